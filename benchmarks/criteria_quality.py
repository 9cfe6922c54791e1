"""Which criterion loses least? Accuracy after the same cut and the same fine-tuning.

    python -m benchmarks.criteria_quality                    # resumes where it stopped, 2 processes
    python -m benchmarks.criteria_quality --tasks cancer-mlp digits-mlp --seeds 0
    python -m benchmarks.criteria_quality --summary          # only summarise what is there
    python -m benchmarks.criteria_quality --projection       # hours still to go, from what is done

Structured: at most 1/2, 1/4, 1/10 of the MACs may remain, the same share of units in every family
(so criteria differ only in which units they keep there), really removed by `shrink` at the end.
Weights: at most 10, 5, 2, 1 % may remain, and all layers compete ("global"), so that a criterion
decides the density of the layers, too. Cuts follow a cubic schedule; before each, what is left is
scored anew on the calibration samples; after each comes a short fine-tuning with AdamW and a
cosine, the same for all (`CUTS`). The test split is evaluated once for each row, at the end.

Controls: random scores; Taylor's scores shuffled inside each family (only its densities are left);
Taylor inverted (what matters most goes first). All rows of a task and seed share the dense network,
so that differences are paired. One thread for each process; a row is appended to
`benchmarks/results/criteria_quality.jsonl` as soon as it is done.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import secateurs as sc
from secateurs.controls import controlled_scores
from secateurs.criteria import CRITERIA
from secateurs.errors import PruningError
from secateurs.finetuning import Finetune, finetune
from secateurs.masks import apply_masks_
from secateurs.pipeline import Stage
from secateurs.report import environment
from secateurs.schedules import Schedule
from secateurs.tasks import TASKS as KNOWN
from secateurs.tasks import available, dense_checkpoint, get_task
from secateurs.types import Graph, Plan, Scores

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "criteria_quality.jsonl"
SUMMARY = HERE / "results" / "criteria_quality.json"
SEEDS = (0, 1, 2)
CUTS = {
    "cancer-mlp": (3, 110),
    "digits-mlp": (3, 170),
    "digits-cnn": (3, 60),
    "vowels-gru": (3, 40),
    "fashion-lenet300": (3, 150),
    "spam-transformer": (2, 50),
    "fashion-lenet5": (2, 60),
    "fashion-resnet20": (2, 20),
}
"""Task, the cheapest first -> cuts, and steps of fine-tuning after each."""
KEPT = {"structured": (0.5, 0.25, 0.1), "weight": (0.1, 0.05, 0.02, 0.01)}
"""Level -> what may remain: of the MACs, or of the weights."""
METHODS: dict[str, tuple[str, ...]] = {
    "structured": (
        "magnitude", "geometric_median", "synflow", "activation_variance", "wanda",
        "mutual_information", "conditional_entropy", "taylor", "taylor_abs", "fisher",
        "gauss_newton", "kfac", "path_integral",
    ),
    "weight": (
        "magnitude", "lamp", "synflow", "wanda", "gradient", "snip", "taylor_batch",
        "fisher_batch", "fisher", "directional", "path_integral", "grasp_abs", "movement",
    ),
}  # fmt: skip
CONTROLS = ("random", "shuffle", "invert")
OF_CONTROLS = {"structured": "taylor", "weight": "taylor_batch"}
REFERENCES = ("random", "magnitude")
MAX_SECONDS = 600.0


def names_for(level: str) -> list[str]:
    """Criteria that are registered, and the controls."""
    return [*(c for c in METHODS[level] if c in CRITERIA), *CONTROLS]


# -- one job: all cuts of one criterion -----------------------------------------------------------


class Dense:
    """The dense network of a task and seed, with its data and graph; the last one is kept."""

    _held: tuple[str, int, Dense] | None = None

    def __init__(self, name: str, seed: int) -> None:
        self.task = get_task(name)
        # Of two processes that need an untrained network, one trains it.
        lock = Path(tempfile.gettempdir()) / f"secateurs-{name}-{seed}.lock"
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.model, self.data, _ = dense_checkpoint(self.task, seed)
        self.graph: Graph = sc.trace(self.model, self.data.example_inputs)
        self.metrics = self.task.metric(self.model, self.data.test)

    @classmethod
    def of(cls, name: str, seed: int) -> Dense:
        if cls._held is None or cls._held[:2] != (name, seed):
            cls._held = name, seed, cls(name, seed)
        return cls._held[2]


class Run:
    """The way of one criterion or control through all budgets; dense scores are shared."""

    def __init__(self, dense: Dense, level: str, name: str, seed: int) -> None:
        self.dense, self.level, self.name, self.seed = dense, level, name, seed
        self._first: Scores | None = None

    def scores(self, model: nn.Module, plan: Plan | None) -> Scores:
        """Scores of what is left, by the criterion or the control."""
        if plan is None and self._first is not None:
            return self._first
        control = self.name if self.name in CONTROLS else None
        scores: Scores = sc.score(
            model, self.dense.data.calibration, self.dense.task.loss_fn, graph=self.dense.graph,
            criterion=self.name if control is None else OF_CONTROLS[self.level],
            granularity=self.level, previous=plan, seed=self.seed, max_seconds=MAX_SECONDS,
        )  # fmt: skip
        # Another draw for each cut.
        drawn = self.seed + 1000 * (0 if plan is None else plan.n_removed)
        scores = controlled_scores(scores, control, drawn)
        if plan is None:
            self._first = scores
        return scores

    def through(self, keep: float) -> dict[str, Any]:
        """Metrics after all cuts to one budget."""
        dense, structured = self.dense, self.level == "structured"
        cuts, steps = CUTS[dense.task.name]
        stage = Stage(
            sc.Budget(macs=keep) if structured else sc.Budget(units=keep),
            granularity=self.level,
            allocation="uniform" if structured else "global",
            schedule=Schedule("cubic", steps=cuts),
        )
        config = Finetune(steps=steps, lr=1e-3, lr_schedule="cosine")
        work, plan = copy.deepcopy(dense.model), None
        for cut in range(1, cuts + 1):
            scores = self.scores(work, plan)
            counts = stage.allocated(scores, stage.asked_at(cut, dense.graph))
            plan = sc.select(scores, counts, previous=plan)
            apply_masks_(work, plan.masks)
            finetune(
                work, dense.data.train, dense.task.loss_fn, config, masks=plan.masks,
                seed=self.seed + cut,
            )  # fmt: skip
        assert plan is not None
        model = sc.shrink(work, plan, dense.data.example_inputs) if structured else work
        metrics = dense.task.metric(model, dense.data.test)
        name = next(iter(metrics))
        return {
            "metric": name,
            "dense": dense.metrics[name],
            "pruned": metrics[name],
            "remains": counts.realised["macs" if structured else "units"],
            "not_scored": len(scores.not_scored),
            "emptied": sum(n <= 1 for n in counts.kept.values()),
            "message": "",
        }


def run_job(task: str, seed: int, level: str, name: str, done: set[tuple[Any, ...]]) -> None:
    """All cuts of one criterion that are not there yet."""
    todo = [k for k in KEPT[level] if (task, seed, level, name, k) not in done]
    if not todo:
        return
    run = Run(Dense.of(task, seed), level, name, seed)
    for keep in todo:
        started = time.perf_counter()
        try:
            found = run.through(keep)
        except PruningError as error:
            found = {"pruned": None, "message": str(error)[:300]}
        row = {
            "task": task, "seed": seed, "level": level, "criterion": name, "keep": keep,
            "cuts": CUTS[task],
        } | found  # fmt: skip
        row["seconds"] = round(time.perf_counter() - started, 2)
        ROWS.parent.mkdir(parents=True, exist_ok=True)
        with ROWS.open("a") as file:
            file.write(json.dumps(row | {"environment": environment(seed)}) + "\n")
        told = found["message"] or f"{found['dense']:.4f} -> {found['pruned']:.4f}"
        print(f"{task} {seed} {level} {name} {keep} {told} {row['seconds']} s", flush=True)


# -- rows -----------------------------------------------------------------------------------------


def read_rows() -> list[dict[str, Any]]:
    """Rows that are done."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines() if line.strip()]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("task", "seed", "level", "criterion", "keep"))


