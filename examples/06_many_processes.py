"""How do you prune on several processes, and does it give what one process gives?

    python examples/06_many_processes.py
    torchrun --nproc-per-node 2 examples/06_many_processes.py

Every process sees its own part of each batch. Scores are those of all the data, every process makes
the same plan, and a step of the training follows the mean over all samples; so the script ends with
the same network, however many processes it has.

You will see, for a network that reads handwritten digits:

1. how many samples each process has seen, the hash of the masks that all of them hold, and the
   accuracy before the cut, after it, and healed: the same figures alone and with torchrun;
2. the smaller network, written by one process and read again.
"""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import secateurs as sc
from secateurs.distributed import Group, assert_same, on_first, plain, ranks_of
from secateurs.tasks import dense_checkpoint, get_task

LEFT = 0.25  # of the multiply-adds
HEAL = sc.Finetune(epochs=8, lr=3e-3, lr_schedule="cosine")


def begin() -> Group:
    """The group that torchrun has started, or None for a process alone."""
    if not dist.is_torchelastic_launched():
        return None
    dist.init_process_group("gloo")  # on GPUs "nccl", and the model on the GPU of this process
    return "world"


def main() -> None:
    torch.set_num_threads(1)
    group = begin()
    ranks, task = ranks_of(group), get_task("digits-mlp")
    on_first(group, lambda: dense_checkpoint(task, seed=0))  # one trains it, all read the file
    dense, data, _ = dense_checkpoint(task, seed=0)
    mine = [(x[ranks.rank :: ranks.size], y[ranks.rank :: ranks.size]) for x, y in data.train]

    def accuracy(model: nn.Module) -> float:
        return task.metric(model, data.validation)["accuracy"]

    graph = sc.trace(dense, data.example_inputs)  # before the model is wrapped
    scores = sc.score(dense, mine, task.loss_fn, graph=graph, group=group)
    plan = sc.select(scores, sc.allocate(scores, sc.Budget(macs=LEFT)))
    told = assert_same(plan, group, what="the plan")

    model: nn.Module = copy.deepcopy(dense)
    sc.apply_masks_(model, plan.masks)
    cut = accuracy(model)
    if group is not None:
        model = DistributedDataParallel(model)
    sc.finetune(model, mine, task.loss_fn, HEAL, masks=plan.masks, group=group)
    small = sc.shrink(plain(model), plan, data.example_inputs)  # each process for itself

    def tell() -> None:
        """What one process does for all: save and report."""
        sc.save(small, plan, "small", force=True)
        table = Table(f"1. {LEFT:.0%} of the MACs", "accuracy", box=None)
        for name, value in [("dense", accuracy(dense)), ("cut", cut), ("healed", accuracy(small))]:
            table.add_row(name, f"{value:.1%}")
        Console(width=100).print(table)
        print(f"The same masks on every process: {told}\n")
        again = sc.load("small", task.build)
        same = torch.equal(again(data.example_inputs), small(data.example_inputs))
        print(f"2. read again: outputs {'bit for bit the same' if same else 'DIFFER'}")

    for rank, seen in enumerate(ranks.gather(sum(len(y) for _, y in mine))):
        if ranks.rank == 0:
            print(f"process {rank} of {ranks.size}: {seen} samples")
    on_first(group, tell)
    if group is not None:
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # torch 2.13: threads of gloo now and then abort a process that is ending


if __name__ == "__main__":
    main()
