"""`secateurs run recipe.yaml`: prune a built-in task or your own model, write the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from secateurs.recipe import Recipe
    from secateurs.runner import Problem


def run(
    recipe: Path = typer.Argument(..., help="A recipe: a YAML file."),
    set_: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one value: --set budget.macs=0.1"
    ),
    out: Path = typer.Option(None, "--out", help="Directory of the results [runs/RECIPE]."),
    seed: int = typer.Option(None, "--seed", help="Same as --set seed=N."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan; run nothing."),
    force: bool = typer.Option(False, "--force", help="Overwrite earlier results."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Prune by a recipe and write model, plan, recipe and report to a directory."""
    from secateurs.cli.output import before_after, progress, stderr, stdout
    from secateurs.recipe import read_recipe
    from secateurs.runner import check_output, load_problem, run_recipe, write_results

    overrides = (*set_, *([f"seed={seed}"] if seed is not None else []))
    base = recipe.parent
    parsed = read_recipe(recipe, overrides).anchored(base)
    where = out or Path("runs") / recipe.stem
    check_output(where, force or dry_run)
    if dry_run:
        _describe(parsed, load_problem(parsed, base, train=False), where)
        return
    with progress(parsed.task or "model") as step:
        step("load (a task is trained the first time)", 0, 1)
        problem = load_problem(parsed, base)
        result = run_recipe(parsed, problem, out=str(where), progress=step)
        files = write_results(result, parsed, where, force=force)
    if as_json:
        typer.echo(json.dumps(result.report.to_dict(), indent=1, allow_nan=False))
        return
    console = stdout()
    console.print(result.report.headline, highlight=False)
    console.print(before_after(result.report))
    for note in result.report.notes:
        console.print(note, style="dim", highlight=False, markup=False)
    console.print("\nTry next:")
    for line in result.report.next_steps:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    stderr().print(f"written: {', '.join(str(f) for f in files)}", highlight=False)


def _describe(recipe: Recipe, problem: Problem, where: Path) -> None:
    """The dry run: what would be pruned, by what, into which directory."""
    from secateurs.cost import dense_cost
    from secateurs.graph import trace

    graph = trace(problem.model, problem.example_inputs)
    cost = dense_cost(graph)
    typer.echo(recipe.to_yaml())
    typer.echo(f"model: {problem.name}: {cost.params:,.0f} parameters, {cost.macs:,.0f} MACs")
    typer.echo("samples: " + ", ".join(f"{n} {k}" for k, n in problem.sizes.items()))
    for number, stage in enumerate(recipe.all_stages(), start=1):
        asked = stage.budget or stage.threshold
        typer.echo(f"stage {number}: {asked}, {stage.steps}")
        for target in graph.select(stage.granularity):
            typer.echo(f"  {target.name}: {target.n_units:,} units")
    for left in graph.excluded:
        typer.echo(f"left whole: {left.name}: {left.reason}")
    typer.echo(f"would write to {where}")
