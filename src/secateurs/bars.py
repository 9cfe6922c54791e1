"""Progress of long work: a callable for those who have their own display, a bar for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "bar", "epoch_text"]

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: what is being done now, and how many steps of how many are."""


@contextmanager
def bar(title: str) -> Iterator[Progress]:
    """A progress bar on stderr with the time left; silent when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as shown:
        task = shown.add_task(title, total=None)

        def step(what: str, done: int, total: int) -> None:
            shown.update(task, description=f"{title}: {what}", completed=done, total=total)

        yield step


def epoch_text(what: str, epoch: int, loss: float, metric: float | None) -> str:
    """One line for an epoch that is done.

    Example:
        >>> epoch_text("heal", 2, 0.04321, 0.98)
        'heal: epoch 2, loss 0.0432, metric 0.98'
    """
    tail = "" if metric is None else f", metric {metric:.4g}"
    return f"{what}: epoch {epoch}, loss {loss:.3g}{tail}"
