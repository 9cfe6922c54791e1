"""A warm process that forks a child for each run, and kills it by SIGKILL at a chosen instant.

Reads one JSON object a line: {"scenario", "folder", "resume", "kill", "plant"}; answers with one:
{"killed", "failed", "seconds"}. A child that ends writes `result.json` to its folder. `kill` is
null, or how and when: ["time", seconds] from outside; ["line", n] before the n-th line of code that
is run in the rooms below; ["write", n] after half of the n-th piece of a checkpoint is written;
["replace", n] and ["fsync", n] before these calls; ["step", n] after an optimizer step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import secateurs
from secateurs.checkpoints import files
from secateurs.finetuning import loop
from secateurs.finetuning.resuming import Place
from tests.checkpoints.scenarios import SCENARIOS

ROOMS = tuple(
    str(Path(secateurs.__file__).parent / room)
    for room in ("checkpoints", "finetuning", "pipeline", "runner", "surgery/files.py")
)
COUNTED = {"lines": 0}


def die() -> None:
    """As if the power went."""
    os.kill(os.getpid(), signal.SIGKILL)


def count_lines(last: int) -> None:
    """Trace the lines of our rooms; die before the last one."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            COUNTED["lines"] += 1
            if COUNTED["lines"] == last:
                die()
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(ROOMS) else None

    sys.settrace(enter)


def dies_at(n: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose n-th call does not happen."""
    left = [n]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            die()
        return real(*arguments)

    return call


def half_a_write(n: int) -> Callable[..., None]:
    """Writes pieces; of the n-th only a half."""
    left = [n]

    def write(file: Any, piece: memoryview) -> None:
        left[0] -= 1
        file.write(piece if left[0] else piece[: len(piece) // 2])
        if not left[0]:
            file.flush()
            die()

    return write


def plan_death(how: str, n: int) -> None:
    if how == "line":
        count_lines(n)
    elif how == "write":
        files.write = half_a_write(n)
    elif how == "replace":
        os.replace = dies_at(n, os.replace)
    elif how == "fsync":
        os.fsync = dies_at(n, os.fsync)
    elif how == "step":
        register_optimizer_step_post_hook(dies_at(n, lambda *_: None))
    else:
        assert how == "time", how


FORGOTTEN = {
    "random": "set_random_state", "optimizer": "load_optimizer_", "weights": "restore_",
    "place": "Place",
}  # fmt: skip
"""Part of the state -> what puts it back when a training goes on."""


def plant(bug: str) -> None:
    """Forget a part of the state when a training goes on."""
    new = Place if bug == "place" else None
    setattr(loop, FORGOTTEN[bug], lambda *_, **__: None if new is None else new())


def child(asked: dict[str, Any]) -> None:
    folder = Path(asked["folder"])
    try:
        kill = asked["kill"]
        if asked.get("plant"):
            plant(asked["plant"])
        if kill is not None:
            plan_death(kill[0], kill[1])
        found = SCENARIOS[asked["scenario"]](folder, asked["resume"])
        sys.settrace(None)
        text = json.dumps({"result": found, "lines": COUNTED["lines"]})
        (folder / "result.json").write_text(text)
    except BaseException:
        sys.settrace(None)
        (folder / "error.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def serve() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for name, scenario in SCENARIOS.items():  # so that each child finds everything imported
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).mkdir()
            scenario(Path(folder) / name, False)
    os.chdir("/")
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        pid = os.fork()
        if not pid:
            child(asked)
        kill = asked["kill"]
        if kill is not None and kill[0] == "time":
            time.sleep(kill[1])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        answer = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "failed": os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0,
            "seconds": time.perf_counter() - started,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
