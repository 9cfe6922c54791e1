"""`prune`: score, allocate, select, heal, step by step; then shrink, verify, measure, report.

    for each stage, for each step of its schedule:
        score -> allocate -> select -> zero -> fine-tune with the cut held at zero
    shrink -> verify -> measure -> report

Everything happens on a copy: the caller's model is not changed, whatever happens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.allocation import ALLOCATORS, allocate
from secateurs.batches import check_batches, in_mode
from secateurs.controls import CONTROLS, controlled_scores, reinitialise_, shuffled_targets
from secateurs.cost import dense_cost
from secateurs.criteria import get_criterion
from secateurs.errors import BudgetError, ConfigError, ScoringError, choose
from secateurs.finetuning import Finetune, FinetuneResult, finetune
from secateurs.graph import trace
from secateurs.masks import apply_masks_
from secateurs.report.assemble import Outcome, assemble
from secateurs.report.data import Report, StepRow
from secateurs.schedules import Schedule
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.surgery import save, shrink, slice_masks
from secateurs.types import (
    Batches,
    Budget,
    Counts,
    Evaluate,
    Graph,
    Inputs,
    LossFn,
    Plan,
    Scores,
    Threshold,
    expand_granularity,
)

__all__ = ["PruneResult", "Stage", "prune", "prune_stages"]

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: called before each step and at the end."""


