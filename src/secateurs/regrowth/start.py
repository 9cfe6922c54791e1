"""Masks to start from when a network is trained sparse from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateurs.allocation import allocate
from secateurs.errors import ConfigError, choose
from secateurs.selection import select
from secateurs.types import Budget, Graph, Scores, WeightTarget

__all__ = ["ALLOCATIONS", "random_masks"]

ALLOCATIONS = ("erk", "uniform")


def random_masks(
    model_or_shapes: nn.Module | Mapping[str, Sequence[int]],
    density: float,
    *,
    allocation: str = "erk",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Masks that keep floor(density x entries) in all, drawn at random in each tensor.

    Args:
        model_or_shapes: a model (its trained parameters with at least two dimensions, tied ones
            once) or tensor name -> shape.
        density: fraction of all those entries to keep, in (0, 1].
        allocation: "erk": densities in proportion to sum of dims / product of dims, so that small
            layers stay denser; "uniform": the same density everywhere.
        seed: of the draw. The first tensors are drawn alike whatever follows them.

    Returns:
        Tensor name -> bool mask, also of tensors that stay whole.

    Raises:
        ConfigError: the density is out of range or there is nothing to mask.
        BudgetError: too few for one entry per tensor.

    Example:
        >>> masks = random_masks({"a": (8, 8), "b": (2, 8)}, 0.5)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'a': 25, 'b': 15}

    References:
        Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134: random masks with "erk" are where
        RigL starts.
    """
    choose(allocation, ALLOCATIONS, "allocation")
    if not 0 < density <= 1:
        raise ConfigError(f"density must be in (0, 1], got {density:g} (it is a fraction)")
    if isinstance(model_or_shapes, nn.Module):
        shapes = {
            name: tuple(p.shape)
            for name, p in model_or_shapes.named_parameters()
            if p.requires_grad and p.dim() > 1
        }
    else:
        shapes = {name: tuple(shape) for name, shape in model_or_shapes.items()}
    if not shapes:
        raise ConfigError("random_masks: there is no trained parameter with two dimensions")
    generator = torch.Generator().manual_seed(seed)
    graph = Graph({name: WeightTarget(name, shape) for name, shape in shapes.items()})
    draw = {n: torch.rand(t.n_units, generator=generator) for n, t in graph.targets.items()}
    scores = Scores(graph, draw, "random")
    counts = allocate(scores, Budget(units=float(density)), method=allocation)
    masks = dict(select(scores, counts).masks)
    return {
        name: masks.get(name, torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()
    }
