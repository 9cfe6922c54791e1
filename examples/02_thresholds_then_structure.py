"""Cut the weights with small gradients, cut whole neurons, or one after the other?

A threshold turns scores into a cut: what scores below it goes. Weights are scored by the size of
their gradient of the loss and cut below rate x mean |gradient|; neurons by the L2 norm of their
weights and cut below the mean norm. The combination prunes weights first and structure afterwards:
a neuron that has lost most of its weights has a small norm and goes as a whole.

You will see, for a network that reads handwritten digits:

1. what each threshold rule would leave, before anything is removed;
2. accuracy, size and computation after each cut and after both, with fine-tuning, averaged over
   three networks. Beside them stand controls: the same number of units cut from each layer at
   random, about as many weights cut by their size, and the dense network trained just as long.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save as to_bytes
from torch import nn

import secateurs as sc
from secateurs.pipeline import Stage, prune_stages
from secateurs.tasks import Data, Task, dense_checkpoint, get_task

SEEDS = (0, 1, 2)
RULES = {  # for weights by |gradient|, for neurons by L2 norm
    "value: 1e-4, 1.1": (sc.Threshold("value", value=1e-4), sc.Threshold("value", value=1.1)),
    "mean": (sc.Threshold("mean"),) * 2,
    "k_std: mean - std / 2": (sc.Threshold("k_std", k=-0.5),) * 2,
    "rate_mean: 0.5 x mean": (sc.Threshold("rate_mean", rate=0.5),) * 2,
    "rate_mean: 1.5 x mean": (sc.Threshold("rate_mean", rate=1.5),) * 2,
    "quantile: lowest 60 %": (sc.Threshold("quantile", q=0.6),) * 2,
}
HEAL = sc.Finetune(epochs=10, lr=2e-3)
WEIGHTS = Stage(
    threshold=sc.Threshold("rate_mean", rate=1.0),
    criterion="gradient",
    granularity="weight",
    finetune=HEAL,
)
BY_SIZE = replace(WEIGHTS, criterion="magnitude", threshold=sc.Threshold("quantile", q=0.61))
NEURONS = Stage(
    threshold=sc.Threshold("mean"), criterion="l2_norm", granularity="neuron", finetune=HEAL
)
RUNS = {
    "weights by |gradient|": [WEIGHTS],
    "  as many at random": [replace(WEIGHTS, control="shuffle")],
    "  about as many by |w|": [BY_SIZE],
    "neurons by L2 norm": [NEURONS],
    "  as many at random ": [replace(NEURONS, control="shuffle")],
    "weights, then neurons": [WEIGHTS, NEURONS],
}
Row = dict[str, float]


def preview(task: Task, model: nn.Module, data: Data) -> Table:
    """How many weights and neurons each rule would leave; nothing is changed."""
    graph = sc.trace(model, data.example_inputs)
    batch = data.train, task.loss_fn
    by_gradient = sc.score(model, *batch, criterion="gradient", granularity="weight", graph=graph)
    by_norm = sc.score(model, *batch, criterion="l2_norm", granularity="neuron", graph=graph)
    table = Table("1. threshold", "weights left", "neurons left", box=None)
    for name, thresholds in RULES.items():
        cells = []
        for scores, threshold in zip((by_gradient, by_norm), thresholds, strict=True):
            total = sum(len(line) for line in scores.values.values())
            try:
                cells.append(f"{sum(sc.allocate(scores, threshold).kept.values())} of {total}")
            except sc.PruningError:
                cells.append("refused: it would empty a layer")
        table.add_row(name, *cells)
    return table


def cost(task: Task, data: Data, model: nn.Module, n_bytes: int) -> Row:
    """Accuracy on the test samples, and what the model costs."""
    found = sc.measure(model, data.example_inputs, latency=False)
    return {
        "accuracy": 100 * task.metric(model, data.test)["accuracy"],
        "parameters": found.params,
        "non-zeros": found.nonzeros,
        "MACs": found.macs,
        "bytes": n_bytes,
    }


def compared(task: Task, model: nn.Module, data: Data) -> dict[str, Row]:
    """The dense network, and the result of every run."""
    n_bytes = len(to_bytes(model.state_dict()))
    trained = copy.deepcopy(model)
    for _ in range(2):  # the combination heals twice
        sc.finetune(trained, data.train, task.loss_fn, HEAL)
    rows = {
        "dense": cost(task, data, model, n_bytes),
        "  trained on": cost(task, data, trained, n_bytes),
    }
    for name, stages in RUNS.items():
        result = prune_stages(
            model, data.train, task.loss_fn, stages, example_inputs=data.example_inputs
        )
        with tempfile.TemporaryDirectory() as folder:
            file = sc.save(result.model, result.plan, folder) / "model.safetensors"
            rows[name] = cost(task, data, result.model, file.stat().st_size)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    task, console = get_task("digits-mlp"), Console(width=100)
    runs: list[dict[str, Row]] = []
    for seed in SEEDS:
        model, data, _ = dense_checkpoint(task, seed)
        if not runs:
            console.print(preview(task, model, data), "")
        runs.append(compared(task, model, data))

    columns = list(runs[0]["dense"])
    means = {n: {k: mean(run[n][k] for run in runs) for k in columns} for n in runs[0]}
    table = Table("2. mean of three networks", "accuracy, % [range]", *columns[1:], box=None)
    for name, row in means.items():
        low, *_, high = sorted(run[name]["accuracy"] for run in runs)
        cells = [f"{row[k]:,.0f}" for k in columns[1:]]
        table.add_row(name, f"{row['accuracy']:.1f} [{low:.1f}, {high:.1f}]", *cells)
    console.print(table, markup=False)
    dense = means["dense"]

    both, weights = means["weights, then neurons"], means["weights by |gradient|"]
    left = {k: f"{both[k] / dense[k]:.0%}" for k in dense}
    print(
        f"\nBoth cuts leave {left['non-zeros']} of the weights, {left['MACs']} of the MACs and "
        f"{left['bytes']} of the file;\nthe weights alone {weights['MACs'] / dense['MACs']:.0%} of "
        "the MACs, because a dense layer multiplies zeros like any number."
    )
    lost = {name: f"{dense['accuracy'] - row['accuracy']:.1f}" for name, row in means.items()}
    print(
        f"Points of accuracy lost, weights: {lost['weights by |gradient|']} by |gradient|, "
        f"{lost['  as many at random']} at random, {lost['  about as many by |w|']} by |w|, "
        f"{lost['weights, then neurons']} by both cuts;\nneurons: "
        f"{lost['neurons by L2 norm']} by norm, {lost['  as many at random ']} at random."
    )


if __name__ == "__main__":
    main()
