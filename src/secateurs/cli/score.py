"""`secateurs score`: scores by several criteria from one pass, and how far they agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from secateurs.recipe import Recipe
    from secateurs.types import Scores


def score(
    what: str = typer.Argument(..., metavar="RECIPE|TASK", help="A recipe, or a task's name."),
    criteria: str = typer.Option(
        "taylor,magnitude,random", "--criteria", metavar="A,B", help="Names, with commas between."
    ),
    granularity: list[str] = typer.Option(
        [], "--granularity", metavar="KIND", help="Kinds of units [those of the recipe or task]."
    ),
    max_batches: int | None = typer.Option(None, "--max-batches", help="At most that many."),
    within: str = typer.Option(
        "network", "--within", help="Where units are compared: network or target."
    ),
    seed: int = typer.Option(0, "--seed", help="Of the task's network and of random criteria."),
    out: Path | None = typer.Option(
        None, "--out", help="Directory for the scores and the plots [nothing is written]."
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite earlier scores."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Score every unit of a trained network by several criteria, and compare what they say."""
    from secateurs.bars import bar
    from secateurs.cli.output import prints_to_stderr, stderr
    from secateurs.criteria import get_combination
    from secateurs.errors import ConfigError, choose
    from secateurs.graph import trace
    from secateurs.runner import load_problem
    from secateurs.scores import agreement
    from secateurs.scoring import score as scored

    names = [get_combination(name.strip()) for name in criteria.split(",") if name.strip()]
    if not names:
        raise ConfigError("--criteria names none; secateurs criteria lists them")
    choose(within, ("network", "target"), "--within")
    recipe, base = _recipe(what, seed)
    _check_out(out, [c.label for c in names], force)
    with prints_to_stderr(), bar(what) as step:
        step("load (a task is trained the first time)", 0, 1)
        problem = load_problem(recipe, base, progress=step)
        graph = trace(problem.model, problem.example_inputs, outputs=recipe.outputs or ())
        graph = graph.only(recipe.include, recipe.exclude, problem.model)
        found = scored(
            problem.model, problem.calibration, problem.loss_fn, criterion=names, graph=graph,
            granularity=granularity or recipe.all_stages()[0].granularity, seed=seed,
            max_batches=max_batches,
            progress=lambda done, total: step("score", done, total or 0),
        )  # fmt: skip
    compared = agreement(found, within=within) if len(found) > 1 else None  # type: ignore[arg-type]
    if out is not None:
        files = _write(found, compared, out, force)
        stderr().print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(_plain(found, compared), indent=1, allow_nan=False))
        return
    for label, scores in found.items():
        typer.echo(f"{label}: {scores.n_samples} samples" if scores.n_samples else label)
        for name, values in scores.values.items():
            typer.echo(f"  {name}: {len(values)} units, {values.min():.3g} to {values.max():.3g}")
        for name, why in scores.not_scored.items():
            typer.echo(f"  {name}: not scored: {why}")
        for note in scores.notes:
            typer.echo(f"  note: {note}")
    if compared is not None:
        typer.echo(f"\n{compared.table()}")


def _recipe(what: str, seed: int) -> tuple[Recipe, Path | None]:
    """The recipe that is named, or one for a task; and the folder of its files."""
    from secateurs.recipe import parse_recipe, read_recipe
    from secateurs.tasks import get_task

    if Path(what).suffix in (".yaml", ".yml") or Path(what).is_file():
        base = Path(what).parent
        return read_recipe(what, (f"seed={seed}",)).anchored(base), base
    task = get_task(what)
    task.source.require()
    asked = {"task": what, "granularity": task.default_granularity, "budget": {"units": 0.5}}
    return parse_recipe({**asked, "seed": seed}), None


def _check_out(out: Path | None, labels: list[str], force: bool) -> None:
    """Refuse what cannot be written, before anything slow."""
    from secateurs.errors import ConfigError

    if out is None:
        return
    if out.is_file():
        raise ConfigError(f"{out} is a file; name a directory")
    held = [f"{label}.safetensors" for label in labels if (out / f"{label}.safetensors").exists()]
    if held and not force:
        raise ConfigError(f"{out} already holds {', '.join(held)}. Add --force to overwrite")
    out.mkdir(parents=True, exist_ok=True)


def _write(found: dict[str, Scores], compared: Any, out: Path, force: bool) -> list[Path]:
    """One file for each criterion; plots where they can be drawn."""
    from secateurs.report.scores import plot_agreement, plot_scores
    from secateurs.scores import save_scores

    files = [save_scores(s, out / f"{n}.safetensors", force=force) for n, s in found.items()]
    for name, scores in found.items():
        plot_scores(scores, out / f"{name}.png")
        files.append(out / f"{name}.png")
    if compared is not None:
        plot_agreement(compared, out / "agreement.png")
        files.append(out / "agreement.png")
    return files


def _plain(found: dict[str, Scores], compared: Any) -> dict[str, Any]:
    """Everything as plain values; units removed earlier do not occur here."""
    return {
        "scores": {
            label: {
                "samples": s.n_samples,
                "values": {name: values.tolist() for name, values in s.values.items()},
                "not_scored": dict(s.not_scored),
                "notes": list(s.notes),
            }
            for label, s in found.items()
        },
        "agreement": None if compared is None else compared.to_dict(),
    }
