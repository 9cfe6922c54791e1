"""A pool without processes, for tests that need none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

__all__ = ["Inline", "inline_pool"]


class Inline:
    """The part of a pool that is used."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Calls at once, in this process."""
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


@contextmanager
def inline_pool(jobs: int) -> Iterator[Inline]:
    """In place of `worker_pool`."""
    yield Inline()
