"""What a training holds: weights and buffers, the state of its optimizer; kept aside, put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.errors import ConfigError
from secateurs.masks import named_tensors

__all__ = ["clear_gradients_", "load_optimizer_", "restore_", "snapshot"]


def clear_gradients_(model: nn.Module) -> None:
    """Let go of all gradients."""
    for parameter in model.parameters():
        parameter.grad = None


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers by name."""
    return {name: t.detach().clone() for name, t in named_tensors(model).items()}


@torch.no_grad()
def restore_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write a snapshot back in place, bit for bit."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(state[name])


def load_optimizer_(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put back what `optimizer.state_dict()` gave, bit for bit.

    torch converts the state to the precision of the parameter; here it keeps its own.

    Raises:
        ConfigError: it is the state of another optimizer, or of other parameters.
    """
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"the optimizer does not fit its checkpoint: {error}") from error
    parameters: Iterable[Tensor] = (p for g in optimizer.param_groups for p in g["params"])
    for i, parameter in enumerate(parameters):
        held = optimizer.state.get(parameter, {})
        for name, value in state["state"].get(i, {}).items():
            now = held.get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                held[name] = value.to(now.device)
