"""Where one global magnitude leaves no path through a network, and SynFlow does.

    python -m benchmarks.collapse              # resumes where it stopped
    python -m benchmarks.collapse --summary    # only summarise what is there

A new or the dense network of a task is cut in one go, by torch.nn.utils.prune (global L1) or by
SynFlow in its hundred exponential steps, and then trained for the steps of `unstructured.py`.
Nothing is chosen; test data. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import secateurs as sc
from benchmarks.healing_common import (
    RESULTS,
    Dense,
    Rows,
    SameSteps,
    error_of,
    one_thread,
    points,
)
from benchmarks.unstructured import EPOCHS, steps_of
from benchmarks.unstructured_peer import layers_of, n_left, n_weights
from secateurs.finetuning import Finetune, finetune
from secateurs.report import environment
from secateurs.schedules import Schedule

ROWS = Rows(
    RESULTS / "collapse.jsonl", ("task", "start", "density", "method", "setting", "seed", "steps")
)
SUMMARY = RESULTS / "collapse.json"
SEEDS = (0, 1, 2)
DENSITIES = {"init": (0.05, 0.02), "dense": (0.002,)}
"""Where pruning starts -> densities. A new network has its largest weights in its last layers, so
that one global magnitude empties the first layer."""
LR = 3e-3


def outputs_reached(model: nn.Module, inputs: Tensor) -> int:
    """Outputs to which a path of weights leads that are not zero.

    The network computes on ones with weights of one where they are not zero and without biases.
    """
    plain = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_((p != 0).to(p) if p.dim() > 1 else torch.zeros_like(p))
        found: Tensor = plain(torch.ones_like(inputs[:1], dtype=torch.double))
    return int((found > 0).sum())


def fresh(dense: Dense, seed: int) -> nn.Module:
    """The network of a task before any training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dense.task.build()


def work(row: dict[str, Any]) -> dict[str, Any]:
    """Cut without training, then trained: how many outputs are reached, and what comes of it.

    Ours is SynFlow in its hundred exponential steps.
    """
    dense = Dense.of(row["task"], row["seed"])
    model = copy.deepcopy(dense.model) if row["start"] == "dense" else fresh(dense, row["seed"])
    kept = round(row["density"] * n_weights(model))
    steps, masks = row["steps"], dict[str, Tensor]()
    if row["method"] == "one-shot":
        cut = copy.deepcopy(model)  # what torch has pruned cannot be copied
        for each in (cut, model):
            torch_prune.global_unstructured(
                layers_of(each),
                pruning_method=torch_prune.L1Unstructured,
                amount=n_weights(model) - kept,
            )
        for module, weight in layers_of(cut):
            torch_prune.remove(module, weight)  # type: ignore[no-untyped-call]
    else:
        result = sc.prune(
            model, dense.data.calibration, dense.task.loss_fn,
            example_inputs=dense.data.example_inputs, budget=sc.Budget(units=kept),
            criterion="synflow", granularity="weight", allocation="global", round_to=1,
            schedule=Schedule("exponential", steps=100), seed=row["seed"],
        )  # fmt: skip
        model, masks = result.masked, dict(result.plan.masks)
        cut = copy.deepcopy(model)
    config = Finetune(steps=steps, lr=LR, lr_schedule="cosine")
    with SameSteps(steps):
        finetune(model, dense.data.train, dense.task.loss_fn, config, masks=masks, seed=row["seed"])
    return {
        **dense.figures(model.eval(), "final"),
        "kept": kept,
        "left": n_left(cut),
        "outputs_reached": outputs_reached(cut, dense.data.example_inputs),
    }


def wanted(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Magnitude beside ours, from a new network and from the dense one."""
    for task in tasks:
        steps = steps_of(task, EPOCHS[task])
        for start, densities in DENSITIES.items():
            for seed in seeds:
                for density in densities:
                    for method, name in (("one-shot", "magnitude"), ("ours", "synflow")):
                        yield {
                            "task": task, "start": start, "density": density,
                            "method": method, "setting": name, "seed": seed, "steps": steps,
                        }  # fmt: skip


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs reached and accuracy after training, of magnitude and of ours."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kind = (row["task"], row["start"], row["density"], row["setting"])
        found.setdefault(kind, []).append(row)
    names = ("task", "start", "density", "setting")
    return [
        dict(zip(names, kind, strict=True))
        | {
            "test": mean(r["test"] for r in held),
            "standard_error": error_of([r["test"] for r in held]),
            "outputs_reached": [r["outputs_reached"] for r in held],
            "emptied_layers": [sum(n == 0 for n in r["left"]) for r in held],
            "seeds": sorted(r["seed"] for r in held),
        }
        for kind, held in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", nargs="*", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    options = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")
    if not options.summary:
        ROWS.run(wanted(options.tasks, options.seeds), work)
    found = summarise(ROWS.read())
    SUMMARY.write_text(json.dumps({"environment": environment(0), "rows": found}, indent=1) + "\n")
    for c in found:
        print(
            f"{c['task']} from {c['start']} {c['density']:<6} {c['setting']:<10} "
            f"n={len(c['seeds'])} outputs reached {c['outputs_reached']} emptied layers "
            f"{c['emptied_layers']} test {100 * c['test']:.2f} ({points(c['standard_error'])})"
        )


if __name__ == "__main__":
    main()
