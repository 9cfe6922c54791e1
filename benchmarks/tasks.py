"""Every built-in task at a 4x MACs (structured) and a 90 % (weight) target, with controls.

    python benchmarks/tasks.py                       # all tasks, 3 seeds; resumes where it stopped
    python benchmarks/tasks.py --tasks digits-cnn cancer-mlp
    python benchmarks/tasks.py --summary             # only write docs/results.md

One row is appended to `benchmarks/results/tasks.jsonl` as soon as a run is done, so that a run that
is stopped goes on where it was. Method and controls share budget, schedule, fine-tuning and seeds;
the random and magnitude rows differ in nothing but the scores. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from secateurs.recipe import parse_recipe
from secateurs.report import environment
from secateurs.runner import load_problem, run_recipe
from secateurs.surgery.shrinking import info_of

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "tasks.jsonl"
SUMMARY = HERE / "results" / "tasks.json"
SEEDS = (0, 1, 2)
CRITERIA = ("taylor", "magnitude", "random")
TARGETS: dict[str, dict[str, Any]] = {
    "structured": {"granularity": "structured", "budget": {"macs": 0.25}},
    "weight": {"granularity": "weight", "budget": {"units": 0.1}, "allocation": "global"},
}
EPOCHS = {
    "digits-mlp": 10,
    "digits-cnn": 6,
    "cancer-mlp": 10,
    "vowels-lstm": 10,
    "vowels-gru": 10,
    "fashion-lenet300": 2,
    "fashion-lenet5": 1,
    "fashion-resnet20": 1,
}
"""Fine-tuning epochs after each of three pruning steps."""


def recipe_for(task: str, target: str, criterion: str, seed: int, full_data: bool) -> Any:
    """The recipe of one row."""
    data = {
        "task": task,
        "criterion": criterion,
        **TARGETS[target],
        "schedule": {"curve": "cubic", "steps": 3},
        "finetune": {"epochs": EPOCHS[task], "lr": 0.001, "lr_schedule": "cosine"},
        "seed": seed,
        "full_data": full_data,
        "latency": [],
    }
    return parse_recipe(data)


def run_one(task: str, target: str, criterion: str, seed: int, full_data: bool) -> dict[str, Any]:
    """One row: metrics and size before and after, and the proof."""
    recipe = recipe_for(task, target, criterion, seed, full_data)
    problem = load_problem(recipe)
    started = time.perf_counter()
    result = run_recipe(recipe, problem)
    rows = {r.name: (r.before, r.after) for r in result.report.rows}
    check = info_of(result.model)
    return {
        "task": task,
        "target": target,
        "criterion": criterion,
        "seed": seed,
        "full_data": full_data,
        "metrics": {k.removeprefix("test "): v for k, v in rows.items() if k.startswith("test ")},
        "reached": result.report.reached,
        "sizes": {k: rows[k] for k in ("parameters", "non-zeros", "MACs", "bytes on disk")},
        "verification": {
            "error": check.verification.error,
            "ok": check.verification.ok,
            "form": check.form,
        },
        "samples": dict(problem.sizes),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment(seed),
    }


def read_rows() -> list[dict[str, Any]]:
    """Rows that are done."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines() if line.strip()]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("task", "target", "criterion", "seed", "full_data"))


def spread(values: list[float]) -> float | None:
    """Standard error of the mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds for each task, target and criterion."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kind = (row["task"], row["target"], row["criterion"], row["full_data"])
        groups.setdefault(kind, []).append(row)
    table = []
    order = {name: i for i, name in enumerate([*EPOCHS, *CRITERIA])}
    for kind in sorted(groups, key=lambda k: (order[k[0]], k[3], k[1], order[k[2]])):
        held, (task, target, criterion, full) = groups[kind], kind
        name = next(iter(held[0]["metrics"]))
        pairs = [r["metrics"][name] for r in held]
        gaps = [after - before for before, after in pairs]
        kept = "macs" if target == "structured" else "units"
        table.append(
            {
                "task": task,
                "target": target,
                "criterion": criterion,
                "full_data": full,
                "metric": name,
                "seeds": sorted(r["seed"] for r in held),
                "samples": held[0]["samples"],
                "dense": mean(b for b, _ in pairs),
                "pruned": mean(a for _, a in pairs),
                "pruned_se": spread([a for _, a in pairs]),
                "difference": mean(gaps),
                "difference_se": spread(gaps),
                "remaining": mean(r["reached"][kept] for r in held),
                "disk_ratio": mean(
                    r["sizes"]["bytes on disk"][0] / r["sizes"]["bytes on disk"][1] for r in held
                ),
                "largest_verify_error": max(r["verification"]["error"] for r in held),
                "verified": all(r["verification"]["ok"] for r in held),
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", nargs="*", default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--full-data", action="store_true")
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    done = {key_of(r) for r in read_rows()}
    todo = [
        (task, target, criterion, seed, options.full_data)
        for task in options.tasks
        for target in options.targets
        for criterion in options.criteria
        for seed in options.seeds
    ]
    for job in [] if options.summary else todo:
        if job in done:
            continue
        row = run_one(*job)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        name, (before, after) = next(iter(row["metrics"].items()))
        print(*job[:4], f"{name} {before:.4f} -> {after:.4f}", f"{row['seconds']} s", flush=True)
    SUMMARY.write_text(json.dumps(summarise(read_rows()), indent=1) + "\n")


if __name__ == "__main__":
    main()
