"""Train a saved smaller model further: removed weights stay zero, the dense model may teach.

    directory of a run -> model, plan, recipe, data -> finetune -> another directory

What was pruned does not change here; only the weights that are left do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from secateurs.bars import Progress
from secateurs.boards import BoardLog
from secateurs.checkpoints import Checkpoints, differences
from secateurs.distributed import Group, ranks_of
from secateurs.errors import ConfigError, FileFormatError
from secateurs.finetuning import (
    Finetune,
    FinetuneResult,
    counted,
    distillation,
    finetune,
    has_unused,
    wrapped,
)
from secateurs.graph import trace
from secateurs.imports import import_function
from secateurs.masks import apply_masks_
from secateurs.pipeline.onlooking import Onlooker, length
from secateurs.pipeline.request import random_state
from secateurs.recipe import Recipe, parse_recipe
from secateurs.recipe.reading import override
from secateurs.report.assemble import metrics_of
from secateurs.runner import Problem, check_output, is_finished, load_problem
from secateurs.statistics.together import shared_batches
from secateurs.surgery import load, save, slice_masks
from secateurs.surgery.files import load_plan
from secateurs.tasks import get_task
from secateurs.types import Batches, Plan

__all__ = [
    "FILES",
    "Healed",
    "Saved",
    "check_saved",
    "heal_saved",
    "is_healed",
    "read_saved",
    "write_healed",
]

FILES = ("model.safetensors", "plan.json", "graph.json", "recipe.yaml", "finetune.json")


@dataclass(frozen=True, eq=False)
class Saved:
    """A run that was saved, and how it is to be trained further.

    Attributes:
        directory: where it is.
        recipe: of the run.
        config: of the training to come.
    """

    directory: Path
    recipe: Recipe
    config: Finetune


@dataclass(frozen=True, eq=False)
class Healed:
    """A smaller model that was trained further.

    Attributes:
        model: trained, in eval mode.
        plan: what had been removed; it did not change.
        config: how it was trained.
        history: what the training did.
        validation: metrics on validation data "before" and "after".
        test: metrics on test data, after.
    """

    model: nn.Module
    plan: Plan
    config: Finetune
    history: FinetuneResult
    validation: Mapping[str, Mapping[str, float]]
    test: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain values."""
        done = self.history
        return {
            "finetune": asdict(self.config),
            "epochs": [asdict(row) for row in done.history],
            "steps": done.steps,
            "seconds": done.seconds,
            "best_epoch": done.best_epoch,
            "stopped_early": done.stopped_early,
            "validation": {side: dict(found) for side, found in self.validation.items()},
            "test": dict(self.test),
        }


def read_saved(directory: Path, overrides: tuple[str, ...] = ()) -> Saved:
    """The recipe of a run that was saved, and the training that is asked for.

    Args:
        directory: written by `secateurs run` or `secateurs finetune`.
        overrides: texts such as "finetune.epochs=5", on top of the run's own fine-tuning (of its
            last stage).

    Raises:
        ConfigError: no such run, or a value is wrong or not about fine-tuning.
    """
    file = directory / "recipe.yaml"
    if not file.is_file():
        what = "is no directory" if not directory.is_dir() else "holds no recipe.yaml"
        raise ConfigError(f"{directory} {what}: name a directory that `secateurs run` has written")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{file}: not valid YAML in UTF-8: {error}") from error
    recipe = parse_recipe(data, str(file), directory)
    changed = deepcopy(data)
    block = changed["stages"][-1] if changed.get("stages") else changed
    for text in overrides:
        if text.split("=")[0].strip().split(".")[0] != "finetune":
            raise ConfigError(
                f"--set {text!r}: the model is pruned already, only its training can be changed: "
                "finetune.epochs, finetune.lr, ..."
            )
        override(block, text)
    config = parse_recipe(changed, str(file), directory).all_stages()[-1].finetune
    if config is None:
        raise ConfigError(
            f"{file} has no fine-tuning of its own: say how, for example "
            "--set finetune.epochs=3 --set finetune.lr=0.001"
        )
    return Saved(directory, recipe, config)


def check_saved(saved: Saved, out: Path, force: bool) -> None:
    """Find what cannot be written or read before anything slow.

    Raises:
        ConfigError: the output directory holds results, or is the one that is read.
    """
    if out.resolve() == saved.directory.resolve():
        raise ConfigError(f"{out} is the directory that is read; name another one with --out")
    check_output(out, force, FILES)


