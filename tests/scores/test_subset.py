"""A subset narrows scores and graph by the same patterns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.errors import ConfigError
from secateurs.scores import subset
from secateurs.types import Exclusion, Graph, GroupTarget, Scores, WeightTarget

NAMES = ("fc1:neuron", "fc2:neuron", "fc1.weight", "fc2.weight")
MIXED = Graph(
    {n: GroupTarget(n, "neuron", 2, ()) for n in NAMES[:2]}
    | {n: WeightTarget(n, (1, 2)) for n in NAMES[2:]},
    excluded=(Exclusion("head:neuron", "the output"),),
)
NEURONS = Scores(
    MIXED, {"fc1:neuron": torch.ones(2)}, "taylor", not_scored={"fc2:neuron": "no site"}
)


def test_a_subset_narrows_scores_and_graph() -> None:
    first = subset(NEURONS, include="fc1:neuron")
    assert (list(first.values), list(first.graph.targets)) == (["fc1:neuron"], ["fc1:neuron"])
    assert first.not_scored == {}
    assert (first.criterion, list(NEURONS.graph.targets)) == ("taylor", list(NAMES))
    assert [e.name for e in first.graph.excluded] == ["head:neuron", "fc2:neuron", *NAMES[2:]]
    without = subset(NEURONS, exclude="re:fc3|2:")
    assert (list(without.values), without.not_scored) == (["fc1:neuron"], {})
    assert list(without.graph.targets) == ["fc1:neuron", "fc1.weight", "fc2.weight"]


def test_modules_and_classes_are_looked_up_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Conv1d(2, 1, 1))
    graph = Graph({"0.weight": WeightTarget("0.weight", (1, 2)),
                   "1.weight": WeightTarget("1.weight", (1, 2, 1))})  # fmt: skip
    scores = Scores(graph, {n: torch.ones(2) for n in graph.targets}, "magnitude")
    assert list(subset(scores, exclude=nn.Linear, model=model).values) == ["1.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (None, None, "subset needs include=, exclude= or both"),
        ("fc3*", None, "include 'fc3.*' matches no target"),
        ("fc1.weight", None, "include 'fc1.weight' matches no target"),
        (None, "weight", "exclude 'weight' matches no target"),
        ("fc2:neuron", None, "leave no scored target"),
        (None, "*neuron", "leave no target"),
    ],
)
def test_a_subset_of_nothing(include: str | None, exclude: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        subset(NEURONS, include, exclude)
