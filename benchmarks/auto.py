"""How good is `budget="auto"`? Size reached, and what the test split says of the promise.

    python -m benchmarks.auto                  # resumes where it stopped
    python -m benchmarks.auto --tasks digits-cnn --seeds 0
    python -m benchmarks.auto --summary        # only summarise what is there

"auto" goes down step by step until the validation metric has lost more than a hundredth, and back
to the smallest good network of at least twice that size. Each task is pruned so, once with each
seed, and then measured on test data, which nothing has seen. Beside it `Budget(metric_drop=)` with
the same limit: the smallest network that passes, without the margin. Steps are healed by two epochs
of AdamW at a third of the learning rate of the task. One thread; a row is appended to
`benchmarks/results/auto.jsonl` as soon as it is done.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

import secateurs as sc
from secateurs.errors import PruningError
from secateurs.report import environment
from secateurs.tasks import available, dense_checkpoint, get_task

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "auto.jsonl"
SUMMARY = HERE / "results" / "auto.json"
TASKS = ("cancer-mlp", "digits-mlp", "digits-cnn", "vowels-gru", "vowels-lstm", "spam-transformer")
SEEDS = (0, 1, 2, 3, 4)
METHODS = ("auto", "metric_drop")
LIMIT = 0.01
"""Of the dense validation metric: what "auto" allows."""


def row(task_name: str, seed: int, method: str) -> dict[str, Any]:
    """One run."""
    task = get_task(task_name)
    model, data, _ = dense_checkpoint(task, seed=seed)
    started = time.perf_counter()

    def validate(net: torch.nn.Module) -> dict[str, float]:
        return task.metric(net, data.validation)

    dense = next(iter(validate(model).values()))
    limit = LIMIT * abs(dense)
    budget: sc.Budget | Literal["auto"] = (
        "auto" if method == "auto" else sc.Budget(metric_drop=limit)
    )
    heal = sc.Finetune(epochs=2, lr=task.train_recipe.lr / 3, optimizer="adamw")
    found: dict[str, Any] = {"task": task_name, "seed": seed, "method": method, "limit": limit}
    try:
        result = sc.prune(
            model, data.train, task.loss_fn, example_inputs=data.example_inputs, budget=budget,
            finetune=heal, evaluate=validate, calibration=data.calibration, seed=seed,
        )  # fmt: skip
    except PruningError as error:
        return {**found, "problem": str(error), "seconds": time.perf_counter() - started}
    name, test = next(iter(task.metric(model, data.test).items()))
    small = next(iter(task.metric(result.model, data.test).values()))
    return {
        **found,
        "metric": name,
        "validation": {"dense": dense, "small": next(iter(validate(result.model).values()))},
        "test": {"dense": test, "small": small},
        "kept": test - small <= LIMIT * abs(test) + 1e-9,
        "remaining": result.report.reached,
        "steps": len(result.report.steps),
        "seconds": time.perf_counter() - started,
        "environment": environment(seed),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each task and method."""
    entries = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in rows):
        held = [r for r in rows if (r["task"], r["method"]) == (task, method)]
        done = [r for r in held if "problem" not in r]
        if not done:
            continue
        entries.append(
            {
                "task": task,
                "method": method,
                "metric": done[0]["metric"],
                "runs": len(held),
                "refused": len(held) - len(done),
                "kept": sum(r["kept"] for r in done),
                "macs": mean(r["remaining"]["macs"] for r in done),
                "test_dense": mean(r["test"]["dense"] for r in done),
                "test_drop": mean(r["test"]["dense"] - r["test"]["small"] for r in done),
                "worst_drop": max(r["test"]["dense"] - r["test"]["small"] for r in done),
                "validation_drop": mean(
                    r["validation"]["dense"] - r["validation"]["small"] for r in done
                ),
                "seconds": mean(r["seconds"] for r in done),
            }
        )
    return entries


def read_rows() -> list[dict[str, Any]]:
    """All rows so far."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--summary", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = {(r["task"], r["seed"], r["method"]) for r in read_rows()}
    for seed in () if given.summary else given.seeds:
        for task in given.tasks:
            if (problem := available(get_task(task))) is not None:
                print(f"{task}: left out: {problem}", flush=True)
                continue
            for method in METHODS:
                if (task, seed, method) in done:
                    continue
                new = row(task, seed, method)
                with ROWS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(new) + "\n")
                told = new.get("problem") or f"{new['remaining']['macs']:.3f} {new['test']}"
                print(task, seed, method, told, f"{new['seconds']:.0f} s", flush=True)
    rows = read_rows()
    if rows:
        found = {"limit": LIMIT, "environment": rows[0].get("environment"), "rows": summary(rows)}
        SUMMARY.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
