"""From the names in a recipe to a model with its data, loss and metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.bars import Progress, epoch_text
from secateurs.batches import (
    batch_size,
    check_batches,
    check_iterable,
    iterate,
    model_device,
    preserve,
)
from secateurs.checkpoints import same_data
from secateurs.distributed import Group, Ranks, ranks_of
from secateurs.errors import ConfigError, PruningError
from secateurs.finetuning import EpochRow
from secateurs.imports import import_function
from secateurs.masks import named_tensors
from secateurs.pipeline.request import random_state
from secateurs.recipe import Recipe
from secateurs.statistics.together import shared_batches
from secateurs.tasks import dense_checkpoint, get_task
from secateurs.tasks.base import Metric, accuracy
from secateurs.types import Batches, Inputs, LossFn

__all__ = ["Problem", "load_problem"]

CROSS_ENTROPY = "torch.nn.functional:cross_entropy"


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


def load_problem(
    recipe: Recipe,
    base: Path | None = None,
    *,
    train: bool = True,
    progress: Progress | None = None,
    group: Group = None,
) -> Problem:
    """The model and data that a recipe names.

    Args:
        recipe: validated.
        base: directory of the recipe file, where the user's own files are looked for first.
        train: False builds a task's network without training it (for a dry run).
        progress: called with (what, epochs done, epochs in all) while a task's network is trained.
        group: "world" or a process group: `train` and `calibration` are the part of this process
            then. The batches of a task are dealt out, and its network is trained by rank 0. The
            function `data` of a recipe is called by every process and gives its part.

    Raises:
        ConfigError: a function cannot be imported or returns something else, or gives all processes
            the same training data.
        MissingDependencyError: the data of a task is not installed.
        DataError: the data is empty or does not fit the model.
    """
    ranks = ranks_of(group)
    if recipe.task is None:
        return _own_problem(recipe, base, ranks)
    task = get_task(recipe.task)

    def trained(row: EpochRow) -> None:
        if progress is not None:
            epochs = task.train_recipe.epochs
            text = epoch_text(
                "train the dense network", row.epoch, row.train_loss, row.metric, epochs=epochs
            )
            progress(text, row.epoch, epochs)

    with ranks.agreed(f"task {task.name}"):
        if train and recipe.start != "untrained" and ranks.rank == 0:
            model, data, _ = dense_checkpoint(
                task, recipe.seed, full_data=recipe.full_data, progress=trained
            )
        else:
            with random_state(recipe.seed):
                model = task.build()
            model = model.eval() if train or recipe.start == "untrained" else model
            data = task.load(recipe.seed, full_data=recipe.full_data)
    for tensor in named_tensors(model).values() if ranks.size > 1 else ():
        ranks.copy_first_(tensor)
    mine = slice(ranks.rank, None, ranks.size)
    return Problem(
        name=task.name,
        model=model,
        train=data.train[mine],
        calibration=data.calibration[mine],
        validation=data.validation,
        test=data.test,
        example_inputs=data.example_inputs,
        loss_fn=task.loss_fn,
        metric=task.metric,
        sizes=data.sizes,
    )


def _own_problem(recipe: Recipe, base: Path | None, ranks: Ranks) -> Problem:
    """The user's own model and data; each process has its part of the latter."""
    with ranks.agreed("model and data"):
        problem, given = _own_parts(recipe, base, several=ranks.size > 1)
    if ranks.size == 1:
        return problem
    if same_data(problem.train, ranks):
        raise ConfigError(
            f"data: {recipe.data} gave each of {ranks.size} processes the same training data, so "
            "that every sample would count several times: give the part of the process, such as "
            "batches[dist.get_rank() :: dist.get_world_size()] with torch.distributed as dist"
        )
    if not all(ranks.gather(given)):  # one may have no data, and all trace with the same
        shared = shared_batches(problem.model, problem.train, ranks)
        assert shared is not None
        problem = replace(problem, example_inputs=next(iter(shared))[0])
    sampler = getattr(problem.train, "sampler", None)  # a part of a data set that all hold
    whole = not hasattr(sampler, "num_replicas")
    n = problem.sizes.get("train", 0) if sampler is None or whole else len(sampler)
    total = int(ranks.add_up(n)[0])
    others = {split: n for split, n in problem.sizes.items() if split != "train"}
    return replace(problem, sizes={**({"train": total} if total else {}), **others})


def _own_parts(recipe: Recipe, base: Path | None, *, several: bool) -> tuple[Problem, bool]:
    """What the user's functions give, and whether example inputs are among it.

    Of `several` processes one may have no training data.
    """
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
        if several and split in ("train", "calibration") and _is_empty(data[split]):
            continue
        try:
            check_batches(model, data[split], loss_fn)
        except PruningError as error:
            raise type(error)(f"{split} data: {error}") from error
    with preserve(model):
        device = model_device(model)
        first = next(iterate(data["train"], device, max_batches=1, may_be_empty=True), None)
    inputs: Any
    inputs, targets = first or (None, None)
    if (
        recipe.metric is None
        and first is not None
        and (not isinstance(targets, Tensor) or targets.is_floating_point())
    ):
        raise ConfigError("metric: accuracy, the default, needs integer labels; name a metric")
    given = data.get("example_inputs")
    problem = Problem(
        name=Path(recipe.model).name,
        model=model,
        train=data["train"],
        calibration=data["train"] if data.get("calibration") is None else data["calibration"],
        validation=data["validation"],
        test=data["test"],
        example_inputs=inputs if given is None else given,
        loss_fn=loss_fn,
        metric=metric,
        sizes={k: n for k in wanted if (n := _n_samples(data[k]))},
        groups=data.get("groups"),
    )
    return problem, given is not None


def _is_empty(batches: Batches) -> bool:
    check_iterable(batches)
    with torch.random.fork_rng():
        return next(iter(batches), None) is None


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
