"""What a comparison will run, found and checked before anything expensive."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from secateurs.ablation.rows import Row, read_row, row_file
from secateurs.batches import iterate, model_device
from secateurs.controls import resets, shuffled_targets
from secateurs.errors import ConfigError
from secateurs.recipe import Recipe
from secateurs.runner import RESULTS, Problem, check_output, check_recipe, load_problem
from secateurs.types import Graph

__all__ = ["Intended", "Job", "check_ablation", "controlled", "own_files", "versions"]

N_SEEDS = 3


@dataclass(frozen=True, eq=False)
class Job:
    """One run: its own recipe, what its row must have been made by, and the file of the row."""

    control: str | None
    seed: int
    recipe: Recipe
    base: Path | None
    made_by: dict[str, Any]
    file: Path

    @property
    def name(self) -> str:
        return f"{self.control or 'the criterion'}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Intended:
    """A comparison before it is run.

    Attributes:
        problem: untrained.
        graph: what can be pruned.
        seeds: of the runs.
        skipped: control -> why it cannot be run on this recipe.
        jobs: all runs, seed by seed, the criterion first.
        finished: rows of those that an earlier call has finished.
    """

    problem: Problem
    graph: Graph
    seeds: tuple[int, ...]
    skipped: dict[str, str]
    jobs: list[Job]
    finished: dict[Job, Row]


def controlled(recipe: Recipe, control: str | None, seed: int) -> Recipe:
    """One run of a comparison: under a control (None: the criterion itself), untimed.

    A control applies to all stages, "reinit" to the last one.

    Raises:
        ConfigError: the control means nothing for this recipe.
    """
    last = len(recipe.stages) - 1
    stages = [
        stage.model_copy(update={"control": None if control == "reinit" and i < last else control})
        for i, stage in enumerate(recipe.stages)
    ]
    changes = {"control": None if stages else control, "seed": seed, "seeds": None}
    run = recipe.model_copy(update={**changes, "stages": stages, "latency": []})
    final = run.all_stages()[-1]
    heal = final.finetune
    if control == "reinit" and (heal is None or 0 in (heal.epochs, heal.steps)):
        raise ConfigError(
            'control "reinit" trains from fresh weights after the last cut, and this recipe has no '
            "finetune there"
        )
    return run


def check_ablation(
    recipe: Recipe, out: Path, *, base: Path | None = None, force: bool = False
) -> Intended:
    """What `ablate` would do; finds what is wrong, trains and writes nothing.

    Arguments and errors as `ablate`.
    """
    if not recipe.controls:
        raise ConfigError(
            "no control to compare with: give control: all, or a list such as [shuffle, invert]"
        )
    if any(stage.wants_drop or stage.max_drop is not None for stage in recipe.all_stages()):
        raise ConfigError(
            "a comparison needs runs of equal size, and a limit on the drop of the metric ends "
            "each at a size of its own: leave max_drop and metric_drop away"
        )
    recipe = recipe.anchored(base)
    check_output(out, force=True)
    single = [name for name in RESULTS if name != "recipe.yaml" and (out / name).exists()]
    if single:
        raise ConfigError(
            f"{out} holds the results of a single run ({', '.join(single)}); choose another --out"
        )
    seeds = tuple(recipe.seeds or range(recipe.seed, recipe.seed + N_SEEDS))
    real = controlled(recipe, None, seeds[0])
    problem = load_problem(real, base, train=False)
    graph = check_recipe(real, problem)
    skipped = {}
    for control in recipe.controls:
        try:
            controlled(recipe, control, seeds[0])
            _check_control(control, problem)
        except ConfigError as error:
            skipped[control] = str(error)
    if len(skipped) == len(recipe.controls):
        reasons = "".join(f"\n  {control}: {why}" for control, why in skipped.items())
        raise ConfigError(f"none of the controls can be run on this recipe:{reasons}")
    jobs = _jobs(recipe, out, base, seeds, skipped)
    rows = {} if force else {job: read_row(job.file, job.made_by) for job in jobs}
    finished = {job: row for job, row in rows.items() if row is not None}
    return Intended(problem, graph, seeds, skipped, jobs, finished)


def _check_control(control: str, problem: Problem) -> None:
    """What a control needs from the model and the data; of these, two batches are looked at."""
    if control == "reinit":
        resets(problem.model)
    if control == "random-labels":
        first = list(iterate(problem.calibration, model_device(problem.model), max_batches=2))
        shuffled_targets(first, problem.model, 0)


def _jobs(
    recipe: Recipe,
    out: Path,
    base: Path | None,
    seeds: tuple[int, ...],
    skipped: dict[str, str],
) -> list[Job]:
    """Every run, seed by seed, the criterion first; without the controls that are skipped."""
    made_with = {"files": own_files(recipe), **versions()}
    jobs = []
    for seed in seeds:
        for control in (None, *(c for c in recipe.controls if c not in skipped)):
            run = controlled(recipe, control, seed)
            made_by = json.loads(json.dumps({"recipe": run.resolved(), **made_with}))
            jobs.append(Job(control, seed, run, base, made_by, row_file(out, control, seed)))
    return jobs


def versions() -> dict[str, str]:
    """What made a result, besides the recipe."""
    return {"secateurs": version("secateurs"), "torch": str(torch.__version__)}


def own_files(recipe: Recipe) -> dict[str, str]:
    """Hashes of the user's files that the recipe names."""
    places = [getattr(recipe, name) or "" for name in ("model", "data", "loss", "metric", "fit")]
    files = {Path(place.rpartition(":")[0]) for place in places}
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for file in sorted(files)
        if file.suffix == ".py" and file.is_file()
    }
