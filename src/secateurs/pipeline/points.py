"""What a step allocates by, and the states that a run can go back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateurs.types import Counts, Graph, Plan, Scores

__all__ = ["Point", "Ranking", "unscored"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a step allocates by: scores, and for some thresholds those on shuffled labels."""

    scores: Scores
    null: Sequence[Scores] = ()

    def without(self, plan: Plan | None) -> Ranking:
        """The same ranking of what a plan has left."""
        return Ranking(_left(self.scores, plan), [_left(s, plan) for s in self.null])


def unscored(graph: Graph, granularity: str | tuple[str, ...], plan: Plan | None) -> Ranking:
    """Zeros for all that is left, by no criterion: for allocations that go by sizes."""
    zeros = {t.name: torch.zeros(t.n_units) for t in graph.select(granularity)}
    return Ranking(Scores(graph, zeros, "")).without(plan)


def _left(scores: Scores, plan: Plan | None) -> Scores:
    """Scores with -inf for what is removed."""
    if plan is None:
        return scores
    targets = scores.graph.targets
    values = {
        name: line.masked_fill(plan.gone(targets[name]), float("-inf"))
        for name, line in scores.values.items()
    }
    return replace(scores, values=values)


@dataclass(frozen=True, eq=False)
class Point:
    """A state that a run can go back to.

    Attributes:
        weights: parameters and buffers by name.
        plan: what is removed; None = nothing.
        ranking, counts: of the step that led here; None before the first step of a stage.
        row: number of the last step that was kept; 0 = none.
    """

    weights: Mapping[str, Tensor]
    plan: Plan | None
    ranking: Ranking | None = None
    counts: Counts | None = None
    row: int = 0
