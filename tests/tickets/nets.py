"""Small networks and data for the tests of this room."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from secateurs.types import Batch, Graph, WeightTarget


def mlp(*widths: int, bias: bool = False, seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between them, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def graph_of(model: nn.Module, inputs: Tensor) -> Graph:
    """All matrices of a model as targets."""
    targets = {
        n: WeightTarget(n, tuple(p.shape)) for n, p in model.named_parameters() if p.dim() > 1
    }
    return Graph({**targets}, inputs=inputs.to("meta"))


def data(n: int, width: int, classes: int, sizes: Sequence[int], seed: int = 1) -> list[Batch]:
    """Random inputs and labels in batches of the given sizes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=g)
    return list(zip(torch.split(x, list(sizes)), torch.split(y, list(sizes)), strict=True))


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Its matrices by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