@dataclass(frozen=True)
class Stage:
    """One round of pruning: what is cut, by which measure, how much, and how it heals.

    Args:
        budget: what may remain; exactly one of `budget` and `threshold`.
        threshold: units scoring below it go.
        criterion: a name, or a mapping with its options.
        granularity: kinds of units, or "structured".
        allocation: how the budget is divided among targets ("uniform", "global", ...).
        schedule: steps and curve. A threshold is applied once per step, to what is left.
        finetune: after each step; None = no training.
        min_keep: fewest units that stay in each target.
        round_to: units kept are multiples of this where possible.
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
    round_to: int = 1
    control: str | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.threshold is None):
            raise ConfigError("give exactly one of budget and threshold")
        get_criterion(self.criterion)
        expand_granularity(self.granularity)
        choose(self.allocation, ALLOCATORS, "allocation")
        if self.control is not None:
            choose(self.control, CONTROLS, "control")
        for name in ("min_keep", "round_to"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

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
        dense = {"units": units, "params": cost.params, "macs": cost.macs}[self.budget.quantity]
        share = self.steps.remaining(step, self.budget.fraction(int(dense)))
        return Budget(**{self.budget.quantity: min(1.0, share)})


@dataclass(eq=False)
class PruneResult:
    """What `prune` gives back.

    Attributes:
        model: the smaller model, verified; in the mode of the model that came in.
        plan: what was removed.
        masks: weight masks of the smaller model, to go on training with `hold_masks`.
        report: everything worth reading, as data; `report.to_dict()` for JSON.
        masked: the dense-shaped model with everything removed at zero.
        scores: of the last step.
        counts: of the last step.
        history: fine-tuning after each step.
    """

    model: nn.Module
    plan: Plan
    masks: dict[str, Tensor]
    report: Report
    masked: nn.Module
    scores: Scores
    counts: Counts
    history: list[FinetuneResult] = field(default_factory=list)

    def save(self, directory: str | Path, *, force: bool = False) -> Path:
        """Write `model.safetensors`, `plan.json`, `report.json` and `report.html`.

        Raises:
            ConfigError: the directory holds results already and `force` is not set.
            MissingDependencyError: the page needs `secateurs[report]`.
        """
        import json

        from secateurs.report.html import check_available, write

        check_available()
        out = save(self.model, self.plan, directory, force=force)
        text = json.dumps(self.report.to_dict(), indent=1, allow_nan=False)
        (out / "report.json").write_text(text, encoding="utf-8")
        write(self.report, out / "report.html")
        return out


def prune(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    *,
    example_inputs: Inputs,
    budget: Budget | None = None,
    threshold: Threshold | None = None,
    criterion: str | Mapping[str, Any] = "taylor",
    granularity: str | tuple[str, ...] = "structured",
    schedule: Schedule | None = None,
    finetune: Finetune | None = None,
    evaluate: Evaluate | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a trained model in one call; the model that is passed in is not changed.

    Args:
        model: trained.
        batches: training data, re-iterable pairs `(inputs, targets)`.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the samples.
        example_inputs: a tensor, a tuple or a dict: what the model is called with.
        budget, threshold, criterion, granularity, schedule, finetune: see `Stage`.
        evaluate: `evaluate(model)` on validation data; a float or a dict.
        **options: `allocation`, `min_keep`, `round_to`, `control` as in `Stage`, and the options
            of `prune_stages`.

    Raises:
        ConfigError, BudgetError, DataError, CaptureError, ScoringError, SoundnessError: by stage.

    Example:
        >>> from torch.nn import functional as F
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(32, 4)
        >>> result = prune(net, [(x, (x[:, 0] > 0).long())], F.cross_entropy, example_inputs=x,
        ...                budget=Budget(units=0.25))
        >>> result.model[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    stage_options = {
        k: options.pop(k) for k in ("allocation", "min_keep", "round_to", "control") if k in options
    }
    stage = Stage(budget, threshold, criterion, granularity, schedule=schedule, finetune=finetune,
                  **stage_options)  # fmt: skip
    return prune_stages(
        model,
        batches,
        loss_fn,
        [stage],
        example_inputs=example_inputs,
        evaluate=evaluate,
        **options,
    )


def prune_stages(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    stages: Sequence[Stage],
    *,
    example_inputs: Inputs,
    evaluate: Evaluate | None = None,
    test: Evaluate | None = None,
    calibration: Batches | None = None,
    maximize: bool = True,
    form: str = "auto",
    seed: int = 0,
    latency: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Several rounds in a row, e.g. weights first, then the structure that is left.

    Args:
        stages: rounds; masks of earlier ones stay.
        evaluate: on validation data, used along the way.
        test: on test data, called twice at the end: for the dense and for the smaller model.
        calibration: batches for scoring; by default the training batches.
        maximize: whether a larger metric is better.
        form: of the result, see `shrink`.
        seed: of noise, dropout and loaders without a generator.
        latency: batch sizes to time; None = not timed.
        progress: called with (what, done, total).

    Other arguments, and errors, as `prune`.
    """
    if not stages:
        raise ConfigError("no stage is given")
    choose(form, ["auto", "module", "graph"], "form")
    samples = batches if calibration is None else calibration
    check_batches(model, batches, loss_fn)
    if samples is not batches:
        check_batches(model, samples, loss_fn)
    graph = trace(model, example_inputs)
    for stage in stages:
        if not graph.select(stage.granularity):
            found = sorted({t.kind for t in graph.targets.values()})
            raise ConfigError(
                f"nothing of granularity {stage.granularity!r} can be pruned in this model; "
                f"it has {', '.join(found) or 'no prunable part'}. "
                + "; ".join(f"{e.name}: {e.reason}" for e in graph.excluded[:3])
            )
    run = _Run(model, batches, samples, loss_fn, graph, evaluate, maximize, seed, progress)
    run.total = sum(stage.steps.steps for stage in stages)
    for stage in stages:
        run.stage(stage)
    assert run.plan is not None
    small = shrink(run.work, run.plan, example_inputs, form=form)
    small.train(model.training)
    run.tell("measure", run.total)
    report = assemble(
        Outcome(
            dense=model, small=small, graph=graph, plan=run.plan, scores=run.last_scores,
            counts=run.last_counts, dense_metrics=run.dense_metrics, steps=tuple(run.steps),
            evaluate=evaluate, test=test, batches=samples, loss_fn=loss_fn, maximize=maximize,
            example_inputs=example_inputs, latency=tuple(latency or ()), seed=seed,
            notes=tuple(run.notes),
        )
    )  # fmt: skip
    return PruneResult(
        small, run.plan, slice_masks(run.plan), report, run.work,
        run.last_scores[-1], run.last_counts[-1], run.history,
    )  # fmt: skip


