"""Parts that several architectures of the zoo share, and the way a case is put together."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.types import Inputs
from tests.zoo.case import Case, randomise_

__all__ = ["SqueezeExcite", "case", "conv_bn", "image", "same_padding", "tokens", "vectors"]


def case(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], Inputs],
    outputs: tuple[str, ...] = (),
) -> Case:
    """A case whose weights and inputs depend on its name alone."""
    seed = zlib.crc32(name.encode())

    def build() -> tuple[nn.Module, Inputs]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, x = make(), inputs()
        enliven_(model)
        return randomise_(model, seed), x

    return Case(name, build, outputs)


def enliven_(model: nn.Module) -> None:
    """Double the weights of convolutions: initial ones let the signal fade with depth."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data.mul_(2.0)


def image(channels: int = 3, size: int = 16) -> Callable[[], Tensor]:
    """Two square images."""
    return lambda: torch.randn(2, channels, size, size)


def vectors(*shape: int) -> Callable[[], Tensor]:
    """Two arrays of real numbers of this shape."""
    return lambda: torch.randn(2, *shape)


def tokens(length: int, vocabulary: int) -> Callable[[], Tensor]:
    """Two sequences of token numbers."""
    return lambda: torch.randint(vocabulary, (2, length))


def same_padding(kernel: int) -> int:
    return (kernel - 1) // 2


def conv_bn(
    n_in: int,
    n_out: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: Callable[[], nn.Module] | None = lambda: nn.ReLU(inplace=True),
) -> nn.Sequential:
    """Convolution, batch norm and, unless `act` is None, an activation."""
    conv = nn.Conv2d(n_in, n_out, kernel, stride, same_padding(kernel), groups=groups, bias=False)
    parts: list[nn.Module] = [conv, nn.BatchNorm2d(n_out)]
    return nn.Sequential(*parts, *([act()] if act else []))


class SqueezeExcite(nn.Module):
    """Channels rescaled by a gate that sees the mean of every channel."""

    def __init__(self, channels: int, hidden: int, gate: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.act = nn.ReLU(inplace=True)
        self.gate = gate()

    def forward(self, x: Tensor) -> Any:
        s = x.mean((2, 3), keepdim=True)
        s = self.expand(self.act(self.reduce(s)))
        return x * self.gate(s)
