"""Which allocation loses least? Accuracy at equal MACs, after the same fine-tuning.

    python -m benchmarks.allocation_quality                     # resumes where it stopped
    python -m benchmarks.allocation_quality --tasks digits-cnn --seeds 0 --epochs 2
    python -m benchmarks.allocation_quality --summary           # only summarise what is there

Channels of the dense network are scored once with "taylor" on the calibration samples. Each method
then divides the same budgets (at most 1/2, 1/4 and 1/10 of the MACs) among the families in one
shot, so that rows of a task, seed and budget differ in nothing but the counts. The network is cut
for real (`shrink`, verified), evaluated as it is ("cut") and again after a short fine-tuning with
AdamW and a cosine, the same for all ("healed"), on validation and test data; nothing is chosen by
either. Curves for "sensitivity" are measured on the same calibration samples, once for each seed
(rise of the loss). One thread; a row is appended to `benchmarks/results/allocation_quality.jsonl`
as soon as it is done.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import secateurs as sc
from secateurs.allocation import Sensitivity
from secateurs.errors import PruningError
from secateurs.finetuning import Finetune, finetune
from secateurs.report import environment
from secateurs.sensitivities import sensitivity
from secateurs.tasks import available, dense_checkpoint, get_task

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "allocation_quality.jsonl"
SUMMARY = HERE / "results" / "allocation_quality.json"
EPOCHS = {"digits-cnn": 3, "fashion-resnet20": 1}
"""Task -> fine-tuning epochs after the cut."""
SEEDS = {"digits-cnn": tuple(range(10)), "fashion-resnet20": (0, 1, 2)}
"""The digits are so few that three seeds tell nothing apart, and so quick that ten cost little."""
KEPT = (0.5, 0.25, 0.1)
METHODS = (
    "uniform", "uniform_plus", "global", "global_normalized", "erk", "lamp", "density",
    "sensitivity",
)  # fmt: skip
REFERENCE = "uniform"


class Dense:
    """The dense network of a task and seed, with all that its rows share."""

    _held: tuple[str, int, Dense] | None = None

    def __init__(self, name: str, seed: int) -> None:
        self.task = get_task(name)
        self.model, self.data, _ = dense_checkpoint(self.task, seed)
        self.graph = sc.trace(self.model, self.data.example_inputs)
        self.validation = self.metric(self.model, "validation")
        self.test = self.metric(self.model, "test")
        calibration, loss_fn = self.data.calibration, self.task.loss_fn
        self.scores = sc.score(
            self.model, calibration, loss_fn, criterion="taylor", graph=self.graph,
            granularity="channel", seed=seed,
        )  # fmt: skip
        started = time.perf_counter()
        self.curves: Sensitivity = sensitivity(
            self.model, calibration, loss_fn, scores=self.scores, graph=self.graph,
            granularity="channel",
            cache=Path(tempfile.gettempdir()) / f"secateurs-curves-{name}-{seed}.json",
        )  # fmt: skip
        self.seconds = time.perf_counter() - started

    def metric(self, model: torch.nn.Module, split: str) -> float:
        """The main metric on "validation" or "test" data."""
        return next(iter(self.task.metric(model, getattr(self.data, split)).values()))

    @classmethod
    def of(cls, name: str, seed: int) -> Dense:
        if cls._held is None or cls._held[:2] != (name, seed):
            cls._held = name, seed, cls(name, seed)
        return cls._held[2]


def run_one(dense: Dense, seed: int, method: str, keep: float, epochs: int) -> dict[str, Any]:
    """Figures of one row: cut in one shot, evaluated, healed, evaluated."""
    curves = dense.curves if method == "sensitivity" else None
    started = time.perf_counter()
    counts = sc.allocate(
        dense.scores, sc.Budget(macs=keep), method=method, sensitivity=curves, round_to=1
    )
    allocated = time.perf_counter() - started
    plan = sc.select(dense.scores, counts)
    small = sc.shrink(copy.deepcopy(dense.model), plan, dense.data.example_inputs)
    cut = {split: dense.metric(small, split) for split in ("validation", "test")}
    config = Finetune(
        epochs=epochs, optimizer="adamw", lr=1e-3, weight_decay=0.01, lr_schedule="cosine"
    )
    finetune(small, dense.data.train, dense.task.loss_fn, config, seed=seed)
    small.eval()
    healed = {split: dense.metric(small, split) for split in ("validation", "test")}
    return {
        "dense": {"validation": dense.validation, "test": dense.test},
        "cut": cut,
        "healed": healed,
        "macs": counts.realised["macs"],
        "params": counts.realised["params"],
        "kept": dict(counts.kept),
        "fewest": min(n / dense.graph.targets[t].n_units for t, n in counts.kept.items()),
        "allocate_seconds": round(allocated, 4),
        "curves_seconds": round(dense.seconds, 2),
        "message": "",
    }


def read_rows() -> list[dict[str, Any]]:
    """Rows that are done."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines() if line.strip()]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("task", "seed", "method", "keep", "epochs"))


