"""One budget for weights and units together, or one scale at a time? Accuracy at equal non-zeros.

    python -m benchmarks.multi_scale                          # about fifteen minutes
    python -m benchmarks.multi_scale --tasks digits-mlp --seeds 0
    python -m benchmarks.multi_scale --summary                # only print what is there

At most 10 and 5 % of the parameters may be other than zero at the end, biases included. Each row is
one run of `prune_stages` from the same dense network, with six cuts and the same fine-tuning after
each; they differ in what is cut:

    weights      single weights, all layers in one ranking
    two stages   units in the first three cuts, until the square root of the budget remains (the
                 split halfway, as factors go); then single weights in the last three
    multi scale  both in every cut, decided together

Structure is ranked over all layers in the two stages ("global"), as the others are. A stage of
single weights counts the biases of units that went before as if they were there; the two stages
are given those back, so that all rows end with equally many non-zeros. Nothing is
chosen by a result: validation data is not used, and the test split is evaluated once for each row.
MACs are those of the structure that is left. One thread; rows go to
`benchmarks/results/multi_scale.json` as they are done.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import secateurs as sc
from secateurs.finetuning import Finetune
from secateurs.pipeline import PruneResult, Stage
from secateurs.report import environment
from secateurs.schedules import Schedule
from secateurs.tasks import dense_checkpoint, get_task

RESULT = Path(__file__).resolve().parent / "results" / "multi_scale.json"
TASKS = ("digits-mlp", "digits-cnn")
SEEDS = (0, 1, 2)
KEPT = (0.1, 0.05)
METHODS = ("weights", "two stages", "multi scale")
CRITERIA = ("taylor", "fisher")
CUTS, EPOCHS, LR = 6, 5, 1e-3

Row = dict[str, Any]


def stages(method: str, criterion: str, kept: float | int, half_way: float) -> list[Stage]:
    """What is cut in which order; `half_way` is what the first of two stages leaves."""
    heal = Finetune(epochs=EPOCHS, lr=LR, optimizer="adamw", lr_schedule="cosine")

    def stage(
        granularity: str | tuple[str, ...], budget: float | int, cuts: int, how: str
    ) -> Stage:
        return Stage(
            sc.Budget(params=budget), criterion=criterion, granularity=granularity,
            allocation=how, schedule=Schedule("cubic", steps=cuts), finetune=heal,
        )  # fmt: skip

    if method == "weights":
        return [stage("weight", kept, CUTS, "global")]
    if method == "multi scale":
        return [stage(("weight", "structured", "layer"), kept, CUTS, "multi_scale")]
    half = CUTS // 2
    units = stage("structured", half_way, half, "global")
    return [units, stage("weight", kept, CUTS - half, "global")]


def run(name: str, seed: int) -> list[Row]:
    """All rows of a task and seed: they share the dense network."""
    task = get_task(name)
    dense, data, _ = dense_checkpoint(task, seed)
    before = next(iter(task.metric(dense, data.test).values()))
    size = sc.measure(dense, data.example_inputs)
    rows: list[Row] = []

    def prune(several: list[Stage]) -> PruneResult:
        return sc.prune_stages(
            dense, data.train, task.loss_fn, several, example_inputs=data.example_inputs,
            calibration=data.calibration, seed=seed,
        )  # fmt: skip

    for criterion in CRITERIA:
        for kept in KEPT:
            for method in METHODS:
                start = time.perf_counter()
                asked: float | int = kept
                half_way = math.sqrt(kept)
                if method == "two stages":
                    first = prune(stages(method, criterion, kept, half_way)[:1])
                    asked = int(kept * size.params) + small_ones(dense) - small_ones(first.model)
                done = prune(stages(method, criterion, asked, half_way))
                after = sc.measure(done.model, data.example_inputs)
                metric = next(iter(task.metric(done.model, data.test).values()))
                rows.append(
                    {
                        "task": name, "seed": seed, "criterion": criterion, "kept": kept,
                        "method": method, "dense": before, "test": metric,
                        "nonzeros": nonzeros(done) / size.params,
                        "params": after.params / size.params,
                        "macs": after.macs / size.macs if size.macs and after.macs else None,
                        "seconds": round(time.perf_counter() - start, 1),
                    }
                )  # fmt: skip
                print(f"{name} seed {seed} {criterion} {kept} {method}: {metric:.4f}", flush=True)
    return rows


def small_ones(model: nn.Module) -> int:
    """Parameters that are no matrices: biases and norms."""
    return sum(p.numel() for p in model.parameters() if p.dim() < 2)


def nonzeros(done: PruneResult) -> int:
    """Parameters of the smaller model that may be other than zero."""
    found = 0
    for name, p in done.model.named_parameters():
        mask = done.masks.get(name)
        found += p.numel() if mask is None else int(mask.sum())
    return found


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation over seeds, and the difference to weights alone, paired."""
    found = []
    for key in dict.fromkeys((r["task"], r["criterion"], r["kept"]) for r in rows):
        same = [r for r in rows if (r["task"], r["criterion"], r["kept"]) == key]
        base = {r["seed"]: r["test"] for r in same if r["method"] == "weights"}
        for method in METHODS:
            mine = [r for r in same if r["method"] == method]
            if not mine:
                continue
            tests = [r["test"] for r in mine]
            gains = [r["test"] - base[r["seed"]] for r in mine if r["seed"] in base]
            found.append(
                {
                    "task": key[0], "criterion": key[1], "kept": key[2], "method": method,
                    "seeds": len(mine), "test": mean(tests),
                    "sd": stdev(tests) if len(tests) > 1 else None,
                    "gain": mean(gains) if gains else None, "dense": mean(r["dense"] for r in mine),
                    "nonzeros": mean(r["nonzeros"] for r in mine),
                    "params": mean(r["params"] for r in mine),
                    "macs": mean(r["macs"] for r in mine if r["macs"]),
                }
            )  # fmt: skip
    return found


def table(found: Sequence[Row]) -> str:
    """The summary as lines of text."""
    lines = [
        "task        criterion  kept  method       test    sd      gain    dense   params  MACs"
    ]
    for r in found:
        sd = "" if r["sd"] is None else f"{r['sd']:.4f}"
        gain = "" if r["gain"] is None else f"{r['gain']:+.4f}"
        lines.append(
            f"{r['task']:<11} {r['criterion']:<10} {r['kept']:<5} {r['method']:<12} "
            f"{r['test']:.4f}  {sd:<6}  {gain:<7} {r['dense']:.4f}  {r['params']:.3f}   "
            f"{r['macs']:.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--summary", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    have = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"rows": []}
    rows: list[Row] = have["rows"]
    done = {(r["task"], r["seed"]) for r in rows}
    for name in [] if asked.summary else asked.tasks:
        for seed in asked.seeds:
            if (name, seed) not in done:
                rows += run(name, seed)
                _write(rows)
    print(table(summary(rows)))


def _write(rows: Sequence[Row]) -> None:
    data = {
        "environment": environment(),
        "protocol": {"cuts": CUTS, "epochs after each": EPOCHS, "lr": LR, "optimizer": "adamw"},
        "summary": summary(rows),
        "rows": list(rows),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
