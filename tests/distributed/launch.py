"""Processes of a gloo group on this machine, started from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Worker", "launch"]

Worker = Callable[[Path], Any]
"""Runs in every process; gets a folder that all of them see."""


def launch(
    worker: Worker, size: int, folder: Path, *, timeout: float = 60.0, limit: float = 240.0
) -> list[int | None]:
    """The exit codes of the processes, None for one that had to be ended.

    Args:
        worker: a function of a module.
        size: processes.
        folder: for what they leave behind; `rank.error` holds a traceback.
        timeout: of the group, in seconds.
        limit: seconds until all are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.checks"])
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    processes = [
        context.Process(target=_main, args=(worker, rank, size, folder, meeting, timeout))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _main(
    worker: Worker, rank: int, size: int, folder: Path, meeting: Path, timeout: float
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        worker(folder)
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        code = 1
    os._exit(code)  # nothing is cleaned up: the others may be gone
