"""What repairs win after one cut without any training.

    python -m benchmarks.repairs              # resumes where it stopped
    python -m benchmarks.repairs --summary    # only summarise what is there

Units of the dense network of a task are cut in one shot by `taylor`, and then nothing is trained:
the cut as it is, and after each repair of `secateurs.posttraining` alone. Scores and repairs read
the same first training samples. Nothing is chosen; every row is on the whole test split. One
thread; the seconds are those of the repair, disturbed by what else the machine does.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from torch import nn

import secateurs as sc
from benchmarks.healing_common import RESULTS, Dense, Rows, error_of, one_thread, paired
from secateurs.posttraining import Won, compensate_bias, recalibrate_norms, reconstruct
from secateurs.report import environment

ROWS = Rows(RESULTS / "repairs.jsonl", ("task", "keep", "repair", "seed", "samples"))
SUMMARY = RESULTS / "repairs.json"
TASKS = {
    "digits-cnn": (range(5), 512),
    "fashion-lenet300": (range(3), 512),
    "vowels-lstm": (range(3), 216),
    "vowels-gru": (range(3), 216),
    "fashion-resnet20": (range(3), 256),
}
"""Task -> seeds, samples that are read."""
KEPT = (0.5, 0.25)
Repair = Callable[[nn.Module, nn.Module, Any, Any], Won]
REPAIRS: dict[str, Repair | None] = {
    "none": None,
    "bias": lambda model, dense, plan, batches: compensate_bias(model, dense, plan, batches),
    "norms": lambda model, dense, plan, batches: recalibrate_norms(model, batches, masks=plan),
    "reconstruct": lambda model, dense, plan, batches: reconstruct(model, dense, plan, batches),
}


def work(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of a row."""
    dense = Dense.of(row["task"], row["seed"])
    batches = dense.batches(row["samples"])
    graph = sc.trace(dense.model, dense.data.example_inputs)
    scores = sc.score(dense.model, batches, dense.task.loss_fn, graph=graph)
    counts = sc.allocate(scores, sc.Budget(macs=row["keep"]))
    plan = sc.select(scores, counts)
    model = copy.deepcopy(dense.model)
    sc.apply_masks_(model, plan.masks)
    repair = REPAIRS[row["repair"]]
    won = None if repair is None else repair(model, dense.model, plan, batches)
    small = sc.shrink(model.eval(), plan, dense.data.example_inputs)
    return {
        "macs": counts.realised["macs"],
        "repair_seconds": None if won is None else won.seconds,
        **dense.figures(small, "final"),
    }


def rows() -> Iterator[dict[str, Any]]:
    """All rows that are wanted."""
    for task, (seeds, samples) in TASKS.items():
        for seed in seeds:
            normed = any(
                getattr(m, "running_mean", None) is not None
                for m in Dense.of(task, seed).model.modules()
            )
            for keep in KEPT:
                for repair in REPAIRS:
                    if repair != "norms" or normed:
                        yield {
                            "task": task, "keep": keep, "repair": repair, "seed": seed,
                            "samples": samples,
                        }  # fmt: skip


def summary() -> None:
    """Means over seeds, printed and written."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in ROWS.read():
        groups.setdefault((row["task"], row["keep"], row["repair"]), []).append(row)
    found = []
    for (task, keep, repair), held in groups.items():
        test = {row["seed"]: row["test"] for row in held}
        dense = {row["seed"]: row["dense_test"] for row in held}
        found.append(
            {
                "task": task, "keep": keep, "repair": repair, "seeds": sorted(test),
                "macs": mean(row["macs"] for row in held), "dense": mean(dense.values()),
                "test": mean(test.values()), "standard_error": error_of(list(test.values())),
                "lost": paired(dense, test),
                "repair_seconds": [row["repair_seconds"] for row in held],
            }
        )  # fmt: skip
        print(
            f"{task:17} {keep:4} {repair:12} n={len(held)} dense {100 * mean(dense.values()):.2f} "
            f"test {100 * mean(test.values()):.2f}"
        )
    text = json.dumps({"environment": environment(0), "rows": found}, indent=1)
    SUMMARY.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--summary", action="store_true")
    asked = parser.parse_args()
    one_thread()
    if not asked.summary:
        ROWS.run(rows(), work)
    summary()


if __name__ == "__main__":
    main()