def jobs(
    tasks: Sequence[str], seeds: Sequence[int], levels: Sequence[str], criteria: Sequence[str]
) -> Iterator[tuple[str, int, str, str]]:
    """(task, seed, level, criterion), the cheapest tasks first."""
    for task in tasks:
        for seed in seeds:
            for level in levels:
                for name in names_for(level):
                    if not criteria or name in criteria:
                        yield task, seed, level, name


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds, with the paired differences from the references."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["pruned"] is not None:
            kind = (row["task"], row["level"], row["keep"], row["criterion"])
            groups.setdefault(kind, {})[row["seed"]] = row
    found = []
    for (task, level, keep, name), held in groups.items():
        values = [r["pruned"] for r in held.values()]
        line: dict[str, Any] = {
            "task": task,
            "level": level,
            "keep": keep,
            "criterion": name,
            "metric": next(iter(held.values()))["metric"],
            "seeds": sorted(held),
            "dense": mean(r["dense"] for r in held.values()),
            "pruned": mean(values),
            "se": _error(values),
            "remains": mean(r["remains"] for r in held.values()),
            "control": name in CONTROLS,
        }
        for reference in REFERENCES:
            other = groups.get((task, level, keep, reference), {})
            gaps = [held[s]["pruned"] - other[s]["pruned"] for s in held if s in other]
            line[f"over_{reference}"] = mean(gaps) if gaps else None
            line[f"over_{reference}_se"] = _error(gaps)
        found.append(line)
    order = {name: i for i, name in enumerate(CUTS)}
    found.sort(key=lambda r: (order[r["task"]], r["level"], -r["keep"], -r["pruned"]))
    return found


