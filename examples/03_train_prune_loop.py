"""How do you prune inside a training loop of your own, and do cut weights stay cut?

The loop is plain PyTorch. The library's verbs stand around it: score the channels by gradients, cut
the worst, train on with the cut held at zero (their gradients, weights and optimizer state), repeat
until a quarter of the multiply-adds is left. Then the zeros are removed for good.

You will see, for a small residual CNN that reads handwritten digits:

1. round by round, what is left, the accuracy after the cut and after training, and how many cut
   entries are no longer zero: with `hold_masks`, and in a copy that is trained without it, where
   what Adam remembers of the entries just cut brings them back;
2. the smaller network, verified against the masked one, measured, saved and loaded again.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

import secateurs as sc
from secateurs.tasks import dense_checkpoint, get_task
from secateurs.types import Batch, Plan

TARGET, STEP = 0.25, 0.25  # of the multiply-adds: what may remain, what a round takes
EPOCHS = 2


def train(
    model: nn.Module, optimizer: Optimizer, batches: list[Batch], held: Mapping[str, Tensor] | None
) -> None:
    """A plain training loop; the only line about pruning is the context."""
    model.train()
    with nullcontext() if held is None else sc.hold_masks(model, optimizer, held):
        for _ in range(EPOCHS):
            for inputs, labels in batches:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    model.eval()


def revived(model: nn.Module, plan: Plan) -> int:
    """How many entries that were cut are not exactly zero."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(int(tensors[name][~mask].count_nonzero()) for name, mask in plan.masks.items())


def main() -> None:
    torch.set_num_threads(1)
    task, console = get_task("digits-cnn"), Console(width=100)
    dense, data, _ = dense_checkpoint(task, seed=0)

    def accuracy(model: nn.Module) -> float:
        return task.metric(model, data.validation)["accuracy"]

    model = copy.deepcopy(dense)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    train(model, optimizer, data.train, held=None)  # from now on Adam has a memory
    graph = sc.trace(model, data.example_inputs)
    table = Table("1. round", "MACs left", "entries cut", "accuracy: cut", "trained", box=None)
    table.add_column("not zero: held")
    table.add_column("not held")
    plan, share, came_back = None, 1.0, {"with": 0, "without": 0}
    while share > TARGET:
        share = max(TARGET, share - STEP)
        scores = sc.score(
            model, data.calibration, task.loss_fn, criterion="taylor", graph=graph, previous=plan
        )
        counts = sc.allocate(scores, sc.Budget(macs=share), method="global")
        plan = sc.select(scores, counts, previous=plan)
        sc.apply_masks_(model, plan.masks)
        after_cut = accuracy(model)
        free, free_optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, data.train, held=plan.masks)
        train(free, free_optimizer, data.train, held=None)
        held, not_held = revived(model, plan), revived(free, plan)
        came_back = {"with": came_back["with"] + held, "without": came_back["without"] + not_held}
        table.add_row(
            str(table.row_count + 1),
            f"{counts.realised['macs']:.1%}",
            f"{sum(int((~mask).sum()) for mask in plan.masks.values()):,}",
            f"{after_cut:.1%}",
            f"{accuracy(model):.1%}",
            f"{held:,}",
            f"{not_held:,}",
        )
    console.print(table)
    told = " and ".join(f"{n:,} {how} hold_masks" for how, n in came_back.items())
    print(f"Cut entries that came back in all, {told}.\n")
    assert plan is not None

    small = sc.shrink(model, plan, data.example_inputs)
    print(f"2. {sc.verify(model, small, plan, data.example_inputs).text()}")
    with tempfile.TemporaryDirectory() as folder:
        sc.save(small, plan, folder)
        loaded = sc.load(folder, task.build)
    same = torch.equal(loaded(data.example_inputs), small(data.example_inputs))
    print(f"saved and loaded: outputs {'bit for bit the same' if same else 'DIFFER'}")
    before, after = (sc.measure(m, data.example_inputs, latency=False) for m in (dense, loaded))
    test = [task.metric(m, data.test)["accuracy"] for m in (dense, loaded)]
    print(
        f"parameters {before.params:,} -> {after.params:,}, MACs {before.macs:,.0f} -> "
        f"{after.macs:,.0f} ({after.macs / before.macs:.1%}), "
        f"test accuracy {test[0]:.1%} -> {test[1]:.1%}"
    )


if __name__ == "__main__":
    main()
