"""A walk through a stage: what it remembers between two steps, so that it can be left and resumed.

Each walk is a dataclass whose fields are its whole memory. It leaves a checkpoint after each step
(`run.leave(must=True)`), and where one may be due on the way; `go` goes on from its fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from secateurs.finetuning import snapshot
from secateurs.pipeline.layerwise import cut_layerwise
from secateurs.pipeline.points import Ranking
from secateurs.pipeline.repairing import repair
from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.regrowth import RULES
from secateurs.surgery.verification import copied
from secateurs.types import Batches, Counts

__all__ = ["End", "Walk"]

End = tuple[Ranking, Counts]
"""Ranking and counts of a step."""
GIVEN = ("run", "stage", "samples")


@dataclass
class Walk(ABC):
    """One way through a stage.

    Attributes:
        prepared: whether the training before the first cut is done.
        first: ranking of a stage that scores only once.
        fresh: ranking and counts of a cut that is made and not healed yet.
        masked: the metric right after that cut.
        before: weights from before that cut, where removed ones may come back.
    """

    run: Run
    stage: Stage
    samples: Batches
    prepared: bool = False
    first: Ranking | None = None
    fresh: End | None = None
    masked: float | None = None
    before: dict[str, Tensor] | None = None

    @abstractmethod
    def go(self) -> End:
        """Take all steps that are left; ranking and counts of the last one that was kept."""

    def state(self) -> dict[str, Any]:
        """What it remembers."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in GIVEN}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def cut(self, step: int) -> End:
        """Score, allocate, select and zero what goes at a step of the schedule."""
        run, stage = self.run, self.stage
        ranking = run.rank(stage, self.samples) if self.first is None else (
            self.first.without(run.plan)
        )  # fmt: skip
        if not stage.steps.rescore and self.first is None:
            self.first = ranking
        asked = stage.asked_at(step, run.graph, run.dense_ms)
        counts = run.count(stage, ranking, asked, self.samples)
        self.take(ranking, counts, must=step == stage.steps.steps)
        return ranking, counts

    def look_back(self) -> None:
        """Before a cut: remember the weights if removed ones may come back with their values."""
        regrow = self.stage.regrow
        if regrow is not None and RULES[regrow.rule].dense:
            self.before = snapshot(self.run.work)

    def take(self, ranking: Ranking, counts: Counts, *, must: bool) -> None:
        """Zero what goes by scores, or layer by layer; repair what needs no training."""
        run = self.run
        gone = 0 if run.plan is None else run.plan.n_removed
        self.look_back()
        trained = bool(self.stage.repair and run.history)
        whole = copied(run.work) if trained else run.model
        if self.stage.layerwise is None:
            run.take(ranking, counts, must=must)
        else:
            cut_layerwise(run, self.stage, ranking, counts, must=must)
        if run.cut_plan.n_removed > gone:
            repair(run, self.stage, whole)
