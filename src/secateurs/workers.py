"""Worker processes for independent runs: one thread each, so that results do not depend on them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from secateurs.errors import PruningError

__all__ = ["worker_pool"]


@contextmanager
def worker_pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of as many processes as there are cores, at most `jobs`.

    On an error, or Ctrl-C, what has not begun is cancelled.

    Raises:
        PruningError: a worker was ended from outside.
    """
    count = max(1, min(jobs, os.cpu_count() or 1))
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise PruningError(
            "a worker process was ended from outside, perhaps because memory ran out"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    """One thread; and Ctrl-C ends a worker at once, without a traceback."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
