"""`secateurs run recipe.yaml`: prune a built-in task or your own model, write the results.

With `--controls`, or a recipe that names several: the criterion beside its controls, over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from secateurs.cli.processes import begin

if TYPE_CHECKING:
    from secateurs.ablation import Intended
    from secateurs.checkpoints import Checkpoints
    from secateurs.recipe import Recipe
    from secateurs.report.data import Report
    from secateurs.runner import Problem
    from secateurs.types import Graph

CHECKPOINTS = "checkpoints"
"""Folder in the directory of the results, while a run is not finished."""


def run(
    recipe: Path = typer.Argument(..., help="A recipe: a YAML file."),
    set_: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one value: --set budget.macs=0.1"
    ),
    out: Path = typer.Option(
        None,
        "--out",
        help="Directory of the results [runs/RECIPE; with controls runs/RECIPE-controls].",
    ),
    seed: int = typer.Option(None, "--seed", help="Same as --set seed=N."),
    controls: str = typer.Option(
        None,
        "--controls",
        metavar="NAMES",
        help="Compare the criterion with controls: all, or shuffle,invert,...",
    ),
    seeds: str = typer.Option(
        None,
        "--seeds",
        metavar="N,N,N",
        help="Seeds of that comparison: 0,1,2 [three, from the recipe's seed on].",
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check everything and print the plan; train and write nothing."
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite earlier results."),
    resume: bool = typer.Option(
        False, "--resume", help="Go on with a run that was interrupted, from its last checkpoint."
    ),
    tensorboard: Path | None = typer.Option(
        None, "--tensorboard", metavar="DIR", help="Write a log for TensorBoard."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Prune by a recipe and write model, plan, recipe and report to a directory."""
    from secateurs.bars import bar
    from secateurs.boards import BoardLog
    from secateurs.checkpoints import Checkpoints
    from secateurs.cli.controls import compare, comparison
    from secateurs.cli.output import prints_to_stderr
    from secateurs.distributed import on_first
    from secateurs.recipe import read_recipe
    from secateurs.report import check_available
    from secateurs.report.data import Report
    from secateurs.runner import (
        check_output,
        check_recipe,
        is_complete,
        load_problem,
        run_recipe,
        write_results,
    )

    asked = comparison(controls, seeds, seed)
    overrides = (*set_, *([f"seed={seed}"] if seed is not None else []), *asked)
    base = recipe.parent
    parsed = read_recipe(recipe, overrides).anchored(base)
    where = out or Path("runs") / (f"{recipe.stem}-controls" if parsed.controls else recipe.stem)
    check_available()
    ranks = begin()
    first = ranks.rank == 0
    if parsed.controls:
        _single_only(tensorboard, resume, ranks.size)
        compare(parsed, base, where, dry_run=dry_run, force=force, as_json=as_json)
        return
    if dry_run:
        check_output(where, force=True)
        with prints_to_stderr():
            problem = load_problem(parsed, base, train=False, group=ranks.group)
            graph = check_recipe(parsed, problem, group=ranks.group)
        if first:
            describe(parsed, problem, graph, where, as_json)
        return
    kept = Checkpoints(where / CHECKPOINTS, say=tell)
    done = on_first(
        ranks.group,
        lambda: is_complete(parsed, where, kept, resume=resume, force=force),
        "looking at earlier results",
    )
    if ranks.first(done):
        if first:
            tell(f"{where} is complete: nothing is left to do")
            text = (where / "report.json").read_text(encoding="utf-8")
            show(Report.from_dict(json.loads(text)), as_json)
        return
    with ExitStack() as stack:
        log = None
        if first:
            stack.enter_context(resumable(kept))
            log = stack.enter_context(BoardLog(tensorboard)) if tensorboard is not None else None
        stack.enter_context(prints_to_stderr())
        step = stack.enter_context(bar(parsed.task or "model")) if first else unseen
        step("load (a task is trained the first time)", 0, 1)
        problem = load_problem(parsed, base, progress=step, group=ranks.group)
        result = run_recipe(
            parsed, problem, out=str(where), progress=step, log=log, checkpoint=kept,
            resume=resume, group=ranks.group,
        )  # fmt: skip
        files = on_first(
            ranks.group,
            lambda: write_results(result, parsed, where, force=force or resume),
            "writing the results",
        )
    if files is not None:
        show(result.report, as_json)
        tell(f"written: {', '.join(str(f) for f in files)}")


