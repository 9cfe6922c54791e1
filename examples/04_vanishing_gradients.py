"""What do vanishing gradients look like, and what does pruning do to them?

In a deep network of sigmoids every layer passes on at most a quarter of the gradient, so the first
layers hardly learn. A gradient score is then small because of depth, not because a neuron is
useless, and a cut that compares neurons across layers is misled.

You will see, for three networks of ten layers that read handwritten digits (sigmoid as PyTorch
initialises it, sigmoid from wider weights, ReLU with He initialisation):

1. the gradient of every layer before and after half of the neurons are pruned;
2. accuracy and flagged layers before the cut, after it and after fine-tuning, by which factor the
   cut changes the gradient per weight (median layer), and what a global cut would leave per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import secateurs as sc
from secateurs.diagnosis import Diagnosis, compare
from secateurs.tasks import Data, Task, get_task

DEPTH, WIDTH = 10, 32
TRAIN = sc.Finetune(epochs=20, lr=3e-3)
HEAL = sc.Finetune(epochs=10, lr=3e-3)


def network(kind: str) -> nn.Module:
    """Ten linear layers with an activation function between them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(DEPTH - 1):
        linear = nn.Linear(WIDTH if i else 64, WIDTH)
        if kind == "ReLU, He":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        elif kind == "sigmoid, wider":
            nn.init.xavier_normal_(linear.weight, gain=4.0)  # the slope of a sigmoid is 1/4 at most
        layers += [linear, nn.ReLU() if kind == "ReLU, He" else nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


@dataclass(frozen=True)
class Story:
    """One network: trained; half of its neurons pruned by one share per layer, and globally."""

    trained: Diagnosis
    pruned: Diagnosis
    healed: Diagnosis
    accuracy: tuple[float, float, float]  # trained, pruned, healed
    kept_globally: list[int]


def tell(kind: str, task: Task, data: Data) -> Story:
    """Train, diagnose, prune, diagnose, heal, diagnose."""
    model, batch = network(kind), (data.calibration, task.loss_fn)
    sc.finetune(model, data.train, task.loss_fn, TRAIN)
    scores = sc.score(model, *batch, criterion="taylor", granularity="neuron")
    half = sc.Budget(units=0.5)
    plan = sc.select(scores, sc.allocate(scores, half))
    small = sc.shrink(model, plan, data.example_inputs)
    pruned, after_cut = sc.diagnose(small, *batch), task.metric(small, data.test)["accuracy"]
    sc.finetune(small, data.train, task.loss_fn, HEAL)
    return Story(
        trained=sc.diagnose(model, *batch),
        pruned=pruned,
        healed=sc.diagnose(small, *batch),
        accuracy=(
            task.metric(model, data.test)["accuracy"],
            after_cut,
            task.metric(small, data.test)["accuracy"],
        ),
        kept_globally=list(sc.allocate(scores, half, method="global").kept.values()),
    )


def main() -> None:
    torch.set_num_threads(1)
    task, console = get_task("digits-mlp"), Console(width=110)
    data = task.load(seed=0)
    kinds = ("sigmoid", "sigmoid, wider", "ReLU, He")
    stories = {kind: tell(kind, task, data) for kind in kinds}

    table = Table("1. gradient norm, trained > pruned", *kinds, box=None)
    for i in range(DEPTH):
        cells = []
        for story in stories.values():
            before, after = story.trained.layers[i], story.pruned.layers[i]
            flag = "" if after.flag == "ok" else f" {after.flag}"
            cells.append(f"{before.grad_norm:.0e} > {after.grad_norm:.0e}{flag}")
        table.add_row(f"layer {i + 1}", *cells)
    console.print(table, "", markup=False)

    table = Table("2. trained, cut, healed", "accuracy", "layers flagged", box=None)
    table.add_column("gradient x")
    table.add_column("a global cut would keep", no_wrap=True)
    for kind, story in stories.items():
        rows = compare(story.trained, story.pruned)
        ratio = median(row.grad_ratio for row in rows if row.grad_ratio is not None)
        flagged = [len(d.flagged) for d in (story.trained, story.pruned, story.healed)]
        table.add_row(
            kind,
            ", ".join(f"{a:.1%}" for a in story.accuracy),
            ", ".join(map(str, flagged)),
            f"{ratio:.2g}",
            " ".join(map(str, story.kept_globally)),
        )
    console.print(table)

    print(f"\nThe diagnosis of the sigmoid network: {stories['sigmoid'].trained.verdict}")
    n_before = sum(len(s.trained.flagged) for s in stories.values())
    n_after = sum(len(s.healed.flagged) for s in stories.values())
    better = [k for k, s in stories.items() if s.accuracy[2] > s.accuracy[0] + 0.005]
    print(
        f"Pruning half of the neurons took the flagged layers from {n_before} to {n_after} in "
        f"all, and made {len(better)} of {len(stories)} networks more accurate by half a point."
    )


if __name__ == "__main__":
    main()
