"""Allocation: totals are exact, limits are kept, nothing more would fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.allocation import ALLOCATORS, allocate
from secateurs.cost import dense_cost
from secateurs.errors import BudgetError, ConfigError, ScoringError
from secateurs.types import Budget, Scores, Threshold
from tests.graphs import conv, mlp, units_graph

INF = float("inf")
METHODS = pytest.mark.parametrize(
    "method", [m for m in ALLOCATORS if m not in ("sensitivity", "multi_scale")]
)


def scores_of(
    values: Mapping[str, Sequence[float]], weights: Mapping[str, Sequence[int]] | None = None
) -> Scores:
    graph = units_graph({n: len(v) for n, v in values.items()}, weights)
    return Scores(graph, {n: torch.tensor(list(v)) for n, v in values.items()}, "test")


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # a is on a larger scale: raw global ranking empties b
        ("uniform", {"a": 2, "b": 3}),
        ("global", {"a": 4, "b": 1}),
        # rms: a 27.39, b 2.03 -> a 0.37 0.73 1.10 1.46, b 1.97 .98 .49 .25 .05 .05
        ("global_normalized", {"a": 3, "b": 2}),
    ],
)
def test_five_of_ten_units_by_hand(method: str, expected: dict[str, int]) -> None:
    s = scores_of({"a": [10, 20, 30, 40], "b": [4, 2, 1, 0.5, 0.1, 0.1]})
    counts = allocate(s, Budget(units=0.5), method=method)
    assert counts.kept == expected
    assert counts.realised["units"] == 0.5
    # 10 + 5 of 10 + 10 parameters
    assert counts.realised["params"] == counts.realised["macs"] == 0.75
    assert counts.asked == Budget(units=0.5)


def test_largest_remainder() -> None:
    s = scores_of({"a": [1.0] * 3, "b": [1.0] * 5, "c": [1.0] * 10})
    # shares of 11 in 18: 1.83, 3.06, 6.11
    assert allocate(s, Budget(units=11)).kept == {"a": 2, "b": 3, "c": 6}
    assert allocate(s, Budget(units=12)).kept == {"a": 2, "b": 3, "c": 7}  # 2, 3.33, 6.67


def test_thresholds_of_budgets_are_the_lowest_kept_scores() -> None:
    s = scores_of({"a": [1, 4, 2, 3]})
    assert allocate(s, Budget(units=2)).thresholds == {"a": 3.0}


@METHODS
def test_ties_still_give_exact_counts(method: str) -> None:
    s = scores_of({"a": [1.0] * 7, "b": [1.0] * 5})
    for n in range(2, 13):
        assert sum(allocate(s, Budget(units=n), method=method).kept.values()) == n


def test_float_fractions_are_not_rounded_off() -> None:
    """0.29 * 100 is 28.999999999999996 in binary."""
    s = scores_of({"a": list(range(100))})
    assert allocate(s, Budget(units=0.29)).kept == {"a": 29}


values = st.lists(st.floats(0, 10, width=32), min_size=1, max_size=12)
problems = st.dictionaries(st.sampled_from("abcd"), values, min_size=1)


@METHODS
@settings(deadline=None, max_examples=60)
@given(problem=problems, fraction=st.floats(0.01, 1), min_keep=st.integers(1, 3))
def test_totals(method: str, problem: Any, fraction: float, min_keep: int) -> None:
    s = scores_of(problem)
    n = sum(len(v) for v in problem.values())
    total = math.floor(fraction * n * (1 + 1e-12))
    floor = sum(min(min_keep, len(v)) for v in problem.values())
    if total < floor:
        with pytest.raises(BudgetError, match="ask for at least units="):
            allocate(s, Budget(units=fraction), method=method, min_keep=min_keep)
        return
    kept = allocate(s, Budget(units=fraction), method=method, min_keep=min_keep).kept
    assert sum(kept.values()) == total
    assert all(min(min_keep, len(v)) <= kept[t] <= len(v) for t, v in problem.items())


@METHODS
@settings(deadline=None, max_examples=60)
@given(data=st.data(), problem=problems, fraction=st.floats(0.05, 1))
def test_within_one_unit(method: str, data: Any, problem: Any, fraction: float) -> None:
    """The limit holds, and no single next unit fits any more."""
    sizes = {
        t: data.draw(st.lists(st.integers(1, 9), min_size=len(v), max_size=len(v)))
        for t, v in problem.items()
    }
    s = scores_of(problem, sizes)
    order = {t: sorted(range(len(v)), key=lambda i: (-v[i], i)) for t, v in problem.items()}

    def cost(kept: Mapping[str, int]) -> int:
        return 10 + sum(int(sizes[t][i]) for t, k in kept.items() for i in order[t][:k])

    limit = math.floor(fraction * dense_cost(s.graph).params * (1 + 1e-12))
    if cost(dict.fromkeys(problem, 1)) > limit:
        with pytest.raises(BudgetError):
            allocate(s, Budget(params=fraction), method=method)
        return
    counts = allocate(s, Budget(params=fraction), method=method)
    assert cost(counts.kept) <= limit
    assert counts.realised["params"] == cost(counts.kept) / dense_cost(s.graph).params
    for t, v in problem.items():
        if counts.kept[t] < len(v):
            assert cost({**counts.kept, t: counts.kept[t] + 1}) > limit


@METHODS
@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("quantity", ["params", "macs"])
def test_coupled_targets(method: str, fraction: float, quantity: str) -> None:
    """Rows of one layer are columns of the next: within the limit, and nothing more fits."""
    graph = mlp().graph
    g = torch.Generator().manual_seed(0)
    s = Scores(graph, {"0:neuron": torch.rand(6, generator=g),
                       "2:neuron": torch.rand(5, generator=g)}, "test")  # fmt: skip

    def cost(a: int, b: int) -> int:
        return 4 * a + a * b + 3 * b + ((a + b + 3) if quantity == "params" else 0)

    limit = math.floor(fraction * cost(6, 5))
    kept = allocate(s, Budget(**{quantity: fraction}), method=method).kept
    a, b = kept["0:neuron"], kept["2:neuron"]
    best = max(cost(i, j) for i, j in itertools.product(range(1, 7), range(1, 6))
               if cost(i, j) <= limit)  # fmt: skip
    assert cost(a, b) <= limit
    assert a == 6 or cost(a + 1, b) > limit
    assert b == 5 or cost(a, b + 1) > limit
    assert best - cost(a, b) <= 4 + 5 + 1  # less than the largest unit below the optimum


def test_one_target_reaches_the_brute_force_optimum() -> None:
    graph = conv().graph
    s = Scores(graph, {"0:channel": torch.tensor([3.0, 1.0, 4.0, 2.0])}, "test")
    for limit in range(36, 142):
        kept = allocate(s, Budget(params=limit)).kept["0:channel"]
        assert kept == max(k for k in range(1, 5) if 3 + 33 * k <= limit)


def test_global_removes_the_lowest_first() -> None:
    s = scores_of({"a": [5, 1, 3], "b": [2, 4, 6]})
    for n in range(2, 7):
        kept = allocate(s, Budget(units=n), method="global").kept
        top = sorted([5, 1, 3, 2, 4, 6])[-n:]
        expected = {"a": max(1, sum(v in top for v in (5, 1, 3))),
                    "b": max(1, sum(v in top for v in (2, 4, 6)))}  # fmt: skip
        assert kept == expected


@METHODS
def test_min_keep_and_round_to(method: str) -> None:
    s = scores_of({"a": [0.1] * 10, "b": list(range(1, 17))})
    kept = allocate(s, Budget(units=0.5), method=method, round_to=4).kept
    assert all(k % 4 == 0 for k in kept.values())
    assert sum(kept.values()) == 12
    kept = allocate(s, Budget(units=0.5), method=method, min_keep=5).kept
    assert kept["a"] >= 5
    assert sum(kept.values()) == 13
    assert allocate(s, Budget(units=1.0), method=method, round_to=4).kept == {"a": 10, "b": 16}


@METHODS
def test_units_removed_earlier_are_never_kept(method: str) -> None:
    s = scores_of({"a": [-INF, 1, -INF, 2], "b": [1, 2, 3, 4]})
    assert allocate(s, Budget(units=0.75), method=method).kept == {"a": 2, "b": 4}
    kept = allocate(s, Budget(units=4), method=method).kept
    assert sum(kept.values()) == 4
    assert kept["a"] <= 2


@METHODS
def test_weights(method: str) -> None:
    """Zeros of single weights: params are the non-zeros of the whole model."""
    graph = mlp().graph
    g = torch.Generator().manual_seed(0)
    names = ("0.weight", "2.weight", "4.weight")
    s = Scores(graph, {n: torch.rand(graph.targets[n].n_units, generator=g) for n in names}, "t")
    counts = allocate(s, Budget(params=0.5), method=method)
    assert sum(counts.kept.values()) == 83 // 2 - 14  # 14 biases stay
    assert counts.realised["params"] == 41 / 83
    assert sum(allocate(s, Budget(units=0.1), method=method).kept.values()) == 6


@METHODS
def test_signed_scores(method: str) -> None:
    s = scores_of({"a": [-1.0, -2.0, 3.0], "b": [0.0, 0.0, 0.0]})
    assert sum(allocate(s, Budget(units=4), method=method).kept.values()) == 4


# -- thresholds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Threshold("value", value=3.0), {"a": 3, "b": 2}),
        (Threshold("mean"), {"a": 2, "b": 2}),  # 3.5, 3.75
        (Threshold("k_std", k=1.0), {"a": 1, "b": 1}),  # 3.5 + 1.80, 3.75 + 3.70
        (Threshold("rate_mean", rate=0.5), {"a": 3, "b": 2}),  # 1.75, 1.875
        (Threshold("quantile", q=0.5), {"a": 2, "b": 2}),
        (Threshold("mean", scope="global"), {"a": 2, "b": 2}),  # 3.625
        # sorted 0 1 1 3 4 4 6 10: the cut is 1, and both ones stay
        (Threshold("quantile", q=0.25, scope="global"), {"a": 4, "b": 3}),
    ],
)
def test_thresholds_by_hand(asked: Threshold, expected: dict[str, int]) -> None:
    s = scores_of({"a": [1, 3, 4, 6], "b": [0, 1, 4, 10]})
    counts = allocate(s, asked)
    assert counts.kept == expected
    assert counts.realised["units"] == sum(expected.values()) / 8


def test_equal_scores_are_never_below_their_own_mean() -> None:
    for value in (0.1, 1 / 3, 1e-7, 12345.678):
        s = scores_of({"a": [value] * 11})
        assert allocate(s, Threshold("mean")).kept == {"a": 11}


def test_removed_units_take_no_part_in_statistics() -> None:
    counts = allocate(scores_of({"a": [-INF, -INF, 2, 4]}), Threshold("mean"))
    assert counts.thresholds == {"a": 3.0}
    assert counts.kept == {"a": 1}


def test_thresholds_round_up() -> None:
    s = scores_of({"a": list(range(10))})
    assert allocate(s, Threshold("value", value=5.0), round_to=4).kept == {"a": 8}


def test_a_threshold_that_empties_a_target_is_refused() -> None:
    s = scores_of({"a": [1, 2], "b": [7, 8], "c": [0.5, 9]})
    with pytest.raises(BudgetError, match="a: 0 of 2 units reach the threshold 5, its largest "
                                          "score is 2, at least 1 must stay"):  # fmt: skip
        allocate(s, Threshold("value", value=5.0))
    with pytest.raises(BudgetError, match=r"a: .*; c: 1 of 2 .* or scope='target'"):
        allocate(s, Threshold("value", value=5.0, scope="global"), min_keep=2)


# -- hostile -----------------------------------------------------------------------------------


def test_the_nearest_reachable_budget_is_named_and_works() -> None:
    s = scores_of({"a": [1, 2, 3], "b": [1, 2, 3, 4]})
    with pytest.raises(BudgetError, match=r"12 \(0.7059 of the model\) remain .* params=0.7059"):
        allocate(s, Budget(params=0.5))
    assert allocate(s, Budget(params=0.7059)).kept == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "globel"}, "Did you mean 'global'"),
        ({"min_keep": 0}, "min_keep must be a whole number, at least 1"),
        ({"round_to": 1.5}, "round_to must be a whole number"),
        ({"round_to": True}, "round_to must be a whole number"),
        ({"round_to": 0}, "at least 1"),
        ({"round_to": "16"}, 'round_to must be a whole number, at least 1, "auto"'),
        ({"round_to": {"channel": 0}}, "at least 1"),
        ({"round_to": {"chanel": 8}}, "unknown kind in round_to 'chanel'. Did you mean 'channel'"),
        ({"homogeneous": 1}, "homogeneous must be True or False"),
    ],
)
def test_options_that_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate(scores_of({"a": [1, 2]}), Budget(units=0.5), **options)


def test_scores_that_are_refused() -> None:
    with pytest.raises(ScoringError, match="a: a score is nan or inf"):
        allocate(scores_of({"a": [1, float("nan")]}), Budget(units=1))
    with pytest.raises(BudgetError, match="a has no unit left"):
        allocate(scores_of({"a": [-INF, -INF]}), Budget(units=1))
    with pytest.raises(ConfigError, match="no scores"):
        allocate(Scores(units_graph({"a": 2}), {}, "test"), Budget(units=1))
    with pytest.raises(ConfigError, match="a threshold takes scope="):
        allocate(scores_of({"a": [1, 2]}), Threshold("mean"), method="global")


def test_a_graph_without_macs() -> None:
    case = mlp()
    graph = type(case.graph)(case.graph.targets)
    s = Scores(graph, {"0:neuron": torch.rand(6)}, "test")
    with pytest.raises(ConfigError, match="knows no macs"):
        allocate(s, Budget(macs=0.5))


def test_large_weight_problems_are_quick() -> None:
    """Hundreds of thousands of units: no step for each unit."""
    from secateurs.types import CostDim, CostTerm, Graph, WeightTarget

    sizes = {"a": 200_000, "b": 100_000}
    graph = Graph(
        {n: WeightTarget(n, (size,)) for n, size in sizes.items()},
        costs=tuple(CostTerm(n, (CostDim(size),), uses=700) for n, size in sizes.items()),
    )
    g = torch.Generator().manual_seed(0)
    s = Scores(graph, {n: torch.rand(size, generator=g) for n, size in sizes.items()}, "test")
    for method in set(ALLOCATORS) - {"sensitivity", "multi_scale"}:
        counts = allocate(s, Budget(params=0.1), method=method)
        assert sum(counts.kept.values()) == 30_000
    with pytest.raises(ConfigError, match="save no dense multiply-adds"):
        allocate(s, Budget(macs=0.1))
