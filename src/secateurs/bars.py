"""Progress of long work: a callable for those who have their own display, a bar for the others."""

from __future__ import annotations

import math
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
        speed_estimate_period=math.inf,  # an epoch may take an hour
        console=Console(stderr=True),
        transient=True,
    ) as shown:
        task = shown.add_task(title, total=None)

        def step(what: str, done: int, total: int) -> None:
            shown.update(task, description=f"{title}: {what}", completed=done, total=total)

        yield step


def epoch_text(
    what: str,
    epoch: int,
    loss: float,
    metric: float | None,
    *,
    epochs: int | None = None,
    zeros: float | None = None,
) -> str:
    """One line for an epoch that is done, of how many, and the share of zeros among all weights.

    Example:
        >>> epoch_text("heal", 2, 0.04321, 0.98)
        'heal: epoch 2, loss 0.0432, metric 0.98'
        >>> epoch_text("heal", 2, 0.04321, None, epochs=5, zeros=0.8)
        'heal: epoch 2 of 5, loss 0.0432, 80.0% zeros'
    """
    end = "" if epochs is None else f" of {epochs}"
    tail = "" if metric is None else f", metric {metric:.4g}"
    share = "" if zeros is None else f", {zeros:.1%} zeros"
    return f"{what}: epoch {epoch}{end}, loss {loss:.3g}{tail}{share}"
