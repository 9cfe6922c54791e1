"""Run a recipe: from names to a model and data, through the pipeline, to a directory of results.

    Recipe -> Problem (model, data, loss, metric) -> PruneResult -> files

Used by the command line, the benchmarks and the examples. Everything that can be wrong with a
recipe is found before anything expensive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from secateurs.batches import check_batches, iterate, model_device
from secateurs.errors import ConfigError, DataError
from secateurs.finetuning import Finetune
from secateurs.pipeline import Progress, PruneResult, prune_stages
from secateurs.recipe import Recipe, import_function
from secateurs.report import check_available
from secateurs.report.data import Report
from secateurs.tasks import dense_checkpoint, get_task
from secateurs.tasks.base import Metric, accuracy
from secateurs.types import Batches, Inputs, LossFn

__all__ = ["Problem", "check_output", "load_problem", "run_recipe", "write_results"]

RESULTS = ("model.safetensors", "plan.json", "recipe.yaml", "report.json", "report.html")


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
        metric: `metric(model, batches)`, larger = better.
        sizes: samples in each split, where known.
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


def check_output(out: Path, force: bool) -> None:
    """Refuse to overwrite earlier results.

    Raises:
        ConfigError: the directory holds results and `force` is not set, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; name a directory")
    held = [name for name in RESULTS if (out / name).exists()]
    if held and not force:
        raise ConfigError(
            f"{out} already holds {', '.join(held)}. "
            "Add --force to overwrite, or choose another --out"
        )


def load_problem(recipe: Recipe, base: Path | None = None, *, train: bool = True) -> Problem:
    """The model and data that a recipe names.

    Args:
        recipe: validated.
        base: directory of the recipe file, where the user's own files are looked for first.
        train: False builds a task's network without training it (for a dry run).

    Raises:
        ConfigError: a function cannot be imported or returns something else.
        MissingDependencyError: the data of a task is not installed.
        DataError: the data is empty or does not fit the model.
    """
    if recipe.task is None:
        return _own_problem(recipe, base)
    task = get_task(recipe.task)
    if train:
        model, data, _ = dense_checkpoint(task, recipe.seed, full_data=recipe.full_data)
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
    loss_fn = import_function(recipe.loss, "loss", base)
    metric = import_function(recipe.metric, "metric", base) if recipe.metric else accuracy
    try:
        model, data = build(), read()
    except Exception as error:  # the user's functions can raise anything
        raise ConfigError(
            f"model or data function fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{recipe.model} returned {type(model).__name__}, expected a Module")
    wanted = ("train", "validation", "test")
    missing = [k for k in wanted if not isinstance(data, Mapping) or data.get(k) is None]
    if missing:
        raise ConfigError(
            f"{recipe.data} must return a dict with {', '.join(wanted)} "
            f"(and, if wanted, calibration, example_inputs); missing: {', '.join(missing)}"
        )
    for split in wanted:
        try:
            check_batches(model, data[split], loss_fn)
        except DataError as error:
            raise DataError(f"{split} data: {error}") from error
    first = next(iter(iterate(data["train"], model_device(model), max_batches=1)))[0]
    return Problem(
        name=recipe.model,
        model=model,
        train=data["train"],
        calibration=data.get("calibration", data["train"]),
        validation=data["validation"],
        test=data["test"],
        example_inputs=data.get("example_inputs", first),
        loss_fn=loss_fn,
        metric=metric,
        sizes={k: len(data[k].dataset) for k in wanted if hasattr(data[k], "dataset")},
    )


def run_recipe(
    recipe: Recipe, problem: Problem, *, out: str = "", progress: Progress | None = None
) -> PruneResult:
    """Prune a problem by its recipe.

    Args:
        recipe: what to do.
        problem: from `load_problem`.
        out: the directory of the results, for the suggestions in the report.
        progress: called with (what, done, total).

    Raises:
        MissingDependencyError: the packages that draw the report are not installed.
        PruningError: whatever `prune_stages` raises.
    """
    check_available()
    result = prune_stages(
        problem.model,
        problem.train,
        problem.loss_fn,
        recipe.all_stages(),
        example_inputs=problem.example_inputs,
        calibration=problem.calibration,
        evaluate=lambda model: problem.metric(model, problem.validation),
        test=lambda model: problem.metric(model, problem.test),
        form=recipe.form,
        seed=recipe.seed,
        latency=recipe.latency,
        progress=progress,
    )
    sizes = ", ".join(f"{n} {split}" for split, n in problem.sizes.items())
    notes = (f"samples: {sizes}",) if sizes else ()
    result.report = replace(
        result.report,
        title=problem.name,
        recipe=recipe.resolved(),
        notes=(*notes, *result.report.notes),
        next_steps=suggestions(recipe, result.report, out),
    )
    return result


def suggestions(recipe: Recipe, report: Report, out: str) -> tuple[str, ...]:
    """Three things to try next, as commands."""
    where = out or "OUT"
    again = f"secateurs run {where}/recipe.yaml"
    main = report.rows[0]
    lost = 0.0 if main.before is None or main.after is None else main.before - main.after
    stage = recipe.all_stages()[-1]
    key = f"stages.{len(recipe.stages) - 1}." if recipe.stages else ""
    lines = []
    if stage.budget is not None and isinstance(stage.budget.amount, float):
        share = stage.budget.amount / 2 if lost <= 0.01 else min(1.0, stage.budget.amount * 1.5)
        word = "deeper" if lost <= 0.01 else "less deep"
        change = f"{key}budget.{stage.budget.quantity}={share:.3g}"
        lines.append(f"cut {word}: {again} --set {change} --out {where}-{word.replace(' ', '-')}")
    else:
        config = replace(stage.finetune or Finetune(epochs=0), epochs=10, steps=None)
        change = f"{key}finetune.epochs={config.epochs}"
        lines.append(f"heal longer: {again} --set {change} --out {where}-longer")
    lines.append(
        f"is the criterion better than chance? {again} --set {key}control=random "
        f"--out {where}-random"
    )
    factory = "build" if recipe.task is None else f'get_task("{recipe.task}").build'
    lines.append(f'use it: secateurs.load("{where}", {factory})')
    return tuple(lines)


def write_results(result: PruneResult, recipe: Recipe, out: Path, *, force: bool) -> list[Path]:
    """Write model, plan, recipe and report; returns the files.

    Raises:
        ConfigError: the directory holds results already and `force` is not set.
    """
    check_output(out, force)
    result.save(out, force=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return [out / name for name in RESULTS]


def recipe_text(report: Report) -> str:
    """The recipe of a report as YAML."""
    text: Any = yaml.safe_dump(report.recipe, sort_keys=False)
    return str(text)
