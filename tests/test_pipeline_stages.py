"""Several stages: what an earlier one removed costs nothing in a later one, so totals are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.allocation import allocate
from secateurs.cost import dense_cost
from secateurs.pipeline import PruneResult, Stage, prune_stages
from secateurs.schedules import Schedule
from secateurs.types import Batch, Budget

ONE = Schedule("one_shot", steps=1)


class Residual(nn.Module):
    """Three residual branches, which can go as a whole, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12)) for _ in range(3)
        )
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x)
        out: Tensor = self.last(x)
        return out


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
BATCHES: list[Batch] = [(X, (X[:, 0] > 0).long())]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(),
                         nn.Linear(16, 2))  # fmt: skip


def run(model: nn.Module, *stages: Stage) -> PruneResult:
    return prune_stages(model, BATCHES, F.cross_entropy, stages, example_inputs=X)


def nonzeros(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


def test_weights_after_neurons_meet_their_budget_to_the_weight() -> None:
    """Biases of removed neurons are gone: they take nothing of the budget."""
    model = mlp()
    dense = sum(p.numel() for p in model.parameters())
    result = run(
        model,
        Stage(budget=Budget(units=0.5), granularity="neuron", schedule=ONE),
        Stage(budget=Budget(params=0.2), granularity="weight", schedule=ONE),
    )
    assert nonzeros(result.model) == int(0.2 * dense)
    assert result.counts.realised["params"] == pytest.approx(int(0.2 * dense) / dense)


def test_weights_after_layers() -> None:
    """Weights of a layer that is gone are in no target; the others meet the budget."""
    model = Residual()
    dense = sum(p.numel() for p in model.parameters())
    result = run(
        model,
        Stage(budget=Budget(units=1), granularity="layer", schedule=ONE, criterion="l2_norm"),
        Stage(budget=Budget(params=0.3), granularity="weight", schedule=ONE),
    )
    assert nonzeros(result.model) == int(0.3 * dense)
    left = {name for name in result.counts.kept if name.startswith("branches")}
    assert len(left) == 2


def test_a_second_kind_of_units_counts_what_is_left_of_the_first() -> None:
    model = Residual()
    graph = sc.trace(model, X)
    first = sc.score(model, criterion="l2_norm", graph=graph, granularity="layer")
    plan = sc.select(first, allocate(first, Budget(units=1)))
    scores = sc.score(model, criterion="l2_norm", graph=graph, granularity="neuron", previous=plan)
    params = sum(p.numel() for p in model.parameters())
    counts = allocate(scores, Budget(params=0.3), previous=plan)
    small = sc.shrink(model, sc.select(scores, counts, previous=plan), X)
    left = sum(p.numel() for p in small.parameters())
    assert left == round(counts.realised["params"] * params)
    assert left <= 0.3 * params
    # Without the plan the layers that are gone take their share of the budget.
    blind = allocate(scores, Budget(params=0.3))
    assert sum(blind.kept.values()) < sum(counts.kept.values())
    assert dense_cost(graph).params == params
