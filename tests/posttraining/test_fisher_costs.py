"""The least importance lost within a budget, against all masks of a tiny transformer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import secateurs as sc
from secateurs.cost import cost_of, dense_cost
from secateurs.errors import BudgetError
from secateurs.posttraining import fisher_costs
from secateurs.posttraining.fisher_costs import least_lost, unit_costs
from secateurs.types import Budget, Graph
from tests.posttraining.test_fisher_gates import texts, tiny


@pytest.fixture(scope="module")
def graph() -> Graph:
    return sc.trace(tiny(), texts(3)[0][0])


def random_importance(graph: Graph, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {t.name: torch.rand(t.n_units, generator=draw) ** 3 for t in graph.groups()}


def masks(graph: Graph, min_keep: int) -> Iterator[dict[str, np.ndarray]]:
    """Every mask that keeps at least so many units of each target."""
    sizes = [t.n_units for t in graph.groups()]
    lines = [
        [m for m in product([False, True], repeat=n) if sum(m) >= min(min_keep, n)] for n in sizes
    ]
    for chosen in product(*lines):
        yield {t.name: np.array(m) for t, m in zip(graph.groups(), chosen, strict=True)}


def best_of_all(
    graph: Graph, importances: dict[str, Tensor], budget: Budget, min_keep: int
) -> float:
    """The most importance that any mask within the budget keeps, from costs of counts."""
    quantity, limit = next(iter(budget.sizes)), 0
    dense = {"macs": dense_cost(graph).macs, "params": dense_cost(graph).params}
    limit = budget.limit(quantity, dense[quantity])
    known: dict[tuple[int, ...], bool] = {}
    best = -1.0
    for mask in masks(graph, min_keep):
        counts = {n: int(m.sum()) for n, m in mask.items()}
        key = tuple(counts.values())
        if key not in known:
            known[key] = getattr(cost_of(graph, counts), quantity) <= limit
        if known[key]:
            value = sum(float(importances[n][torch.from_numpy(m)].sum()) for n, m in mask.items())
            best = max(best, value)
    return best


def kept_value(importances: dict[str, Tensor], kept: dict[str, int]) -> float:
    return sum(
        float(v.sort(descending=True).values[: kept[n]].sum()) for n, v in importances.items()
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("budget", "min_keep"),
    [
        (Budget(macs=0.7), 1),
        (Budget(macs=0.72), 1),
        (Budget(params=0.8), 1),
        (Budget(macs=0.95), 2),
    ],
)
def test_no_mask_of_all_is_better(graph: Graph, seed: int, budget: Budget, min_keep: int) -> None:
    importances = random_importance(graph, seed)
    counts = least_lost(importances, graph, budget, min_keep=min_keep)
    kept = dict(counts.kept)
    assert kept_value(importances, kept) == pytest.approx(
        best_of_all(graph, importances, budget, min_keep)
    )
    (quantity,) = budget.given
    assert counts.realised[quantity] <= budget.given[quantity]
    left = cost_of(graph, kept)
    dense = dense_cost(graph)
    assert counts.realised["macs"] == left.macs / dense.macs
    for name, n in kept.items():  # no single further unit fits
        if n < graph.targets[name].n_units:
            more = getattr(cost_of(graph, {**kept, name: n + 1}), quantity)
            assert more > budget.limit(quantity, getattr(dense, quantity))
    assert "exact" in counts.notes[0]


def test_the_oracle_finds_a_planted_mistake(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(macs=0.7)
    honest = fisher_costs._kind

    def worst_first(*args: object) -> object:
        kind = honest(*args)  # type: ignore[arg-type]
        return replace(kind, total=-kind.total)

    monkeypatch.setattr(fisher_costs, "_kind", worst_first)
    gaps = []
    for seed in range(4):
        importances = random_importance(graph, seed)
        wrong = dict(least_lost(importances, graph, budget).kept)
        best = best_of_all(graph, importances, budget, 1)
        gaps.append(best - kept_value(importances, wrong))
    assert max(gaps) > 0.1


def test_costs_of_units_are_those_of_the_graph(graph: Graph) -> None:
    names = list(graph.units)
    for quantity in ("macs", "params", "bytes"):
        costs = unit_costs(graph, names, quantity)
        assert costs is not None
        for name in names:
            less = cost_of(graph, {name: graph.targets[name].n_units - 1})
            dense = dense_cost(graph)
            assert costs[name] == getattr(dense, quantity) - getattr(less, quantity)


def test_three_costs_are_still_exact(graph: Graph) -> None:
    importances = random_importance(graph, 4)
    first = graph.groups("neuron")[0].name
    # The neurons of one layer cost three times as much.
    terms = tuple(
        replace(t, uses=3 * t.uses) if any(first in d.owned for d in t.dims) else t
        for t in graph.costs
    )
    other = replace(graph, costs=terms)
    costs = unit_costs(other, list(importances), "macs")
    assert costs is not None
    assert len(set(costs.values())) == 3
    counts = least_lost(importances, other, Budget(macs=0.5))
    assert kept_value(importances, dict(counts.kept)) == pytest.approx(
        best_of_all(other, importances, Budget(macs=0.5), 1)
    )


def test_costs_that_depend_on_each_other_go_by_density() -> None:
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(),
        torch.nn.Linear(8, 3),
    )  # fmt: skip
    graph = sc.trace(net, torch.zeros(2, 6))
    importances = random_importance(graph, 0)
    assert unit_costs(graph, list(importances), "macs") is None
    counts = least_lost(importances, graph, Budget(macs=0.4))
    assert counts.realised["macs"] <= 0.4
    assert "for each unit of cost" in counts.notes[-1]
    both = least_lost(importances, graph, Budget(macs=0.6, params=0.5))
    assert both.realised["params"] <= 0.5
    assert both.realised["macs"] <= 0.6


def test_units_and_roundings_are_possible(graph: Graph) -> None:
    importances = random_importance(graph, 2)
    counts = least_lost(importances, graph, Budget(units=0.5))
    assert sum(counts.kept.values()) == 6
    rounded = least_lost(importances, graph, Budget(macs=0.8), round_to={"neuron": 2})
    assert all(rounded.kept[t.name] % 2 == 0 for t in graph.groups("neuron"))


def test_what_cannot_be_reached_is_said(graph: Graph) -> None:
    with pytest.raises(BudgetError, match="remain when every target keeps its fewest units"):
        least_lost(random_importance(graph, 0), graph, Budget(macs=0.01))
