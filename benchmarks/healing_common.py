"""What the benchmarks of healing share: rows on disk, counted steps, and tables of means.

A row is one line of JSON, written whole or not at all; a run that is stopped goes on where it was.
Rows of the part "search" have figures of validation data only, under seeds that no final row has.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.report import environment
from secateurs.tasks import Data, Task, dense_checkpoint, get_task

__all__ = [
    "RESULTS",
    "SEARCH_SEEDS",
    "Dense",
    "Rows",
    "SameSteps",
    "best_setting",
    "error_of",
    "paired",
    "points",
]

RESULTS = Path(__file__).resolve().parent / "results"
SEARCH_SEEDS = (100, 101)
"""Seeds of the search; the final rows have 0, 1, 2, ..."""

Row = dict[str, Any]


class Rows:
    """The rows of one file, by the fields that tell them apart."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path, self.fields = path, tuple(fields)

    def read(self) -> list[Row]:
        """All rows; a last line that was cut off by a crash is no row."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        return [json.loads(line) for line in whole.splitlines() if line.strip()]

    def key(self, row: Mapping[str, Any]) -> str:
        """The fields that tell rows apart, as one text."""
        return json.dumps([row[name] for name in self.fields], sort_keys=True)

    def done(self) -> set[str]:
        """Keys of the rows that are there."""
        return {self.key(row) for row in self.read()}

    def append(self, row: Row) -> None:
        """Add a row, on disk when this returns."""
        line = json.dumps(row | {"environment": environment(row["seed"])}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # half a line: cut it off
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def run(self, wanted: Iterable[Row], work: Callable[[Row], Row]) -> None:
        """Do what is not there yet; `work` gives the figures of a row."""
        done = self.done()
        for row in wanted:
            key = self.key(row)
            if key in done:
                continue
            started = time.perf_counter()
            found = work(row)
            seconds = round(time.perf_counter() - started, 1)
            self.append({**row, **found, "seconds": seconds})
            done.add(key)
            told = {k: v for k, v in found.items() if k in ("validation", "test", "message")}
            print(*(row[name] for name in self.fields), told, f"{seconds} s", flush=True)


class Dense:
    """The dense network of a task and seed, with its data; the last one is kept in memory."""

    _held: tuple[str, int, Dense] | None = None

    def __init__(self, name: str, seed: int) -> None:
        self.task: Task = get_task(name)
        self.model: nn.Module
        self.data: Data
        self.model, self.data, _ = dense_checkpoint(self.task, seed)
        self._known: dict[str, float] = {}

    @classmethod
    def of(cls, name: str, seed: int) -> Dense:
        """The dense network, read once for rows that follow each other."""
        if cls._held is None or cls._held[:2] != (name, seed):
            cls._held = name, seed, cls(name, seed)
        return cls._held[2]

    def metric(self, model: nn.Module, split: str) -> float:
        """The main metric on "validation" or "test" data."""
        return next(iter(self.task.metric(model, getattr(self.data, split)).values()))

    def figures(self, model: nn.Module, part: str) -> dict[str, Any]:
        """The metric on validation data and, of a final row only, on test data; dense beside."""
        found: dict[str, Any] = {}
        for split in ("validation",) if part == "search" else ("validation", "test"):
            if split not in self._known:
                self._known[split] = self.metric(self.model, split)
            found[split] = self.metric(model, split)
            found[f"dense_{split}"] = self._known[split]
        return found

    def batches(self, n_samples: int) -> list[tuple[Tensor, Tensor]]:
        """The first training samples, in the batches of the task."""
        whole = self.data.train[: math.ceil(n_samples / len(self.data.train[0][1]))]
        return list(whole)


class SameSteps:
    """Counts the optimizer steps of a row and refuses any other number than the budget.

    It listens to every optimizer of the process, so that nothing trains beside the count.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.steps = budget, 0

    def __enter__(self) -> SameSteps:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._handle = register_optimizer_step_post_hook(self._count)
        return self

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def __exit__(self, kind: object, *_: object) -> None:
        self._handle.remove()
        if kind is None:
            assert self.steps == self.budget, f"{self.steps} steps, the budget is {self.budget}"


# -- summaries -------------------------------------------------------------------------------------


def error_of(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired(ours: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """Mean difference over the seeds that both have, and its standard error."""
    gaps = [ours[s] - other[s] for s in sorted(ours.keys() & other.keys())]
    return {
        "seeds": len(gaps),
        "difference": mean(gaps) if gaps else None,
        "standard_error": error_of(gaps),
    }


def points(error: float | None) -> str:
    """A standard error in points, to print."""
    return "se -" if error is None else f"se {100 * error:.2f}"


def best_setting(rows: Iterable[Row], names: Sequence[str]) -> str:
    """The setting with the best mean on validation data among those tried on every seed."""
    tried: dict[str, list[float]] = {}
    for row in rows:
        if row["part"] == "search" and row["setting"] in names and row["validation"] is not None:
            tried.setdefault(row["setting"], []).append(row["validation"])
    most = max((len(v) for v in tried.values()), default=0)
    whole = {name: mean(v) for name, v in tried.items() if len(v) == most}
    if not whole:
        raise SystemExit(f"no search rows for {', '.join(names)}: run the search first")
    return max(whole, key=lambda name: whole[name])


def one_thread() -> None:
    """Figures are those of one thread."""
    torch.set_num_threads(1)
