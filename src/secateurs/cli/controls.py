"""What `secateurs run --controls` asks for, and what it prints: a table and a verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from secateurs.ablation import Ablation
    from secateurs.recipe import Recipe

__all__ = ["compare", "comparison"]


def comparison(controls: str | None, seeds: str | None, seed: int | None) -> list[str]:
    """`--controls` and `--seeds` as changes of the recipe.

    Raises:
        ConfigError: an unknown control, no whole numbers, or both `--seed` and `--seeds`.
    """
    from secateurs.controls import CONTROLS
    from secateurs.errors import ConfigError, choose

    changes = []
    if controls is not None:
        names = [choose(n.strip(), (*CONTROLS, "all"), "control") for n in controls.split(",")]
        changes.append("control=all" if "all" in names else f"control=[{', '.join(names)}]")
    if seeds is not None:
        numbers = [n.strip() for n in seeds.split(",")]
        if not all(n.isdecimal() for n in numbers):
            raise ConfigError(
                f"--seeds {seeds!r}: write whole numbers with commas between, for example 0,1,2"
            )
        if seed is not None:
            raise ConfigError("give --seed for a single run or --seeds for a comparison, not both")
        changes.append(f"seeds=[{', '.join(str(int(n)) for n in numbers)}]")
    return changes


def compare(
    recipe: Recipe, base: Path, where: Path, *, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Run the comparison and print it; exit code 1 if a control failed."""
    from secateurs.ablation import ablate, check_ablation
    from secateurs.bars import bar
    from secateurs.cli.output import prints_to_stderr, stderr, stdout
    from secateurs.cli.run import describe

    if dry_run:
        with prints_to_stderr():
            intended = check_ablation(recipe, where, base=base, force=force)
        describe(recipe, intended.problem, intended.graph, where, as_json, intended)
        return
    try:
        with prints_to_stderr(), bar("compare with controls") as step:
            found = ablate(recipe, where, base=base, force=force, progress=step)
    except KeyboardInterrupt:
        n = len(list((where / "rows").glob("*.json")))
        stderr().print(
            f"{n} finished runs are kept in {where / 'rows'}; the same command goes on from there "
            "(without --force)",
            highlight=False,
        )
        raise
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False))
    else:
        _print(found, stdout())
    files = f"{where / 'ablation.json'}, {where / 'recipe.yaml'}, {len(found.rows)} runs"
    stderr().print(f"written: {files} in {where / 'rows'}", highlight=False)
    if found.failed:
        raise typer.Exit(1)


def _print(found: Ablation, console: Console) -> None:
    """The table, the verdict, and what was not run."""
    from secateurs.report.words import sentence

    n = len(found.seeds)
    console.print(_table(found))
    console.print(
        f"\nMean over {n} seed{'s' * (n > 1)} ± standard error. The test split is read once per "
        "run, at the end;\nright after the last cut, before training heals it, on validation data.",
        highlight=False,
    )

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    text = sentence(found.verdict)  # without a verdict it says so itself
    line(f"\n{text}." if found.knows_more is None else f"\nVerdict: {text}.")
    line(f"(The rule: {found.rule}.)\n")
    for row in found.comparisons:
        if row.control != "shuffle":
            line(f"{row.control}: {row.text}.")
    for control, why in found.skipped.items():
        line(f"{control}: not run: {why}.")
    for run, why in found.failed.items():
        line(f"failed: {run}: {why}. The same command tries it again.")
    for note in found.notes:
        line(f"Note: {note}.")


def _table(found: Ablation) -> Table:
    """One line for the dense model, the criterion and each control."""
    from rich.table import Table

    title = f"{found.title}: {found.method} and its controls, seeds {_list(found.seeds)}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("after the cut", "difference", f"test {found.metric}", "difference"):
        table.add_column(heading, justify="right")
    real = found.of(None)
    table.add_row("dense", "", "", _mean([row.dense for row in real]), "")
    cut = _mean([row.after_cut for row in real])
    table.add_row(found.method, cut, "", _mean([row.test for row in real]), "")
    for row in found.comparisons:
        runs = found.of(row.control)
        few = "" if len(row.seeds) == len(found.seeds) else f" (seeds {_list(row.seeds)})"
        table.add_row(
            row.control + few,
            "the same cut" if row.after_cut is None else _mean([r.after_cut for r in runs]),
            "" if row.after_cut is None else row.after_cut.text,
            _mean([r.test for r in runs]),
            row.test.text,
        )
    return table


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _mean(values: list[float]) -> str:
    """Mean and standard error."""
    from secateurs.report.words import number, plus_minus

    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return f"{number(mean(values))} {plus_minus(error)}".rstrip()
