"""Criteria from weights alone, against values by hand and slow computations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.errors import ConfigError
from secateurs.scoring import score
from secateurs.statistics import geometry
from secateurs.types import GroupTarget, Plan
from tests.graphs import CASES, Case, arange, build, linear, mlp


def neurons(rows: list[list[float]], bias: list[float]) -> Case:
    """Linear layers: these neurons, a ReLU, one reader."""
    n = len(rows)
    net = nn.Sequential(nn.Linear(len(rows[0]), n), nn.ReLU(), nn.Linear(n, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(rows))  # type: ignore[operator]
        net[0].bias.copy_(torch.tensor(bias))  # type: ignore[operator]
    graph = build(net, [linear("0", n, ["2"], "producers")], {})
    return Case(net, graph, [], nn.functional.cross_entropy)


def scored(case: Case, criterion: str, **options: object) -> dict[str, Tensor]:
    return dict(score(case.model, graph=case.graph, criterion=criterion, **options).values)  # type: ignore[call-overload]


def without(name: str, units: list[int]) -> Plan:
    return Plan(kept={}, masks={}, removed={name: torch.tensor(units)}, shapes={})


# -- norms of a unit ---------------------------------------------------------------------------


def test_magnitude_of_a_unit_is_its_l1_norm() -> None:
    case = neurons([[1.0, -2.0], [0.0, 0.5]], [3.0, -1.0])
    assert scored(case, "magnitude")["0:neuron"].tolist() == [6.0, 1.5]
    assert scored(case, "l2_norm")["0:neuron"].tolist() == pytest.approx(
        [math.sqrt(14), math.sqrt(1.25)]
    )


# -- norm_scale ----------------------------------------------------------------------------------


def test_norm_scale_by_hand() -> None:
    case = CASES["conv"]()
    with torch.no_grad():
        case.model.get_parameter("1.weight").copy_(torch.tensor([0.5, -2.0, 0.0, 1.0]))
    assert scored(case, "norm_scale")["0:channel"].tolist() == [0.5, 2.0, 0.0, 1.0]


class Stream(nn.Module):
    """A residual stream made by two norms; a layer norm; an inner convolution without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1 = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
        self.inner, self.outer, self.n2 = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.stem(x)))
        x = x + self.n2(self.outer(torch.relu(self.inner(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_norm_scale_of_a_stream_is_the_mean_of_its_norms() -> None:
    model = Stream()
    with torch.no_grad():
        model.n1.weight.copy_(torch.tensor([1.0, -3.0]))
        model.n2.weight.copy_(torch.tensor([2.0, 1.0]))
    graph = sc.trace(model, torch.randn(2, 1, 3, 3))
    found = score(model, graph=graph, criterion="norm_scale", granularity=["channel", "layer"])
    assert found.values["stem:channel"].tolist() == [1.5, 2.0]
    assert found.values["layers:layer"].tolist() == [1.5]
    assert found.not_scored["inner:channel"] == (
        "3 units are not made by a norm with a learned scale"
    )


@pytest.mark.parametrize("name", ["mlp", "lstm", "bare_norm"])
def test_no_norm_no_score(name: str) -> None:
    with pytest.raises(ConfigError, match="not made by a norm with a learned scale"):
        scored(CASES[name](), "norm_scale")


# -- geometric_median ----------------------------------------------------------------------------


def test_geometric_median_by_hand() -> None:
    """Two equal neurons, and one five away; the bias does not count."""
    case = neurons([[1.0, 1.0], [4.0, 5.0], [1.0, 1.0]], [0.0, 7.0, -7.0])
    assert scored(case, "geometric_median")["0:neuron"].tolist() == [5.0, 10.0, 5.0]


def test_removed_units_are_no_neighbours() -> None:
    case = neurons([[1.0, 1.0], [4.0, 5.0], [1.0, 1.0]], [0.0, 0.0, 0.0])
    found = scored(case, "geometric_median", previous=without("0:neuron", [1]))["0:neuron"]
    assert found.tolist() == [0.0, -math.inf, 0.0]


def distances(case: Case, target: GroupTarget) -> list[float]:
    """Sum over the others of the norm of the difference of all producing matrices, in loops."""
    rows: list[list[float]] = [[] for _ in range(target.n_units)]
    state = {n: p.detach().numpy() for n, p in case.model.named_parameters()}
    for m in target.members:
        if m.role == "producer" and m.learned and state[m.tensor].ndim > 1:
            for position, unit in zip(m.index, m.unit, strict=True):
                rows[unit] += state[m.tensor].take(position, axis=m.dim).ravel().tolist()
    every = [np.array(row) for row in rows]
    return [sum(float(np.linalg.norm(a - b)) for b in every) for a in every]


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "residual"])
def test_geometric_median_against_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    for block in (geometry.BLOCK, 5):  # all at once, and row by row
        monkeypatch.setattr(geometry, "BLOCK", block)
        for target in case.graph.groups():
            found = scored(case, "geometric_median")[target.name]
            assert found.tolist() == pytest.approx(distances(case, target), rel=1e-6)


def test_the_distance_oracle_sees_a_wrong_weight() -> None:
    case = mlp()
    target = case.graph.groups()[0]
    found = scored(case, "geometric_median")[target.name]
    with torch.no_grad():
        case.model.get_parameter("0.weight")[0, 0] += 1
    assert found.tolist() != pytest.approx(distances(case, target), rel=1e-6)


def test_units_of_different_size_have_no_distance() -> None:
    case = neurons([[1.0, 1.0], [4.0, 5.0], [1.0, 1.0]], [0.0, 0.0, 0.0])
    (group,) = case.graph.groups()
    uneven = tuple(replace(m, unit=np.array([0, 0, 1])) for m in group.members)
    graph = build(case.model, [replace(group, n_units=2, members=uneven)], {})
    with pytest.raises(ConfigError, match="different numbers of weights"):
        score(case.model, graph=graph, criterion="geometric_median")


# -- lamp ----------------------------------------------------------------------------------------


def one_weight(values: list[float]) -> Case:
    net = nn.Sequential(nn.Linear(len(values), 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([values]))  # type: ignore[operator]
    return Case(net, build(net, [], {}), [], nn.functional.cross_entropy)


def test_lamp_by_hand() -> None:
    """Squares 1, 4, 4, 0: of the two equal ones the later counts as the larger."""
    found = scored(one_weight([1.0, -2.0, 2.0, 0.0]), "lamp", granularity="weight")["0.weight"]
    torch.testing.assert_close(found, torch.tensor([1 / 9, 4 / 8, 4 / 4, 0.0]))


def test_lamp_leaves_out_what_was_removed() -> None:
    plan = Plan({}, {"0.weight": torch.tensor([[True, True, False, True]])}, {}, {})
    found = scored(one_weight([1.0, -2.0, 9.0, 0.0]), "lamp", granularity="weight", previous=plan)
    torch.testing.assert_close(found["0.weight"], torch.tensor([1 / 5, 1.0, -math.inf, 0.0]))


def test_lamp_of_zeros_is_zero() -> None:
    found = scored(one_weight([0.0, 0.0]), "lamp", granularity="weight")
    assert found["0.weight"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "residual"])
def test_lamp_against_loops(name: str) -> None:
    case = CASES[name]()
    for tensor, found in scored(case, "lamp", granularity="weight").items():
        w = case.model.get_parameter(tensor).detach().reshape(-1).tolist()
        expected = [x * x / sum(y * y for y in w if y * y >= x * x) for x in w]
        assert found.tolist() == pytest.approx(expected, rel=1e-6)
        assert found.max() == 1  # no layer is emptied
        assert found.argsort().equal(torch.tensor(w).abs().argsort())


def test_lamp_is_for_single_weights() -> None:
    with pytest.raises(ConfigError, match="lamp is not defined for neuron units"):
        scored(mlp(), "lamp")


def test_the_hand_built_graph_has_the_units_that_it_says() -> None:
    case = neurons([[1.0], [2.0]], [0.0, 0.0])
    assert case.graph.groups()[0].members[0].index.tolist() == arange(2).tolist()
