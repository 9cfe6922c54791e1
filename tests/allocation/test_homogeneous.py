"""`homogeneous=True`: the same place of repeated blocks keeps equal counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from secateurs.allocation import ALLOCATORS, allocate, same_place
from secateurs.errors import BudgetError
from secateurs.selection import select
from secateurs.types import Budget, Scores, Threshold
from tests.graphs import units_graph

METHODS = pytest.mark.parametrize(
    "method", [m for m in ALLOCATORS if m not in ("sensitivity", "multi_scale")]
)
INF = float("inf")


def scores_of(values: Mapping[str, Sequence[float]]) -> Scores:
    graph = units_graph({n: len(v) for n, v in values.items()})
    return Scores(graph, {n: torch.tensor(list(v)) for n, v in values.items()}, "test")


BLOCKS = {
    "h.0.fc": [8.0, 7.0, 6.0, 5.0],
    "h.1.fc": [1.0, 2.0, 3.0, 4.0],
    "h.2.fc": [0.0, 0.1, 0.2, 0.3],
    "head": [2.5, 2.4, 0.1, 0.0],
}


def test_classes() -> None:
    graph = units_graph({"h.0.fc": 4, "h.10.fc": 4, "h.2.fc": 5, "h.0.gate": 4, "x": 4})
    assert same_place(graph, graph.targets) == {
        "h.0.fc": ("h.0.fc", "h.10.fc"),
        "h.2.fc": ("h.2.fc",),  # another size
        "h.0.gate": ("h.0.gate",),  # another name
        "x": ("x",),
    }
    assert same_place(graph, ["h.10.fc"]) == {"h.10.fc": ("h.10.fc",)}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("uniform", {"h.0.fc": 2, "h.1.fc": 2, "h.2.fc": 2, "head": 2}),
        # means of the class: 4.1, 3.4, 2.7, 2.0; head 2.5, 2.4: three steps of 3, one unit forced
        ("global", {"h.0.fc": 2, "h.1.fc": 2, "h.2.fc": 2, "head": 2}),
    ],
)
def test_half_by_hand(method: str, expected: dict[str, int]) -> None:
    counts = allocate(scores_of(BLOCKS), Budget(units=8), method=method, homogeneous=True)
    assert counts.kept == expected
    assert allocate(scores_of(BLOCKS), Budget(units=8), method="global").kept == {
        "h.0.fc": 4, "h.1.fc": 2, "h.2.fc": 1, "head": 1
    }  # fmt: skip


def test_global_compares_the_mean_of_a_class() -> None:
    """12 units: class of three at 4.1, 3.4, 2.7, 2.0 against 2.5, 2.4, 0.1, 0.0."""
    found = [
        list(allocate(scores_of(BLOCKS), Budget(units=n), method="global", homogeneous=True)
             .kept.values())
        for n in (4, 7, 10, 11, 12, 14, 16)
    ]  # fmt: skip
    assert found == [
        [1, 1, 1, 1],
        [2, 2, 2, 1],
        [3, 3, 3, 1],
        [3, 3, 3, 2],
        [3, 3, 3, 3],  # the next of the class would take three
        [4, 4, 4, 2],
        [4, 4, 4, 4],
    ]


@METHODS
def test_units_still_differ_per_target(method: str) -> None:
    graph = units_graph({"b.0": 4, "b.1": 4})
    s = Scores(graph, {"b.0": torch.tensor([4.0, 3, 2, 1]), "b.1": torch.tensor([1.0, 2, 3, 4])},
               "test")  # fmt: skip
    counts = allocate(s, Budget(units=5), method=method, homogeneous=True)
    assert counts.kept == {"b.0": 2, "b.1": 2}  # five cannot be shared equally
    plan = select(s, counts)
    assert [plan.removed[n].tolist() for n in ("b.0", "b.1")] == [[2, 3], [0, 1]]
    assert counts.thresholds == {"b.0": 3.0, "b.1": 3.0}


def test_units_removed_earlier_limit_the_whole_class() -> None:
    s = scores_of({"b.0": [-INF, -INF, 1, 2], "b.1": [1, 2, 3, 4]})
    assert allocate(s, Budget(units=1.0), homogeneous=True).kept == {"b.0": 2, "b.1": 2}
    kept = allocate(s, Threshold("value", value=0.0), homogeneous=True).kept
    assert kept == {"b.0": 2, "b.1": 2}


def test_a_threshold_keeps_the_largest_count_of_a_class() -> None:
    s = scores_of(BLOCKS)
    counts = allocate(s, Threshold("value", value=2.45), homogeneous=True)
    assert counts.kept == {"h.0.fc": 4, "h.1.fc": 4, "h.2.fc": 4, "head": 1}
    s = scores_of({k: v for k, v in BLOCKS.items() if k != "h.0.fc"})
    counts = allocate(s, Threshold("value", value=2.45), homogeneous=True)
    assert counts.kept == {"h.1.fc": 2, "h.2.fc": 2, "head": 1}  # h.2.fc alone: none
    assert list(counts.thresholds) == ["h.1.fc", "h.2.fc", "head"]
    with pytest.raises(BudgetError, match=r"h\.2\.fc: 0 of 4 .*head: 0 of 4"):
        allocate(s, Threshold("value", value=9.0))
    with pytest.raises(BudgetError, match=r"h\.1\.fc: 0 of 4 .*head: 0 of 4"):
        allocate(s, Threshold("value", value=9.0), homogeneous=True)


def test_a_budget_out_of_reach_is_named() -> None:
    s = scores_of(BLOCKS)
    with pytest.raises(BudgetError, match="but 8 "):
        allocate(s, Budget(units=7), min_keep=2, homogeneous=True)
