"""What the checks of several processes share: a network, data for each rank, small helpers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from secateurs.distributed import (
    plain,
)
from secateurs.finetuning import Finetune, FinetuneResult, finetune
from secateurs.masks import hold_masks
from secateurs.types import Batch

SIZES = {2: [[4, 3, 2], [2, 1]], 4: [[3, 2, 1], [2, 1], [1, 1, 1], []]}
"""Number of ranks -> for each the sizes of its batches."""


def ranks() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def raised(kind: type[Exception], function: Callable[[], Any]) -> str:
    """The text of an error that must come."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def sharded(model: nn.Module) -> nn.Module:
    """By `fully_shard`, its children first."""
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child)
    fully_shard(model)
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4),
                         nn.Linear(4, 2))  # fmt: skip


def masks() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"0.weight": torch.rand(8, 6, generator=draw) > 0.5,
            "2.bias": torch.tensor([True, False, True, False])}  # fmt: skip


def samples(sizes: Sequence[int], seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=draw), torch.randn(n, 2, generator=draw)) for n in sizes]


def data_of(size: int) -> list[list[Batch]]:
    return [samples(sizes, 10 + rank) for rank, sizes in enumerate(SIZES[size])]


def joined(parts: Sequence[Sequence[Batch]]) -> list[Batch]:
    """What one process sees: of every step the batches of all ranks."""
    steps = max(map(len, parts))
    every = [[part[i] for part in parts if i < len(part)] for i in range(steps)]
    return [(torch.cat([x for x, _ in b]), torch.cat([y for _, y in b])) for b in every]


def train(
    model: nn.Module, batches: Sequence[Batch], group: Any, config: Finetune | None = None,
    evaluate: Any = None, held: Mapping[str, Tensor] | None = None,
) -> FinetuneResult:  # fmt: skip
    return finetune(
        model, batches, mse_loss if held is not None else nn.functional.cross_entropy,
        config or Finetune(epochs=2), masks=held, evaluate=evaluate, maximize=False, group=group,
    )  # fmt: skip


def everywhere(model: nn.Module) -> dict[str, Tensor]:
    """The full weights by plain names on every rank."""
    state = plain(model).state_dict()
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def steps(
    model: nn.Module, optimizer: Optimizer, held: Mapping[str, Tensor], numbers: range,
    after: Callable[[int], object] = lambda step: None,
) -> None:  # fmt: skip
    """A loop of the user's own: every rank sees the same batch, so that their number is all one."""
    with hold_masks(model, optimizer, held):
        for step in numbers:
            (x, y) = samples([5], 100 + step)[0]
            optimizer.zero_grad()
            torch.autograd.backward(mse_loss(model(x), y))
            optimizer.step()
            after(step + 1)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
