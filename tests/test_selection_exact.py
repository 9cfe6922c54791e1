"""Weights are selected without sorting them: the same counts and plans as with sorting them all.

The slow way is kept here as the oracle: every target sorted, all of them joined and sorted again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateurs import kth, selection
from secateurs.allocation import ALLOCATORS, Problem, allocate, frame
from secateurs.allocation.ranking import by_rank
from secateurs.errors import BudgetError, ConfigError, ScoringError
from secateurs.masks import apply_masks_
from secateurs.selection import order_of, select
from secateurs.types import (
    Budget,
    CostDim,
    CostTerm,
    Counts,
    Graph,
    Plan,
    Scores,
    Threshold,
    WeightTarget,
)
from tests.graphs import mlp

INF = math.inf


def graph_of(sizes: Mapping[str, int], fixed: int = 7) -> Graph:
    """Weights of one dimension, beside a bias that is not pruned."""
    terms = [CostTerm(n, (CostDim(size),), uses=3.0) for n, size in sizes.items()]
    targets = {n: WeightTarget(n, (size,)) for n, size in sizes.items()}
    return Graph(targets, costs=(*terms, CostTerm("bias", (CostDim(fixed),))))


def slow_global(problem: Problem) -> dict[str, int]:
    """The ranking by sorting."""
    return by_rank(problem, problem.values)


def slow_normalized(problem: Problem) -> dict[str, int]:
    return ALLOCATORS["global_normalized"](replace(problem, scores={}))


def slow_counts(scores: Scores, asked: Budget, method: str, min_keep: int) -> Counts:
    slow = {"global": slow_global, "global_normalized": slow_normalized}[method]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALLOCATORS, "global_slow", slow)
        return allocate(scores, asked, method="global_slow", min_keep=min_keep)


def slow_removed(
    scores: Scores, counts: Counts, previous: Plan | None = None
) -> dict[str, list[int]]:
    """Removed weights of each target, by a stable sort."""
    removed = {}
    for name, count in counts.kept.items():
        values = scores.values[name].reshape(-1).clone()
        if previous is not None and name in previous.masks:
            values[~previous.masks[name].reshape(-1)] = -INF
        gone = order_of(values)[count:].sort().values
        if len(gone):
            removed[name] = gone.tolist()
    return removed


@st.composite
def scored(make: st.DrawFn) -> Scores:
    """Scores of up to five weights: ties, removed ones, zeros of both signs, negatives, tiny."""
    sizes = make(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    graph = graph_of({f"w{i}": n for i, n in enumerate(sizes)})
    generator = torch.Generator().manual_seed(make(st.integers(0, 9999)))
    values: dict[str, Tensor] = {}
    for i, n in enumerate(sizes):
        if make(st.booleans()):
            line = torch.randn(n, generator=generator) * make(st.sampled_from([1e-42, 1.0, 1e15]))
        else:
            few = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45])
            line = few[torch.randint(5, (n,), generator=generator)]
        gone = torch.rand(n, generator=generator) < make(st.sampled_from([0.0, 0.3]))
        gone[0] = False
        values[f"w{i}"] = line.masked_fill(gone, -INF)
    return Scores(graph, values, "test")


def check(scores: Scores, asked: Budget, method: str, min_keep: int = 1) -> Counts:
    """Counts, thresholds and plan are those of the slow way."""
    slow = slow_counts(scores, asked, method, min_keep)
    counts = allocate(scores, asked, method=method, min_keep=min_keep)
    assert dict(counts.kept) == dict(slow.kept)
    assert counts.realised == slow.realised
    assert counts.thresholds == {
        n: float(scores.values[n][order_of(scores.values[n])[k - 1]])
        for n, k in counts.kept.items()
    }
    plan = select(scores, counts)
    removed = slow_removed(scores, counts)
    assert {n: v.tolist() for n, v in plan.removed.items()} == removed
    assert {n: (~m).nonzero().view(-1).tolist() for n, m in plan.masks.items()} == removed
    assert plan.reasons.keys() == removed.keys()
    return counts


@given(
    scores=scored(),
    fraction=st.floats(0.05, 1),
    quantity=st.sampled_from(["units", "params"]),
    method=st.sampled_from(["global", "global_normalized"]),
    min_keep=st.sampled_from([1, 3, 50]),
)
@settings(max_examples=120, deadline=None)
def test_as_with_sorting(
    scores: Scores, fraction: float, quantity: str, method: str, min_keep: int
) -> None:
    if method == "global_normalized":  # the slow way divides by zero where scales are denormal
        assume(
            all(float(v.abs().nan_to_num(posinf=0).max()) > 1e-30 for v in scores.values.values())
        )
    sizes: dict[str, Any] = {quantity: fraction}
    try:
        counts = check(scores, Budget(**sizes), method, min_keep)
    except BudgetError:
        return
    total = sum(v.numel() for v in scores.values.values())
    left = sum(int((v > -INF).sum()) for v in scores.values.values())
    if quantity == "units":
        assert sum(counts.kept.values()) == min(left, math.floor(fraction * total + 1e-9))
    else:
        allowed = math.floor(fraction * (total + 7) + 1e-9) - 7
        assert sum(counts.kept.values()) == min(left, allowed)


def test_targets_below_their_fewest_by_hand() -> None:
    """Without min_keep all six of the best are in b: a keeps its two, b the four that remain."""
    values = {"a": torch.tensor([1.0, 3, 2]), "b": torch.tensor([9.0, 8, 7, 6, 5, 4])}
    scores = Scores(graph_of({"a": 3, "b": 6}), values, "test")
    counts = check(scores, Budget(units=6), "global", 2)
    assert dict(counts.kept) == {"a": 2, "b": 4}
    assert counts.thresholds == {"a": 2.0, "b": 6.0}
    assert counts.notes == ()


def test_scales_too_small_for_single_precision() -> None:
    values = {"a": torch.tensor([1e-45, 0.0, 0.0, 0.0]), "b": torch.tensor([1.0, 0.9])}
    scores = Scores(graph_of({"a": 4, "b": 2}), values, "test")
    counts = allocate(scores, Budget(units=3), method="global_normalized")
    assert dict(counts.kept) == {"a": 1, "b": 2}


def test_ties_go_to_the_earlier_target_and_the_smaller_index() -> None:
    values = {"a": torch.ones(4), "b": torch.ones(4)}
    scores = Scores(graph_of({"a": 4, "b": 4}), values, "test")
    counts = check(scores, Budget(units=5), "global")
    assert dict(counts.kept) == {"a": 4, "b": 1}
    assert select(scores, counts).removed["b"].tolist() == [1, 2, 3]


@given(scores=scored(), fraction=st.floats(0.05, 1), again=st.floats(0.1, 1))
@settings(max_examples=40, deadline=None)
def test_nested_plans(scores: Scores, fraction: float, again: float) -> None:
    kept = {n: max(1, int(fraction * int((v > -INF).sum()))) for n, v in scores.values.items()}
    first = select(scores, Counts(kept, Budget(units=1.0)))
    other = {n: v.flip(0).nan_to_num(neginf=0.0) for n, v in scores.values.items()}
    left = {n: int(first.masks[n].sum()) if n in first.masks else len(v) for n, v in other.items()}
    counts = Counts({n: max(1, int(again * k)) for n, k in left.items()}, Budget(units=1.0))
    fresh = replace(scores, values=other)
    plan = select(fresh, counts, previous=first)
    assert {n: v.tolist() for n, v in plan.removed.items()} == {
        **{n: v.tolist() for n, v in first.removed.items()},
        **slow_removed(fresh, counts, first),
    }
    # A plan from a file holds plain numbers instead: the next one is the same.
    plain = replace(first, removed={n: v.clone() for n, v in first.removed.items()})
    same = select(fresh, counts, previous=plain)
    assert {n: v.tolist() for n, v in same.removed.items()} == {
        n: v.tolist() for n, v in plan.removed.items()
    }
    assert all(torch.equal(same.masks[n], plan.masks[n]) for n in plan.masks)


def test_removed_weights_are_read_off_their_masks() -> None:
    graph = mlp().graph
    values = {"4.weight": torch.arange(15.0), "2.weight": torch.arange(30.0)}
    plan = select(Scores(graph, values, "test"), Counts({"4.weight": 13}, Budget(units=13)))
    assert isinstance(plan.removed, selection.RemovedTable)
    assert plan.removed.single["4.weight"].dtype == torch.bool
    assert plan.removed.units == {}
    assert plan.removed["4.weight"].tolist() == [0, 1]
    assert plan.n_removed == 2
    assert "2.weight" not in plan.removed
    assert plan.removed.get("2.weight") is None
    model = torch.nn.Linear(5, 3)
    plan.masks["4.weight"].fill_(False)  # what was read is a copy
    assert plan.removed["4.weight"].tolist() == [0, 1]
    apply_masks_(model, {"weight": plan.masks["4.weight"]})
    assert model.weight.view(-1)[:2].tolist() == [0, 0]


@pytest.mark.parametrize("method", ["global", "global_normalized", "uniform", "erk"])
@pytest.mark.parametrize("quantity", ["units", "params"])
def test_nothing_is_sorted(monkeypatch: pytest.MonkeyPatch, method: str, quantity: str) -> None:
    """Neither orders nor sorted scores of weights are made."""

    def never(*_: object) -> Tensor:
        raise AssertionError("sorted")

    monkeypatch.setattr(frame, "order_of", never)
    monkeypatch.setattr(frame, "_best_first", never)
    monkeypatch.setattr(selection, "order_of", never)
    values = {"a": torch.randn(50).abs(), "b": torch.randn(80).abs()}
    scores = Scores(graph_of({"a": 50, "b": 80}), values, "test")
    sizes: dict[str, Any] = {quantity: 0.3}
    plan = select(scores, allocate(scores, Budget(**sizes), method=method))
    assert plan.n_removed > 0
    with pytest.raises(AssertionError, match="sorted"):
        allocate(scores, Budget(**sizes), method="lamp")


@pytest.mark.parametrize("rule", [Threshold("value", value=0.5), Threshold("quantile", q=0.4)])
def test_thresholds_sort_scores_but_need_no_order(
    monkeypatch: pytest.MonkeyPatch, rule: Threshold
) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("ordered")

    monkeypatch.setattr(frame, "order_of", never)
    line = torch.rand(100, generator=torch.Generator().manual_seed(2))
    scores = Scores(graph_of({"a": 100}), {"a": line}, "test")
    counts = allocate(scores, rule)
    assert counts.kept["a"] == int((line >= counts.thresholds["a"]).sum())
    assert select(scores, counts).removed["a"].tolist() == slow_removed(scores, counts)["a"]


def test_hostile_scores() -> None:
    graph = graph_of({"a": 3})
    for bad in (math.nan, INF):
        scores = Scores(graph, {"a": torch.tensor([1.0, bad, 2.0])}, "test")
        with pytest.raises(ScoringError, match="a: a score is nan or inf"):
            allocate(scores, Budget(units=0.5))
    nan = Scores(graph, {"a": torch.tensor([1.0, math.nan, 2.0])}, "test")
    with pytest.raises(ScoringError, match="a: a score is not a number"):
        select(nan, Counts({"a": 2}, Budget(units=2)))
    gone = Scores(graph, {"a": torch.full((3,), -INF)}, "test")
    with pytest.raises(BudgetError, match="a has no unit left"):
        allocate(gone, Budget(units=0.5))


def test_a_planted_off_by_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(40, generator=generator) for n in ("a", "b")}
    scores = Scores(graph_of({"a": 40, "b": 40}), values, "test")
    check(scores, Budget(units=30), "global")
    right = kth.keep_mask

    def off(values: Tensor, threshold: float, equal: int) -> Tensor:
        return right(values, threshold, max(0, equal - 1))

    with monkeypatch.context() as patch:
        patch.setattr(selection, "keep_mask", off)
        with pytest.raises(AssertionError):
            check(scores, Budget(units=30), "global")


# -- by a sample -----------------------------------------------------------------------------------


def test_a_sample_meets_the_budget_and_says_so() -> None:
    """The total is exact; how it is spread is near the truth, by the stated error."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "a": torch.randn(30_000, generator=generator).abs(),
        "b": 0.5 * torch.randn(50_000, generator=generator).abs(),
    }
    scores = Scores(graph_of({"a": 30_000, "b": 50_000}), values, "test")
    for method in ("global", "global_normalized"):
        for budget in (Budget(units=0.2), Budget(params=0.2)):
            exact = allocate(scores, budget, method=method)
            about = allocate(scores, budget, method=method, sample=5_000)
            assert sum(about.kept.values()) == sum(exact.kept.values())
            assert about.kept != exact.kept
            error = math.sqrt(0.2 * 0.8 / 5_000)
            assert abs(about.kept["a"] - exact.kept["a"]) < 4 * error * 80_000
            assert about.notes == (
                "how much each target keeps was estimated from a sample of 5000 scores",
            )
            assert allocate(scores, budget, method=method, sample=5_000).kept == about.kept
    reasons = select(scores, about).reasons
    assert reasons["a"].endswith("estimated from a sample of 5000 scores")


