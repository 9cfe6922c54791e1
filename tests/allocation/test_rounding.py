"""`round_to`: which counts are allowed, and that a budget stays a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.allocation import ALLOCATORS, allocate
from secateurs.allocation.rounding import Rounding, roundings
from secateurs.errors import BudgetError
from secateurs.types import Budget, Graph, GroupTarget, Kind, Scores, Threshold
from tests.graphs import units_graph

METHODS = pytest.mark.parametrize(
    "method", [m for m in ALLOCATORS if m not in ("sensitivity", "multi_scale")]
)


def scores_of(sizes: Mapping[str, int], seed: int = 0, **kinds: Kind) -> Scores:
    """Random scores of channels, or of other kinds where they are named."""
    graph = units_graph(sizes)
    targets = {n: GroupTarget(n, kinds.get(n, "channel"), size, ()) for n, size in sizes.items()}
    g = torch.Generator().manual_seed(seed)
    values = {n: torch.rand(size, generator=g) for n, size in sizes.items()}
    return Scores(replace(graph, targets=targets), values, "test")


@pytest.mark.parametrize(
    ("kind", "n_units", "device", "expected"),
    [
        ("channel", 128, "cpu", Rounding(16, 16)),
        ("channel", 127, "cpu", Rounding()),
        ("channel", 512, "cuda", Rounding()),
        ("neuron", 512, "cpu", Rounding()),
        ("hidden", 512, "cpu", Rounding()),
    ],
)
def test_auto(kind: Kind, n_units: int, device: str, expected: Rounding) -> None:
    graph = Graph({"a": GroupTarget("a", kind, n_units, ())}, device=device)
    assert roundings("auto", graph, ["a"]) == {"a": expected}
    assert roundings(4, graph, ["a"]) == {"a": Rounding(4)}
    assert roundings({"neuron": 8}, graph, ["a"])["a"].multiple == (8 if kind == "neuron" else 1)


def test_counts_by_hand() -> None:
    s = scores_of({"a": 160, "b": 64, "c": 200}, c="neuron")
    counts = allocate(s, Budget(units=212))  # shares: 80, 32, 100
    assert counts.kept == {"a": 80, "b": 32, "c": 100}
    assert counts.round_to == {"a": 16}
    # 74.7, 29.9, 93.4: 64 and 29 and 93; 16 more do not fit, so the others share what is left
    assert allocate(s, Budget(units=198)).kept == {"a": 64, "b": 35, "c": 99}
    assert allocate(s, Budget(units=198), round_to=1).kept == {"a": 75, "b": 30, "c": 93}
    assert allocate(s, Budget(units=198), round_to=1).round_to == {}
    assert allocate(s, Budget(units=198), round_to={"channel": 8}).kept["b"] % 8 == 0


def test_a_small_count_is_free_so_that_no_budget_gets_out_of_reach() -> None:
    s = scores_of({"a": 256, "b": 256})
    assert allocate(s, Budget(units=2)).kept == {"a": 1, "b": 1}
    assert allocate(s, Budget(units=11)).kept == {"a": 6, "b": 5}
    assert allocate(s, Budget(units=20), min_keep=9).kept == {"a": 10, "b": 10}
    with pytest.raises(BudgetError, match="but 64 "):  # 17 is rounded up to 32
        allocate(s, Budget(units=40), min_keep=17)


@METHODS
@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    fraction=st.floats(0.05, 1),
    round_to=st.sampled_from(["auto", 7, {"channel": 32}]),
    homogeneous=st.booleans(),
    quantity=st.sampled_from(["units", "params"]),
)
def test_the_limit_holds_and_no_next_step_fits(
    method: str, sizes: list[int], fraction: float, round_to: Any, homogeneous: bool, quantity: str
) -> None:
    s = scores_of({f"l{i}": n for i, n in enumerate(sizes)})
    rules = roundings(round_to, s.graph, s.values)
    total = sum(sizes) + (10 if quantity == "params" else 0)
    least = sum(min(n, rules[f"l{i}"].up(1)) for i, n in enumerate(sizes)) + total - sum(sizes)
    if least > math.floor(fraction * total * (1 + 1e-12)):
        return
    asked = Budget(**{quantity: fraction})
    kept = allocate(s, asked, method=method, round_to=round_to, homogeneous=homogeneous).kept
    spent = sum(kept.values()) + total - sum(sizes)
    assert spent <= fraction * total * (1 + 1e-12)
    for size in set(sizes):
        equal = [f"l{i}" for i, n in enumerate(sizes) if n == size]
        assert not homogeneous or len({kept[n] for n in equal}) == 1
        for name in equal:
            assert kept[name] in (rules[name].down(kept[name]), size)
            if kept[name] < size:
                more = min(size, rules[name].up(kept[name] + 1)) - kept[name]
                repeats = len(equal) if homogeneous else 1
                assert spent + repeats * more > math.floor(fraction * total * (1 + 1e-12))


def test_thresholds_round_up() -> None:
    values = {"a": torch.arange(160.0), "b": torch.arange(160.0)}
    s = Scores(scores_of({"a": 160, "b": 160}).graph, values, "test")
    assert allocate(s, Threshold("value", value=100.0)).kept == {"a": 64, "b": 64}  # 60
    assert allocate(s, Threshold("value", value=150.0)).kept == {"a": 10, "b": 10}
    assert allocate(s, Threshold("value", value=1.0)).kept == {"a": 160, "b": 160}  # 159
