"""`secateurs sensitivity`: what cutting each layer alone would cost, drawn and in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from secateurs.bars import Progress
    from secateurs.sensitivities import MeasuredSensitivity

CURVES, PICTURE = "sensitivity.json", "sensitivity.png"
MEASURES = ("loss", "metric")


def sensitivity(
    what: str = typer.Argument(..., metavar="RECIPE|TASK", help="A recipe, or a task's name."),
    criterion: str | None = typer.Option(
        None, "--criterion", metavar="NAME", help="Which units go first [that of the recipe]."
    ),
    granularity: list[str] = typer.Option(
        [], "--granularity", metavar="KIND", help="Kinds of units [those of the recipe or task]."
    ),
    on: str = typer.Option("loss", "--on", help="What is measured: loss or metric."),
    fractions: str = typer.Option(
        "0.1,0.25,0.5,0.75,0.9", "--fractions", metavar="A,B", help="Shares of units that go."
    ),
    drop: float | None = typer.Option(
        None, "--drop", help="How much worse is tolerable [a tenth of the loss, 1 % of a metric]."
    ),
    max_batches: int | None = typer.Option(None, "--max-batches", help="At most that many."),
    seed: int = typer.Option(0, "--seed", help="Of the task's network and of random criteria."),
    out: Path | None = typer.Option(
        None, "--out", help="Directory for curves and picture; the same call goes on from there."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure on validation data how far each target alone can be cut; trains and keeps nothing."""
    from secateurs.bars import bar
    from secateurs.cli.output import prints_to_stderr, stderr
    from secateurs.errors import ConfigError, choose
    from secateurs.report.sensitivity import plot_sensitivity

    choose(on, MEASURES, "--on")
    if drop is not None and drop <= 0:
        raise ConfigError(f"--drop is above 0, in the unit of what is measured; got {drop:g}")
    if on == "metric" and max_batches is not None:
        raise ConfigError("--max-batches is for --on loss: a metric is read on all validation data")
    if out is not None and out.is_file():
        raise ConfigError(f"{out} is a file; name a directory")
    shares = _shares(fractions)
    with prints_to_stderr(), bar(what) as step:
        found = _measured(
            what, criterion, granularity, on, shares, max_batches, seed,
            None if out is None else out / CURVES, step,
        )  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot_sensitivity(found, out / PICTURE, drop=drop)
        stderr().print(f"written: {out / CURVES}, {out / PICTURE}", highlight=False, soft_wrap=True)
    if as_json:
        data = {**found.to_dict(), "recommendation": found.recommendation(drop)}
        typer.echo(json.dumps(data, indent=1, allow_nan=False))
        return
    typer.echo(f"{_table(found)}\n\n{found.recommendation(drop)}")
    for note in found.notes:
        typer.echo(f"note: {note}")


def _shares(text: str) -> tuple[float, ...]:
    from secateurs.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            f"--fractions {text!r}: write numbers with commas between, for example 0.1,0.5"
        ) from error


def _measured(
    what: str, criterion: str | None, granularity: list[str], on: str,
    fractions: tuple[float, ...], max_batches: int | None, seed: int, cache: Path | None,
    step: Progress,
) -> MeasuredSensitivity:  # fmt: skip
    """Scores on calibration data, curves on validation data."""
    from secateurs.cli.score import _recipe
    from secateurs.graph import trace
    from secateurs.runner import load_problem
    from secateurs.scoring import score
    from secateurs.sensitivities import sensitivity as measure

    recipe, base = _recipe(what, seed)
    stage = recipe.all_stages()[0]
    step("load (a task is trained the first time)", 0, 1)
    problem = load_problem(recipe, base, progress=step)
    graph = trace(problem.model, problem.example_inputs, outputs=recipe.outputs or ())
    graph = graph.only(recipe.include, recipe.exclude, problem.model)
    scores = score(
        problem.model, problem.calibration, problem.loss_fn, graph=graph, seed=seed,
        criterion=criterion if criterion is not None else stage.criterion,
        granularity=granularity or stage.granularity,
        progress=lambda done, total: step("score", done, total or 0),
    )  # fmt: skip
    return measure(
        problem.model, problem.validation, problem.loss_fn, scores=scores, fractions=fractions,
        evaluate=(lambda m: problem.metric(m, problem.validation)) if on == "metric" else None,
        maximize=recipe.maximize, max_batches=max_batches, cache=cache, progress=step,
    )  # fmt: skip


def _table(found: MeasuredSensitivity) -> str:
    """One row for each target: the drop at each cut."""
    from secateurs.report.words import number

    lines = [f"{found.measure} when a target alone is cut (uncut: {number(found.dense)})"]
    for name, curve in found.curves.items():
        pairs = zip(curve.removed[1:], curve.drop[1:], strict=True)
        cells = [f"{100 * share:.0f} %: {drop:+.3g}" for share, drop in pairs]
        lines.append(f"  {name}: {', '.join(cells)}")
    return "\n".join(lines)
