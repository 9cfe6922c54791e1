"""Does the exact gradient of all samples prune and heal better than mini-batches?

Batch gradient descent takes one step per pass over the data, along the exact gradient of the mean
loss. That gradient does not depend on how the samples are cut into batches, and neither do scores
that rest on it. A pass of mini-batches takes many cheap, noisy steps instead.

You will see, for a network that reads handwritten digits:

1. which scores depend on the partition into batches, and which training does;
2. how well a network heals after its weights or its neurons were cut, by mini-batches, by as many
   passes of batch gradient descent, and by as many *steps* of it, averaged over three networks. The
   learning rate of each is chosen on the validation samples.
"""

from __future__ import annotations

import copy
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import secateurs as sc
from secateurs.tasks import Data, Task, dense_checkpoint, get_task
from secateurs.types import Batch, Plan

SEEDS = (0, 1, 2)
PASSES = 8
RATES = (2e-3, 2e-2)
CUTS = {"weights": ("gradient", "weight", 0.25), "neurons": ("taylor", "neuron", 0.25)}


def in_batches(batches: list[Batch], size: int) -> list[Batch]:
    """The same samples in the same order, `size` at a time."""
    inputs, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    return list(zip(torch.split(inputs, size), torch.split(labels, size), strict=True))


def flat(tensors: list[Tensor]) -> Tensor:
    """All numbers in one line."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double()


def partition_table(task: Task, model: nn.Module, data: Data) -> Table:
    """How far scores and trained weights move when the same samples come in other batches."""
    table = Table("1. relative difference to one batch of all", "batches of 64", "of 7", box=None)
    sizes = (10**6, 64, 7)
    found: dict[str, list[Tensor]] = {}
    for size in sizes:
        batches = in_batches(data.train, size)
        for name in ("gradient", "taylor", "taylor_batch"):
            scores = sc.score(model, batches, task.loss_fn, criterion=name, granularity="neuron")
            found.setdefault(f"score {name}", []).append(flat(list(scores.values.values())))
        for full in (True, False):
            trained = copy.deepcopy(model)
            config = sc.Finetune(epochs=2, lr=1e-3, optimizer="sgd", full_batch=full)
            sc.finetune(trained, batches, task.loss_fn, config)
            moved = flat(list(trained.parameters())) - flat(list(model.parameters()))
            found.setdefault(f"training, full_batch={full}", []).append(moved)
    for name, (whole, *others) in found.items():
        table.add_row(name, *(f"{float((x - whole).norm() / whole.norm()):.0e}" for x in others))
    return table


def healed(task: Task, model: nn.Module, data: Data, plan: Plan) -> dict[str, tuple[int, float]]:
    """Optimizer steps and test accuracy of each way to heal, at its best learning rate."""
    n_steps = PASSES * len(data.train)
    everything = in_batches(data.train, 10**6)  # one batch: the exact gradient in one go
    ways = {
        f"mini-batches, {PASSES} passes": (data.train, PASSES, False),
        f"full batch, {PASSES} passes": (everything, PASSES, True),
        f"full batch, {n_steps} passes": (everything, n_steps, True),
    }
    masked = copy.deepcopy(model)
    sc.apply_masks_(masked, plan.masks)
    result = {"not healed": (0, task.metric(masked, data.test)["accuracy"])}
    for name, (batches, epochs, full) in ways.items():
        tried = []
        for rate in RATES:
            trained = copy.deepcopy(model)
            config = sc.Finetune(epochs=epochs, lr=rate, lr_schedule="cosine", full_batch=full)
            done = sc.finetune(trained, batches, task.loss_fn, config, masks=plan.masks)
            chosen_by = task.metric(trained, data.validation)["accuracy"]
            tried.append((chosen_by, done.steps, task.metric(trained, data.test)["accuracy"]))
        _, steps, accuracy = max(tried, key=lambda row: row[0])
        result[name] = (steps, accuracy)
    return result


def main() -> None:
    torch.set_num_threads(1)
    task, console = get_task("digits-mlp"), Console(width=100)
    runs: list[dict[str, dict[str, tuple[int, float]]]] = []
    for seed in SEEDS:
        model, data, _ = dense_checkpoint(task, seed)
        if not runs:
            console.print(partition_table(task, model, data), "")
        run = {}
        for cut, (criterion, granularity, share) in CUTS.items():
            scores = sc.score(
                model, data.train, task.loss_fn, criterion=criterion, granularity=granularity
            )
            plan = sc.select(scores, sc.allocate(scores, sc.Budget(units=share)))
            run[cut] = healed(task, model, data, plan)
        runs.append(run)

    table = Table(f"2. test accuracy, {next(iter(CUTS.values()))[2]:.0%} left", "steps", box=None)
    for cut in CUTS:
        table.add_column(f"{cut} cut [range]")
    accuracy = {c: {w: [100 * run[c][w][1] for run in runs] for w in runs[0][c]} for c in CUTS}
    for way, (steps, _) in runs[0]["weights"].items():
        found = [accuracy[cut][way] for cut in CUTS]
        cells = [f"{mean(a):.1f} [{min(a):.1f}, {max(a):.1f}]" for a in found]
        table.add_row(way, str(steps), *cells)
    console.print(table, markup=False)
    print()
    for cut in CUTS:
        _, mini, same_passes, same_steps = (mean(a) for a in accuracy[cut].values())
        print(
            f"{cut} cut: batch gradient descent against mini-batches, in points: "
            f"{same_passes - mini:+.1f} after as many passes, {same_steps - mini:+.1f} after as "
            "many steps."
        )
    print(f"As many steps here mean {len(data.train)} times the passes.")


if __name__ == "__main__":
    main()