def test_what_a_sample_is_refused_with() -> None:
    weights = Scores(graph_of({"a": 30}), {"a": torch.arange(30.0)}, "test")
    units = Scores(mlp().graph, {"0:neuron": torch.arange(6.0)}, "test")
    for scores, asked, options in (
        (units, Budget(units=0.5), {"method": "global"}),
        (weights, Budget(units=0.5), {"method": "uniform"}),
        (weights, Budget(units=0.5), {"method": "lamp"}),
        (weights, Threshold("mean"), {}),
        (weights, Budget(units=0.5), {"method": "global", "round_to": 8}),
    ):
        given_: dict[str, Any] = {**options, "sample": 10}
        with pytest.raises(ConfigError, match=r"sample= is for"):
            allocate(scores, asked, **given_)
    for sample in (0, -1, True, 0.5):
        wrong: dict[str, Any] = {"sample": sample}
        with pytest.raises(ConfigError, match="sample must be a whole number of scores"):
            allocate(weights, Budget(units=0.5), method="global", **wrong)


def test_sorted_scores_for_allocators_that_ask() -> None:
    """Best first, what is gone left out, as a stable sort gives them."""
    line = torch.tensor([3.0, -INF, 1.0, -2.0, 0.0, 3.0])
    assert frame._best_first(line).tolist() == [3.0, 3.0, 1.0, 0.0, -2.0]
    assert line.tolist() == [3.0, -INF, 1.0, -2.0, 0.0, 3.0]
    ordered = line[order_of(line)]
    assert frame._best_first(line).tolist() == ordered[ordered > -INF].tolist()
