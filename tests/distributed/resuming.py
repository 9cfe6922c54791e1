"""Trainings and pruning runs of several processes that are killed, and go on from a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from secateurs.checkpoints import Checkpoints, tensor_mark
from secateurs.finetuning import Finetune, finetune
from secateurs.masks import named_tensors
from secateurs.regrowth import Regrow, Regrowth
from secateurs.types import Batches
from tests.distributed.cases import ranks

PARTS = {2: [17, 9], 4: [17, 9, 4, 0]}
"""Samples of each rank: in batches of 5 some have fewer steps than others, and one none."""


def noisy() -> nn.Module:
    """A network with running statistics and dropout; its weights lie in another order than used."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3),
                         nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 2))  # fmt: skip


def loader(rank: int, size: int) -> Batches:
    """The part of a rank, shuffled anew in each epoch by the random state of its process."""
    n = PARTS[size][rank]
    draw = torch.Generator().manual_seed(rank)
    x, y = torch.randn(n, 6, generator=draw), torch.randn(n, 2, generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True) if n else []


CONFIGS: Mapping[str, dict[str, Any]] = {
    "plain": {"config": Finetune(epochs=3, lr=0.02, restore_best=True, lr_schedule="cosine")},
    "rigl": {"config": Finetune(steps=9, lr=0.02, accumulate=2)},
}
MASK = {"0.weight": torch.arange(72).reshape(12, 6) % 3 > 0}


def train(
    folder: Path,
    *,
    name: str = "plain",
    die: int | None = None,
    resume: bool = False,
    lr: float | None = None,
    every: int = 1,
) -> str:
    """The mark of what a training ends with; `die` kills the process at that evaluation of loss."""
    rank, size = ranks()
    calls = [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == die:
            os.kill(os.getpid(), signal.SIGKILL)
        return mse_loss(outputs, targets)

    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(9))
    model = DistributedDataParallel(noisy())
    parts = [Regrowth(Regrow("rigl", every=2, until=1.0), 3)] if name == "rigl" else []
    config = CONFIGS[name]["config"]
    if lr is not None:
        config = Finetune(epochs=3, lr=lr)
    done = finetune(
        model, loader(rank, size), loss, config, masks=MASK, parts=parts, seed=5,
        evaluate=lambda m: float(m(x).square().mean()), checkpoint=Checkpoints(folder, every=every),
        resume=resume, group="world",
    )  # fmt: skip
    rows = [(row.train_loss, row.metric, row.lr) for row in done.history]
    return tensor_mark(named_tensors(model)) + str(rows) + tensor_mark(done.masks)
