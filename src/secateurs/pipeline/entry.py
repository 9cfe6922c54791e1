"""`prune` and `prune_stages`: the composition of all rooms, and their result."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from secateurs.bars import Progress, bar
from secateurs.boards import BoardLog
from secateurs.checkpoints import Checkpoints, keeper_of
from secateurs.distributed import Group, ranks_of
from secateurs.errors import ConfigError, choose
from secateurs.filters import Patterns
from secateurs.finetuning import Finetune, FinetuneResult
from secateurs.pipeline.peers import Peers
from secateurs.pipeline.request import check_request, random_state
from secateurs.pipeline.resolving import check_budget
from secateurs.pipeline.resuming import OWN, run_marks
from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.pipeline.stepping import cut_all
from secateurs.report.assemble import Outcome, assemble
from secateurs.report.data import Report
from secateurs.schedules import Schedule
from secateurs.surgery import save, slice_masks
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

__all__ = ["PruneResult", "cut_stages", "prune", "prune_stages"]


@dataclass(eq=False)
class PruneResult:
    """What `prune` gives back.

    Attributes:
        model: the smaller model, verified; in the mode of the model that came in.
        plan: what was removed.
        masks: weight masks of the smaller model, to go on training with `hold_masks`.
        report: everything worth reading, as data; `report.to_dict()` for JSON.
        masked: the dense-shaped model with everything removed at zero.
        scores: of the last step that was kept; zeros by no criterion where sizes alone decided.
        counts: of the last step that was kept.
        history: fine-tuning after each step, those that were rolled back included; one for all
            steps of a stage with `Schedule(every=)`; before them, that of `Stage(prepare=)`.
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
    budget: Budget | Literal["auto"] | None = None,
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
        **options: `allocation`, `min_keep`, `round_to`, `homogeneous`, `control`, `max_drop`,
            `allow_missed`, `prepare`, `penalty`, `repair`, `regrow`, `at_init`, `ticket`,
            `fisher_masks`, `layerwise` as in `Stage`, and the options of `prune_stages` (`include`,
            `exclude` and `group` among them).

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
    of_stage = {f.name for f in fields(Stage)} - {*inspect.signature(prune).parameters}
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
    log: BoardLog | None = None,
    checkpoint: Checkpoints | None = None,
    resume: bool = False,
    group: Group = None,
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
        progress: True draws a bar on stderr; a function is called with (what, done, total), where
            cuts and optimizer steps of all trainings are counted.
        log: for TensorBoard: every training and every cut is written to it. Nothing about the
            result changes. Close it yourself: `with BoardLog(folder) as log:`. A resumed run goes
            on with the curves.
        checkpoint: where checkpoints go: after each step, and inside long trainings as often as it
            says. They stay when the run has ended, so that results that were not saved yet are
            quickly made again; `checkpoint.clear()` removes them.
        resume: go on from the newest checkpoint, with the arguments of the start. On a CPU the
            result is bit for bit that of a run without interruption, for data that can be read
            again: see `finetune`. Several processes go on as many as they were.
        group: "world" or a process group of torch.distributed: every rank gives the same plain
            model and settings, and its own part of `batches` and `calibration`, of any number, or
            none. Scores are those of all data, each training step follows the mean over the
            samples of all ranks, every rank gets the same result. `evaluate` and `test` are called
            on every rank, with all of their data; what they say on rank 0 counts. Repairs,
            `at_init`, `fisher_masks`, `layerwise`, `allocation="sensitivity"` and latencies are
            made by rank 0, from its data, for all; meanwhile the others wait, at most for the
            timeout of the group.
            A bar, a log and checkpoints are written by rank 0. Not with `ticket`.

    Other arguments, and errors, as `prune`.
    """
    peers = Peers(ranks_of(group))
    if not peers.first:  # one draws a bar and writes a log
        progress, log = False if progress is True else progress, None
    shown = bar("prune") if progress is True else nullcontext(progress or None)
    asked = {
        "stages": stages, "include": include, "exclude": exclude, "outputs": outputs,
        "norm": norm, "form": form, "maximize": maximize, "seed": seed,
        "functions": {"loss_fn": loss_fn, "evaluate": evaluate},
    }  # fmt: skip
    with random_state(seed), shown as tell:
        given = {
            "calibration": calibration is not None, "test": test is not None,
            "checkpoint": checkpoint is not None, "resume": resume, "latency": latency,
        }  # fmt: skip
        peers.check(model, stages)
        peers.same_start(model, {**asked, "given": given})
        graph = check_request(
            model, batches, loss_fn, stages, example_inputs=example_inputs, evaluate=evaluate,
            test=test, calibration=calibration, include=include, exclude=exclude,
            outputs=outputs, norm=norm, form=form, latency=latency, peers=peers,
        )  # fmt: skip
        peers.check_apart(batches)
        samples = batches if calibration is None else calibration
        run = Run(
            model,
            batches,
            samples,
            loss_fn,
            graph,
            evaluate,
            maximize,
            seed,
            tell,
            example_inputs,
            log,
            peers,
        )
        if checkpoint is not None:
            run.remember(
                keeper_of(
                    checkpoint, lambda: run_marks(run, asked), peers.ranks, resume=resume, own=OWN
                )
            )
        small = cut_all(run, stages, example_inputs, form=form, norm=norm)
        assert run.plan is not None
        run.spent = run.total
        run.tell("measure")
        report = _told(
            peers,
            Outcome(
                dense=model, small=small, graph=graph, plan=run.plan, scores=[
                    scores if stage.layerwise is None else replace(scores, criterion="")
                    for stage, scores in zip(stages, run.last_scores, strict=True)
                ],
                counts=run.last_counts, dense_metrics=run.dense_metrics, steps=tuple(run.steps),
                evaluate=evaluate, test=test, batches=samples, loss_fn=loss_fn, maximize=maximize,
                example_inputs=example_inputs, latency=tuple(latency or ()), seed=seed,
                notes=tuple(run.notes), met=run.met,
            ),
        )  # fmt: skip
    return PruneResult(
        small, run.plan, slice_masks(run.plan), report, run.work,
        run.last_scores[-1], run.last_counts[-1], run.history,
    )  # fmt: skip


def _told(peers: Peers, run: Outcome) -> Report:
    """The report: every rank measures the metrics, rank 0 the rest, and all get what it has."""
    if not peers.many:
        return assemble(run)
    known = {
        (split, id(model)): peers.metrics(model, function)
        for split, function, models in (
            ("validation", run.evaluate, [run.small]), ("test", run.test, [run.dense, run.small])
        )
        for model in models
    }  # fmt: skip
    batches = peers.to_look_at(run.dense, run.batches)
    n = peers.ranks.size
    run = replace(
        run,
        evaluate=None if run.evaluate is None else lambda model: known["validation", id(model)],
        test=None if run.test is None else lambda model: known["test", id(model)],
        batches=batches,
        notes=(
            f"made by {n} processes, each with its part of the data; times are those of process 0",
            *run.notes,
        ),
    )
    return peers.once("the report", lambda: assemble(run), run.graph)


def cut_stages(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    stages: Sequence[Stage],
    *,
    example_inputs: Inputs,
    graph: Graph,
    evaluate: Evaluate | None = None,
    calibration: Batches | None = None,
    norm: str = "exact",
    maximize: bool = True,
    form: str = "auto",
    seed: int = 0,
) -> tuple[nn.Module, Plan]:
    """The smaller model and what was removed: `prune_stages` without measuring and report.

    Args:
        graph: from `check_request` on a model of the same architecture.

    Other arguments, and errors, as `prune_stages`.
    """
    samples = batches if calibration is None else calibration
    for stage in stages:
        check_budget(stage, evaluate is not None)
    with random_state(seed):
        run = Run(
            model, batches, samples, loss_fn, graph, evaluate, maximize, seed, None, example_inputs
        )
        small = cut_all(run, stages, example_inputs, form=form, norm=norm)
    assert run.plan is not None
    return small, run.plan
