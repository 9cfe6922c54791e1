"""LSTM and GRU at 4x fewer MACs: is less than one point lost?

    python -m benchmarks.recurrent_healing              # resumes where it stopped
    python -m benchmarks.recurrent_healing --summary    # only summarise what is there

Hidden units of the tasks vowels-lstm and vowels-gru are cut from the dense checkpoint and the
network is fine-tuned, five seeds. Three recipes of equally many optimizer steps (counted, and
asserted): in one shot, in five cuts inside one training, and that with distillation. Nothing is
chosen: all three are shown. Beside them stands the dense network as it is, and after as many steps
more, since a recurrent network of this size still gains from them. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import secateurs as sc
from benchmarks.healing_common import RESULTS, Dense, Rows, SameSteps, error_of, one_thread, paired
from secateurs.finetuning import Finetune, finetune
from secateurs.macs import macs
from secateurs.report import environment
from secateurs.schedules import Schedule

ROWS = Rows(RESULTS / "recurrent_healing.jsonl", ("task", "keep", "setting", "seed", "steps"))
SUMMARY = RESULTS / "recurrent_healing.json"
TASKS = ("vowels-lstm", "vowels-gru")
KEEP = 0.25
EPOCHS = 40
"""As many as the dense network was trained for: 280 steps of 32 series."""
SEEDS = tuple(range(5))
SETTINGS: dict[str, tuple[int, float]] = {
    "one shot": (1, 0.0),
    "iterative": (5, 0.0),
    "iterative, distilled": (5, 0.5),
    "dense, trained on": (0, 0.0),
}
"""Setting -> cuts, weight of the distillation."""
ALLOWED = 0.01


def work(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of a row."""
    dense = Dense.of(row["task"], row["seed"])
    cuts, distill = SETTINGS[row["setting"]]
    steps, inputs = row["steps"], dense.data.example_inputs
    config = Finetune(
        steps=steps, optimizer="adamw", lr=5e-3, weight_decay=0.01, lr_schedule="cosine",
        distill=distill,
    )  # fmt: skip
    with SameSteps(steps):
        if not cuts:
            model = copy.deepcopy(dense.model)
            finetune(model, dense.data.train, dense.task.loss_fn, config, seed=row["seed"])
        else:
            model = sc.prune(
                dense.model, dense.data.train, dense.task.loss_fn, example_inputs=inputs,
                budget=sc.Budget(macs=row["keep"]), granularity="hidden", round_to=1,
                calibration=dense.data.calibration, seed=row["seed"], finetune=config,
                schedule=Schedule("one_shot", steps=1)
                if cuts == 1
                else Schedule("cubic", steps=cuts, every=f"{int(0.4 * steps) // cuts} steps"),
            ).model  # fmt: skip
    left = macs(model, inputs) / macs(dense.model, inputs)
    assert left <= (row["keep"] if cuts else 1)
    return {**dense.figures(model.eval(), "final"), "macs": left}


def wanted(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """All rows."""
    for task in tasks:
        steps = EPOCHS * len(Dense.of(task, 0).data.train)
        for seed in seeds:
            for setting in SETTINGS:
                yield {"task": task, "keep": KEEP, "setting": setting, "seed": seed, "steps": steps}


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy and mean loss against dense of every recipe; goal met or missed."""
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["setting"]), {})[row["seed"]] = row
    lines = []
    for (task, setting), held in groups.items():
        test = {s: r["test"] for s, r in held.items()}
        gap = paired(test, {s: r["dense_test"] for s, r in held.items()})
        lines.append(
            {
                "task": task, "setting": setting, "seeds": sorted(held),
                "macs": mean(r["macs"] for r in held.values()),
                "dense": mean(r["dense_test"] for r in held.values()),
                "test": mean(test.values()), "standard_error": error_of(list(test.values())),
                "over_dense": gap, "met": gap["difference"] > -ALLOWED,
            }
        )  # fmt: skip
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Plain text: one line per task and recipe."""
    told = []
    for r in lines:
        gap = r["over_dense"]
        verdict = "met" if r["met"] else "MISSED"
        told.append(
            f"{r['task']} {r['setting']:<22} n={len(r['seeds'])} macs {r['macs']:.3f} dense "
            f"{100 * r['dense']:.2f} test {100 * r['test']:.2f} ({_points(r['standard_error'])}) "
            f"over dense {100 * gap['difference']:+.2f} ({_points(gap['standard_error'])})"
            + ("" if r["setting"].startswith("dense") else f" under 1 point lost: {verdict}")
        )
    return "\n".join(told)


def _points(value: float | None) -> str:
    return "se -" if value is None else f"se {100 * value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    options = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")
    if not options.summary:
        ROWS.run(wanted(options.tasks, options.seeds), work)
    lines = summarise(ROWS.read())
    SUMMARY.write_text(json.dumps({"environment": environment(0), "rows": lines}, indent=1) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
