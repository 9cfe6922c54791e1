"""Budgets on real networks: within every limit, to the unit, by recounts of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateurs as sc
from secateurs.allocation import ALLOCATORS, allocate
from secateurs.allocation.problem import Limit, MissedBudget, Problem, allocator
from secateurs.cost import cost_of_kept, dense_cost
from secateurs.errors import BudgetError, ConfigError
from secateurs.macs import macs
from secateurs.selection import order_of
from secateurs.surgery import slice_masks
from secateurs.surgery.shrinking import info_of
from secateurs.surgery.storage import stored_tensors
from secateurs.types import Budget, Counts, Graph, IntArray, Plan, Scores
from tests.graphs import mlp, units_graph
from tests.zoo.test_zoo import built

METHODS = ("uniform", "global", "global_normalized")
ZOO = (
    "plain-cnn", "resnet-basic", "resnext", "densenet", "mobilenet-v2", "vit", "llama",
    "tied-lm", "lstm-three", "gru-two-bidirectional", "shared-block", "tied-lstm",
)  # fmt: skip
PAIRS = (("params", "macs"), ("units", "bytes"), ("macs", "bytes"))
GROUPS = ("structured", "embedding")


def random_scores(graph: Graph, granularity: str | tuple[str, ...] = GROUPS) -> Scores:
    g = torch.Generator().manual_seed(0)
    targets = graph.select(granularity)
    return Scores(graph, {t.name: torch.rand(t.n_units, generator=g) for t in targets}, "random")


def sizes_of(scores: Scores, kept: Mapping[str, int]) -> dict[str, int]:
    """What remains, counted from marks of the best units and without any curve."""
    marks = {}
    for name, count in kept.items():
        line = np.zeros(len(scores.values[name]), dtype=np.bool_)
        line[order_of(scores.values[name]).numpy()[:count]] = True
        marks[name] = line
    cost = cost_of_kept(scores.graph, marks)
    return {"units": sum(kept.values()), "params": cost.params, "macs": cost.macs,
            "bytes": cost.bytes}  # fmt: skip


def check(scores: Scores, budget: Budget, counts: Counts) -> None:
    """Within every limit, and the next unit of every target is too much for one of them."""
    dense = sizes_of(scores, {n: len(v) for n, v in scores.values.items()})
    limits = {q: budget.limit(q, dense[q]) for q in budget.sizes}
    left = sizes_of(scores, counts.kept)
    for quantity, most in limits.items():
        assert left[quantity] <= most, f"{quantity}: {left[quantity]} of {most}"
    for quantity, found in left.items():
        if dense[quantity]:
            assert counts.realised[quantity] == pytest.approx(found / dense[quantity], rel=1e-12)
    for name, count in counts.kept.items():
        if count < len(scores.values[name]):
            more = sizes_of(scores, {**counts.kept, name: count + 1})
            assert any(more[q] > most for q, most in limits.items()), f"{name} may keep one more"


def check_missed(scores: Scores, budget: Budget, error: MissedBudget) -> None:
    """Every limit that one unit of each target exceeds is named, with what that takes."""
    least = sizes_of(scores, dict.fromkeys(scores.values, 1))
    dense = sizes_of(scores, {n: len(v) for n, v in scores.values.items()})
    missed = {q: least[q] for q in budget.sizes if least[q] > budget.limit(q, dense[q])}
    assert missed
    assert error.nearest == missed


def n_left(model: nn.Module, plan: Plan) -> int:
    """Parameters that a plan leaves, from its positions."""
    return sum(
        prod(
            len(plan.kept[n][d]) if d in plan.kept.get(n, {}) else s for d, s in enumerate(p.shape)
        )
        for n, p in model.named_parameters()
    )


# -- the zoo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_every_limit_is_met_to_the_unit(name: str) -> None:
    torch.set_num_threads(1)
    model, inputs = built(name)
    graph = sc.trace(model, inputs)
    scores = random_scores(graph)
    asked = [{q: f} for q in ("units", "params", "macs", "bytes") for f in (0.35, 0.8)]
    asked += [{a: 0.5, b: 0.45} for a, b in PAIRS]
    for number, limits in enumerate(asked):
        budget = Budget(**limits)
        try:
            counts = allocate(scores, budget, method=METHODS[number % 3], round_to=1)
        except MissedBudget as error:
            check_missed(scores, budget, error)
            continue
        check(scores, budget, counts)
        plan = sc.select(scores, counts)
        assert counts.realised["params"] * dense_cost(graph).params == pytest.approx(
            n_left(model, plan), rel=1e-9
        )


@pytest.mark.parametrize("name", ["resnet-basic", "mobilenet-v2", "tied-lstm", "lstm-three"])
def test_sizes_are_those_of_the_smaller_model_and_its_file(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, inputs = built(name)
    graph = sc.trace(model, inputs)
    scores = random_scores(graph)
    counts = allocate(scores, Budget(bytes=0.6), round_to=1)
    plan = sc.select(scores, counts)
    small = sc.shrink(model, plan, inputs)
    expected = sizes_of(scores, counts.kept)
    assert sum(p.numel() for p in small.parameters()) == expected["params"]
    assert info_of(small).form == "module"
    in_file = {n: t for m in (small,) for n, t in stored_tensors(m, slice_masks(plan)).items()}
    full = {**small.state_dict(), **dict(small.named_buffers(remove_duplicate=False))}
    assert sum(t.numel() * t.element_size() for t in full.values()) == expected["bytes"]
    # A tensor that holds zeros of its own is packed: the file may only be smaller.
    assert sum(t.numel() * t.element_size() for t in in_file.values()) <= expected["bytes"]
    assert data_bytes(sc.save(small, plan, tmp_path / "out")) <= expected["bytes"]
    if name == "resnet-basic":
        assert macs(small, inputs) == pytest.approx(expected["macs"])


def data_bytes(folder: Path) -> int:
    """Bytes after the header of a safetensors file."""
    content = (folder / "model.safetensors").read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


# -- bytes of single weights ---------------------------------------------------------------------


class Tied(nn.Module):
    """A layer under two names, a half-precision one, and buffers of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 24)
        self.b = nn.Linear(24, 24)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(24)
        self.small = nn.Linear(24, 2)
        self.register_buffer("table", torch.arange(1, 12, dtype=torch.int16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.small(self.norm(self.b(self.a(x).relu())).relu())
        return out


@pytest.mark.parametrize("share", [0.3, 0.4, 0.7, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_single_weights_are_those_of_the_file(
    share: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = (torch.rand_like(tensor.data) + 0.5).to(dtype)  # no zeros of its own
    x = torch.randn(3, 24).to(dtype)
    scores = random_scores(sc.trace(model, x), "weight")
    counts = allocate(scores, Budget(bytes=share), method="global")
    check(scores, Budget(bytes=share), counts)
    plan = sc.select(scores, counts)
    folder = sc.save(sc.shrink(model, plan, x), plan, tmp_path / "out")
    assert data_bytes(folder) == sizes_of(scores, counts.kept)["bytes"]
    dense = dense_cost(scores.graph)
    # a.weight is stored twice; 6 floats wide vectors: three biases of 24, 2, the norm's four
    n = 2 * 24 * 24 + 2 * 24 + 24 * 2 + 2 + 4 * 24
    assert dense.bytes == n * dtype.itemsize + 8 + 11 * 2


def test_a_limit_that_keeps_a_tensor_from_being_whole() -> None:
    """Few zeros make the file larger; without the limit in units there would be none of them."""
    graph = mlp().graph  # 24, 30 and 15 weights: never packed, their masks take 3, 4 and 2 bytes
    graph = replace(graph, costs=tuple(replace(t, item_bytes=4) for t in graph.costs))
    scores = random_scores(graph, "weight")
    dense = dense_cost(graph).bytes
    assert dense == 4 * 83
    assert sum(allocate(scores, Budget(bytes=dense)).kept.values()) == 69
    for units in (40, 67, 68):
        budget = Budget(units=units, bytes=dense + 9)
        kept = allocate(scores, budget, method="global").kept
        assert sum(kept.values()) == units
        assert dense < sizes_of(scores, kept)["bytes"] <= dense + 9
        with pytest.raises(MissedBudget, match=r"341 \(1.027 of .* at least bytes=341"):
            allocate(scores, Budget(units=units, bytes=dense))
    with pytest.raises(MissedBudget, match=r"allows 331 of 332 bytes, but 332"):
        allocate(scores, Budget(bytes=dense - 1))


# -- brute force ---------------------------------------------------------------------------------

small_limits = st.fixed_dictionaries(
    {}, optional={q: st.floats(0.2, 1.0) for q in ("units", "params", "macs")}
).filter(bool)


@pytest.mark.parametrize("method", [m for m in METHODS if m in ALLOCATORS])
@settings(deadline=None, max_examples=40)
@given(limits=small_limits, seed=st.integers(0, 9))
def test_tiny_problems_against_all_counts(method: str, limits: dict[str, float], seed: int) -> None:
    """Feasible exactly when some counts are; then no feasible counts lie above the found ones."""
    graph = mlp().graph
    g = torch.Generator().manual_seed(seed)
    values = {"0:neuron": torch.rand(6, generator=g), "2:neuron": torch.rand(5, generator=g)}
    scores, budget = Scores(graph, values, "test"), Budget(**limits)
    dense = sizes_of(scores, {"0:neuron": 6, "2:neuron": 5})

    def fits(a: int, b: int) -> bool:
        left = sizes_of(scores, {"0:neuron": a, "2:neuron": b})
        return all(left[q] <= budget.limit(q, dense[q]) for q in limits)

    feasible = {(a, b) for a, b in itertools.product(range(1, 7), range(1, 6)) if fits(a, b)}
    if not feasible:
        with pytest.raises(MissedBudget):
            allocate(scores, budget, method=method)
        return
    kept = allocate(scores, budget, method=method).kept
    a, b = kept["0:neuron"], kept["2:neuron"]
    assert (a, b) in feasible
    assert not {(i, j) for i, j in feasible if i >= a and j >= b} - {(a, b)}


def test_the_check_sees_counts_that_are_wrong() -> None:
    graph = mlp().graph
    scores = random_scores(graph)
    good = allocate(scores, Budget(params=0.5))
    for change, what in ((-1, "one more"), (1, "params")):
        kept = {**good.kept, "0:neuron": good.kept["0:neuron"] + change}
        real = sizes_of(scores, kept)
        whole = sizes_of(scores, {"0:neuron": 6, "2:neuron": 5})
        realised = {q: real[q] / whole[q] for q in whole if whole[q]}
        with pytest.raises(AssertionError, match=what):
            check(scores, Budget(params=0.5), Counts(kept, Budget(params=0.5), realised))


# -- what is missed, and refused -----------------------------------------------------------------


def test_each_missed_limit_is_named_with_what_can_be_reached() -> None:
    scores = Scores(units_graph({"a": 3, "b": 4}), {"a": torch.rand(3), "b": torch.rand(4)}, "test")
    with pytest.raises(MissedBudget) as caught:
        allocate(scores, Budget(units=1, params=0.5, macs=0.99))
    said = str(caught.value)
    assert "Budget(units=1) allows 1 of 7 units, but 2 (0.2857 of the model) remain" in said
    assert "Budget(params=0.5) allows 8 of 17 params, but 12 (0.7059 of the model) remain" in said
    assert "ask for at least params=0.7059 or params=12" in said
    assert "macs" not in said
    assert caught.value.nearest == {"units": 2, "params": 12}
    assert isinstance(caught.value, BudgetError)
    assert allocate(scores, Budget(units=2, params=12)).kept == {"a": 1, "b": 1}


def test_what_counts_cannot_decide_is_refused() -> None:
    case = mlp()
    scores = random_scores(case.graph)
    with pytest.raises(ConfigError, match=r"metric_drop=0.01\): counts do not tell"):
        allocate(scores, Budget(params=0.5, metric_drop=0.01))
    with pytest.raises(ConfigError, match=r"needs a table.*measure_table"):
        allocate(scores, Budget(latency_ms=1.0))
    with pytest.raises(ConfigError, match="save no dense time"):
        allocate(random_scores(case.graph, "weight"), Budget(latency_ms=1.0))
    with pytest.raises(ConfigError, match="knows no bytes"):
        allocate(scores, Budget(bytes=0.5))


class Linear:
    """A table without measurements: a millisecond, and so much for each unit."""

    def __init__(self, each: Mapping[str, float]) -> None:
        self.each = each

    def curve(
        self, graph: Graph, orders: Mapping[str, IntArray]
    ) -> Callable[[Mapping[str, int]], float]:
        return lambda counts: 1.0 + sum(self.each[n] * c for n, c in counts.items())


def test_time_is_a_limit_like_others() -> None:
    graph = mlp().graph
    scores = random_scores(graph)
    table = Linear({"0:neuron": 0.5, "2:neuron": 0.25})
    counts = allocate(scores, Budget(latency_ms=3.3), latency=table)
    a, b = counts.kept["0:neuron"], counts.kept["2:neuron"]
    taken = 1 + a / 2 + b / 4
    assert counts.realised["latency_ms"] == taken <= 3.3
    assert a == 6 or taken + 0.5 > 3.3
    assert b == 5 or taken + 0.25 > 3.3
    both = allocate(scores, Budget(latency_ms=3.3, units=4), latency=table)
    assert sum(both.kept.values()) == 4
    with pytest.raises(MissedBudget, match=r"predicts 1.75 ms .* at least latency_ms=1.75"):
        allocate(scores, Budget(latency_ms=1.7), latency=table)


def test_an_allocator_that_lies_is_found_out() -> None:
    scores = random_scores(mlp().graph)

    @allocator("test-all")
    def everything(problem: Problem) -> dict[str, int]:
        return dict(problem.high)

    @allocator("test-few")
    def few(problem: Problem) -> dict[str, int]:
        return dict(problem.low)

    try:
        with pytest.raises(ConfigError, match="'test-all' returned more than the budget"):
            allocate(scores, Budget(units=5), method="test-all")
        check(scores, Budget(units=5), allocate(scores, Budget(units=5), method="test-few"))
    finally:
        del ALLOCATORS["test-all"], ALLOCATORS["test-few"]


def test_limits_hold_up_to_their_figure() -> None:
    limit = Limit("units", lambda counts: sum(counts.values()), 3)
    assert limit.holds({"a": 1, "b": 2})
    assert not limit.holds({"a": 2, "b": 2})
