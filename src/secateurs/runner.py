"""Run a recipe: from names to a model and data, through the pipeline, to a directory of results.

    Recipe -> Problem (model, data, loss, metric) -> PruneResult -> files

Used by the command line, the benchmarks and the examples. Everything that can be wrong with a
recipe is found before anything expensive.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from secateurs.bars import Progress, epoch_text
from secateurs.batches import batch_size, check_batches, iterate, model_device, preserve
from secateurs.boards import BoardLog
from secateurs.checkpoints import Checkpoints, differences, flush
from secateurs.errors import ConfigError, PruningError
from secateurs.finetuning import EpochRow, Finetune
from secateurs.imports import import_function
from secateurs.pipeline import PruneResult, check_request, prune_stages
from secateurs.pipeline.request import random_state
from secateurs.recipe import Recipe
from secateurs.report import check_available
from secateurs.report.data import Report
from secateurs.tasks import dense_checkpoint, get_task
from secateurs.tasks.base import Metric, accuracy
from secateurs.types import Batches, Budget, Evaluate, Graph, Inputs, LossFn

__all__ = [
    "Problem",
    "check_output",
    "check_recipe",
    "is_complete",
    "is_finished",
    "load_problem",
    "run_recipe",
    "write_results",
]

CROSS_ENTROPY = "torch.nn.functional:cross_entropy"
RESULTS = (
    "model.safetensors", "plan.json", "graph.json", "recipe.yaml", "report.json", "report.html",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Problem:
    """A trained model with everything that a run needs.

    Attributes:
        name: of the task, or of the function that builds the model.
        model: trained.
        train, calibration, validation, test: batches; choices are made on validation only, test
            is touched once at the end.
        example_inputs: what to trace with.
        loss_fn: `loss_fn(outputs, targets)`.
        metric: `metric(model, batches)`.
        sizes: samples in each split, where known.
        groups: "train" and "validation" -> the group of each sample, where the data has groups.
    """

    name: str
    model: nn.Module
    train: Batches
    calibration: Batches
    validation: Batches
    test: Batches
    example_inputs: Inputs
    loss_fn: LossFn
    metric: Metric
    sizes: Mapping[str, int]
    groups: Mapping[str, Sequence[Any]] | None = None


def check_output(out: Path, force: bool, files: Sequence[str] = RESULTS) -> None:
    """Refuse to overwrite earlier results.

    Args:
        out: directory.
        force: overwrite.
        files: that are results.

    Raises:
        ConfigError: the directory holds results and `force` is not set, or cannot be made.
    """
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file; name a directory")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{there} cannot be written to; choose another --out")
    held = [name for name in files if (out / name).exists()]
    if held and not force:
        raise ConfigError(
            f"{out} already holds {', '.join(held)}. "
            "Add --force to overwrite, or choose another --out"
        )


def is_complete(
    recipe: Recipe, out: Path, checkpoints: Checkpoints, *, resume: bool, force: bool
) -> bool:
    """Whether a directory has all results of a recipe already; else it may be run there.

    Args:
        recipe: that is to be run.
        out: directory of the results.
        checkpoints: of this run; removed if `force` asks for a new start.
        resume: go on with a run that was not finished.
        force: overwrite.

    Raises:
        ConfigError: what is there would be lost, or belongs to another recipe.
    """

    def others() -> list[str]:
        held = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
        return differences(held, yaml.safe_load(recipe.to_yaml()))

    return is_finished(out, RESULTS, others, checkpoints, resume=resume, force=force)


def is_finished(
    out: Path,
    files: Sequence[str],
    others: Callable[[], list[str]],
    checkpoints: Checkpoints,
    *,
    resume: bool,
    force: bool,
) -> bool:
    """Whether a directory has all results already; else they may be made there.

    Args:
        out: directory of the results.
        files: the results; `graph.json` is not always among them.
        others: what differs between the recipe of results that are there and this one.
        checkpoints, resume, force: as in `is_complete`.

    Raises:
        ConfigError: what is there would be lost, or belongs to another recipe.
    """
    unfinished = bool(checkpoints.files)
    if resume and unfinished:
        return False  # whatever results are there, it has begun to write them
    if unfinished and not force:
        raise ConfigError(
            f"{out} holds the checkpoints of a run that was not finished. Go on with it by "
            "--resume, start again by --force, or choose another --out"
        )
    needed = set(files) - {"graph.json"}
    if resume and all((out / name).exists() for name in needed):
        other = others()
        if not other:
            return True
        if not force:
            raise ConfigError(
                f"{out} holds the results of another recipe: {'; '.join(other)}. "
                "Add --force to overwrite, or choose another --out"
            )
    check_output(out, force, files)
    checkpoints.clear()
    return False


def load_problem(
    recipe: Recipe,
    base: Path | None = None,
    *,
    train: bool = True,
    progress: Progress | None = None,
) -> Problem:
    """The model and data that a recipe names.

    Args:
        recipe: validated.
        base: directory of the recipe file, where the user's own files are looked for first.
        train: False builds a task's network without training it (for a dry run).
        progress: called with (what, epochs done, epochs in all) while a task's network is trained.

    Raises:
        ConfigError: a function cannot be imported or returns something else.
        MissingDependencyError: the data of a task is not installed.
        DataError: the data is empty or does not fit the model.
    """
    if recipe.task is None:
        return _own_problem(recipe, base)
    task = get_task(recipe.task)
    if recipe.start == "untrained":
        with random_state(recipe.seed):
            model = task.build().eval()
        data = task.load(recipe.seed, full_data=recipe.full_data)
    elif train:

        def trained(row: EpochRow) -> None:
            if progress is not None:
                epochs = task.train_recipe.epochs
                text = epoch_text(
                    "train the dense network", row.epoch, row.train_loss, row.metric, epochs=epochs
                )
                progress(text, row.epoch, epochs)

        model, data, _ = dense_checkpoint(
            task, recipe.seed, full_data=recipe.full_data, progress=trained
        )
    else:
        model, data = task.build(), task.load(recipe.seed, full_data=recipe.full_data)
    return Problem(
        name=task.name,
        model=model,
        train=data.train,
        calibration=data.calibration,
        validation=data.validation,
        test=data.test,
        example_inputs=data.example_inputs,
        loss_fn=task.loss_fn,
        metric=task.metric,
        sizes=data.sizes,
    )


def _own_problem(recipe: Recipe, base: Path | None) -> Problem:
    assert recipe.model is not None
    assert recipe.data is not None
    build = import_function(recipe.model, "model", base)
    read = import_function(recipe.data, "data", base)
    loss_fn = import_function(recipe.loss or CROSS_ENTROPY, "loss", base)
    metric = import_function(recipe.metric, "metric", base) if recipe.metric else accuracy
    with random_state(recipe.seed):
        model, data = _called(build, recipe.model, "model"), _called(read, recipe.data, "data")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: {recipe.model} returned {type(model).__name__}, expected a torch.nn.Module"
        )
    wanted = ("train", "validation", "test")
    missing = [k for k in wanted if not isinstance(data, Mapping) or data.get(k) is None]
    if missing:
        raise ConfigError(
            f"data: {recipe.data} must return a dict with {', '.join(wanted)} "
            f"(and, if wanted, calibration, example_inputs); missing: {', '.join(missing)}"
        )
    for split in (*wanted, *(["calibration"] if data.get("calibration") is not None else [])):
        try:
            check_batches(model, data[split], loss_fn)
        except PruningError as error:
            raise type(error)(f"{split} data: {error}") from error
    with preserve(model):
        inputs, targets = next(iterate(data["train"], model_device(model), max_batches=1))
    if recipe.metric is None and (not isinstance(targets, Tensor) or targets.is_floating_point()):
        raise ConfigError("metric: accuracy, the default, needs integer labels; name a metric")
    return Problem(
        name=Path(recipe.model).name,
        model=model,
        train=data["train"],
        calibration=data["train"] if data.get("calibration") is None else data["calibration"],
        validation=data["validation"],
        test=data["test"],
        example_inputs=inputs if data.get("example_inputs") is None else data["example_inputs"],
        loss_fn=loss_fn,
        metric=metric,
        sizes={k: n for k in wanted if (n := _n_samples(data[k]))},
        groups=data.get("groups"),
    )


def _n_samples(batches: Batches) -> int | None:
    """Samples of a DataLoader or of a list of batches; None where counting would read the data."""
    if hasattr(batches, "dataset"):
        return len(batches.dataset)
    return sum(batch_size(b[0]) for b in batches) if isinstance(batches, (list, tuple)) else None


def _called(function: Callable[[], Any], path: str, what: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:  # the user's function can raise anything
        raise ConfigError(f"{what}: {path} fails: {type(error).__name__}: {error}") from error


def check_recipe(recipe: Recipe, problem: Problem) -> Graph:
    """Find what is wrong with a run before anything expensive; returns the graph.

    Raises:
        PruningError: whatever `check_request` raises.
    """
    return check_request(
        problem.model, problem.train, problem.loss_fn, recipe.all_stages(),
        example_inputs=problem.example_inputs, calibration=problem.calibration,
        evaluate=_on(problem.metric, problem.validation), include=recipe.include,
        exclude=recipe.exclude, outputs=recipe.outputs or (), norm=recipe.norm, form=recipe.form,
        latency=recipe.latency,
    )  # fmt: skip


def run_recipe(
    recipe: Recipe,
    problem: Problem,
    *,
    out: str = "",
    progress: Progress | bool = False,
    log: BoardLog | None = None,
    checkpoint: Checkpoints | None = None,
    resume: bool = False,
) -> PruneResult:
    """Prune a problem by its recipe.

    Args:
        recipe: what to do.
        problem: from `load_problem`.
        out: the directory of the results, for the suggestions in the report.
        progress, log, checkpoint, resume: as in `prune_stages`.

    Raises:
        ConfigError: the recipe asks for a comparison with controls, which is many runs.
        MissingDependencyError: the packages that draw the report are not installed.
        PruningError: whatever `prune_stages` raises.
    """
    if recipe.controls:
        raise ConfigError(
            f"this recipe compares its criterion with {', '.join(recipe.controls)}: many runs. "
            "Use secateurs.ablation.ablate, or leave control (and seeds) away for one run"
        )
    if recipe.search is not None:
        raise ConfigError(
            "this recipe searches: many runs. Use `secateurs search`, or take the block search: "
            "away for one run"
        )
    check_available()
    result = prune_stages(
        problem.model,
        problem.train,
        problem.loss_fn,
        recipe.all_stages(),
        example_inputs=problem.example_inputs,
        calibration=problem.calibration,
        evaluate=_on(problem.metric, problem.validation),
        test=_on(problem.metric, problem.test),
        include=recipe.include,
        exclude=recipe.exclude,
        outputs=recipe.outputs or (),
        norm=recipe.norm,
        maximize=recipe.maximize,
        form=recipe.form,
        seed=recipe.seed,
        latency=recipe.latency,
        progress=progress,
        log=log,
        checkpoint=checkpoint,
        resume=resume,
    )
    sizes = ", ".join(f"{n} {split}" for split, n in problem.sizes.items())
    notes: tuple[str, ...] = (f"samples: {sizes}",) if sizes else ()
    headline = result.report.headline
    if recipe.start == "untrained":
        headline += " Before, the network was not trained."
        whose = (
            f"as built under seed {recipe.seed}" if recipe.task else f"as {recipe.model} gave it"
        )
        notes += (
            f"start: untrained. Metrics 'before' and 'dense' are those of the untrained network, "
            f"{whose}: they say what chance gives, not what a trained dense network can do",
        )
    result.report = replace(
        result.report,
        headline=headline,
        title=problem.name,
        recipe=recipe.resolved(),
        notes=(*notes, *result.report.notes),
        next_steps=suggestions(recipe, result.report, out),
    )
    return result


def _on(metric: Metric, batches: Batches) -> Evaluate:
    return lambda model: metric(model, batches)


def suggestions(recipe: Recipe, report: Report, out: str) -> tuple[str, ...]:
    """Three things to try next, as commands."""
    where = out or "OUT"
    key = f"stages.{len(recipe.stages) - 1}." if recipe.stages else ""
    stage = recipe.all_stages()[-1]

    def again(name: str, *changes: str) -> str:
        sets = " ".join(f"--set {shlex.quote(key + change)}" for change in changes)
        recipe = shlex.quote(f"{where}/recipe.yaml")
        return f"secateurs run {recipe} {sets} --out {shlex.quote(f'{where}-{name}')}"

    lines = []
    sizes = stage.budget.sizes if isinstance(stage.budget, Budget) else {}
    shares = {name: amount for name, amount in sizes.items() if isinstance(amount, float)}
    if shares:
        quantity, share = next(iter(shares.items()))
        word, share = ("deeper", share / 2) if _hardly_lost(report) else (
            "less deep", min(1.5 * share, (1 + share) / 2)
        )  # fmt: skip
        change = f"budget.{quantity}={share:.3g}"
        lines.append(f"cut {word}: {again(word.replace(' ', '-'), change)}")
    else:
        config = stage.finetune or Finetune(epochs=5)
        name = "epochs" if config.steps is None else "steps"
        change = f"finetune.{name}={2 * (getattr(config, name) or 1)}"
        lines.append(f"heal longer: {again('longer', change)}")
    if stage.at_init is not None:
        chance = "at_init=null", "criterion=random", "schedule={curve: one_shot, steps: 1}"
        lines.append(f"is {stage.at_init.method} better than chance? {again('random', *chance)}")
    elif stage.ticket is not None:
        lines.append(f"is the ticket better than chance? {again('random', 'criterion=random')}")
    elif stage.control is None:
        control = "random" if stage.budget is not None else "shuffle"
        lines.append(f"is the criterion better than chance? {again(control, f'control={control}')}")
    else:
        lines.append(f"the criterion itself, not its control: {again('method', 'control=null')}")
    if recipe.task is None:
        lines.append(f'use it: secateurs.load("{where}", factory), factory: {recipe.model}')
    else:
        lines.append(f'use it: secateurs.load("{where}", get_task("{recipe.task}").build)')
    return tuple(lines)


def _hardly_lost(report: Report) -> bool:
    """Whether the main metric fell by no more than a hundredth of itself."""
    main = report.rows[0]
    if main.before is None or main.after is None:
        return True
    lost = main.before - main.after if main.better == "higher" else main.after - main.before
    return lost <= 0.01 * abs(main.before)


def write_results(result: PruneResult, recipe: Recipe, out: Path, *, force: bool) -> list[Path]:
    """Write model, plan, recipe and report; returns the files, which are on the disk then.

    Raises:
        ConfigError: the directory holds results already and `force` is not set.
    """
    check_output(out, force)
    result.save(out, force=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    files = [out / name for name in RESULTS if (out / name).exists()]
    for path in (*files, out):
        flush(path)
    return files