class _Run:
    """The state of one pruning run: a masked copy of the model and the plan so far."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        samples: Batches,
        loss_fn: LossFn,
        graph: Graph,
        evaluate: Evaluate | None,
        maximize: bool,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.model, self.work = model, copy.deepcopy(model)
        self.batches, self.samples, self.loss_fn = batches, samples, loss_fn
        self.graph, self.evaluate, self.maximize = graph, evaluate, maximize
        self.seed, self.progress = seed, progress
        self.plan: Plan | None = None
        self.steps: list[StepRow] = []
        self.history: list[FinetuneResult] = []
        self.notes: list[str] = []
        self.last_scores: list[Scores] = []
        self.last_counts: list[Counts] = []
        self.total = 0
        self.dense_metrics = metrics_of(model, evaluate)

    def tell(self, what: str, done: int) -> None:
        if self.progress is not None:
            self.progress(what, done, self.total)

    def stage(self, stage: Stage) -> None:
        """All steps of one stage."""
        samples = self.samples
        if stage.control == "random-labels":
            samples = shuffled_targets(samples, self.model, self.seed)
        schedule = stage.steps
        fractions = list(schedule.fractions())
        for step in range(1, schedule.steps + 1):
            self.tell("prune", len(self.steps))
            scores, counts = self.cut(stage, step, samples)
            masked = main_metric(metrics_of(self.work, self.evaluate))
            if stage.control == "reinit" and step == schedule.steps:
                assert self.plan is not None
                reinitialise_(self.work, self.plan.masks, self.seed)
            healed, loss = self.heal(stage)
            self.steps.append(
                StepRow(
                    step=len(self.steps) + 1,
                    fraction=fractions[step - 1],
                    remaining=dict(counts.realised),
                    metric_masked=masked,
                    metric_healed=healed,
                    loss=loss,
                )
            )
        self.last_scores.append(scores)
        self.last_counts.append(counts)
        for note in scores.notes:
            if note not in self.notes:
                self.notes.append(note)
        self.notes += [f"{name}: not scored: {why}" for name, why in scores.not_scored.items()]

    def cut(self, stage: Stage, step: int, samples: Batches) -> tuple[Scores, Counts]:
        """Score, allocate, select, and zero what goes."""
        scores = score(
            self.work, samples, self.loss_fn, criterion=stage.criterion, graph=self.graph,
            granularity=stage.granularity, previous=self.plan, seed=self.seed + len(self.steps),
        )  # fmt: skip
        scores = controlled_scores(scores, stage.control, self.seed + len(self.steps))
        asked = stage.asked_at(step, self.graph)
        counts = allocate(
            scores, asked, method=stage.allocation, min_keep=stage.min_keep,
            round_to=stage.round_to,
        )  # fmt: skip
        before = 0 if self.plan is None else self.plan.n_removed
        self.plan = select(scores, counts, previous=self.plan)
        if self.plan.n_removed == before and step == stage.steps.steps and before == 0:
            raise BudgetError(
                f"{asked} removes nothing: all scores reach it; ask for less to remain"
            )
        apply_masks_(self.work, self.plan.masks)
        return scores, counts

    def heal(self, stage: Stage) -> tuple[float | None, float | None]:
        """Fine-tune with the cut held; the metric and the training loss afterwards."""
        config = stage.finetune
        if config is None or self.plan is None:
            return None, None
        done = finetune(
            self.work, self.batches, self.loss_fn, config, masks=self.plan.masks,
            teacher=self.model if config.distill else None, evaluate=self.evaluate,
            maximize=self.maximize, seed=self.seed + len(self.steps),
        )  # fmt: skip
        self.history.append(done)
        if config.restore_best:
            healed = main_metric(metrics_of(self.work, self.evaluate))
        else:
            healed = done.final_metric
        return healed, done.history[-1].train_loss if done.history else None


def metrics_of(model: nn.Module, evaluate: Evaluate | None) -> dict[str, float]:
    """The metrics of a model by name ("metric" for a bare number), checked.

    Raises:
        ConfigError: `evaluate` returns nothing.
        ScoringError: a metric is not a number.
    """
    if evaluate is None:
        return {}
    with in_mode(model, training=False), torch.no_grad():
        answer = evaluate(model)
    found = dict(answer) if isinstance(answer, Mapping) else {"metric": answer}
    if not found:
        raise ConfigError("evaluate returned an empty dict; its first entry is the main metric")
    for name, value in found.items():
        if not isinstance(value, (int, float)) or value != value:
            raise ScoringError(f"evaluate returned {name} = {value!r}; expected a number")
    return {name: float(value) for name, value in found.items()}


def main_metric(metrics: Mapping[str, float]) -> float | None:
    """The first entry, or None."""
    return next(iter(metrics.values()), None)
