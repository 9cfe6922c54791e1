"""What the verbs print: the before and after table, and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.table import Table

from secateurs.report.data import MetricRow, Report
from secateurs.report.words import change, quantity, spread

__all__ = ["before_after", "prints_to_stderr", "stderr", "stdout"]


def stdout() -> Console:
    """Console for data; wide enough for a table when it is not a terminal."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=120)


def stderr() -> Console:
    """Console for progress and messages."""
    return Console(stderr=True)


@contextmanager
def prints_to_stderr() -> Iterator[None]:
    """What the user's functions print goes to stderr: stdout is for our data."""
    with redirect_stdout(sys.stderr):
        yield


def before_after(report: Report) -> Table:
    """The one table of a run."""
    table = Table(title=report.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        table.add_row(row.name, _cell(row, 0), _cell(row, 1), change(row).text)
    return table


def _cell(row: MetricRow, side: int) -> str:
    value = (row.before, row.after)[side]
    quartiles = spread((row.spread_before, row.spread_after)[side], row.unit)
    return quantity(value, row.unit) + (f" [{quartiles}]" if quartiles else "")
