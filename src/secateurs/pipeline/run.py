"""`prune` and `prune_stages`: the composition of all rooms, and its result."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateurs.bars import Progress, bar, epoch_text
from secateurs.controls import controlled_scores, null_scores, reinitialise_, shuffled_targets
from secateurs.errors import BudgetError, ConfigError, choose
from secateurs.filters import Patterns
from secateurs.finetuning import Finetune, FinetuneResult, finetune
from secateurs.masks import apply_masks_
from secateurs.pipeline.request import check_request, given, random_state
from secateurs.pipeline.stage import Stage
from secateurs.report.assemble import Outcome, assemble, metrics_of, remaining_of
from secateurs.report.data import Report, StepRow
from secateurs.schedules import Schedule
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.surgery import save, shrink, slice_masks
from secateurs.surgery.shrinking import info_of
from secateurs.surgery.verification import copied
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
)

__all__ = ["PruneResult", "prune", "prune_stages"]


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
            ConfigError: the directory holds results already and `force` is not set, or is a file.
            MissingDependencyError: the page needs `secateurs[report]`.
        """
        from secateurs.report.html import render

        if Path(directory).is_file():
            raise ConfigError(f"{directory} is a file; name a directory")
        text = json.dumps(self.report.to_dict(), indent=1, allow_nan=False)
        page = render(self.report)
        out = save(self.model, self.plan, directory, force=force)
        (out / "report.json").write_text(text, encoding="utf-8")
        (out / "report.html").write_text(page, encoding="utf-8")
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
        **options: `allocation`, `min_keep`, `round_to`, `homogeneous`, `control` as in `Stage`,
            and the options of `prune_stages` (`include` and `exclude` among them).

    Raises:
        ConfigError, BudgetError, DataError, CaptureError, ScoringError, SoundnessError: by stage.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(32, 4)
        >>> result = prune(net, [(x, (x[:, 0] > 0).long())], F.cross_entropy, example_inputs=x,
        ...                budget=Budget(units=0.25))
        >>> result.model[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    known = {n for f in (prune, prune_stages) for n in inspect.signature(f).parameters}
    of_stage = ("allocation", "min_keep", "round_to", "homogeneous", "control")
    for name in options:
        choose(name, {*of_stage, *known} - {"options", "stages"}, "option of prune")
    stage_options = {k: options.pop(k) for k in of_stage if k in options}
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
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    outputs: Sequence[str] = (),
    norm: str = "exact",
    maximize: bool = True,
    form: str = "auto",
    seed: int = 0,
    latency: Sequence[int] | None = None,
    progress: Progress | bool = False,
) -> PruneResult:
    """Several rounds in a row, e.g. weights first, then the structure that is left.

    Args:
        stages: rounds; masks of earlier ones stay.
        evaluate: on validation data, used along the way. Its first call is on the dense model,
            before anything expensive.
        test: on test data, called twice at the end: for the dense and for the smaller model.
        calibration: batches for scoring; by default the training batches.
        include, exclude: what may be pruned in all stages, by name, glob, kind, regular expression,
            module class or module: see `Graph.only`.
        outputs: names of the model's outputs that matter, see `trace`; empty for all.
        norm: what norms and means over removed units count: "exact", all that the dense model had;
            "plain", what is left (see `shrink`); "pin": such units stay (see `trace`).
        maximize: whether a larger metric is better.
        form: of the result, see `shrink`.
        seed: of noise, dropout and loaders without a generator, from 0 to 2**32 - 1.
        latency: batch sizes to time; None = not timed.
        progress: True draws a bar on stderr; a function is called with (what, done, total).

    Other arguments, and errors, as `prune`.
    """
    shown = bar("prune") if progress is True else nullcontext(progress or None)
    with random_state(seed), shown as tell:
        graph = check_request(
            model, batches, loss_fn, stages, example_inputs=example_inputs, evaluate=evaluate,
            test=test, calibration=calibration, include=include, exclude=exclude,
            outputs=outputs, norm=norm, form=form, latency=latency,
        )  # fmt: skip
        samples = batches if calibration is None else calibration
        run = _Run(model, batches, samples, loss_fn, graph, evaluate, maximize, seed, tell)
        run.total = sum(stage.steps.steps for stage in stages)
        for number, stage in enumerate(stages, start=1):
            run.stage(number, stage)
        assert run.plan is not None
        kept = "plain" if norm == "plain" else "exact"
        small = shrink(run.work, run.plan, example_inputs, form=form, norm=kept)
        if info_of(small).form == "graph":  # the module form has the mode of each module already
            small.train(model.training)
        run.tell("measure", run.total)
        report = assemble(
            Outcome(
                dense=model, small=small, graph=graph, plan=run.plan, scores=run.last_scores,
                counts=run.last_counts, dense_metrics=run.dense_metrics, steps=tuple(run.steps),
                evaluate=evaluate, test=test, batches=samples, loss_fn=loss_fn, maximize=maximize,
                example_inputs=example_inputs, latency=tuple(latency or ()), seed=seed,
                notes=tuple(run.notes), met=run.met,
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
        self.model, self.work = model, copied(model)
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
        self.met = True
        self.dense_metrics = metrics_of(model, evaluate)

    def tell(self, what: str, done: int) -> None:
        if self.progress is not None:
            self.progress(what, done, self.total)

    def stage(self, number: int, stage: Stage) -> None:
        """All steps of one stage."""
        samples = self.samples
        if stage.control == "random-labels":
            samples = shuffled_targets(samples, self.model, self.seed)
        schedule = stage.steps
        fractions = list(schedule.fractions())
        before = 0 if self.plan is None else self.plan.n_removed
        for step in range(1, schedule.steps + 1):
            self.tell("prune", len(self.steps))
            try:
                scores, counts = self.cut(stage, step, samples)
            except BudgetError as error:
                if stage.threshold is None or step == 1 or stage.control == "reinit":
                    raise
                self.met = False
                self.notes.append(f"stopped after step {step - 1} of {schedule.steps}: {error}")
                break
            masked = _main(metrics_of(self.work, self.evaluate))
            if stage.control == "reinit" and step == schedule.steps:
                assert self.plan is not None
                reinitialise_(self.work, self.plan.masks, self.seed)
            healed, loss = self.heal(stage)
            self.steps.append(
                StepRow(
                    step=len(self.steps) + 1,
                    fraction=fractions[step - 1] if stage.threshold is None else None,
                    remaining=remaining_of(self.graph, counts),
                    metric_masked=masked,
                    metric_healed=healed,
                    loss=loss,
                )
            )
        self.last_scores.append(scores)
        self.last_counts.append(counts)
        if self.plan is not None and self.plan.n_removed == before:
            self.notes.append(
                f"stage {number} removed nothing: {given(counts.asked)} was met before it"
            )
        found = [
            *scores.notes,
            *_rounded(stage, counts, self.graph),
            *(f"{n}: not scored: {w}" for n, w in scores.not_scored.items()),
        ]
        self.notes += [note for note in found if note not in self.notes]

    def cut(self, stage: Stage, step: int, samples: Batches) -> tuple[Scores, Counts]:
        """Score, allocate, select, and zero what goes."""
        scores = score(
            self.work, samples, self.loss_fn, criterion=stage.criterion, graph=self.graph,
            granularity=stage.granularity, previous=self.plan, seed=self.seed + len(self.steps),
            progress=lambda i, n: self.tell(f"score: batch {i} of {n or '?'}", len(self.steps)),
        )  # fmt: skip
        scores = controlled_scores(scores, stage.control, self.seed + len(self.steps))
        asked = stage.asked_at(step, self.graph)
        counts = stage.allocated(scores, asked, self.null(stage, samples))
        self.plan = select(scores, counts, previous=self.plan)
        final = step == stage.steps.steps
        if not self.plan.n_removed and (final or isinstance(asked, Threshold)):
            raise BudgetError(f"{given(asked)} removes nothing: all scores reach it")
        apply_masks_(self.work, self.plan.masks)
        return scores, counts

    def null(self, stage: Stage, samples: Batches) -> list[Scores]:
        """Scores on shuffled labels, for a threshold that compares with them."""
        if not stage.null_repeats:
            return []
        seed = self.seed + len(self.steps)
        drawn = null_scores(
            self.work, samples, self.loss_fn, criterion=stage.criterion, graph=self.graph,
            granularity=stage.granularity, previous=self.plan, seed=seed,
            repeats=stage.null_repeats,
            progress=lambda i, n: self.tell(
                f"score shuffled labels: batch {i} of {n or '?'}", len(self.steps)
            ),
        )  # fmt: skip
        return [controlled_scores(scores, stage.control, seed) for scores in drawn]

    def heal(self, stage: Stage) -> tuple[float | None, float | None]:
        """Fine-tune with the cut held; the metric and the training loss afterwards."""
        config = stage.finetune
        if config is None or self.plan is None:
            return None, None
        done = finetune(
            self.work, self.batches, self.loss_fn, config, masks=self.plan.masks,
            teacher=self.model if config.distill else None, evaluate=self.evaluate,
            maximize=self.maximize, seed=self.seed + len(self.steps),
            progress=lambda row: self.tell(
                epoch_text("heal", row.epoch, row.train_loss, row.metric), len(self.steps)
            ),
        )  # fmt: skip
        self.history.append(done)
        if config.restore_best:
            healed = _main(metrics_of(self.work, self.evaluate))
        else:
            healed = done.final_metric
        return healed, done.history[-1].train_loss if done.history else None


def _rounded(stage: Stage, counts: Counts, graph: Graph) -> list[str]:
    """A note about the targets whose counts were rounded."""
    multiples: dict[int, int] = {}
    for name, multiple in counts.round_to.items():
        if counts.kept[name] < graph.targets[name].n_units:
            multiples[multiple] = multiples.get(multiple, 0) + 1
    return [
        f"counts rounded: {n} of {len(counts.kept)} targets keep multiples of {multiple} units "
        f"(round_to={stage.round_to!r}"
        + ("; round_to=1 turns it off)" if stage.round_to == "auto" else ")")
        for multiple, n in multiples.items()
    ]


def _main(metrics: Mapping[str, float]) -> float | None:
    """The first entry, or None."""
    return next(iter(metrics.values()), None)
