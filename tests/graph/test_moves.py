"""Operators that move data: what passes, what is pinned and why, and that the numbers agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.law import proven, why
from tests.graph.nets import Net, image, sequence

Between = Callable[[Any, Tensor], Tensor]
MODULE, GRAPH = ("module", "graph"), ("graph",)
EIGHT = {"a:neuron": 8}
ORDER = torch.tensor([2, 0, 3, 1, 4, 7, 6, 5])
INDEX, ROW = torch.zeros(2, 3, 8, dtype=torch.long), torch.ones(2, 1, 8).double()
STEPS = torch.tensor([[0, 2, 4], [1, 3, 0]])  # (batch, 3)


def over_time(between: Between, features: int = 8, **parts: Any) -> nn.Module:
    """linear(4, 8) on (2, 5, 4) - `between` - linear(features, 3)."""
    return Net(
        lambda n, x: n.c(between(n, n.a(x))), a=nn.Linear(4, 8), c=nn.Linear(features, 3), **parts
    )


def on_images(between: Between, channels: int = 8) -> nn.Module:
    """conv(3, 8) on (2, 3, 6, 6) - `between` - conv(channels, 4, 1)."""
    return Net(
        lambda n, x: n.c(between(n, n.a(x))),
        a=nn.Conv2d(3, 8, 3, padding=1), c=nn.Conv2d(channels, 4, 1),
    )  # fmt: skip


PASSES: dict[str, tuple[Between, int, tuple[str, ...], dict[str, int]]] = {
    "movedim": (lambda n, x: x.movedim(2, 1).transpose(1, 2), 8, MODULE, EIGHT),
    "swapaxes and permute": (lambda n, x: x.swapaxes(0, 2).permute(2, 1, 0), 8, MODULE, EIGHT),
    "matrix transpose": (lambda n, x: x.mT.relu().mT, 8, MODULE, EIGHT),
    "heads seen and merged": (lambda n, x: x.view(-1, 5, 2, 4).relu().flatten(2), 8, GRAPH,
                              {"a:neuron": 4}),
    "unflatten and flatten": (lambda n, x: torch.unflatten(x, 2, (4, 2)).flatten(2), 8, GRAPH,
                              {"a:neuron": 4}),
    "unsqueeze and squeeze": (lambda n, x: x.unsqueeze(1).squeeze(1), 8, MODULE, EIGHT),
    "select a step": (lambda n, x: x.select(1, 3), 8, MODULE, EIGHT),
    "narrow of steps": (lambda n, x: x.narrow(1, 1, 3), 8, MODULE, EIGHT),
    "narrow of units": (lambda n, x: torch.cat([x.narrow(2, 5, 3), x.narrow(2, 0, 5)], 2), 8, GRAPH,
                        {"a:neuron": 5, "a:neuron#2": 3}),
    "tensor_split": (lambda n, x: torch.cat(x.tensor_split(3, 2)[::-1], 2), 8, GRAPH,
                     {"a:neuron": 3, "a:neuron#2": 3, "a:neuron#3": 2}),
    "split of steps": (
        lambda n, x: torch.cat(torch.split(x, [2, 3], 1)[::-1], 1), 8, MODULE, EIGHT),
    "unbind of steps": (lambda n, x: torch.stack(x.unbind(1)[::-1], 1), 8, MODULE, EIGHT),
    "roll over steps": (lambda n, x: x.roll(2, 1), 8, MODULE, EIGHT),
    "unfold over steps": (lambda n, x: x.unfold(1, 3, 1).mean(-1), 8, MODULE, EIGHT),
    "every second step": (lambda n, x: x[:, ::2], 8, MODULE, EIGHT),
    "steps cropped": (lambda n, x: F.pad(x, (0, 0, -1, -2)), 8, MODULE, EIGHT),
    "steps padded": (lambda n, x: F.pad(x, (0, 0, 2, 1), value=0.5), 8, MODULE, EIGHT),
    "flip": (lambda n, x: x.flip(-1), 8, MODULE, EIGHT),
    "repeat": (lambda n, x: x.repeat(1, 1, 2), 16, MODULE, EIGHT),
    "tile": (lambda n, x: x.tile(3), 24, MODULE, EIGHT),
    "repeat_interleave": (lambda n, x: x.repeat_interleave(2, -1), 16, MODULE, EIGHT),
    "expand, merged outside": (
        lambda n, x: x[:, :, None].expand(-1, -1, 2, -1).reshape(-1, 5, 16), 16, GRAPH, EIGHT),
    "expand, merged inside": (
        lambda n, x: x[..., None].expand(-1, -1, -1, 2).flatten(2), 16, MODULE, EIGHT),
    "expand_as": (lambda n, x: x[:, :1].expand_as(x), 8, MODULE, EIGHT),
    "view_as": (lambda n, x: x.flatten(0, 1).view_as(x), 8, MODULE, EIGHT),
    "lower triangle of steps": (
        lambda n, x: x.mT[..., None].mul(torch.ones(5)).tril().sum(-1).mT, 8, MODULE, EIGHT),
    "steps by number": (lambda n, x: x[:, [3, 0, 3]], 8, MODULE, EIGHT),
    "steps by a mask": (lambda n, x: x[:, torch.tensor([True, False, True, True, False])],
                        8, MODULE, EIGHT),
    "steps by batch and number": (lambda n, x: x[torch.arange(2), torch.tensor([4, 1])],
                                  8, MODULE, EIGHT),
    "index_select of steps": (
        lambda n, x: x.index_select(1, torch.tensor([4, 0])), 8, MODULE, EIGHT),
    "gather by a spread index": (
        lambda n, x: x.gather(1, STEPS[..., None].expand(-1, -1, x.shape[-1])), 8, MODULE, EIGHT),
    "take_along_dim": (
        lambda n, x: torch.take_along_dim(x, STEPS[..., None].expand(-1, -1, x.shape[-1]), 1),
        8, MODULE, EIGHT),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str) -> None:
    between, features, forms, units = PASSES[name]
    proven(over_time(between, features), sequence(), units, forms=forms)


def written(n: Any, x: Tensor) -> Tensor:
    """Steps overwritten by other units: the two share their fate."""
    y = x.clone()
    y[:, [0, 2]] = n.b(x)[:, 1:3]
    return y


def added(n: Any, x: Tensor) -> Tensor:
    return x.index_add(1, torch.tensor([0, 3]), n.b(x)[:, 1:3])


def filled(n: Any, x: Tensor) -> Tensor:
    return x.index_fill(1, torch.tensor([0, 3]), 0.0)


@pytest.mark.parametrize(
    ("between", "units"),
    [(written, {"a:neuron": 8}), (added, {"a:neuron": 8}), (filled, {"a:neuron": 8})],
)
def test_writes_by_number(between: Between, units: dict[str, int]) -> None:
    parts: dict[str, Any] = {} if between is filled else {"b": nn.Linear(8, 8)}
    proven(over_time(between, **parts), sequence(), units)


MOVED = "its entries change places in a way that sizes cannot follow"
NUMBER = "its entries are picked by number"
CROPPED = "its dimension is padded or cropped"
PINNED: dict[str, tuple[Between, int, str]] = {
    "roll over units": (lambda n, x: x.roll(3, -1), 8, MOVED),
    "roll over everything": (lambda n, x: x.roll(3), 8, MOVED),
    "unfold over units": (lambda n, x: x.unfold(2, 3, 1).mean(-1), 6, MOVED),
    "diagonal": (lambda n, x: (x[:, :, None] * x[:, None]).diagonal(0, 1, 2).mT, 8, MOVED),
    "rot90": (lambda n, x: torch.rot90(x, 2, (1, 2)), 8, MOVED),
    "repeats of its own for each unit": (
        lambda n, x: x.repeat_interleave(torch.tensor([2, 1, 1, 1, 1, 1, 1, 0]), -1), 8, MOVED),
    "every second unit": (lambda n, x: x[..., 1::2], 4, "it is sliced with a step"),
    "units cropped": (lambda n, x: F.pad(x, (-2, -1)), 5, CROPPED),
    "units reflected": (lambda n, x: F.pad(x, (2, 1), mode="reflect"), 11, CROPPED),
    "units by number": (lambda n, x: x[..., ORDER], 8, NUMBER),
    "units by a mask": (lambda n, x: x[..., ORDER > 3], 4, NUMBER),
    "index_select of units": (lambda n, x: x.index_select(2, ORDER), 8, NUMBER),
    "gather by a fixed index": (
        lambda n, x: x.gather(1, INDEX), 8,
        "it is picked by a fixed index tensor"),
    "one unit picked": (
        lambda n, x: torch.cat([x[..., 3:4], x], 2), 9,
        "one index of the dimension is picked out"),
    "one step written by the input": (
        lambda n, x: x.index_copy(1, torch.tensor([1]), ROW), 8,
        "a fixed tensor is written into it"),
    "as positions": (
        lambda n, x: x + F.one_hot(x.detach().abs().long().clamp(max=1), 2).sum(-1), 8,
        "its values are used as positions by one_hot"),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_pinned(name: str) -> None:
    between, features, reason = PINNED[name]
    net = over_time(between, features)
    units = {"a:neuron": 7} if name == "one unit picked" else {}
    graph = proven(net, sequence(), units, forms=GRAPH)
    assert reason in why(graph, "a:neuron")


IMAGES: dict[str, tuple[Between, int, dict[str, int]]] = {
    "channel_shuffle": (lambda n, x: torch.channel_shuffle(x, 2), 8, {"a:channel": 4}),
    "pixel_shuffle": (lambda n, x: F.pixel_shuffle(x, 2), 2, {"a:channel": 2}),
    "pixel_unshuffle": (lambda n, x: F.pixel_unshuffle(x, 2), 32, {"a:channel": 8}),
    "unfold and fold": (
        lambda n, x: F.fold(F.unfold(x, 2, stride=2).relu(), (6, 6), 2, stride=2), 8,
        {"a:channel": 8}),
    "patches": (lambda n, x: F.unfold(x, 2, stride=2)[..., None], 32, {"a:channel": 8}),
    "windows": (
        lambda n, x: x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).mean(-1), 8, {"a:channel": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    between, channels, units = IMAGES[name]
    proven(on_images(between, channels), image(), units)


def test_two_prunable_dimensions_merged() -> None:
    """(batch, heads, positions): heads and positions of two layers land on one dimension."""
    net = Net(
        lambda n, x: n.c((n.a(x)[:, :, :, None] * n.b(x)[:, :, None, :]).flatten(2).relu()),
        a=nn.Linear(4, 3), b=nn.Linear(4, 5), c=nn.Linear(15, 3),
    )  # fmt: skip
    graph = proven(net, sequence(), {"a:neuron": 3}, forms=GRAPH)
    assert why(graph, "b:neuron") == {"two prunable dimensions are merged into one"}
