"""What a zoo entry is: a name, and a builder of a small model with example inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from secateurs.types import Inputs

__all__ = ["Case", "randomise_"]


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: unique in the zoo.
        build: returns the model in eval mode, already randomised, and example inputs with a batch
            of two or more; the same weights at every call.
        outputs: names of the outputs that matter; empty for all.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    outputs: tuple[str, ...] = ()


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give biases, norms and batch-norm statistics values that hide no mistake; eval mode.

    One-dimensional parameters become 1 + noise or noise; running means are moved, running variances
    are positive. Other parameters keep their initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() <= 1 and p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3
                p.add_(noise)
        for name, buffer in model.named_buffers():
            draw = torch.rand(buffer.shape, generator=generator)
            if name.endswith("running_mean"):
                buffer.copy_(draw - 0.5)
            elif name.endswith("running_var"):
                buffer.copy_(draw + 0.5)
    return model.eval()
