"""`secateurs demo`: the main job on real data in under a minute, with its controls."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from secateurs.recipe import Recipe
    from secateurs.report.data import ControlRow

SEEDS = (0, 1, 2)
CRITERIA = ("taylor", "magnitude", "random")
RECIPE: dict[str, Any] = {
    "task": "digits-cnn",
    "criterion": "taylor",
    "granularity": "channel",
    "budget": {"macs": 0.1},
    "schedule": {"curve": "cubic", "steps": 4},
    "finetune": {"epochs": 3, "lr": 0.002, "lr_schedule": "cosine", "distill": 0.5},
    "seed": 0,
}


def demo(
    out: Path = typer.Option(Path("out/demo"), "--out", help="Directory of the results."),
    force: bool = typer.Option(False, "--force", help="Overwrite earlier results."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Train a small CNN on handwritten digits, prune it by gradients, prove and measure it."""
    import torch

    from secateurs.bars import bar
    from secateurs.cli.output import before_after, stderr, stdout
    from secateurs.recipe import parse_recipe
    from secateurs.report import check_available
    from secateurs.runner import check_output, load_problem, run_recipe, write_results
    from secateurs.tasks import get_task

    check_available()
    check_output(out, force)
    recipe = parse_recipe(RECIPE, "demo")
    get_task(RECIPE["task"]).source.require()
    torch.set_num_threads(1)  # as its controls: the same numbers
    with bar("demo") as step:
        controls = _controls(step)
        problem = load_problem(recipe)
        result = run_recipe(recipe, problem, out=str(out))
        result.report = replace(result.report, controls=controls)
        files = write_results(result, recipe, out, force=force)
    if as_json:
        typer.echo(json.dumps(result.report.to_dict(), indent=1, allow_nan=False))
        return
    console = stdout()
    console.print(before_after(result.report))
    console.print(f"\n{_sizes(problem.sizes)}; {_controls_text(controls)}", highlight=False)
    for note in result.report.notes:
        if note.startswith("No gain"):
            console.print(note, highlight=False)
    console.print("\nTry next:")
    for line in result.report.next_steps:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    stderr().print(f"written: {', '.join(str(f) for f in files)}", highlight=False)


def _controls(step: Any) -> tuple[ControlRow, ...]:
    """The method, magnitude and random at the same budget and training, over three seeds.

    Runs in as many processes as there are cores, one thread each.
    """
    from secateurs.workers import worker_pool

    jobs = [(criterion, seed) for seed in SEEDS for criterion in CRITERIA]
    found: dict[tuple[str, int], tuple[float, float]] = {}
    total = len(SEEDS) + len(jobs)
    with worker_pool(len(SEEDS)) as pool:
        for n, _ in enumerate(pool.map(_train, SEEDS), start=1):
            step("train the dense network, 3 seeds", n, total)
        for n, (job, pair) in enumerate(zip(jobs, pool.map(_prune, jobs), strict=True), start=1):
            found[job] = pair
            step("prune by taylor, magnitude, random", len(SEEDS) + n, total)
    return tuple(control_row(c, {s: found[(c, s)] for s in SEEDS}) for c in CRITERIA)


def _train(seed: int) -> None:
    from secateurs.tasks import dense_checkpoint, get_task

    dense_checkpoint(get_task("digits-cnn"), seed)


def _prune(job: tuple[str, int]) -> tuple[float, float]:
    """Test accuracy of the dense and of the pruned network."""
    from secateurs.recipe import parse_recipe
    from secateurs.runner import load_problem, run_recipe

    criterion, seed = job
    recipe: Recipe = parse_recipe({**RECIPE, "criterion": criterion, "seed": seed, "latency": []})
    row = run_recipe(recipe, load_problem(recipe)).report.rows[0]
    assert row.before is not None
    assert row.after is not None
    return row.before, row.after


def control_row(name: str, pairs: dict[int, tuple[float, float]]) -> ControlRow:
    """Mean, paired difference from dense, and standard errors over the seeds.

    Example:
        >>> row = control_row("taylor", {0: (0.99, 0.98), 1: (0.97, 0.98)})
        >>> round(row.mean, 3), round(abs(row.difference), 3), round(row.difference_error, 3)
        (0.98, 0.0, 0.01)
    """
    from secateurs.report.data import ControlRow

    after = [b for _, b in pairs.values()]
    gaps = [b - a for a, b in pairs.values()]
    n = math.sqrt(len(pairs))
    return ControlRow(
        name=name,
        mean=mean(after),
        standard_error=stdev(after) / n if len(pairs) > 1 else None,
        seeds=tuple(pairs),
        difference=mean(gaps),
        difference_error=stdev(gaps) / n if len(pairs) > 1 else None,
        role="method" if name == "taylor" else "control",
    )


def _sizes(sizes: Any) -> str:
    return "digits: " + ", ".join(f"{n} {split}" for split, n in sizes.items())


def _controls_text(controls: tuple[ControlRow, ...]) -> str:
    lines = [
        f"  {c.name:10s} {100 * (c.mean or 0):6.2f} %   "
        f"{100 * (c.difference or 0):+.2f} ± {100 * (c.difference_error or 0):.2f} points"
        for c in controls
    ]
    head = "mean test accuracy over 3 seeds, and the paired difference from dense ± standard error:"
    return "\n".join([head, *lines])
