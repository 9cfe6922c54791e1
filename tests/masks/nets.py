"""The small nets of the tests of holding: one row of weights, two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def row_masks(*kept: int) -> dict[str, Tensor]:
    """Of one row of four weights."""
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, list(kept)] = True
    return {"weight": mask}


def row() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def train_row(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(model(torch.arange(1.0, 9.0).reshape(2, 4)).square().sum())
    optimizer.step()


class TwoLayers(nn.Module):
    """`first` and `last`, with tanh between them, from the same seed each time."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(inputs, hidden)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
