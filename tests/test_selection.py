"""Selection: which units go, and what a plan says about every tensor."""

from __future__ import annotations

import pytest
import torch

from secateurs.allocation import allocate
from secateurs.errors import ConfigError, ScoringError
from secateurs.selection import order_of, select
from secateurs.types import Budget, Counts, Graph, Scores, Threshold
from tests.graphs import conv, lstm, mlp


def test_ties_keep_the_smaller_index() -> None:
    assert order_of(torch.tensor([2.0, 5.0, 2.0, 5.0])).tolist() == [1, 3, 0, 2]
    graph = mlp().graph
    s = Scores(graph, {"0:neuron": torch.tensor([1.0, 2, 1, 2, 1, 1])}, "test")
    plan = select(s, Counts({"0:neuron": 4}, Budget(units=4)))
    assert plan.removed["0:neuron"].tolist() == [4, 5]


def test_a_convolution_with_everything_that_belongs_to_it() -> None:
    graph = conv().graph
    s = Scores(graph, {"0:channel": torch.tensor([3.0, 1, 4, 2])}, "taylor")
    plan = select(s, allocate(s, Budget(units=0.5)))
    assert {n: {d: rows.tolist() for d, rows in dims.items()} for n, dims in plan.kept.items()} == {
        "0.weight": {0: [0, 2]},
        "0.bias": {0: [0, 2]},
        "1.weight": {0: [0, 2]},
        "1.bias": {0: [0, 2]},
        "1.running_mean": {0: [0, 2]},
        "1.running_var": {0: [0, 2]},
        "5.weight": {1: [0, 1, 2, 3, 8, 9, 10, 11]},
    }
    assert set(plan.masks) == set(plan.kept) == set(plan.shapes)
    assert plan.shapes["0.weight"] == tuple(plan.masks["0.weight"].shape) == (4, 2, 3, 3)
    assert plan.masks["0.weight"].sum((1, 2, 3)).tolist() == [18, 0, 18, 0]
    assert plan.masks["1.running_mean"].tolist() == [True, False, True, False]
    assert plan.masks["5.weight"].sum().item() == 3 * 8
    assert all(mask.dtype == torch.bool for mask in plan.masks.values())
    assert plan.granularity == ("channel",)
    assert plan.n_removed == 2
    assert plan.reasons == {
        "0:channel": "2 of 4 channel units removed by criterion taylor, budget units=0.5; "
        "kept from a score of 3"
    }


def test_rows_and_columns_of_a_recurrent_weight() -> None:
    graph = lstm().graph
    s = Scores(graph, {"lstm:hidden": torch.tensor([5.0, 1, 4, 3, 2])}, "test")
    plan = select(s, Counts({"lstm:hidden": 3}, Threshold("value", value=2.5)))
    assert plan.kept["lstm.weight_hh_l0"][1].tolist() == [0, 2, 3]
    rows = [0, 2, 3, 5, 7, 8, 10, 12, 13, 15, 17, 18]
    assert plan.kept["lstm.weight_hh_l0"][0].tolist() == rows
    assert plan.masks["lstm.weight_hh_l0"].sum().item() == 12 * 3
    assert "threshold value(value=2.5)" in plan.reasons["lstm:hidden"]


def test_two_targets_of_one_tensor() -> None:
    graph = mlp().graph
    s = Scores(graph, {"0:neuron": torch.arange(6.0), "2:neuron": torch.arange(5.0)}, "test")
    plan = select(s, Counts({"0:neuron": 5, "2:neuron": 3}, Budget(units=8)))
    assert plan.kept["2.weight"][0].tolist() == [2, 3, 4]
    assert plan.kept["2.weight"][1].tolist() == [1, 2, 3, 4, 5]
    assert plan.masks["2.weight"].sum().item() == 3 * 5


def test_nothing_removed_is_an_empty_plan() -> None:
    graph = mlp().graph
    s = Scores(graph, {"0:neuron": torch.arange(6.0)}, "test")
    plan = select(s, Counts({"0:neuron": 6}, Budget(units=1.0)))
    assert (plan.kept, plan.masks, plan.removed, plan.reasons) == ({}, {}, {}, {})


