"""Short trainings in a loop of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateurs.regrowth import Regrow, Regrowth, regrow_masks
from tests.regrowth.textbook import data, net, some_masks

N_STEPS = 12


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    batches = data()
    for t in range(first, last):
        x, y = batches[t % len(batches)]
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()


def by(rule: str, every: int = 2) -> Regrow:
    return Regrow(rule, every)


def own(rule: Regrow, model: nn.Module | None = None, **how: Any) -> tuple[nn.Module, Regrowth]:
    """A whole training in a loop of one's own."""
    model = model or net()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    masks = how.get("masks", some_masks())
    with regrow_masks(model, sgd, masks, rule, n_steps=N_STEPS, check_every=1) as regrowth:
        steps(model, sgd, 0, N_STEPS)
    return model, regrowth
