"""Transformers at half of their MACs without any training: what each step of it wins.

    python -m benchmarks.post_training                  # resumes where it stopped
    python -m benchmarks.post_training --tasks spam-minilm --seeds 0
    python -m benchmarks.post_training --summary        # only summarise what is there

The MACs are those of the model that `trace` counts: the blocks of the encoder and the head, which
has less than a hundred-thousandth of them in spam-minilm; embeddings multiply nothing. Random and
magnitude: the same search with those scores, and nothing else.
"fisher": the mask search of Kwon et al. (2022) by derivatives of the loss; "outputs": the same
search by derivatives of the outputs (`any_output`). Each is then rearranged, and from there tuned:
by solving the weights again, and for "fisher", as in the paper, by scales of units. 256 training
samples for everything; no step is refused here because it lost. A row is appended to
`benchmarks/results/post_training.jsonl` as soon as it is done. Choices (which recipe is
recommended) rest on the validation split; the test split is only told.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import secateurs as sc
from secateurs.masks import apply_masks_
from secateurs.posttraining import reconstruct
from secateurs.posttraining.fisher_costs import least_lost
from secateurs.posttraining.fisher_gates import any_output, first_samples, gate_fisher
from secateurs.posttraining.rearranging import rearrange
from secateurs.posttraining.scaling import tune_scales_
from secateurs.report import environment
from secateurs.selection import select
from secateurs.tasks import Data, Task, available, dense_checkpoint, get_task
from secateurs.types import Batch, Graph, LossFn, Plan, Scores

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "post_training.jsonl"
SUMMARY = HERE / "results" / "post_training.json"
TASKS = ("spam-transformer", "spam-minilm")
SEEDS = (0, 1, 2)
PARTS = {
    "magnitude": "magnitude",
    "outputs": "outputs + rearranged + weights",
    "fisher": "fisher + rearranged + weights",
}
"""Part -> its last row."""
N_SAMPLES = 256
BUDGET = sc.Budget(macs=0.5)
Say = Callable[[str, nn.Module, float, float], None]
"""Called with method, model, MACs that remain and seconds of this step."""


def baselines(model: nn.Module, graph: Graph, seed: int, say: Say) -> None:
    """Random and magnitude masks."""
    for name in ("random", "magnitude"):
        begun = time.perf_counter()
        scores = sc.score(model, graph=graph, criterion=name, seed=seed)
        counts = least_lost({n: v.double() for n, v in scores.values.items()}, graph, BUDGET)
        plan = select(scores, counts)
        say(name, masked(model, plan), counts.realised["macs"], time.perf_counter() - begun)


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy with what goes set to zero."""
    copied = copy.deepcopy(model)
    apply_masks_(copied, plan.masks)
    return copied


def fisher_masks(
    model: nn.Module, graph: Graph, held: list[Batch], name: str, loss: LossFn, say: Say
) -> None:
    """The mask search, rearranged, and tuned."""
    begun = time.perf_counter()
    fisher = gate_fisher(model, held, loss, graph.groups(), n_samples=N_SAMPLES)
    every = {n: fisher.diagonal(n) for n in fisher.rows}
    counts = least_lost(every, graph, BUDGET)
    left = counts.realised["macs"]
    plan = select(fisher.scores(graph), counts)
    say(name, masked(model, plan), left, time.perf_counter() - begun)

    begun = time.perf_counter()
    stays = {n: keep.float() for n, keep in rearrange(fisher, counts.kept).items()}
    plan = select(Scores(graph, stays, "fisher masks"), counts)
    cut = masked(model, plan)
    say(f"{name} + rearranged", cut, left, time.perf_counter() - begun)

    if name == "fisher":
        begun = time.perf_counter()
        scaled = copy.deepcopy(cut)
        tune_scales_(scaled, model, plan, held, graph=graph)
        say(f"{name} + rearranged + scales", scaled, left, time.perf_counter() - begun)

    begun = time.perf_counter()
    reconstruct(cut, model, plan, held)
    say(f"{name} + rearranged + weights", cut, left, time.perf_counter() - begun)


def rows_of(task: Task, seed: int, part: str, write: Callable[[dict[str, Any]], None]) -> None:
    """The rows of one part for a task and a seed."""
    model, data, _ = dense_checkpoint(task, seed=seed)
    graph = sc.trace(model, data.example_inputs)
    held = first_samples(data.calibration, N_SAMPLES, torch.device("cpu"))

    def say(method: str, net: nn.Module, macs: float, seconds: float) -> None:
        write(measured(task, data, seed, method, net, macs, seconds))

    if part == "magnitude":
        say("dense", model, 1.0, 0.0)
        baselines(model, graph, seed, say)
    else:
        loss = any_output(seed) if part == "outputs" else task.loss_fn
        fisher_masks(model, graph, held, part, loss, say)


def measured(
    task: Task, data: Data, seed: int, method: str, net: nn.Module, macs: float, seconds: float
) -> dict[str, Any]:
    """One row."""
    return {
        "task": task.name,
        "seed": seed,
        "method": method,
        "macs": macs,
        "validation": task.metric(net, data.validation),
        "test": task.metric(net, data.test),
        "seconds": seconds,
        "samples": N_SAMPLES,
        "threads": torch.get_num_threads(),
        "environment": environment(seed),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each task and method: means over the seeds, and drops against the dense one."""
    dense = {(r["task"], r["seed"]): r for r in rows if r["method"] == "dense"}
    entries = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in rows):
        held = [r for r in rows if (r["task"], r["method"]) == (task, method)]
        entry: dict[str, Any] = {"task": task, "method": method, "seeds": [r["seed"] for r in held]}
        entry["macs"] = mean(r["macs"] for r in held)
        for split in ("validation", "test"):
            for metric in ("accuracy", "auc"):
                drops = [dense[task, r["seed"]][split][metric] - r[split][metric] for r in held]
                entry[f"{split}_{metric}"] = mean(r[split][metric] for r in held)
                entry[f"{split}_{metric}_drop"] = mean(drops)
                entry[f"{split}_{metric}_worst_drop"] = max(drops)
        entry["seconds"] = mean(r["seconds"] for r in held)
        entries.append(entry)
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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--summary", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    done = {(r["task"], r["seed"], r["method"]) for r in read_rows()}

    def write(new: dict[str, Any]) -> None:
        if (new["task"], new["seed"], new["method"]) in done:
            return
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(new) + "\n")
        told = f"validation {new['validation']} {new['seconds']:.0f} s"
        print(new["task"], new["seed"], new["method"], told, flush=True)

    for part, last in () if given.summary else PARTS.items():
        for seed in given.seeds:
            for name in given.tasks:
                if (problem := available(get_task(name))) is not None:
                    print(f"{name}: left out: {problem}", flush=True)
                elif (name, seed, last) not in done:
                    rows_of(get_task(name), seed, part, write)
    rows = read_rows()
    if rows:
        found = {
            "budget": BUDGET.given,
            "samples": N_SAMPLES,
            "timing": "wall seconds of each step beside the work of others; not for comparisons",
            "environment": rows[0]["environment"],
            "rows": summary(rows),
        }
        SUMMARY.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
