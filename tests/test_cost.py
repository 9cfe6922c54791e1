"""Costs against counting what is really left."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from secateurs.cost import Cost, CostCurve, cost_of, cost_of_kept, dense_cost
from secateurs.errors import ConfigError
from tests.graphs import CASES, conv, lstm, mlp, units_graph


@pytest.mark.parametrize("name", CASES)
def test_dense_params_are_the_models(name: str) -> None:
    case = CASES[name]()
    assert dense_cost(case.graph).params == sum(p.numel() for p in case.model.parameters())


def test_by_hand() -> None:
    graph = mlp().graph  # 4 -> 6 -> 5 -> 3
    assert dense_cost(graph) == Cost(24 + 6 + 30 + 5 + 15 + 3, 24 + 30 + 15)
    assert cost_of(graph, {"0:neuron": 2}) == Cost(8 + 2 + 10 + 5 + 15 + 3, 8 + 10 + 15)
    both = {"0:neuron": 2, "2:neuron": 1}
    assert cost_of(graph, both) == Cost(8 + 2 + 2 + 1 + 3 + 3, 8 + 2 + 3)
    channels = conv().graph  # weight (4, 2, 3, 3), bias, norm, linear (3, 16) + 3
    assert cost_of(channels, {"0:channel": 1}) == Cost(18 + 1 + 2 + 12 + 3, 18 * 16 + 12)
    hidden = lstm().graph  # both dimensions of the recurrent weight shrink
    assert cost_of(hidden, {"lstm:hidden": 2}).params == 8 * 3 + 8 * 2 + 8 + 8 + 2 * 3 + 3


def test_single_weights_and_structure_at_once() -> None:
    graph = mlp().graph
    weights = np.ones(24, dtype=bool)
    weights[:5] = False  # row 0 (4 weights) and one of row 1
    dense = dense_cost(graph)
    assert cost_of_kept(graph, {"0.weight": weights}) == Cost(dense.params - 5, dense.macs - 5)
    rows = np.array([False, True, True, True, True, True])
    left = cost_of_kept(graph, {"0.weight": weights, "0:neuron": rows})
    assert left == Cost(19 + 5 + 25 + 5 + 15 + 3, 19 + 25 + 15)


def test_uneven_units_need_marks() -> None:
    graph = units_graph({"a": 3}, {"a": [1, 2, 4]})
    assert dense_cost(graph) == Cost(17, 17)
    assert cost_of_kept(graph, {"a": np.array([False, True, True])}) == Cost(16, 16)
    assert cost_of(graph, {"a": 3}) == Cost(17, 17)
    with pytest.raises(ConfigError, match="units of a differ in size"):
        cost_of(graph, {"a": 2})


def test_the_curve_equals_exact_cost_for_every_count() -> None:
    graph = units_graph({"a": 3, "b": 4}, {"a": [1, 2, 4], "b": [3, 1, 1, 5]})
    orders = {"a": np.array([2, 0, 1]), "b": np.array([1, 3, 0, 2])}
    curve = CostCurve(graph, orders)
    for a, b in itertools.product(range(4), range(5)):
        kept = {"a": np.isin(np.arange(3), orders["a"][:a]),
                "b": np.isin(np.arange(4), orders["b"][:b])}  # fmt: skip
        assert curve({"a": a, "b": b}) == cost_of_kept(graph, kept)
    coupled = mlp().graph
    curve = CostCurve(coupled, {"0:neuron": np.arange(6), "2:neuron": np.arange(5)})
    for a, b in itertools.product(range(7), range(6)):
        counts = {"0:neuron": a, "2:neuron": b}
        assert curve(counts) == cost_of(coupled, counts)


def test_the_curve_of_single_weights() -> None:
    graph = mlp().graph
    curve = CostCurve(graph, {"0.weight": np.arange(24)[::-1].copy()})
    marks = np.arange(24) >= 14
    assert curve({"0.weight": 10}) == cost_of_kept(graph, {"0.weight": marks})
    with pytest.raises(ConfigError, match="two stages"):
        CostCurve(graph, {"0.weight": np.arange(24), "0:neuron": np.arange(6)})


def test_what_is_refused() -> None:
    graph = mlp().graph
    with pytest.raises(ConfigError, match="Did you mean '0:neuron'"):
        cost_of(graph, {"0:neurons": 2})
    with pytest.raises(ConfigError, match="has 6 units, it cannot keep 7"):
        cost_of(graph, {"0:neuron": 7})
    with pytest.raises(ConfigError, match=r"bool array of shape \(6,\), got int64"):
        cost_of_kept(graph, {"0:neuron": np.arange(6)})  # type: ignore[dict-item]
