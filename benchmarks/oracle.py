"""How well does each criterion predict the exact loss change of removing each unit?

    python benchmarks/oracle.py

The oracle is the exact ablation (finite difference with step 1) of every structural unit, on the
same calibration samples that the criterion sees. Spearman rank correlation with its absolute
value, over all units of a task, 3 seeds. One thread. Writes `benchmarks/results/oracle.json`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import spearmanr

from secateurs.criteria import CRITERIA
from secateurs.graph import trace
from secateurs.report import environment
from secateurs.scoring import score
from secateurs.tasks import dense_checkpoint, get_task

OUT = Path(__file__).resolve().parent / "results" / "oracle.json"
TASKS = ("digits-mlp", "digits-cnn", "cancer-mlp", "vowels-gru")
SEEDS = (0, 1, 2)


def correlations(name: str, seed: int) -> dict[str, float]:
    """Spearman of each criterion with |exact loss change|, all units of the network together."""
    task = get_task(name)
    model, data, _ = dense_checkpoint(task, seed)
    graph = trace(model, data.example_inputs)
    oracle = score(
        model, data.calibration, task.loss_fn, criterion="finite_difference", graph=graph
    )
    names = [c for c in CRITERIA if c != "finite_difference"]
    specs: list[Any] = [*names, {"name": "directional", "of": "output"}]
    scores = score(
        model, data.calibration, task.loss_fn, criterion=specs, graph=graph, max_seconds=600
    )
    exact = torch.cat([oracle.values[t] for t in oracle.values]).abs()
    found = {}
    for label, held in scores.items():
        line = torch.cat([held.values[t] for t in oracle.values])
        found[label] = float(spearmanr(line.numpy(), exact.numpy()).statistic)
    return found


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in TASKS:
        started = time.perf_counter()
        runs = [correlations(name, seed) for seed in SEEDS]
        for label in runs[0]:
            values = [r[label] for r in runs]
            rows.append(
                {
                    "task": name,
                    "criterion": label,
                    "spearman": mean(values),
                    "sd": stdev(values),
                    "values": values,
                }
            )
            print(f"{name:12s} {label:24s} {mean(values):+.3f} sd {stdev(values):.3f}", flush=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    payload = {"seeds": SEEDS, "environment": environment(), "rows": rows}
    OUT.write_text(json.dumps(payload, indent=1) + "\n")


if __name__ == "__main__":
    main()
