"""The directory of a run: what may be written there, what is there already, and writing it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from secateurs.checkpoints import Checkpoints, differences, flush
from secateurs.errors import ConfigError
from secateurs.pipeline import PruneResult
from secateurs.recipe import Recipe

__all__ = ["RESULTS", "check_output", "is_complete", "is_finished", "write_results"]

RESULTS = (
    "model.safetensors", "plan.json", "graph.json", "recipe.yaml", "report.json", "report.html",
)  # fmt: skip


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
