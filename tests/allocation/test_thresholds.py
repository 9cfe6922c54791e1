"""Thresholds: rows worked by hand, slow oracles, laws, and scores that are hardly scores."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secateurs.allocation import THRESHOLDS, allocate, preview, threshold
from secateurs.allocation.cuts import Found, find_cuts, null_lines
from secateurs.allocation.thresholds import FITTED, Line, two_gaussians
from secateurs.asked import RULES, Parameter, Rule
from secateurs.errors import BudgetError, ConfigError, PruningError, ScoringError
from secateurs.types import Budget, Counts, Scores, Threshold
from tests.graphs import units_graph

INF = float("inf")
MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).smallest_subnormal)


def scores_of(criterion: str = "test", **values: Sequence[float]) -> Scores:
    graph = units_graph({n: len(v) for n, v in values.items()})
    return Scores(graph, {n: torch.tensor([*map(float, v)]) for n, v in values.items()}, criterion)


def found(values: Sequence[float], asked: Threshold, null: Sequence[float] = ()) -> Found:
    """The cut of one target."""
    line = np.sort(np.array(values, dtype=np.float32))[::-1]
    nulls = {"a": np.sort(np.array(null, dtype=np.float64))} if len(null) else {}
    return find_cuts({"a": line}, asked, nulls)["a"]


def attempt(scores: Scores, asked: Threshold, **options: Any) -> Counts | str:
    """What `allocate` gives, or why it refuses."""
    try:
        return allocate(scores, asked, **options)
    except BudgetError as error:
        return str(error)


# -- worked by hand --------------------------------------------------------------------------------

FIVE = (1, 2, 3, 4, 10)  # mean 4, variance (9 + 4 + 1 + 0 + 36) / 5 = 10
POWERS = (1, 10, 1000, 10000)
ROWS: list[tuple[Threshold, Sequence[float], float, int]] = [
    (Threshold("value", value=2.5), FIVE, 2.5, 3),
    (Threshold("quantile", q=0.4), FIVE, 3, 3),
    (Threshold("mean"), FIVE, 4, 2),
    (Threshold("k_std", k=1.0), FIVE, 4 + math.sqrt(10), 1),
    (Threshold("k_std", k=-0.5), FIVE, 4 - math.sqrt(10) / 2, 3),
    # |score - 3| = 2 1 0 1 7, their median is 1
    (Threshold("mad", k=-1.0), FIVE, 3 - 1.4826, 4),
    (Threshold("mad", k=1.0), FIVE, 3 + 1.4826, 1),
    # more than half are equal: the deviation is 0
    (Threshold("mad", k=-3.0), (1, 5, 5, 5, 9), 5, 4),
    (Threshold("rate_mean", rate=0.5), FIVE, 2, 4),
    # {1 2} {9 10 11}: 2/5 x 3/5 x 8.5^2 = 17.3; {1} {2 9 10 11}: 1/5 x 4/5 x 7^2 = 7.8
    (Threshold("otsu"), (10, 1, 9, 2, 11), 9, 3),
    # {1 10 1000} {10000}: 3/16 x 9663^2; {1 10} {1000 10000}: 1/4 x 5494.5^2 is less
    (Threshold("otsu"), POWERS, 10000, 1),
    # decimal logarithms 0 1 3 4: {0 1} {3 4}: 1/4 x 3^2; {0} {1 3 4}: 3/16 x 2.67^2 is less
    (Threshold("otsu", log=True), POWERS, 1000, 2),
    (Threshold("otsu", log=True), (0, 0, *POWERS), 1000, 2),
    # logarithms -7 -5 5 7 to the base of 2: the same spread and share on both sides of 0
    (Threshold("gaussian_mixture"), (2**-7, 2**-5, 2**5, 2**7), 1, 2),
    (Threshold("gaussian_mixture"), (0, 0, 0, 2**-7, 2**-5, 2**5, 2**7), 1, 2),
    # heights 0 .8 .9 1 1 over ranks 0 .25 .5 .75 1: .55 above the chord at 8, which stays
    (Threshold("knee"), (0, 8, 9, 10, 10), 8, 4),
    # heights 0 0 .1 .2 1: .55 below the chord at 2, which goes
    (Threshold("knee"), (0, 0, 1, 2, 10), 10, 1),
]


@pytest.mark.parametrize(("asked", "values", "cut", "kept"), ROWS, ids=lambda x: str(x)[:60])
def test_by_hand(asked: Threshold, values: Sequence[float], cut: float, kept: int) -> None:
    counts = allocate(scores_of(a=values), asked)
    assert counts.thresholds["a"] == pytest.approx(cut, rel=1e-6)
    assert counts.kept == {"a": kept}


def test_permutation_by_hand() -> None:
    """p-values .1 .1 .4 .7 of 6 5 2 1; limits .05 .1 .15 .2: the second is the last within."""
    null = (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert found((1, 2, 5, 6), Threshold("permutation", fdr=0.2), null) == Found(5.0, 2)
    # limits .075 .15 .225 .3 and .175 .35 .525 .7: with the latter all are within
    assert found((1, 2, 5, 6), Threshold("permutation", fdr=0.3), null) == Found(5.0, 2)
    assert found((1, 2, 5, 6), Threshold("permutation", fdr=0.7), null) == Found(1.0, 4)
    none = found((1, 2, 5, 6), Threshold("permutation", fdr=0.15), (*null, 9))
    assert (none.cut, none.reach) == (INF, 0)
    assert none.why.startswith("a: none of 4 scores beats shuffled labels at a false-discovery rate"
                               " of 0.15: the largest is 6 (p-value 0.182), that of shuffled labels"
                               " 9")  # fmt: skip


def test_every_rule_has_a_function_and_a_row() -> None:
    assert RULES.keys() == THRESHOLDS.keys()
    assert {asked.rule for asked, *_ in ROWS} | {"permutation"} == RULES.keys()


def test_global_thresholds_look_at_all_scores() -> None:
    both = scores_of(a=[1, 2, 9], b=[10, 11, 12, 13])
    counts = allocate(both, Threshold("otsu"))
    assert (counts.thresholds, counts.kept) == ({"a": 9.0, "b": 12.0}, {"a": 1, "b": 2})
    # {1 2} {9 ... 13}: 10/49 x 9.5^2 = 18.4; {1 2 9} {10 ... 13}: 12/49 x 7.5^2 = 13.8
    counts = allocate(both, Threshold("otsu", scope="global"))
    assert (counts.thresholds, counts.kept) == ({"a": 9.0, "b": 9.0}, {"a": 1, "b": 4})


# -- slow oracles ----------------------------------------------------------------------------------

floats = st.floats(0, 1e6, width=32)
lines = st.lists(floats, min_size=1, max_size=30)
signed = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30)
few = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)  # many ties


def mean_of(values: Sequence[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def splits(values: Sequence[float]) -> list[tuple[float, Fraction]]:
    """First score of the upper class and w0 w1 (m1 - m0)^2, exactly, of every possible split."""
    exact = sorted(map(Fraction, values))
    places = [i for i in range(1, len(exact)) if exact[i - 1] < exact[i]]
    return [
        (
            float(exact[i]),
            Fraction(i * (len(exact) - i), len(exact) ** 2)
            * (mean_of(exact[i:]) - mean_of(exact[:i])) ** 2,
        )
        for i in places
    ]


def is_otsu(values: Sequence[float], cut: float) -> bool:
    """Whether no split is better than that cut, and no equally good one is lower."""
    of = dict(splits(values))
    if not of:
        return cut == min(values)
    best = max(of.values())
    lower = [v for at, v in of.items() if at < cut]
    near = best * (1 - Fraction(1, 10**9))
    return cut in of and of[cut] >= near and all(v < best for v in lower)


@settings(deadline=None, max_examples=150)
@given(values=st.one_of(signed, few))
def test_otsu_is_the_best_of_all_splits(values: list[float]) -> None:
    assert is_otsu(values, found(values, Threshold("otsu")).cut)


def test_the_check_of_otsu_can_fail() -> None:
    assert is_otsu([1, 2, 9, 10, 11], 9)
    assert not is_otsu([1, 2, 9, 10, 11], 10)  # a worse split
    assert not is_otsu([1, 2, 9, 10, 11], 8)  # no score
    assert not is_otsu([0, 1, 2], 2)  # as good as 1, but not the lowest
    assert is_otsu([0, 1, 2], 1)


@settings(deadline=None, max_examples=60)
@given(values=signed, k=st.floats(-3, 3), q=st.floats(0, 0.99), rate=st.floats(0, 2))
def test_moments_by_definition(values: list[float], k: float, q: float, rate: float) -> None:
    mean, middle = statistics.fmean(values), statistics.median(values)
    deviation = statistics.median(abs(v - middle) for v in values)
    low = sorted(values)
    expected = {
        Threshold("mean"): mean,
        Threshold("k_std", k=k): mean + k * statistics.pstdev(values),
        Threshold("mad", k=k): middle + k * 1.4826 * deviation,
        Threshold("rate_mean", rate=rate): rate * mean,
        Threshold("value", value=k): k,
        Threshold("quantile", q=q): next(
            v for i, v in enumerate(low) if i == math.floor(q * len(low) * (1 + 1e-12))
        ),
    }
    scale = max(map(abs, values)) + 1
    for asked, cut in expected.items():
        assert found(values, asked).cut == pytest.approx(cut, rel=1e-6, abs=1e-6 * scale)


def is_knee(values: Sequence[float], cut: float) -> bool:
    """Whether the cut is beside a score that no other is farther from the chord than."""
    exact = sorted(map(Fraction, values))
    n, low, high = len(exact), exact[0], exact[-1]
    if low == high:
        return cut == low
    above = [(v - low) / (high - low) - Fraction(i, n - 1) for i, v in enumerate(exact)]
    far = max(map(abs, above))
    if far < Fraction(1, 10**6):
        return cut == low
    corners = [i for i in range(n) if abs(above[i]) >= far * (1 - Fraction(1, 10**9))]
    beside = {min(v for v in exact if v > exact[i]) if above[i] < 0 else exact[i] for i in corners}
    return cut in beside


@settings(deadline=None, max_examples=150)
@given(values=st.one_of(signed, few))
def test_the_knee_is_farthest_from_the_chord(values: list[float]) -> None:
    assert is_knee(values, found(values, Threshold("knee")).cut)


def test_the_check_of_the_knee_can_fail() -> None:
    assert is_knee([0, 8, 9, 10, 10], 8)
    assert not is_knee([0, 8, 9, 10, 10], 9)
    assert not is_knee([0, 0, 1, 2, 10], 2)  # the corner of a curve below the chord goes


def test_the_knee_of_a_mirror_image_is_the_same_gap() -> None:
    """What is flat below the chord in one is flat above it in the other."""
    values = [0.0, 0.5, 1.0, 1.5, 9.0, 20.0, 30.0]
    gap = (1.5, 9.0)
    cut = found(values, Threshold("knee")).cut
    assert cut == gap[1]
    assert found([30 - v for v in values], Threshold("knee")).cut == 30 - gap[0]


def test_scores_on_a_straight_line_have_no_corner() -> None:
    for n in (2, 3, 7, 1000):
        line = [0.1 * i + 0.3 for i in range(n)]
        assert found(line, Threshold("knee")) == Found(float(np.float32(0.3)), n)


def mixture(seed: int, n: int, share: float, gap: float, spread: float) -> Line:
    """(n,) ascending: two Gaussians at 0 and `gap`."""
    g = np.random.default_rng(seed)
    low = g.random(n) < share
    return np.sort(np.where(low, g.normal(0, 1, n), g.normal(gap, spread, n)))


MIXTURES = [(0, 400, 0.5, 6, 1.0), (1, 300, 0.3, 5, 0.5), (2, 500, 0.8, 4, 2.0), (3, 60, 0.4, 8, 1)]


@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_the_mixture_is_that_of_scikit_learn(case: tuple[int, int, float, float, float]) -> None:
    from sklearn.mixture import GaussianMixture

    line = mixture(*case)
    share, middle, variance = two_gaussians(line)
    other = GaussianMixture(
        2, tol=1e-9, max_iter=2000, reg_covar=1e-6, random_state=0,
        weights_init=[0.5, 0.5], means_init=[[line[0]], [line[-1]]],
        precisions_init=[[[1.0]], [[1.0]]],
    ).fit(line[:, None])  # fmt: skip
    assert share == pytest.approx(other.weights_, abs=2e-3)
    assert middle == pytest.approx(other.means_[:, 0], abs=5e-3)
    assert variance == pytest.approx(other.covariances_[:, 0, 0], rel=5e-3)
    values = np.exp(line)
    cut = found(values.tolist(), Threshold("gaussian_mixture")).cut
    assert other.predict_proba([[math.log(cut)]])[0, 0] == pytest.approx(0.5, abs=0.02)
    # far from the cut the two sides are clear, so a cut at a mean would be noticed
    assert other.predict_proba([[middle[0]]])[0, 0] > 0.9
    assert other.predict_proba([[middle[1]]])[0, 0] < 0.1


def test_a_large_target_is_fitted_through_its_ranks() -> None:
    line = mixture(5, 40 * FITTED + 3, 0.4, 6, 1.0)
    values = np.exp(line)
    _, middle, _ = two_gaussians(line[:: len(line) // 4000])
    cut = found(values.tolist(), Threshold("gaussian_mixture")).cut
    own = found(values[::40].tolist(), Threshold("gaussian_mixture")).cut
    assert math.log(cut) == pytest.approx(math.log(own), abs=0.01)
    assert middle[0] < math.log(cut) < middle[1]


def test_one_group_inside_another_is_no_two_groups() -> None:
    """A narrow component in the middle of a broad one: no cut between their means."""
    g = np.random.default_rng(0)
    line = np.concatenate([g.normal(0, 3, 60), g.normal(0.2, 0.01, 600)])
    values = np.exp(line)
    result = found(values.tolist(), Threshold("gaussian_mixture"))
    assert result == Found(float(np.float32(values.min())), 660)
    with_zeros = found([*values.tolist(), 0, 0], Threshold("gaussian_mixture"))
    assert with_zeros.reach == 660  # zeros go even so


def benjamini_hochberg(values: Sequence[float], null: Sequence[float], fdr: float) -> set[float]:
    """Scores that stay, by definition, in exact arithmetic."""
    p_of = {v: Fraction(1 + sum(x >= v for x in null), 1 + len(null)) for v in values}
    ascending = sorted(p_of[v] for v in values)
    n = len(values)
    limit = Fraction(fdr).limit_denominator(10**6)
    ranks = [i for i in range(1, n + 1) if ascending[i - 1] <= limit * i / n]
    return {v for v in values if p_of[v] <= ascending[max(ranks) - 1]} if ranks else set()


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(st.integers(0, 20), min_size=1, max_size=15),
    null=st.lists(st.integers(0, 15), min_size=1, max_size=40),
    fdr=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.9]),
)
def test_permutation_by_definition(values: list[int], null: list[int], fdr: float) -> None:
    from scipy.stats import false_discovery_control

    stay = benjamini_hochberg(values, null, fdr)
    result = found(values, Threshold("permutation", fdr=fdr), null)
    assert {v for v in values if v >= result.cut} == stay
    p_values = [(1 + sum(x >= v for x in null)) / (1 + len(null)) for v in values]
    adjusted = false_discovery_control(p_values)
    assert result.reach == sum(adjusted <= fdr + 1e-9)
    assert bool(result.why) == (not stay)


def false_share(kept: Sequence[bool], real: Sequence[bool]) -> float:
    """Share of what was kept that is noise."""
    wrong = sum(k and not r for k, r in zip(kept, real, strict=True))
    return wrong / max(1, sum(kept))


def test_the_false_discovery_rate_is_what_it_says() -> None:
    """200 networks of 80 idle and 20 useful units; without the correction the check fails."""
    g = np.random.default_rng(0)
    real = [False] * 80 + [True] * 20
    asked, shares, naive, power = Threshold("permutation", fdr=0.2), [], [], []
    for _ in range(200):
        values = np.concatenate([g.normal(0, 1, 80), g.normal(2.5, 1, 20)]).astype(np.float32)
        null = g.normal(0, 1, 2000)
        kept = (values >= found(values.tolist(), asked, null.tolist()).cut).tolist()
        shares.append(false_share(kept, real))
        power.append(sum(kept[80:]) / 20)
        p_values = [(1 + (null >= v).sum()) / 2001 for v in values]
        naive.append(false_share([p <= 0.2 for p in p_values], real))
    error = 3 * statistics.stdev(shares) / math.sqrt(200)
    assert statistics.fmean(shares) == pytest.approx(0.2 * 0.8, abs=error)  # fdr x idle share
    assert statistics.fmean(power) > 0.7
    assert statistics.fmean(naive) > 0.2 + error


# -- laws ------------------------------------------------------------------------------------------

ALL = [
    Threshold("value", value=0.0), Threshold("quantile", q=0.3), Threshold("mean"),
    Threshold("k_std", k=-0.5), Threshold("mad", k=-0.5), Threshold("rate_mean", rate=0.5),
    Threshold("otsu"), Threshold("otsu", log=True), Threshold("gaussian_mixture"),
    Threshold("knee"), Threshold("permutation", fdr=0.4),
]  # fmt: skip
RULE = pytest.mark.parametrize("asked", ALL, ids=lambda a: a.text)
NULL = [0.0, 0.0, 0.5, 1.0, 3.0, 0.25]


def null_of(asked: Threshold, factor: float = 1.0) -> list[float]:
    return [factor * v for v in NULL] if asked.needs_null else []


@RULE
@settings(deadline=None, max_examples=40)
@given(values=st.one_of(lines, few), power=st.integers(-12, 12))
def test_the_cut_scales_with_the_scores(asked: Threshold, values: list[float], power: int) -> None:
    factor = 2.0**power
    assume(all(v == 0 or v > 1e-30 for v in values))
    once = found(values, asked, null_of(asked))
    scaled = found([factor * v for v in values], asked, null_of(asked, factor))
    if not math.isfinite(once.cut):
        assert once.cut == scaled.cut
        return
    loose = asked.rule == "gaussian_mixture"  # logarithms are rounded
    assert scaled.cut == pytest.approx(factor * once.cut, rel=1e-5 if loose else 1e-15)
    assert loose or scaled.reach == once.reach


@RULE
@settings(deadline=None, max_examples=25)
@given(values=few, data=st.data(), min_keep=st.integers(1, 3))
def test_order_does_not_matter_and_ties_share_their_fate(
    asked: Threshold, values: list[float], data: Any, min_keep: int
) -> None:
    null = [scores_of(a=data.draw(st.permutations(values)))] if asked.needs_null else []
    other = data.draw(st.permutations(values))

    def outcome(line: Sequence[float]) -> int | str:
        counts = attempt(scores_of(a=line), asked, min_keep=min_keep, null=null)
        if isinstance(counts, str):
            assert "a: " in counts
            return counts
        kept, cut = counts.kept["a"], counts.thresholds["a"]
        assert math.isfinite(cut)
        assert min(min_keep, len(line)) <= kept == sum(v >= cut for v in line)
        return kept

    assert outcome(values) == outcome(other)


@RULE
def test_scores_that_are_all_equal_all_stay(asked: Threshold) -> None:
    for value in (0.0, 0.1, 1 / 3, 1e-30, 1e30, MAX, TINY):
        for n in (1, 2, 11):
            null = [-1.0] * 10 if asked.needs_null else []
            assert found([value] * n, asked, null).reach == n


EXTREMES = {
    "one": [3.0],
    "two": [1.0, 2.0],
    "two far": [1e-30, 1e30],
    "zero and one": [0.0, 1.0],
    "zeros and equal": [0.0, 0.0, 5.0, 5.0],
    "huge range": [10.0**e for e in range(-30, 31, 5)],
    "largest": [0.0, 1.0, MAX / 2, MAX],
    "both ends": [-MAX, 0.0, MAX],
    "smallest": [0.0, TINY, 2 * TINY, 3 * TINY],
    "neighbours": [1.0, float(np.nextafter(np.float32(1), np.float32(2)))],
    "one outlier": [1.0] * 20 + [MAX],
    "signed": [-3.0, -1.0, 2.0],
    "negative": [-3.0, -2.0, -2.0],
}


NOTHING_STAYS = {("value", "negative"), ("rate_mean", "negative")}
"""All scores are below 0, or below half of their negative mean."""


@RULE
@pytest.mark.parametrize("name", EXTREMES)
def test_hardly_scores(asked: Threshold, name: str) -> None:
    """A finite cut that leaves something, or an error that names the target."""
    values = EXTREMES[name]
    null = [scores_of(a=values) for _ in range(4)] if asked.needs_null else []
    logs = asked.rule == "gaussian_mixture" or asked.parameters.get("log") is True
    if logs and min(values) < 0:
        with pytest.raises(ConfigError, match=r"on a: logarithms need .* the lowest is -"):
            allocate(scores_of(a=values), asked, null=null)
        return
    counts = attempt(scores_of(a=values), asked, null=null)
    if isinstance(counts, str):
        assert f"threshold {asked.rule!r} would leave too little. a: " in counts
        assert asked.rule == "permutation" or (asked.rule, name) in NOTHING_STAYS
        return
    assert (asked.rule, name) not in NOTHING_STAYS
    assert math.isfinite(counts.thresholds["a"])
    assert 1 <= counts.kept["a"] <= len(values)


def test_two_values() -> None:
    """Rules that look for two groups take any two values for them; a corner needs three."""
    pair = [1.0, 1.0, 2.0]
    assert found(pair, Threshold("otsu")) == Found(2.0, 1)
    assert found(pair, Threshold("gaussian_mixture")).reach == 1
    assert found([1.0, 2.0], Threshold("knee")) == Found(1.0, 2)
    assert found(pair, Threshold("knee")) == Found(2.0, 1)


def test_a_positive_figure_below_all_floats_still_cuts_zeros() -> None:
    assert found([0.0, 0.0, 1.0], Threshold("value", value=1e-60)) == Found(TINY, 1)
    assert found([0.0, 0.0, 1.0], Threshold("value", value=0.0)) == Found(0.0, 3)


def test_a_figure_above_all_floats_lets_nothing_stay() -> None:
    assert found([1.0, MAX], Threshold("value", value=1e39)) == Found(INF, 0)
    assert found([1.0, -MAX], Threshold("value", value=-1e39)) == Found(-INF, 2)


def test_units_removed_earlier_take_no_part() -> None:
    line = [-INF, 1, -INF, 2, 9, 10, 11]
    assert allocate(scores_of(a=line), Threshold("otsu")).kept == {"a": 3}
    null = [scores_of(a=[-INF, 5, -INF, 0, 0, 0, 0])]
    counts = allocate(scores_of(a=line), Threshold("permutation", fdr=0.5), null=null)
    # p-values 1/6 1/6 1/6 2/6 2/6, limits .1 .2 .3 .4 .5
    assert counts.kept == {"a": 5}


# -- before it happens -----------------------------------------------------------------------------


def test_a_preview_as_a_table() -> None:
    shown = preview(scores_of("taylor", a=[1, 9, 2, 10, 11], b=[4, 4]), Threshold("otsu"))
    assert shown.table().splitlines() == [
        "threshold otsu(log=False) per target, on scores of taylor",
        "target  units  threshold  go  share  lowest  goes to  stays from  median  largest",
        "a           5          9   2  40.0%       1        2           9       9       11",
        "b           2          4   0   0.0%       4        -           4       4        4",
        "total       7              2  28.6%",
    ]


def test_a_preview_shows_what_allocate_refuses() -> None:
    s = scores_of(a=[1, 2], b=[7, 8])
    shown = preview(s, Threshold("value", value=5.0))
    assert [row.goes for row in shown.rows] == [2, 0]
    assert shown.rows[0].stays_from is None
    refused = "a: 0 of 2 units reach the threshold 5, its largest score is 2, at least 1 must stay"
    assert shown.rows[0].problem == refused
    assert shown.table().splitlines()[-1] == f"refused: {refused}"
    with pytest.raises(BudgetError, match=refused):
        allocate(s, Threshold("value", value=5.0))


def test_a_preview_as_json() -> None:
    s = scores_of(a=[1, 2, 3], b=[0, 1])
    null = [scores_of(a=[0, 0, 0], b=[7, 7])] * 4
    found_ = preview(s, Threshold("permutation", fdr=0.2), null=null).to_dict()
    assert json.loads(json.dumps(found_, allow_nan=False)) == found_
    a, b = found_["rows"]
    assert (found_["units"], found_["goes"], a["goes"], a["share"]) == (5, 2, 0, 0.0)
    assert b["threshold"] is None
    assert b["problem"].startswith("b: none of 2 scores beats shuffled labels")


@RULE
@settings(deadline=None, max_examples=15)
@given(values=few)
def test_a_preview_says_what_allocate_does(asked: Threshold, values: list[float]) -> None:
    s = scores_of(a=values, b=[1.0, 2.0, 3.0])
    null = [scores_of(a=values, b=[0.0] * 3)] * 4 if asked.needs_null else []
    rows = {row.target: row for row in preview(s, asked, null=null, round_to=2).rows}
    problems = [row.problem for row in rows.values() if row.problem]
    counts = attempt(s, asked, null=null, round_to=2)
    if isinstance(counts, str):
        assert problems
        assert all(problem in counts for problem in problems)
        return
    assert not problems
    assert counts.kept == {n: row.units - row.goes for n, row in rows.items()}
    assert counts.thresholds == {n: row.threshold for n, row in rows.items()}


# -- the null --------------------------------------------------------------------------------------

WITH = Threshold("permutation", fdr=0.2)
GIVEN = scores_of("snip", a=[1, 2, 3])
REFUSED: dict[str, tuple[Threshold | Budget, list[Scores], str]] = {
    "none": (WITH, [], r"'permutation' compares with scores on shuffled labels: give null="),
    "not needed": (Threshold("mean"), [GIVEN], "'mean' takes no null scores; leave null away"),
    "budget": (Budget(units=0.5), [GIVEN], "a budget takes none"),
    "criterion": (WITH, [scores_of(a=[1, 2, 3])], "of criterion 'test', the scores of 'snip'"),
    "target": (WITH, [scores_of("snip", b=[1, 2, 3])], "have no a of 3 units"),
    "units": (WITH, [scores_of("snip", a=[1, 2])], "have no a of 3 units"),
    "removed": (WITH, [scores_of("snip", a=[1, -INF, 2])], "a: null scores lack units"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_null_scores_that_do_not_fit(name: str) -> None:
    asked, null, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        allocate(GIVEN, asked, null=null)


def test_too_few_null_scores() -> None:
    with pytest.raises(BudgetError, match=r"a: 3 null scores give no p-value below 0.25, .* more"):
        allocate(GIVEN, WITH, null=[scores_of("snip", a=[0, 0, 0])])
    assert allocate(GIVEN, WITH, null=[scores_of("snip", a=[0, 0, 0])] * 2).kept == {"a": 3}


def test_a_null_above_the_scores_is_explained() -> None:
    null = [scores_of("snip", a=[7, 8, 9])] * 3
    with pytest.raises(BudgetError, match=r"gradients of a trained model .* Raise fdr"):
        allocate(GIVEN, WITH, null=null)


def test_with_scope_global_the_null_is_that_of_all_targets() -> None:
    s = scores_of(a=[3, 4], b=[1, 9])
    null = [scores_of(a=[0, 0], b=[2, 2])] * 3
    # per target: a beats its zeros; of b only 9 beats the twos: p 1/7, limits .1 .2 -> not enough
    rows = preview(s, Threshold("permutation", fdr=0.2), null=null).rows
    assert [(r.goes, bool(r.problem)) for r in rows] == [(0, False), (2, True)]
    # over all: 9 4 3 have p 1/13, 1 has 7/13; limits .05 .1 .15 .2
    together = allocate(s, Threshold("permutation", fdr=0.2, scope="global"), null=null)
    assert (together.kept, together.thresholds) == ({"a": 2, "b": 1}, {"a": 3.0, "b": 3.0})
    nothing = [scores_of(a=[10, 10], b=[10, 10])] * 3
    with pytest.raises(BudgetError) as error:
        allocate(s, Threshold("permutation", fdr=0.2, scope="global"), null=nothing)
    assert str(error.value).count("none of 4 scores") == 1
    assert "all targets: none of 4 scores" in str(error.value)


# -- rules of one's own ----------------------------------------------------------------------------


@pytest.fixture
def own_rule() -> Iterator[str]:
    @threshold("largest_share", Rule("rate x largest", {"rate": Parameter(low=0.0, high=1.0)}))
    def largest_share(scores: Line, p: Mapping[str, float], null: Line) -> float:
        return float(p["rate"] * scores[-1])

    yield "largest_share"
    del THRESHOLDS["largest_share"], RULES["largest_share"]


def test_a_rule_of_ones_own(own_rule: str) -> None:
    asked = Threshold(own_rule, rate=0.5)
    assert found([1, 2, 5, 8], asked) == Found(4.0, 2)
    with pytest.raises(ConfigError, match=r"rate must be in \[0, 1\]"):
        Threshold(own_rule, rate=2.0)
    with pytest.raises(ConfigError, match="Did you mean 'largest_share'"):
        Threshold("largest_shar", rate=0.5)


def test_registrations_that_are_refused(own_rule: str) -> None:
    def fn(scores: Line, p: Mapping[str, float], null: Line) -> float:
        return math.nan

    for name, rule, message in (
        ("otsu", None, "'otsu' is already registered"),
        (own_rule, Rule("twice"), "'largest_share' is already registered"),
        ("newer", None, "unknown threshold rule 'newer'"),
        ("newer", Rule("x", {"alpha": Parameter()}), "parameter of threshold rule 'newer'"),
    ):
        with pytest.raises(ConfigError, match=message):
            threshold(name, rule)(fn)
    assert THRESHOLDS.keys() == RULES.keys()
    assert "newer" not in RULES


def test_a_rule_that_gives_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(THRESHOLDS, "mean", lambda scores, p, null: math.nan)
    with pytest.raises(ScoringError, match="threshold 'mean' on a: the rule gave nan"):
        allocate(scores_of(a=[1, 2]), Threshold("mean"))
    with pytest.raises(PruningError, match="on all targets"):
        allocate(scores_of(a=[1, 2]), Threshold("mean", scope="global"))


def test_null_lines_are_sorted_and_pooled() -> None:
    null = [scores_of("snip", a=[3, 1, 2]), scores_of("snip", a=[6, 5, 4])]
    assert null_lines(GIVEN, WITH, null)["a"].tolist() == [1, 2, 3, 4, 5, 6]
    assert null_lines(GIVEN, Threshold("mean"), []) == {}
