"""Allocation methods: rows by hand, slow oracles, totals, what must not matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateurs as sc
from secateurs.allocation import ALLOCATORS, allocate
from secateurs.types import Budget, CostDim, CostTerm, Graph, GroupTarget, Scores, WeightTarget
from tests.graphs import mlp, units_graph

OWN_TESTS = ("sensitivity", "multi_scale")  # they need more than scores
METHODS = pytest.mark.parametrize("method", [m for m in ALLOCATORS if m not in OWN_TESTS])
RANKS = pytest.mark.parametrize("method", ["global", "global_normalized", "lamp", "density"])
INF = float("inf")


def scores_of(values: Mapping[str, Sequence[float]]) -> Scores:
    graph = units_graph({n: len(v) for n, v in values.items()})
    return Scores(graph, {n: torch.tensor(list(v)) for n, v in values.items()}, "test")


def weights_of(shapes: Mapping[str, tuple[int, ...]], uses: float = 1.0) -> Scores:
    """Weight matrices with random scores."""
    graph = Graph(
        {n: WeightTarget(n, shape) for n, shape in shapes.items()},
        costs=tuple(
            CostTerm(n, tuple(CostDim(size) for size in shape), uses=uses)
            for n, shape in shapes.items()
        ),
    )
    g = torch.Generator().manual_seed(0)
    return Scores(graph, {n: torch.rand(math.prod(s), generator=g) for n, s in shapes.items()}, "t")


def chain(*sizes: int, n_in: int = 3, n_out: int = 2) -> Scores:
    """Families of a chain of linear layers: rows of one matrix are columns of the next."""
    names = [f"f{i}" for i in range(len(sizes))]
    dims = [CostDim(n_in)]
    dims += [CostDim(s, {n: np.ones(s, dtype=np.int64)}) for n, s in zip(names, sizes, strict=True)]
    dims += [CostDim(n_out)]
    terms = [
        CostTerm(f"w{i}", (out, into), uses=1.0)
        for i, (into, out) in enumerate(itertools.pairwise(dims))
    ]
    targets = {n: GroupTarget(n, "neuron", s, ()) for n, s in zip(names, sizes, strict=True)}
    g = torch.Generator().manual_seed(0)
    values = {n: torch.rand(t.n_units, generator=g) for n, t in targets.items()}
    return Scores(Graph(targets, costs=tuple(terms)), values, "test")


def kept(scores: Scores, method: str, **budget: Any) -> list[int]:
    return list(allocate(scores, Budget(**budget), method=method, round_to=1).kept.values())


# -- uniform_plus --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (69, [24, 30, 15]),
        # 24 whole, the others 17/45: 11.33 and 5.67
        (41, [24, 11, 6]),
        # uniform is 0.435: the middle (6.52) has half of that, the first what is left: 20.22, 3.26
        (30, [20, 7, 3]),
        # half of uniform is 0.145: 4.35; 47 % of the way up: 13.09, 2.56
        (20, [13, 4, 3]),
        (3, [1, 1, 1]),
    ],
)
def test_uniform_plus_of_weights_by_hand(units: int, expected: list[int]) -> None:
    s = weights_of({"first": (6, 4), "middle": (5, 6), "last": (3, 5)})
    assert kept(s, "uniform_plus", units=units) == expected


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (30, [10, 10, 10]),
        (26, [10, 8, 8]),
        (16, [10, 3, 3]),
        # half of uniform is 0.183: 1.83; 66 % of the way up: 7.22, 1.94
        (11, [7, 2, 2]),
        # half of uniform is 0.1: 1; 30 % of the way up: 3.7, 1.3
        (6, [4, 1, 1]),
        (3, [1, 1, 1]),
    ],
)
def test_uniform_plus_of_units_by_hand(units: int, expected: list[int]) -> None:
    assert kept(chain(10, 10, 10), "uniform_plus", units=units) == expected


def test_uniform_plus_of_weights_keeps_the_last_above_the_others() -> None:
    s = weights_of({"first": (2, 2), "middle": (10, 10), "last": (10, 10)})
    assert kept(s, "uniform_plus", units=34) == [4, 10, 20]


def test_a_table_that_is_looked_up_is_no_first_layer() -> None:
    s = weights_of({"table": (10, 2), "first": (5, 2), "last": (2, 5)})
    table, *others = s.graph.costs
    looked_up = CostTerm(table.name, table.dims, uses=0.0)
    s = Scores(Graph(s.graph.targets, costs=(looked_up, *others)), s.values, "t")
    assert kept(s, "uniform_plus", units=25) == [10, 10, 5]


def test_the_first_layer_of_the_model_counts_not_the_first_that_is_pruned() -> None:
    s = weights_of({"first": (6, 4), "middle": (5, 6), "last": (3, 5)})
    fewer = {n: v for n, v in s.values.items() if n != "first"}
    s = Scores(s.graph.only(exclude="first"), fewer, "t")
    assert kept(s, "uniform_plus", units=18) == [12, 6]
    assert kept(s, "uniform_plus", units=6) == [3, 3]


# -- erk ------------------------------------------------------------------------------------------


def test_erk_of_weights_by_hand() -> None:
    s = weights_of({"a": (2, 2), "b": (10, 10), "c": (20, 5)})
    # densities 1, 0.2, 0.25: a is whole, 46 are shared 20 to 25: 20.44, 25.56
    assert kept(s, "erk", units=50) == [4, 20, 26]
    # eps 0.5: 2, 10, 12.5
    assert kept(s, "erk", units=24) == [2, 10, 12]
    # a convolution: 8 + 4 + 3 + 3 over 288 is 1/16
    s = weights_of({"conv": (8, 4, 3, 3), "fc": (4, 12)})  # 1/16 and 1/3: 18 and 16
    assert kept(s, "erk", units=34) == [18, 16]


def slow_erk(shapes: Mapping[str, tuple[int, ...]], total: int) -> dict[str, float]:
    """The published loop: solve for eps, make dense what exceeds 1, solve again."""
    dense: set[str] = set()
    while True:
        others = {n: s for n, s in shapes.items() if n not in dense}
        left = total - sum(math.prod(shapes[n]) for n in dense)
        eps = left / sum(sum(s) for s in others.values())
        over = {n for n, s in others.items() if eps * sum(s) > math.prod(s)}
        if not over:
            return {n: math.prod(s) if n in dense else eps * sum(s) for n, s in shapes.items()}
        dense |= over


shapes = st.lists(st.integers(2, 12), min_size=2, max_size=4).map(tuple)


@settings(deadline=None, max_examples=40)
@given(layers=st.lists(shapes, min_size=2, max_size=4), fraction=st.floats(0.2, 0.95))
def test_erk_is_the_published_loop(layers: Any, fraction: float) -> None:
    named = {f"w{i}": s for i, s in enumerate(layers)}
    total = max(len(layers), int(fraction * sum(math.prod(s) for s in layers)))
    wanted = slow_erk(named, total)
    found = allocate(weights_of(named), Budget(units=total), method="erk").kept
    assert sum(found.values()) == total
    assert all(abs(found[n] - wanted[n]) < 1 + 1e-6 for n in named)


def test_erk_of_units_by_hand() -> None:
    # f0 owns of (6, 4) and (5, 6): sqrt(21 / 54); f1 of (5, 6) and (3, 5): sqrt(19 / 45)
    s = chain(6, 5, n_in=4, n_out=3)
    # 6 x 0.6236 to 5 x 0.6498 in 5 units: 2.676, 2.324
    assert kept(s, "erk", units=5) == [3, 2]


def test_erk_of_units_thins_wide_layers() -> None:
    s = chain(8, 64, 64, 8)
    few, many, also, last = kept(s, "erk", units=0.5)
    assert min(few, last) / 8 > 1.5 * max(many, also) / 64


# -- lamp and density ------------------------------------------------------------------------------


def test_lamp_by_hand() -> None:
    # a: 1, 4/13, 1/14; b: 1, 100/1000, 100/1100
    s = scores_of({"a": [1.0, 2.0, 3.0], "b": [10.0, 30.0, 10.0]})
    assert [kept(s, "lamp", units=n) for n in (2, 3, 4, 5)] == [[1, 1], [2, 1], [2, 2], [2, 3]]
    assert kept(s, "global", units=4) == [1, 3]


def test_density_by_hand() -> None:
    # share in the unit and below. a: 1, 0.4, 0.1; b: 1, 0.75, 0.5, 0.25
    s = scores_of({"a": [6.0, 3.0, 1.0], "b": [2.0, 2.0, 2.0, 2.0]})
    found = [kept(s, "density", units=n) for n in (2, 3, 4, 5, 6)]
    assert found == [[1, 1], [1, 2], [1, 3], [2, 3], [2, 4]]


def test_signed_scores_by_hand() -> None:
    s = scores_of({"a": [2.0, -1.0, -2.0], "b": [0.0, 0.0]})
    # a: 1, -1/5, -1; b: 0, 0
    assert [kept(s, "lamp", units=n) for n in (3, 4, 5)] == [[1, 2], [2, 2], [3, 2]]
    s = scores_of({"a": [2.0, -1.0, -3.0], "b": [1.0, -1.0]})
    # a: 1, -1/4, -1; b: 1, -1, and of equal values those of the earlier target stay
    assert [kept(s, "density", units=n) for n in (2, 3, 4)] == [[1, 1], [2, 1], [3, 1]]


def slow_lamp(line: Sequence[float]) -> list[float]:
    """Values of scores, best first; of equal ones the earlier counts as the larger."""
    found = []
    for i, s in enumerate(line):
        around = line[: i + 1] if s > 0 else line[i:]
        total = math.fsum(v * v for v in around if v * s > 0)
        found.append(math.copysign(s * s / total, s) if s else 0.0)
    return found


def slow_density(line: Sequence[float]) -> list[float]:
    found = []
    for i, s in enumerate(line):
        around = line[i:] if s > 0 else line[: i + 1]
        total = math.fsum(v for v in line if v * s > 0)
        found.append(math.copysign(math.fsum(v for v in around if v * s > 0) / total, s) if s
                     else 0.0)  # fmt: skip
    return found


def slow_ranking(
    problem: Mapping[str, Sequence[float]],
    value: Callable[[Sequence[float]], list[float]],
    total: int,
) -> list[int]:
    """The best of each target stays; then the largest values, one by one."""
    lines = {n: value(sorted(v, reverse=True)) for n, v in problem.items()}
    counts = dict.fromkeys(lines, 1)
    while sum(counts.values()) < total:
        best = max((n for n in lines if counts[n] < len(lines[n])),
                   key=lambda n: lines[n][counts[n]])  # fmt: skip
        counts[best] += 1
    return list(counts.values())


# Powers of two in float32: squares, sums and quotients are exact, so that ties are ties.
simple = st.sampled_from([-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
lines = st.dictionaries(
    st.sampled_from("abc"), st.lists(simple, min_size=1, max_size=7), min_size=2
)


@pytest.mark.parametrize(("method", "value"), [("lamp", slow_lamp), ("density", slow_density)])
@settings(deadline=None, max_examples=60)
@given(data=st.data(), problem=lines)
def test_rankings_against_the_slow_ones(method: str, value: Any, data: Any, problem: Any) -> None:
    n = sum(map(len, problem.values()))
    total = data.draw(st.integers(len(problem), n))
    ordered = {name: problem[name] for name in sorted(problem)}
    assert kept(scores_of(ordered), method, units=total) == slow_ranking(ordered, value, total)


def test_the_oracle_sees_another_method() -> None:
    problem = {"a": [1.0, 2.0, 3.0], "b": [10.0, 30.0, 10.0]}
    assert kept(scores_of(problem), "global", units=4) != slow_ranking(problem, slow_lamp, 4)


def test_density_keeps_the_fewest_units_that_hold_a_share() -> None:
    """By its definition: there is a share for which every count is the smallest that reaches it."""
    g = torch.Generator().manual_seed(0)
    values = {n: torch.rand(20, generator=g).pow(k).tolist() for n, k in (("a", 1), ("b", 4))}
    for units in range(4, 40):
        counts = kept(scores_of(values), "density", units=units)
        low, high = 0.0, 1.0
        for count, line in zip(counts, values.values(), strict=True):
            held = np.cumsum(sorted(line, reverse=True)) / sum(line)
            low, high = max(low, held[count - 2] if count > 1 else 0.0), min(high, held[count - 1])
        assert low < high  # any share in (low, high] is one


def test_lamp_agrees_with_the_criterion() -> None:
    """Magnitudes with method lamp, and scores of criterion lamp with method global."""
    case = mlp()
    values = {
        c: sc.score(case.model, graph=case.graph, criterion=c, granularity="weight")
        for c in ("magnitude", "lamp")
    }
    for units in range(3, 69, 6):
        assert kept(values["magnitude"], "lamp", units=units) == kept(
            values["lamp"], "global", units=units
        )


# -- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lamp", "density", "global_normalized"])
def test_the_scale_of_a_target_does_not_matter(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    values = {n: torch.randn(9, generator=g) for n in "abc"}
    graph = units_graph(dict.fromkeys("abc", 9))
    scaled = {n: v * 2.0**k for (n, v), k in zip(values.items(), (-40, 0, 25), strict=True)}
    for units in range(3, 27):
        first = kept(Scores(graph, values, "t"), method, units=units)
        assert kept(Scores(graph, scaled, "t"), method, units=units) == first
    assert kept(Scores(graph, scaled, "t"), "global", units=9) != kept(
        Scores(graph, values, "t"), "global", units=9
    )


@pytest.mark.parametrize("method", ["uniform", "uniform_plus", "erk"])
def test_shares_do_not_look_at_scores(method: str) -> None:
    s = chain(7, 9, 5)
    other = Scores(s.graph, {n: -100 * v for n, v in s.values.items()}, "t")
    for units in range(3, 21):
        assert kept(s, method, units=units) == kept(other, method, units=units)


@RANKS
@settings(deadline=None, max_examples=30)
@given(problem=lines)
def test_rankings_are_nested(method: str, problem: Any) -> None:
    s = scores_of(problem)
    n = sum(map(len, problem.values()))
    rows = [kept(s, method, units=k) for k in range(len(problem), n + 1)]
    for smaller, larger in itertools.pairwise(rows):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))


@METHODS
def test_ties_go_to_the_earlier_target(method: str) -> None:
    s = scores_of({"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]})
    first, second = kept(s, method, units=3)
    assert (first, second) in [(2, 1)]
    assert kept(s, method, units=3) == [first, second]


@METHODS
@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    units=st.floats(0.2, 1),
    macs=st.floats(0.1, 1),
    params=st.floats(0.1, 1),
    min_keep=st.integers(1, 2),
    round_to=st.integers(1, 3),
)
def test_several_limits(
    method: str, sizes: list[int], units: float, macs: float, params: float, min_keep: int,
    round_to: int,
) -> None:  # fmt: skip
    """Every limit holds, and no single next step of any family fits."""
    s = chain(*sizes)
    budget = Budget(units=units, macs=macs, params=params)

    def cost(line: Sequence[int]) -> int:
        widths = [3, *line, 2]
        return sum(a * b for a, b in itertools.pairwise(widths))

    most = min(budget.limit("macs", cost(sizes)), budget.limit("params", cost(sizes)))
    most_units = budget.limit("units", sum(sizes))

    def fits(line: Sequence[int]) -> bool:
        return cost(line) <= most and sum(line) <= most_units

    low = [min(-(-min_keep // round_to) * round_to, n) for n in sizes]
    if not fits(low):
        with pytest.raises(sc.errors.BudgetError):
            allocate(s, budget, method=method, min_keep=min_keep, round_to=round_to)
        return
    found = allocate(s, budget, method=method, min_keep=min_keep, round_to=round_to).kept
    line = list(found.values())
    assert fits(line)
    assert all(c >= lo for c, lo in zip(line, low, strict=True))
    for i, n in enumerate(sizes):
        assert line[i] == n or line[i] % round_to == 0
        more = min(n, line[i] // round_to * round_to + round_to)
        assert line[i] == n or not fits([*line[:i], more, *line[i + 1 :]])


@METHODS
def test_blocks_that_stay_alike(method: str) -> None:
    blocks = {
        f"h.{i}.fc": torch.rand(6, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    }
    values = {**blocks, "head": torch.tensor([0.1, 0.2, 0.3, 0.9])}
    s = Scores(units_graph({n: len(v) for n, v in values.items()}), values, "t")
    for units in (5, 9, 12):
        counts = allocate(s, Budget(units=units), method=method, homogeneous=True).kept
        assert counts["h.0.fc"] == counts["h.1.fc"]
        assert units - 1 <= sum(counts.values()) <= units


@METHODS
def test_units_removed_earlier_take_no_part(method: str) -> None:
    s = scores_of({"a": [-INF, 1.0, -INF, 2.0], "b": [1.0, 2.0, 3.0, 4.0]})
    for units in (2, 3, 4, 5):
        first, second = kept(s, method, units=units)
        assert first + second == units
        assert first <= 2
