"""What can be pruned in numbers and words, against counts by hand and by removal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.cost import cost_of, cost_of_kept, dense_cost
from secateurs.inventory import Inventory, common_module, inventory, percent, table
from secateurs.types import (
    KINDS,
    STRUCTURED,
    CostDim,
    CostTerm,
    Exclusion,
    Graph,
    GroupTarget,
    Member,
    Role,
    WeightTarget,
)


def member(tensor: str, dim: int, n: int, role: Role = "producer", learned: bool = True) -> Member:
    index = np.arange(n)
    return Member(tensor, dim, index, index, role, learned=learned)


def tiny() -> Graph:
    """Linear 3 -> 4, batch norm, linear 4 -> 2, by hand."""
    one = {"m.a:neuron": np.ones(4, dtype=np.int64)}
    group = GroupTarget(
        "m.a:neuron",
        "neuron",
        4,
        (
            member("m.a.weight", 0, 4),
            member("m.a.bias", 0, 4),
            member("m.bn.weight", 0, 4),
            member("m.bn.bias", 0, 4),
            member("m.b.weight", 1, 4, "consumer"),
            member("m.bn.running_mean", 0, 4, learned=False),
        ),
    )
    return Graph(
        {"m.a:neuron": group, "m.a.weight": WeightTarget("m.a.weight", (4, 3))},
        excluded=(
            *(Exclusion(f"m.x{i}:neuron", "cumsum runs over it") for i in range(5)),
            Exclusion("m.b:neuron", "it is part of the model's output", "add in m (net.py:41)"),
            Exclusion("operator fold", "no rule yet (2 calls); what it touches is left whole"),
        ),
        costs=(
            CostTerm("m.a.weight", (CostDim(4, one), CostDim(3)), uses=1.0),
            CostTerm("m.a.bias", (CostDim(4, one),)),
            CostTerm("m.bn.weight", (CostDim(4, one),)),
            CostTerm("m.bn.bias", (CostDim(4, one),)),
            CostTerm("m.b.weight", (CostDim(2), CostDim(4, one)), uses=1.0),
            CostTerm("m.b.bias", (CostDim(2),)),
        ),
        unknown_ops=("fold",),
        notes=("the batch size is fixed",),
    )


def test_the_table_is_literally_this() -> None:
    assert tiny().summary() == (
        "group       kind    units  params/unit  params   share  MACs    share\n"
        "m.a:neuron  neuron      4            8      32  94.1 %    20  100.0 %\n"
        "    5 tensors in m: a.weight[0], a.bias[0], bn.weight[0], bn.bias[0] and 1 more\n"
        "\n"
        "in reach: 94.1 % of 34 parameters and 100.0 % of 20 MACs, as 4 units in 1 group\n"
        "\n"
        "no rule for the operator fold: no rule yet (2 calls); what it touches is left whole\n"
        "    teach it the operator with secateurs.graph.register_rule: docs/extending.md\n"
        "\n"
        "left whole: cumsum runs over it (5 parts)\n"
        "    m.x0:neuron\n"
        "    m.x1:neuron\n"
        "    m.x2:neuron\n"
        "    and 2 more\n"
        "\n"
        "left whole: it is part of the model's output\n"
        "    m.b:neuron  add in m (net.py:41)\n"
        "\n"
        "note: the batch size is fixed"
    )


def test_every_one_is_named_when_asked() -> None:
    text = tiny().summary(every=True)
    assert all(e.name.removeprefix("operator ") in text for e in tiny().excluded)
    assert "b.weight[1]" in text
    assert "more" not in text


def test_kinds_asked_for_by_name_are_told_apart() -> None:
    graph = tiny()
    group = graph.targets["m.a:neuron"]
    assert isinstance(group, GroupTarget)
    wide = replace(group, name="m.b:embedding", kind="embedding", n_units=2, members=())
    two = {"m.b:embedding": np.ones(2, dtype=np.int64)}
    terms = [replace(t, dims=(CostDim(2, two), *t.dims[1:])) if "m.b." in t.name else t
             for t in graph.costs]  # fmt: skip
    both = replace(graph, targets={**graph.targets, wide.name: wide}, costs=tuple(terms))
    text = both.summary()
    assert "in reach: 100.0 % of 34 parameters" in text
    assert "without embedding: 94.1 % of 34 parameters and 100.0 % of 20 MACs" in text


def test_nothing_to_prune() -> None:
    assert Graph({}).summary() == "nothing can be pruned"
    assert "left whole: because\n    x" in Graph({}, (Exclusion("x", "because"),)).summary()


def test_layers_are_named_and_own_all_their_tensors() -> None:
    owned = {"layers:layer": np.array([1, 0])}, {"layers:layer": np.array([0, 1])}
    target = GroupTarget(
        "layers:layer",
        "layer",
        2,
        (member("l.0.b.weight", 0, 3),),
        unit_names=("l.0", "l.1"),
        unit_tensors=(("l.0.a.weight", "l.0.b.weight"), ("l.1.b.weight",)),
    )
    sizes = {"l.0.a.weight": (5, owned[0]), "l.0.b.weight": (3, owned[0]),
             "l.1.b.weight": (4, owned[1])}  # fmt: skip
    costs = [CostTerm(n, (CostDim(size), CostDim(1, own))) for n, (size, own) in sizes.items()]
    [row] = counted(Graph({target.name: target}, costs=tuple(costs))).groups
    assert row.tensors == ("l.0.a.weight", "l.0.b.weight", "l.1.b.weight")
    assert row.params_per_unit == (4, 8)
    assert row.share.params == 12
    assert "3 tensors of the units: l.0, l.1" in table(
        counted(Graph({target.name: target}, costs=tuple(costs)))
    )


def test_words() -> None:
    assert percent(0.0) == "0.0 %"
    assert percent(0.0001) == "under 0.1 %"
    assert percent(0.9999) == "over 99.9 %"
    assert percent(1.0) == "100.0 %"
    assert common_module(["a.b.c.weight", "a.bc.weight"]) == "a."
    assert common_module(["a.b.weight"]) == ""
    assert common_module(["weight", "a.weight"]) == ""


# --- against removal -----------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
        self.out = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        h = torch.relu(self.c(h + self.bn(self.b(h))))
        y: torch.Tensor = self.out(h.flatten(2).max(2).values)
        return y


def counted(graph: Graph) -> Inventory:
    return inventory(graph, frozenset(KINDS) - {"weight"}, STRUCTURED)


@pytest.fixture(scope="module")
def residual() -> Graph:
    return sc.trace(Residual(), torch.zeros(2, 3, 4, 4))


def test_a_group_owns_what_goes_with_it(residual: Graph) -> None:
    dense = dense_cost(residual)
    found = counted(residual)
    assert (found.total.params, found.total.macs) == (dense.params, dense.macs)
    for row in found.groups:
        without = cost_of(residual, {row.name: 0})
        assert row.share.params == dense.params - without.params
        assert row.share.macs == dense.macs - without.macs
        lost = []
        for unit in range(row.n_units):
            kept = {row.name: np.arange(row.n_units) != unit}
            lost.append(dense.params - cost_of_kept(residual, kept).params)
        assert row.params_per_unit == (min(lost), max(lost))


def test_what_is_in_reach_is_counted_once(residual: Graph) -> None:
    dense = dense_cost(residual)
    channels = {t.name: 0 for t in residual.groups("channel")}
    [_, *others] = channels
    assert others  # a family that crosses another
    left = cost_of(residual, channels)
    reach = inventory(residual, {"channel"}, STRUCTURED).reach
    assert reach.share.params == dense.params - left.params == dense.params - 2
    assert reach.share.macs == dense.macs - left.macs
    assert sum(g.share.params for g in counted(residual).groups) > reach.share.params
