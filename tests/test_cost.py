"""Costs against counting what is really left."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.cost import Cost, CostCurve, cost_of, cost_of_kept, dense_cost, packed_bytes
from secateurs.errors import ConfigError
from secateurs.surgery.storage import pack, pack_bits
from secateurs.types import CostDim, CostTerm, Graph, WeightTarget
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


# -- bytes ---------------------------------------------------------------------------------------


def weights_graph(size: int, item_bytes: int = 4, names: int = 1) -> Graph:
    """One matrix of single weights."""
    term = CostTerm("w", (CostDim(1), CostDim(size)), True, 0.0, item_bytes, names)
    return Graph({"w": WeightTarget("w", (1, size))}, costs=(term,))


def test_bytes_of_structure_by_hand() -> None:
    graph = mlp().graph  # 4 -> 6 -> 5 -> 3
    assert dense_cost(graph).bytes == 0  # a graph that does not know what is stored
    stored = replace(graph, costs=tuple(replace(t, item_bytes=4) for t in graph.costs))
    assert dense_cost(stored).bytes == 4 * dense_cost(graph).params
    assert cost_of(stored, {"0:neuron": 2}).bytes == 4 * cost_of(graph, {"0:neuron": 2}).params
    tied = replace(graph, costs=(replace(graph.costs[0], item_bytes=2, names=3),))
    assert dense_cost(tied).bytes == 24 * 2 * 3


@settings(deadline=None, max_examples=80)
@given(
    size=st.integers(1, 3000), share=st.one_of(st.floats(0, 1), st.sampled_from([0.9, 1.0])),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    shift=st.integers(-2, 2), n_dims=st.integers(1, 3),
)  # fmt: skip
def test_bytes_of_weights_are_those_that_pack_writes(
    size: int, share: float, dtype: torch.dtype, shift: int, n_dims: int
) -> None:
    kept = min(size, max(0, round(share * size) + shift))
    tensor = torch.zeros(size, dtype=dtype)
    tensor[:kept] = 1
    stored = list(pack({"w": tensor.reshape([1] * (n_dims - 1) + [size])}).values())
    if kept < size:
        stored.append(pack_bits(tensor != 0))
    written = sum(t.numel() * t.element_size() for t in stored)
    assert packed_bytes(size, kept, dtype.itemsize, n_dims) == written


@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 100, 1000])
def test_bounds_of_bytes_never_fall_and_are_the_tightest(size: int, item_bytes: int) -> None:
    curve = CostCurve(weights_graph(size, item_bytes, names=2), {"w": np.arange(size)})
    exact = [curve({"w": k}).bytes for k in range(size + 1)]
    assert exact == [packed_bytes(size, k, item_bytes, 2, 2) for k in range(size + 1)]
    low = [curve({"w": k}, "at_least").bytes for k in range(size + 1)]
    high = [curve({"w": k}, "at_most").bytes for k in range(size + 1)]
    assert low == [min(exact[k:]) for k in range(size + 1)]
    assert high == [max(exact[: k + 1]) for k in range(size + 1)]
    for k in range(size + 1):
        marks = np.arange(size) < k
        assert cost_of_kept(weights_graph(size, item_bytes, 2), {"w": marks}).bytes == exact[k]


def test_a_removed_row_makes_the_packed_tensor_smaller() -> None:
    graph = mlp().graph
    graph = replace(graph, costs=tuple(replace(t, item_bytes=4) for t in graph.costs))
    weights = np.ones(24, dtype=bool)
    weights[:5] = False  # row 0 and one of row 1
    rows = np.array([False, True, True, True, True, True])
    left = cost_of_kept(graph, {"0.weight": weights, "0:neuron": rows})
    without = cost_of_kept(graph, {"0:neuron": rows})
    # 20 weights of five rows, too few to be packed; one is zero, so the mask of 20 bits is there
    assert left.bytes == without.bytes + 3
