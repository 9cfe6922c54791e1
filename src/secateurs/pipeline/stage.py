"""One round of pruning: what is cut, by which measure, how much, and how it heals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from secateurs.allocation import (
    ALLOCATORS,
    BY_SIZE,
    RoundTo,
    Sensitivity,
    allocate,
    check_round_to,
)
from secateurs.allocation.frame import make_frame
from secateurs.controls import check_null
from secateurs.cost import dense_cost
from secateurs.criteria import get_combination
from secateurs.errors import BudgetError, ConfigError, choose
from secateurs.finetuning import Finetune
from secateurs.latency import LatencyTable
from secateurs.penalties import Penalty
from secateurs.pipeline.fitting import TRIES, WHOLE_CUTS, problems
from secateurs.posttraining import FisherSearch, LayerwiseCut
from secateurs.regrowth import Regrow
from secateurs.schedules import Schedule
from secateurs.tickets import AtInit, TicketSearch
from secateurs.types import Budget, Counts, Graph, Plan, Scores, Threshold, expand_granularity

__all__ = ["FINER", "Stage"]

FINER = 6
"""Finer steps at most after the first one that went too far."""


@dataclass(frozen=True)
class Stage:
    """One round of pruning: what is cut, by which measure, how much, and how it heals.

    Args:
        budget: what may remain; exactly one of `budget` and `threshold`. "auto": see
            `resolve_budget`. With `metric_drop` the model becomes as small as possible (with
            sizes: down to these): each step is healed and judged by `evaluate`; after the first
            that goes too far come up to 6 finer ones between the last good size and that one, each
            from the last good model. By default each step leaves 80 % of what was left, in up to 20
            steps; without sizes this is counted in MACs, at weight granularity in units. What
            counts is the metric as measured once, a point estimate that is a little optimistic
            since it was looked at often: `secateurs search` gives a confidence.
        threshold: units scoring below it go.
        criterion: a name, a mapping with its options, or several combined (see `score`).
        granularity: kinds of units, or "structured".
        allocation: how the budget is divided among targets ("uniform", "global", ...).
        schedule: steps, curve and clock. A threshold is applied once per step, to what is left.
            With `metric_drop`, "exponential" means steps of equal factors, at most `steps` of them.
        finetune: after each step, or with `Schedule(every=)` the one in which all cuts are made;
            None = no training.
        min_keep: fewest units that stay in each target.
        round_to: units kept are multiples of this where possible; "auto", a number, or a mapping
            of kinds to numbers, see `allocate`.
        homogeneous: targets in the same place of repeated blocks keep equal counts.
        control: one of `CONTROLS`; None = the real thing.
        max_drop: the guard: how much worse than dense the healed validation metric may get, at
            least 0, in its own unit. The first step beyond it is rolled back and the stage ends
            there, with the report saying so; `Budget(metric_drop=)` would try finer steps
            first. None = no guard.
        allow_missed: give the nearest model to a budget that cannot be reached, instead of an
            error; the report then says that it was missed.
        prepare: how to train before the first cut of the stage; None = not.
        penalty: with `prepare`: what makes units small meanwhile. "growing" ranks and counts
            before, at the final budget; those units are pushed to zero, and the cuts of the stage
            follow that ranking, so that exactly they go.
        repair: what mends the model right after each cut, without training and in this order:
            "bias", "reconstruct", "norms". See `secateurs.posttraining`. What it shall be like
            again is the model before the cut if there was any training, else the dense one.
        regrow: for single weights: how their masks move while `finetune` heals. The plan is then
            that of the end.
        at_init: how the untrained network is cut, in place of criterion, allocation and schedule;
            `finetune` then trains what is left. Only the first stage can have it.
        ticket: how a lottery ticket is looked for, in place of a schedule: each round is a training
            by `finetune`, scored by `criterion`; at the end the ticket is trained once more. Only
            the first stage can have it.
        fisher_masks: how the trained network is cut by `search_masks`, in place of criterion,
            allocation, schedule and repair: masks by Fisher information, rearranged, what is left
            tuned, without training; `finetune` may then heal the rest. Budgets in sizes only;
            `round_to="auto"` is 1 here, with which the search is exact. Only the first stage can
            have it.
        layerwise: which single weights of a layer stay at each cut, in place of scores: SparseGPT,
            Wanda or magnitude, layer by layer on the calibration data, see `prune_layerwise`.
            `allocation` says how many stay in each layer; `criterion` is read by allocations that
            rank scores, and refused beside the others. One step by default. Weights that it cannot
            see are left whole in all stages, and listed.

    Raises:
        ConfigError: a name or a figure is wrong.
    """

    budget: Budget | Literal["auto"] | None = None
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
    max_drop: float | None = None
    allow_missed: bool = False
    prepare: Finetune | None = None
    penalty: Penalty | None = None
    repair: tuple[str, ...] = ()
    regrow: Regrow | None = None
    at_init: AtInit | None = None
    ticket: TicketSearch | None = None
    fisher_masks: FisherSearch | None = None
    layerwise: LayerwiseCut | None = None

    def __post_init__(self) -> None:
        for name, kind, example in (
            ("budget", Budget, "Budget(macs=0.5)"),
            ("threshold", Threshold, 'Threshold("mean")'),
            ("schedule", Schedule, 'Schedule("cubic", steps=5)'),
            ("finetune", Finetune, "Finetune(epochs=3)"),
            ("prepare", Finetune, "Finetune(epochs=3)"),
            ("penalty", Penalty, 'Penalty("group_lasso")'),
            ("regrow", Regrow, 'Regrow("rigl")'),
            ("at_init", AtInit, 'AtInit("synflow")'),
            ("ticket", TicketSearch, "TicketSearch(rounds=3)"),
            ("fisher_masks", FisherSearch, "FisherSearch()"),
            ("layerwise", LayerwiseCut, 'LayerwiseCut("wanda")'),
        ):
            value = getattr(self, name)
            if name == "budget" and value == "auto":
                continue
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
        for problem in problems(self):
            raise ConfigError(problem)

    @property
    def judged_by(self) -> str | Mapping[str, Any]:
        """The criterion, that of `at_init` included ("force" is made of the gradient)."""
        if self.at_init is None:
            return self.criterion
        return "gradient" if self.at_init.method == "force" else self.at_init.method

    @property
    def unscored(self) -> bool:
        """Whether nothing reads `criterion`: a method brings its own measure, or sizes decide."""
        by_size = self.layerwise is not None and self.allocation in BY_SIZE
        return self.at_init is not None or self.fisher_masks is not None or by_size

    @property
    def null_repeats(self) -> int:
        """How often labels are shuffled for the threshold: twice what tells a unit apart, or 0."""
        if self.threshold is None or not self.threshold.needs_null:
            return 0
        return math.ceil(2 / (self.threshold.fdr or 0.1))

    @property
    def wants_drop(self) -> bool:
        """Whether the budget limits the drop of the metric."""
        return self.budget == "auto" or (
            isinstance(self.budget, Budget) and self.budget.metric_drop is not None
        )

    @property
    def searches(self) -> bool:
        """Whether the size is to be found: the drop of the metric is limited and no size is."""
        budget = self.budget
        sized = isinstance(budget, Budget) and (budget.sizes or budget.latency_ms is not None)
        return self.wants_drop and not sized

    @property
    def smallest_in(self) -> str:
        """What "as small as possible" means: "units" for single weights, else "macs"."""
        kinds = expand_granularity(self.granularity)
        return "units" if set(kinds) == {"weight"} else "macs"

    @property
    def most_steps(self) -> int:
        """How many steps there will be at most."""
        return self.steps.steps + (FINER if self.wants_drop else 0)

    @property
    def asked(self) -> Budget | Threshold:
        """The budget or threshold, once "auto" is resolved."""
        asked = self.budget if self.threshold is None else self.threshold
        assert isinstance(asked, (Budget, Threshold))
        return asked

    @property
    def wants_latency(self) -> bool:
        """Whether the budget limits the time of a call."""
        return isinstance(self.budget, Budget) and self.budget.latency_ms is not None

    def allocated(
        self,
        scores: Scores,
        asked: Budget | Threshold,
        null: Sequence[Scores] = (),
        *,
        sensitivity: Sensitivity | None = None,
        latency: LatencyTable | None = None,
        previous: Plan | None = None,
    ) -> Counts:
        """Counts of a step, by the options of the stage; keywords as in `allocate`.

        Raises:
            BudgetError: as `allocate`; not for a budget that may be missed.
        """
        try:
            counts = allocate(
                scores, asked, method=self.allocation, min_keep=self.min_keep,
                round_to=self.multiples, homogeneous=self.homogeneous, null=null,
                sensitivity=sensitivity, latency=latency, previous=previous,
            )  # fmt: skip
        except BudgetError:
            if not self.allow_missed or isinstance(asked, Threshold):
                raise
            counts = replace(self.fewest(scores, previous), asked=asked)
        # Scores do not say which weights go layer by layer: no score is a threshold.
        return counts if self.layerwise is None else replace(counts, thresholds={})

    def fewest(self, scores: Scores, previous: Plan | None = None) -> Counts:
        """Counts when every target keeps as few units as it may."""
        frame = make_frame(scores, self.min_keep, self.multiples, self.homogeneous, previous)
        least = sum(frame.expand(frame.low).values())
        return allocate(
            scores, Budget(units=least), min_keep=self.min_keep, round_to=self.multiples,
            homogeneous=self.homogeneous, previous=previous,
        )  # fmt: skip

    def missed(self, scores: Scores, previous: Plan | None) -> str:
        """Why the budget cannot be reached from these scores; empty when it can."""
        if not isinstance(self.budget, Budget) or not self.budget.sizes:
            return ""
        try:
            replace(self, allow_missed=False).allocated(
                scores, Budget(**self.budget.sizes), previous=previous
            )
        except BudgetError as error:
            return str(error)
        return ""

    @property
    def steps(self) -> Schedule:
        """The schedule; by default five cubic steps to a budget, one shot for a threshold, layer by
        layer, and where one method decides the whole cut.

        For `Budget(metric_drop=)` up to 20 steps that each leave 80 %.
        """
        if self.schedule is not None:
            return self.schedule
        if self.wants_drop:
            return Schedule("exponential", TRIES)
        whole = self.decided_by is not None or self.layerwise is not None
        once = self.threshold is not None or whole
        return Schedule("one_shot", 1) if once else Schedule()

    @property
    def decided_by(self) -> str | None:
        """Which of `WHOLE_CUTS` decides the whole cut, in place of steps; None for none."""
        return next((name for name in WHOLE_CUTS if getattr(self, name) is not None), None)

    @property
    def multiples(self) -> RoundTo:
        """`round_to`; with `fisher_masks`, "auto" is 1."""
        exact = self.fisher_masks is not None and self.round_to == "auto"
        return 1 if exact else self.round_to

    def asked_at(self, step: int, graph: Graph, dense_ms: float = 0.0) -> Budget | Threshold:
        """The budget of a step, from the schedule; a threshold is the same at every step."""
        if self.threshold is not None:
            return self.threshold
        fraction = 1.0 if step == self.steps.steps else self.steps.fraction(step)
        return self.asked_along(fraction, graph, dense_ms)

    def asked_along(self, fraction: float, graph: Graph, dense_ms: float = 0.0) -> Budget:
        """What may remain after a fraction of the whole cut; all limits but the metric at 1.

        Args:
            fraction: of the cut, in [0, 1].
            graph: what sizes are fractions of.
            dense_ms: time of a call of the dense model; 0 leaves the limit on latency out.
        """
        assert isinstance(self.budget, Budget)
        if fraction == 1:
            kept = self.budget.latency_ms if dense_ms else None
            return replace(self.budget, latency_ms=kept, metric_drop=None)
        left: dict[str, float] = {
            name: min(1.0, last + (1 - last) * (1 - fraction))
            for name, last in self.final_fractions(graph, dense_ms).items()
        }
        if "latency_ms" in left:
            left["latency_ms"] *= dense_ms
        return Budget(**left)

    def final_fractions(self, graph: Graph, dense_ms: float = 0.0) -> dict[str, float]:
        """The limits of the budget as fractions of the dense model."""
        assert isinstance(self.budget, Budget)
        units = sum(t.n_units for t in graph.select(self.granularity))
        dense = {**asdict(dense_cost(graph)), "units": units}
        budget = self.budget
        found = {q: budget.fraction(q, dense[q]) if dense[q] else 1.0 for q in budget.sizes}
        if budget.latency_ms is not None and dense_ms:
            found["latency_ms"] = min(1.0, budget.latency_ms / dense_ms)
        return found