def unseen(what: str, done: int, total: int) -> None:
    """The progress of a process that draws no bar."""


def _single_only(tensorboard: Path | None, resume: bool, n_processes: int) -> None:
    """Refuse options that mean nothing for many runs."""
    from secateurs.errors import ConfigError

    if n_processes > 1:
        raise ConfigError(
            f"WORLD_SIZE={n_processes}: a comparison with controls works in one process: start it "
            "without torchrun, or leave the controls away for one run"
        )
    if tensorboard is not None:
        raise ConfigError(
            "--tensorboard is for a single run: the curves of a comparison with controls would "
            "lie on top of each other"
        )
    if resume:
        raise ConfigError(
            "--resume is for a single run: a comparison with controls goes on by itself when "
            "the same command is given again without --force"
        )


@contextmanager
def resumable(checkpoints: Checkpoints) -> Iterator[None]:
    """Work that leaves checkpoints: told how to go on after Ctrl-C; none are left at its end."""
    from secateurs.errors import BudgetError

    try:
        yield
    except KeyboardInterrupt:
        if checkpoints.files:
            tell(
                f"{checkpoints.files[-1]} holds what was done: the same command with --resume "
                "goes on"
            )
        raise
    except BudgetError:  # the end of this recipe: another one cannot go on from there
        checkpoints.clear()
        raise
    checkpoints.clear()


def tell(text: str) -> None:
    """Say something on stderr."""
    from secateurs.cli.output import stderr

    stderr().print(text, highlight=False, markup=False, soft_wrap=True)


def show(report: Report, as_json: bool) -> None:
    """Print a report to stdout."""
    from secateurs.cli.output import before_after, stdout

    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, allow_nan=False))
        return
    console = stdout()
    console.print(report.headline, highlight=False)
    console.print(before_after(report))
    for note in report.notes:
        console.print(note, style="dim", highlight=False, markup=False)
    console.print("\nTry next:")
    for line in report.next_steps:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def describe(
    recipe: Recipe,
    problem: Problem,
    graph: Graph,
    where: Path,
    as_json: bool,
    intended: Intended | None = None,
) -> None:
    """The dry run: what would be pruned, by what, into which directory."""
    from secateurs.cost import dense_cost
    from secateurs.pipeline.request import given

    cost = dense_cost(graph)
    stages = recipe.all_stages()
    units = [{t.name: t.n_units for t in graph.select(s.granularity)} for s in stages]
    if as_json:
        found = {
            "recipe": recipe.resolved(),
            "model": {"name": problem.name, "params": cost.params, "macs": cost.macs},
            "samples": dict(problem.sizes),
            "units": units,
            "excluded": [asdict(e) for e in graph.excluded],
            "out": str(where),
        }
        if intended is not None:
            found["comparison"] = {
                "seeds": intended.seeds,
                "runs": len(intended.jobs),
                "finished": len(intended.finished),
                "skipped": intended.skipped,
            }
        typer.echo(json.dumps(found, indent=1, allow_nan=False))
        return
    typer.echo(recipe.to_yaml())
    typer.echo(f"model: {problem.name}: {cost.params:,.0f} parameters, {cost.macs:,.0f} MACs")
    if problem.sizes:
        typer.echo("samples: " + ", ".join(f"{n} {k}" for k, n in problem.sizes.items()))
    if recipe.start == "untrained":
        typer.echo("start: untrained: what is pruned was not trained before")
    for number, (stage, names) in enumerate(zip(stages, units, strict=True), start=1):
        how = given(getattr(stage, stage.decided_by or "steps"))
        how += f", {given(stage.layerwise)}" if stage.layerwise is not None else ""
        typer.echo(f"stage {number}: {given(stage.budget or stage.threshold)}, {how}")
        for name, n in names.items():
            typer.echo(f"  {name}: {n:,} units")
    for left in graph.excluded:
        typer.echo(f"left whole: {left.name}: {left.reason}")
    if intended is not None:
        runs = ["the criterion itself", *(c for c in recipe.controls if c not in intended.skipped)]
        seeds = ", ".join(map(str, intended.seeds))
        done = f", {len(intended.finished)} of them finished" if intended.finished else ""
        typer.echo(f"{len(intended.jobs)} runs{done}: {', '.join(runs)}; seeds {seeds}")
        for control, why in intended.skipped.items():
            typer.echo(f"cannot be run: {control}: {why}")
    typer.echo(f"would write to {where}")