def is_healed(
    saved: Saved, out: Path, checkpoints: Checkpoints, *, resume: bool, force: bool
) -> bool:
    """Whether a directory has all results of this training already; else it may be made there.

    Arguments and errors as `is_complete` of the runner, and as `check_saved`.
    """
    check_saved(saved, out, force=True)

    def others() -> list[str]:
        told = json.loads((out / "finetune.json").read_text(encoding="utf-8"))
        recipe = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
        asked = json.loads(json.dumps(asdict(saved.config)))
        mine = yaml.safe_load(saved.recipe.anchored(saved.directory).to_yaml())
        return differences(
            {"finetune": told["finetune"], "recipe": recipe}, {"finetune": asked, "recipe": mine}
        )

    return is_finished(out, FILES, others, checkpoints, resume=resume, force=force)


def heal_saved(
    saved: Saved,
    *,
    tensorboard: Path | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoints | None = None,
    resume: bool = False,
    group: Group = None,
) -> Healed:
    """Train a saved model further, by the data and the loss of its recipe.

    Args:
        saved: from `read_saved`.
        tensorboard: folder of a log; None writes none.
        progress: called with (what, optimizer steps done, all of them).
        checkpoint, resume: as in `finetune`.
        group: "world" or a process group that trains together, as in `load_problem`; each process
            gets the result, and rank 0 writes the log.

    Raises:
        PruningError: files that are damaged, data that is missing, or a training that diverges.
    """
    config, recipe = saved.config, saved.recipe
    ranks = ranks_of(group)
    problem = load_problem(recipe, saved.directory, progress=progress, group=group)
    with ranks.agreed("reading the model"):
        small, plan = (
            load(saved.directory, _factory(recipe, saved.directory)),
            load_plan(saved.directory),
        )
    masks = slice_masks(plan)
    apply_masks_(small, masks)

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        return metrics_of(model, lambda m: problem.metric(m, problem.validation))

    def measured(batches: Batches) -> Mapping[str, float]:
        with ranks.agreed("evaluate"):
            found = metrics_of(small, lambda m: problem.metric(m, batches))
        return ranks.first(found)

    before = measured(problem.validation)
    trainee = small
    if ranks.size > 1:
        shared = shared_batches(small, problem.train, ranks)
        assert shared is not None
        unused = has_unused(small, shared, problem.loss_fn, ranks)
        trainee = wrapped(small, ranks, unused=unused)
    with ExitStack() as stack:
        logs = tensorboard is not None and ranks.rank == 0
        log = stack.enter_context(BoardLog(tensorboard)) if tensorboard and logs else None

        total = length(config, counted(problem.train, ranks))

        def say(text: str, done: int) -> None:
            if progress is not None:
                progress(text, min(done, total), total)

        looker = Onlooker(say, "train further", epochs=config.n_epochs, log=log)
        stack.enter_context(random_state((recipe.seed + ranks.rank) % 2**32))
        done = finetune(
            trainee, problem.train, problem.loss_fn, config, masks=masks,
            teacher=_teacher(saved, problem, plan), evaluate=evaluate, maximize=recipe.maximize,
            parts=[looker], progress=looker.epoch, checkpoint=checkpoint, resume=resume,
            group=group,
        )  # fmt: skip
    small.eval()
    test, after = measured(problem.test), measured(problem.validation)
    return Healed(small, plan, config, done, {"before": before, "after": after}, test)


def _factory(recipe: Recipe, base: Path) -> Any:
    """What builds the dense architecture."""
    if recipe.task is not None:
        return get_task(recipe.task).build
    assert recipe.model is not None
    return import_function(recipe.model, "model", base)


def _teacher(saved: Saved, problem: Problem, plan: Plan) -> Any:
    """The dense model that teaches, if one is to."""
    config, recipe = saved.config, saved.recipe
    if not config.distills:
        return None
    graph = None
    if config.hidden:
        graph = trace(problem.model, problem.example_inputs, outputs=recipe.outputs or ())
    return distillation(problem.model, config, graph=graph, plan=plan)


def write_healed(healed: Healed, saved: Saved, out: Path, *, force: bool) -> list[Path]:
    """Write model, plan, the recipe of the run, and what the training did; returns the files.

    Raises:
        ConfigError: the directory holds results already and `force` is not set.
    """
    check_saved(saved, out, force)
    text = json.dumps(healed.to_dict(), indent=1, allow_nan=False)
    save(healed.model, healed.plan, out, force=True)
    recipe = saved.recipe.anchored(saved.directory).to_yaml()
    (out / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (out / "finetune.json").write_text(text, encoding="utf-8")
    return [out / name for name in FILES if (out / name).exists()]
