"""The weights and buffers of a model, kept aside and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateurs.masks import named_tensors

__all__ = ["restore_", "snapshot"]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers by name."""
    return {name: t.detach().clone() for name, t in named_tensors(model).items()}


@torch.no_grad()
def restore_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write a snapshot back in place, bit for bit."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(state[name])