def _error(values: list[float]) -> float | None:
    """Standard error of the mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def verdict(row: dict[str, Any], reference: str) -> str:
    """ "better", "worse" or "level": more than two standard errors of the paired difference."""
    gap, error = row[f"over_{reference}"], row[f"over_{reference}_se"]
    if gap is None or error is None:
        return ""
    if abs(gap) <= 2 * error or gap == 0:
        return "level"
    return "better" if gap > 0 else "worse"


def projection(rows: list[dict[str, Any]], seeds: Sequence[int], workers: int) -> str:
    """Hours that each task still needs, from the mean seconds of what is done (all levels)."""
    done = {key_of(r) for r in rows}
    lines = []
    for task in CUTS:
        held = [r for r in rows if r["task"] == task]
        left = [
            (seed, level, name, keep)
            for _, seed, level, name in jobs([task], seeds, list(KEPT), ())
            for keep in KEPT[level]
            if (task, seed, level, name, keep) not in done
        ]
        if not held:
            lines.append(f"{task}: {len(left)} rows to go, nothing measured yet")
            continue
        each = mean(r["seconds"] for r in held)
        hours = len(left) * each / workers / 3600
        lines.append(
            f"{task}: {len(left)} rows to go at {each:.1f} s: {hours:.2f} h with {workers} "
            "processes"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", nargs="*", choices=CUTS, default=list(CUTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--levels", nargs="*", choices=KEPT, default=list(KEPT))
    parser.add_argument("--criteria", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--share", nargs=2, type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    parser.add_argument("--projection", action="store_true", help="only tell the hours to go")
    options = parser.parse_args()
    if options.projection:
        print(projection(read_rows(), options.seeds, options.workers))
        return
    if options.share is not None:
        work(options)
        return
    if not options.summary:
        command = [sys.executable, "-m", "benchmarks.criteria_quality", *sys.argv[1:], "--share"]
        running = [
            subprocess.Popen([*command, str(i), str(options.workers)], cwd=HERE.parent)
            for i in range(options.workers)
        ]
        for process in running:
            process.wait()
    rows = summarise(read_rows())
    payload = {"environment": environment(0), "rows": rows}
    SUMMARY.write_text(json.dumps(payload, indent=1) + "\n")
    print(f"{len(rows)} groups in {SUMMARY.name}")


def work(options: argparse.Namespace) -> None:
    """The share of one process."""
    os.nice(10)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    number, of = options.share
    done = {key_of(r) for r in read_rows()}
    tasks = [t for t in options.tasks if t in KNOWN and available(get_task(t)) is None]
    for i, job in enumerate(jobs(tasks, options.seeds, options.levels, options.criteria)):
        if i % of == number:
            run_job(*job, done)


if __name__ == "__main__":
    main()
