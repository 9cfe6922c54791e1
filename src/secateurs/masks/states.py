"""Optimizers that are followed, and their state that belongs to the entries of a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from secateurs.errors import ConfigError

__all__ = [
    "FlatHistory",
    "by_entry",
    "flat_histories",
    "followed",
    "parameters_of",
    "skips",
    "unwrapped",
]


def followed(
    model: nn.Module, given: Optimizer | Sequence[Optimizer] | None
) -> tuple[Optimizer, ...]:
    """The optimizers to follow, each checked to be one of this model."""
    if given is None:
        return ()
    parameters = {id(p) for p in model.parameters()}
    wrapped = (given,) if isinstance(given, Optimizer) else tuple(given)
    optimizers = tuple(unwrapped(one) for one in wrapped)
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise ConfigError(f"optimizer: a torch.optim.Optimizer, got {type(one).__name__}")
        if parameters.isdisjoint(parameters_of(one)):
            raise ConfigError(
                "the optimizer holds no parameter of this model. "
                "Build it from model.parameters() after copying or moving the model"
            )
        if any(group.get("differentiable") for group in one.param_groups):
            raise ConfigError(
                f"{type(one).__name__}(differentiable=True) cannot be held: removed entries are "
                "overwritten after each step, which a gradient through the step would not see"
            )
    return optimizers


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps; Accelerate puts another around it, without hooks."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def skips(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler tells a fused optimizer that this step is void."""
    return bool(getattr(optimizer, "found_inf", False))


def parameters_of(optimizer: Optimizer) -> dict[int, Tensor]:
    """The tensors that an optimizer steps now, by their id."""
    return {id(p): p for group in optimizer.param_groups for p in group["params"]}


def by_entry(optimizer: Optimizer, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Key and value of all state that has one number for each entry of a parameter.

    That is what has its shape. Without a dimension nothing tells a moment from a step counter, so
    scalars have none; and L-BFGS has vectors over all parameters instead (`FlatHistory`).
    """
    if not tensor.dim() or isinstance(optimizer, LBFGS) or tensor not in optimizer.state:
        return
    for key, value in optimizer.state[tensor].items():
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            yield str(key), value


class FlatHistory:
    """The directions and gradients that L-BFGS remembers: vectors over all its parameters."""

    def __init__(self, optimizer: LBFGS) -> None:
        self._optimizer = optimizer

    def leak(self, removed: Mapping[int, Tensor]) -> str:
        """Key of the first vector that is not zero where entries are removed; empty for none.

        Args:
            removed: id of a parameter -> bool of its shape, True = removed.
        """
        vectors = list(self._vectors())
        if not vectors:
            return ""
        parts = []
        for parameter in self._optimizer.param_groups[0]["params"]:
            flags = removed.get(id(parameter), torch.zeros(parameter.shape, dtype=torch.bool))
            if parameter.is_complex():
                flags = torch.stack([flags, flags], dim=-1)  # real and imaginary part in turn
            parts.append(flags.reshape(-1).to(vectors[0][1].device))
        where = torch.cat(parts)
        return next((key for key, vector in vectors if (vector[where] != 0).any()), "")

    def forget(self) -> None:
        """Start anew: curvature along entries that are gone says nothing of what is left."""
        state = self._state()
        for key in [key for key in state if key != "func_evals"]:
            del state[key]

    def _state(self) -> dict[str, object]:
        found: dict[str, object] = self._optimizer.state[
            self._optimizer.param_groups[0]["params"][0]
        ]
        return found

    def _vectors(self) -> Iterator[tuple[str, Tensor]]:
        state = self._state()
        for key in ("d", "prev_flat_grad", "old_dirs", "old_stps"):
            value = state.get(key)
            for vector in value if isinstance(value, list) else [value]:
                if isinstance(vector, Tensor):
                    yield key, vector


def flat_histories(optimizers: tuple[Optimizer, ...]) -> list[FlatHistory]:
    """One for each L-BFGS."""
    return [FlatHistory(one) for one in optimizers if isinstance(one, LBFGS)]
