"""`secateurs search recipe.yaml`: candidates judged by cross-validation, one chosen and made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from secateurs.recipe import Recipe
    from secateurs.searching.plan import Snapshot
    from secateurs.searching.results import SearchResult
    from secateurs.searching.run import Watch

__all__ = ["search"]

SHOWN = 25  # rows of the table
STEPS = 20  # lines of progress where there is no terminal


def search(
    recipe: Path = typer.Argument(..., help="A recipe with a block search: a YAML file."),
    set_: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one value: --set search.max_drop=0.02"
    ),
    out: Path = typer.Option(None, "--out", help="Directory of the results [runs/RECIPE-search]."),
    workers: int = typer.Option(1, "--workers", min=1, help="Processes that judge candidates."),
    storage: str = typer.Option(
        None,
        "--storage",
        metavar="URL",
        help="postgresql://USER:PASSWORD@HOST/DATABASE: every machine that runs the same command "
        "works along [a file in OUT].",
    ),
    name: str = typer.Option(None, "--name", help="Of the search in the storage [RECIPE]."),
    trials: int = typer.Option(None, "--trials", help="Same as --set search.trials=N."),
    timeout: float = typer.Option(
        None, "--timeout", metavar="SECONDS", help="Begin no fold after that, and choose."
    ),
    resume: bool = typer.Option(
        False, "--resume", help="Go on though OUT holds results: after --timeout, or more --trials."
    ),
    force: bool = typer.Option(False, "--force", help="Throw earlier folds and results away."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check everything and print the candidates; train nothing."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Choose by cross-validation what and how much to prune, and prune so.

    Folds are kept as they finish: after Ctrl-C or kill -9 the same command goes on.
    """
    from secateurs.bars import bar
    from secateurs.cli.output import prints_to_stderr, stderr
    from secateurs.errors import ConfigError
    from secateurs.recipe import read_recipe
    from secateurs.report import check_available
    from secateurs.searching.run import check_search
    from secateurs.searching.run import search as run_search

    changes = (*set_, *([f"search.trials={trials}"] if trials is not None else []))
    parsed, base = read_recipe(recipe, changes), recipe.parent
    where, study = out or Path("runs") / f"{recipe.stem}-search", name or recipe.stem
    if timeout is not None and timeout <= 0:
        raise ConfigError(f"--timeout must be above 0 seconds, got {timeout}")
    check_available()
    check_search(parsed, None, where, workers, resume=resume, force=force or dry_run)
    if dry_run:
        with prints_to_stderr():
            text = describe(parsed, base, where, as_json)
        typer.echo(text)
        return
    last: list[Snapshot] = []
    try:
        with prints_to_stderr(), _shown(last) as watch, bar("make the chosen network") as step:
            found = run_search(
                parsed, out=where, base=base, workers=workers, storage=storage, name=study,
                timeout=timeout, resume=resume, force=force, watch=watch, progress=step, say=_say,
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"{last[-1].done} of {last[-1].total} candidates" if last else "What is finished"
        folds = f" and {last[-1].folds} folds are" if last else " is"
        without = " (without --force)" if force else ""
        _say(f"{kept}{folds} kept; the same command goes on from there{without}")
        raise
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False))
    else:
        _print(found)
    files = [f.name for f in sorted(where.iterdir()) if f.is_file()]
    stderr().print(f"written: {where}: {', '.join(files)}", highlight=False, soft_wrap=True)
    if not found.choice.candidate and found.settings["goal"] != "pareto":
        raise typer.Exit(1)


def _say(text: str) -> None:
    typer.echo(text, err=True)


# --- progress -------------------------------------------------------------------------------------


@contextmanager
def _shown(last: list[Snapshot]) -> Iterator[Watch]:
    """A bar over all folds in a terminal, lines elsewhere; `last` gets the newest snapshot."""
    from secateurs.bars import bar
    from secateurs.cli.output import stderr

    def keep(show: Watch) -> Watch:
        def watch(snapshot: Snapshot, best: str) -> None:
            last[:] = [snapshot]
            show(snapshot, best)

        return watch

    if not stderr().is_terminal:
        yield keep(lines(_say))
        return
    with bar("search") as step:

        def show(snapshot: Snapshot, best: str) -> None:
            text = f"{snapshot.done} of {snapshot.total} candidates"
            text += f", best so far {best}" if best else ""
            step(f"{text}; folds", snapshot.folds, snapshot.total_folds)

        yield keep(show)


def lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Watch:
    """Progress as lines: at the first fold, and then some twenty times until the end."""
    start: tuple[float, int] | None = None
    said = -1

    def watch(snapshot: Snapshot, best: str) -> None:
        nonlocal start, said
        if start is None:
            start = clock(), snapshot.folds
        part = STEPS * snapshot.done // max(1, snapshot.total)
        if part == said:
            return
        said = part
        words = [f"{snapshot.done} of {snapshot.total} candidates"]
        words.append(f"{snapshot.folds} of {snapshot.total_folds} folds")
        if snapshot.problems:
            words.append(f"{snapshot.problems} impossible")
        if best:
            words.append(f"best so far {best}")
        done, left = snapshot.folds - start[1], snapshot.total_folds - snapshot.folds
        if done and left:
            words.append(f"about {_time((clock() - start[0]) / done * left)} left")
        say(f"search: {', '.join(words)}")

    return watch


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# --- words ----------------------------------------------------------------------------------------


def describe(recipe: Recipe, base: Path, where: Path, as_json: bool) -> str:
    """The dry run: what would be judged, on what."""
    from secateurs.runner import load_problem
    from secateurs.searching.evaluation import prepare
    from secateurs.searching.samplers import fixed_candidates

    anchored = recipe.anchored(base)
    judge = prepare(anchored, load_problem(anchored, base, train=False), base)
    asked = judge.search
    known = fixed_candidates(asked.grid_space, asked.sampler, asked.trials, anchored.seed)
    n, k = asked.n_trials, judge.n_folds
    if as_json:
        found = {
            "recipe": recipe.resolved(), "mode": asked.mode, "candidates": n, "folds": k,
            "samples": judge.ground.n_judged, "out": str(where),
            "listed": None if known is None else [c.to_dict() for c in known],
        }  # fmt: skip
        return json.dumps(found, indent=1)
    words = [recipe.to_yaml()]
    words.append(f"{n} candidates on {k} folds ({asked.folds.kind}): {n * k} prunings, mode "
                 f"{asked.mode}, {judge.ground.n_judged} samples judged")  # fmt: skip
    if known is None:
        words.append(f"sampler {asked.sampler}: candidates follow from the results")
    else:
        words += [f"  {c.number}: {c.text}" for c in known[:SHOWN]]
        words += [f"  ... {n - SHOWN} more"] if n > SHOWN else []
    words += [f"note: {note}" for note in judge.ground.notes]
    return "\n".join([*words, f"would write to {where}"])


def _print(found: SearchResult) -> None:
    from secateurs.cli.output import stdout
    from secateurs.searching import telling

    console = stdout()

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line(f"{telling.headline(found)}\n")
    console.print(_table(found))
    line("")
    for text in (*found.choice.why, telling.final_words(found)):
        line(text)
    for note in found.notes:
        line(f"Note: {note}.")


def _table(found: SearchResult) -> Table:
    """One line for each candidate, the interesting ones if there are too many."""
    from rich.table import Table

    from secateurs.searching import telling

    rows = list(found.standings)
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda s: (s is not found.chosen, not s.passed, not s.front))
        rows = sorted(rows[:SHOWN], key=lambda s: s.candidate.number)
    more = f", {len(rows)} of them" if len(rows) < len(found.standings) else ""
    title = f"{found.title}: {len(found.standings)} candidates{more}, mean of the folds"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("candidate")
    for heading in (found.metric, "drop", "upper bound"):
        table.add_column(heading, justify="right")
    table.add_column("remains")
    table.add_column("")
    for one in rows:
        judged = one.judged
        drops = [telling.drop_words(found, d) if judged else "" for d in (one.drop, one.upper)]
        table.add_row(
            one.candidate.text,
            "" if one.metric is None else f"{one.metric:.4f}",
            *drops,
            telling.remaining_cells(one) if judged else "",
            telling.verdict(found, one),
        )
    return table
