"""One round of pruning: what is cut, by which measure, how much, and how it heals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateurs.allocation import ALLOCATORS, RoundTo, allocate, check_round_to
from secateurs.controls import CONTROLS, check_null
from secateurs.cost import dense_cost
from secateurs.criteria import get_combination
from secateurs.errors import ConfigError, choose
from secateurs.finetuning import Finetune
from secateurs.schedules import Schedule
from secateurs.types import Budget, Counts, Graph, Scores, Threshold, expand_granularity

__all__ = ["Stage"]


@dataclass(frozen=True)
class Stage:
    """One round of pruning: what is cut, by which measure, how much, and how it heals.

    Args:
        budget: what may remain; exactly one of `budget` and `threshold`.
        threshold: units scoring below it go.
        criterion: a name, a mapping with its options, or several combined (see `score`).
        granularity: kinds of units, or "structured".
        allocation: how the budget is divided among targets ("uniform", "global", ...).
        schedule: steps and curve. A threshold is applied once per step, to what is left.
        finetune: after each step; None = no training.
        min_keep: fewest units that stay in each target.
        round_to: units kept are multiples of this where possible; "auto", a number, or a mapping
            of kinds to numbers, see `allocate`.
        homogeneous: targets in the same place of repeated blocks keep equal counts.
        control: one of `CONTROLS`; None = the real thing.

    Raises:
        ConfigError: a name or a figure is wrong.
    """

    budget: Budget | None = None
    threshold: Threshold | None = None
    criterion: str | Mapping[str, Any] = "taylor"
    granularity: str | tuple[str, ...] = "structured"
    allocation: str = "uniform"
    schedule: Schedule | None = None
    finetune: Finetune | None = None
    min_keep: int = 1
    round_to: RoundTo = "auto"
    homogeneous: bool = False
    control: str | None = None

    def __post_init__(self) -> None:
        for name, kind, example in (
            ("budget", Budget, "Budget(macs=0.5)"),
            ("threshold", Threshold, 'Threshold("mean")'),
            ("schedule", Schedule, 'Schedule("cubic", steps=5)'),
            ("finetune", Finetune, "Finetune(epochs=3)"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(
                    f"{name} must be a {kind.__name__}, as in {example}; got {value!r}"
                )
        if (self.budget is None) == (self.threshold is None):
            raise ConfigError("give exactly one of budget and threshold")
        get_combination(self.criterion)
        expand_granularity(self.granularity)
        choose(self.allocation, ALLOCATORS, "allocation")
        least = self.min_keep
        if isinstance(least, bool) or not isinstance(least, int) or least < 1:
            raise ConfigError(f"min_keep must be a whole number, at least 1, got {least!r}")
        check_round_to(self.round_to)
        if not isinstance(self.homogeneous, bool):
            raise ConfigError(f"homogeneous must be True or False, got {self.homogeneous!r}")
        if self.threshold is not None and self.allocation != "uniform":
            raise ConfigError(
                f"allocation={self.allocation!r} distributes a budget; with a threshold leave it "
                'away (Threshold has scope="target" or "global")'
            )
        if self.threshold is not None and self.threshold.needs_null:
            check_null(self.criterion)
        if self.control is not None:
            self._check_control(self.control)

    def _check_control(self, control: str) -> None:
        """A control must change what it claims, and nothing else."""
        choose(control, CONTROLS, "control")
        rule = None if self.threshold is None else self.threshold.rule
        if control in ("random", "invert") and rule not in (None, "quantile"):
            raise ConfigError(
                f"control={control!r} changes the values that threshold {rule!r} looks at, so "
                'another number of units would go; use a budget, "quantile" or control="shuffle"'
            )
        if control == "random-labels" and rule == "permutation":
            raise ConfigError(
                'control="random-labels" scores on shuffled labels, and so does threshold '
                "'permutation': nothing would stay; use another threshold or a budget"
            )
        criterion = get_combination(self.criterion)
        if control == "random-labels" and not criterion.sees_labels:
            raise ConfigError(
                f'control="random-labels" changes nothing: criterion {criterion.label!r} does not '
                "see the targets"
            )

    @property
    def null_repeats(self) -> int:
        """How often labels are shuffled for the threshold: twice what tells a unit apart, or 0."""
        if self.threshold is None or not self.threshold.needs_null:
            return 0
        return math.ceil(2 / (self.threshold.fdr or 0.1))

    def allocated(
        self, scores: Scores, asked: Budget | Threshold, null: Sequence[Scores] = ()
    ) -> Counts:
        """Counts of a step, by the options of the stage."""
        return allocate(
            scores, asked, method=self.allocation, min_keep=self.min_keep,
            round_to=self.round_to, homogeneous=self.homogeneous, null=null,
        )  # fmt: skip

    @property
    def steps(self) -> Schedule:
        """The schedule; by default five cubic steps to a budget, one shot for a threshold."""
        if self.schedule is not None:
            return self.schedule
        return Schedule("one_shot", 1) if self.threshold is not None else Schedule()

    def asked_at(self, step: int, graph: Graph) -> Budget | Threshold:
        """The budget of a step, from the schedule; a threshold is the same at every step."""
        if self.budget is None:
            assert self.threshold is not None
            return self.threshold
        if step == self.steps.steps:
            return self.budget
        cost = dense_cost(graph)
        units = sum(t.n_units for t in graph.select(self.granularity))
        dense = {"units": units, "params": cost.params, "macs": cost.macs}
        left = {
            name: min(1.0, self.steps.remaining(step, self.budget.fraction(name, dense[name])))
            for name in self.budget.sizes
        }
        return Budget(**left)