def test_weights_are_masked_not_removed() -> None:
    graph = mlp().graph
    s = Scores(graph, {"4.weight": torch.arange(15.0)}, "test")
    plan = select(s, Counts({"4.weight": 4}, Budget(units=4)))
    assert plan.kept == {}
    assert not plan.structural
    assert plan.masks["4.weight"].shape == (3, 5)
    assert plan.masks["4.weight"].nonzero().tolist() == [[2, 1], [2, 2], [2, 3], [2, 4]]
    assert plan.shapes == {"4.weight": (3, 5)}


def test_plans_are_nested() -> None:
    """What is gone stays gone, even if new scores would bring it back."""
    graph = mlp().graph
    name = "0:neuron"
    first = select(Scores(graph, {name: torch.tensor([0.0, 1, 2, 3, 4, 5])}, "test"),
                   Counts({name: 4}, Budget(units=4)))  # fmt: skip
    again = Scores(graph, {name: torch.tensor([9.0, 8, 2, 3, 4, 5])}, "test")
    second = select(again, Counts({name: 2}, Budget(units=2)), previous=first)
    assert second.removed[name].tolist() == [0, 1, 2, 3]
    assert second.kept["0.weight"][0].tolist() == [4, 5]
    with pytest.raises(ConfigError, match="has 4 of 6 units left, it cannot keep 5"):
        select(again, Counts({name: 5}, Budget(units=5)), previous=first)


def test_weights_first_then_structure() -> None:
    graph = mlp().graph
    weights = Scores(graph, {"0.weight": torch.arange(24.0)}, "magnitude")
    first = select(weights, Counts({"0.weight": 12}, Budget(units=12)))
    rows = Scores(graph, {"0:neuron": torch.tensor([5.0, 4, 3, 2, 1, 0])}, "taylor")
    both = select(rows, Counts({"0:neuron": 4}, Budget(units=4)), previous=first)
    assert both.removed.keys() == {"0.weight", "0:neuron"}
    assert both.granularity == ("neuron", "weight")
    expected = torch.zeros(6, 4, dtype=torch.bool)
    expected[3] = True  # rows 0 to 2 were masked, rows 4 and 5 removed
    assert torch.equal(both.masks["0.weight"], expected)
    assert both.kept["0.weight"][0].tolist() == [0, 1, 2, 3]
    assert first.masks["0.weight"].sum() == 12


def test_other_targets_of_an_earlier_plan_are_carried_over() -> None:
    graph = mlp().graph
    first = select(Scores(graph, {"0:neuron": torch.arange(6.0)}, "test"),
                   Counts({"0:neuron": 3}, Budget(units=3)))  # fmt: skip
    second = select(Scores(graph, {"2:neuron": torch.arange(5.0)}, "test"),
                    Counts({"2:neuron": 2}, Budget(units=2)), previous=first)  # fmt: skip
    assert {n: len(v) for n, v in second.removed.items()} == {"0:neuron": 3, "2:neuron": 3}
    assert second.kept["2.weight"].keys() == {0, 1}
    assert second.reasons.keys() == {"0:neuron", "2:neuron"}


@pytest.mark.parametrize("count", [0, -1, 7])
def test_counts_out_of_range(count: int) -> None:
    s = Scores(mlp().graph, {"0:neuron": torch.arange(6.0)}, "test")
    with pytest.raises(ConfigError, match="it cannot keep"):
        select(s, Counts({"0:neuron": count}, Budget(units=0.5)))


def test_hostile_scores_and_graphs() -> None:
    graph = mlp().graph
    s = Scores(graph, {"0:neuron": torch.tensor([1.0, float("nan"), 1, 1, 1, 1])}, "test")
    with pytest.raises(ScoringError, match="0:neuron: a score is not a number"):
        select(s, Counts({"0:neuron": 3}, Budget(units=0.5)))
    with pytest.raises(ConfigError, match="unknown scored target '1:neuron'"):
        select(s, Counts({"1:neuron": 3}, Budget(units=0.5)))
    bare = Graph(graph.targets)
    with pytest.raises(ConfigError, match=r"does not know the shape of 0\.bias"):
        select(Scores(bare, {"0:neuron": torch.arange(6.0)}, "test"),
               Counts({"0:neuron": 3}, Budget(units=0.5)))  # fmt: skip