def run(
    tasks: Sequence[str],
    seeds: Sequence[int] | None,
    methods: Sequence[str],
    epochs: int | None,
) -> None:
    """All rows that are not there yet."""
    done = {key_of(row) for row in read_rows()}
    for task in tasks:
        why = available(get_task(task))
        if why is not None:
            print(f"{task} is left out: {why}", flush=True)
            continue
        passes = EPOCHS[task] if epochs is None else epochs
        for seed in SEEDS[task] if seeds is None else seeds:
            for keep in KEPT:
                for method in methods:
                    if (task, seed, method, keep, passes) not in done:
                        _append(task, seed, method, keep, passes)


def _append(task: str, seed: int, method: str, keep: float, epochs: int) -> None:
    dense = Dense.of(task, seed)
    started = time.perf_counter()
    try:
        found = run_one(dense, seed, method, keep, epochs)
    except PruningError as error:
        found = {"healed": None, "message": str(error)[:300]}
    row = {"task": task, "seed": seed, "method": method, "keep": keep, "epochs": epochs} | found
    row["seconds"] = round(time.perf_counter() - started, 2)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row | {"environment": environment(seed)}) + "\n")
    told = found["message"] or (
        f"macs {found['macs']:.4f} test {found['dense']['test']:.4f} -> "
        f"{found['cut']['test']:.4f} -> {found['healed']['test']:.4f}"
    )
    print(f"{task} {seed} {keep} {method}: {told} {row['seconds']} s", flush=True)


# -- summary -------------------------------------------------------------------------------------


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds, and the paired difference from "uniform"."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["healed"] is not None:
            kind = (row["task"], row["epochs"], row["keep"], row["method"])
            groups.setdefault(kind, {})[row["seed"]] = row
    found = []
    for (task, epochs, keep, method), held in groups.items():
        other = groups.get((task, epochs, keep, REFERENCE), {})
        line: dict[str, Any] = {
            "task": task,
            "epochs": epochs,
            "keep": keep,
            "method": method,
            "seeds": sorted(held),
            "macs": mean(r["macs"] for r in held.values()),
            "params": mean(r["params"] for r in held.values()),
            "fewest": min(r["fewest"] for r in held.values()),
        }
        for split in ("validation", "test"):
            healed = [r["healed"][split] for r in held.values()]
            gaps = [
                r["healed"][split] - other[s]["healed"][split]
                for s, r in held.items()
                if s in other
            ]
            line[split] = {
                "dense": mean(r["dense"][split] for r in held.values()),
                "cut": mean(r["cut"][split] for r in held.values()),
                "healed": mean(healed),
                "healed_se": _error(healed),
                f"over_{REFERENCE}": mean(gaps) if gaps else None,
                f"over_{REFERENCE}_se": _error(gaps),
            }
        found.append(line)
    order = {name: i for i, name in enumerate(EPOCHS)}
    found.sort(key=lambda r: (order[r["task"]], r["epochs"], -r["keep"], -r["test"]["healed"]))
    return found


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Plain text: one line per task, budget and method, the best first."""
    told = []
    for r in lines:
        t, v = r["test"], r["validation"]
        gap, error = (
            "-" if t[k] is None else f"{t[k]:+.4f}"
            for k in (f"over_{REFERENCE}", f"over_{REFERENCE}_se")
        )
        told.append(
            f"{r['task']} {r['keep']:<5} {r['method']:<18} n={len(r['seeds'])} "
            f"macs {r['macs']:.4f} params {r['params']:.3f} fewest {r['fewest']:.2f} | test "
            f"{t['dense']:.4f} cut {t['cut']:.4f} healed {t['healed']:.4f} "
            f"({gap}, standard error {error}) | validation healed {v['healed']:.4f}"
        )
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", nargs="*", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="*", type=int, default=None)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=None, help="of fine-tuning; see EPOCHS")
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not options.summary:
        run(options.tasks, options.seeds, options.methods, options.epochs)
    lines = summarise(read_rows())
    SUMMARY.write_text(json.dumps({"environment": environment(0), "rows": lines}, indent=1) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
