"""Processes of which one is killed, or hangs."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from secateurs.distributed import (
    load_sharded,
    newest,
    ranks_of,
    save_sharded,
)
from secateurs.finetuning import Finetune, finetune
from secateurs.scoring import score
from secateurs.testing.nets import case
from tests.distributed.cases import (
    adam,
    data_of,
    everywhere,
    masks,
    net,
    ranks,
    sharded,
    steps,
)

LAST = 8


def run_and_die(folder: Path) -> None:
    """Train with a checkpoint after each second step; in the first run rank 1 is killed."""
    rank, _ = ranks()
    model = sharded(net())
    optimizer = adam(model)
    held, start = masks(), 0
    last = newest(folder / "checkpoints")
    if last is not None:
        held, extra = load_sharded(last, model, optimizer)
        start = extra["steps"]

    def after(step: int) -> None:
        if step % 2 == 0:
            out = folder / "checkpoints" / f"step-{step}"
            save_sharded(out, model, optimizer, masks=held, extra={"steps": step})
        if last is None and step == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with ranks_of("world").named():
        steps(model, optimizer, held, range(start, LAST), after)
    state = everywhere(model)
    if rank == 0:
        torch.save({"state": state, "start": start}, folder / "end.pt")


def score_and_die(folder: Path) -> None:
    """The rank that is left gets a clear error from `score`."""
    rank, _ = ranks()
    c = case("mlp")

    def batches() -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    class Deadly:
        def __iter__(self) -> Any:
            yield c.batches[0]
            batches()

    data: Any = Deadly() if rank == 1 else c.batches
    score(c.model, data, c.loss_fn, graph=c.graph, group="world")


def train_and_die(folder: Path) -> None:
    """The rank that is left gets a clear error from `finetune`."""
    rank, size = ranks()
    calls: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(0)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return mse_loss(outputs, targets)

    model = DistributedDataParallel(net())
    finetune(model, data_of(size)[rank], loss, Finetune(epochs=4), group="world")


def hang(folder: Path) -> None:
    """Rank 1 does not come within the timeout."""
    if ranks()[0] == 1:
        time.sleep(6)
    ranks_of("world").gather("here")


if __name__ == "__main__":  # by torchrun
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    run_and_die(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # on a busy machine torch's own threads may abort a process that is ending
