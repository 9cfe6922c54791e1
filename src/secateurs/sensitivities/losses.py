"""The loss of each sample of a batch, where the loss of the batch is their mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateurs.types import LossFn

__all__ = ["sample_losses"]

CLOSE = 1e-3
"""Relative difference of the loss of a batch from the mean over its samples, up to which they are
the same."""


def sample_losses(loss_fn: LossFn, outputs: Any, targets: Any, n: int) -> Tensor | None:
    """(n,) float64 the loss of each sample, or None where there is no such thing.

    None: the outputs or targets are not one per sample, the loss cannot be mapped over them, or
    its value for the batch is not the mean of theirs (a mean over tokens, samples that are mixed).

    Example:
        >>> outputs, targets = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> sample_losses(torch.nn.functional.mse_loss, outputs, targets, 2).tolist()
        [1.0, 9.0]
    """
    leaves, spec = pytree.tree_flatten((outputs, targets))
    dims = [0 if isinstance(x, Tensor) and x.dim() and len(x) == n else None for x in leaves]
    wanted = [isinstance(x, Tensor) for x in pytree.tree_leaves(targets)]
    if 0 not in dims or not any(wanted):
        return None

    def one(*parts: Any) -> Tensor:
        whole = [p if d is None else p[None] for p, d in zip(parts, dims, strict=True)]
        its_outputs, its_targets = pytree.tree_unflatten(whole, spec)
        return loss_fn(its_outputs, its_targets).reshape(())

    try:
        losses = torch.func.vmap(one, in_dims=tuple(dims))(*leaves).double().cpu()
        together = float(loss_fn(outputs, targets))
    except Exception:  # a user's loss may refuse this in any way; it has no losses by sample then
        return None
    close = abs(float(losses.mean()) - together) <= CLOSE * max(abs(together), 1e-6)
    return losses if close else None
