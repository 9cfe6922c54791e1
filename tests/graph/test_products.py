"""Layers, convolutions and products of tensors: who makes a unit, who reads it, and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.law import proven, why
from tests.graph.nets import Net, image, rows, sequence

MODULE, GRAPH = ("module", "graph"), ("graph",)
Forward = Callable[..., Any]


SQUARE = torch.linspace(-1, 1, 64).view(8, 8).double()


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# -- products with a weight, and between activations -------------------------------------------

VECTORS: dict[str, tuple[Forward, dict[str, Callable[[], Any]], dict[str, int]]] = {
    "matmul with a weight": (
        lambda n, x: F.relu(x @ n.w) @ n.v,
        {"w": lambda: parameter(4, 8), "v": lambda: parameter(8, 3)},
        {"w:neuron": 8}),
    "einsum": (
        lambda n, x: torch.einsum("bth,ho->bto", F.relu(torch.einsum("bti,hi->bth", x, n.w)), n.v),
        {"w": lambda: parameter(8, 4), "v": lambda: parameter(8, 3)}, {"w:neuron": 8}),
    "einsum with dots and no arrow": (
        lambda n, x: torch.einsum("...h,ho", F.relu(torch.einsum("...i,ih", x, n.w)), n.v),
        {"w": lambda: parameter(4, 8), "v": lambda: parameter(8, 3)}, {"w:neuron": 8}),
    "mm and addmm": (
        lambda n, x: torch.addmm(n.s, F.relu(x[:, 0].mm(n.w)), n.v),
        {"w": lambda: parameter(4, 8), "v": lambda: parameter(8, 3), "s": lambda: parameter(3)},
        {"w:neuron": 8}),
    "addmm makes units": (
        lambda n, x: F.relu(torch.addmm(n.s, x[:, 0], n.w)) @ n.v,
        {"w": lambda: parameter(4, 8), "s": lambda: parameter(8), "v": lambda: parameter(8, 3)},
        {"w:neuron": 8}),
    "baddbmm": (
        lambda n, x: torch.baddbmm(n.s, x, n.w.expand(2, 4, 8)).relu() @ n.v,
        {"w": lambda: parameter(4, 8), "s": lambda: parameter(1, 8), "v": lambda: parameter(8, 3)},
        {"w:neuron": 8}),
    "matrix with a vector": (
        lambda n, x: (n.w @ x[0, 0]).tanh() @ n.v,
        {"w": lambda: parameter(8, 4), "v": lambda: parameter(8)}, {"w:neuron": 8}),
    "products of activations": (
        lambda n, x: n.h(n.a(x) @ n.b(x).mT),
        {"a": lambda: nn.Linear(4, 8), "b": lambda: nn.Linear(4, 8), "h": lambda: nn.Linear(5, 3)},
        {"a:neuron": 8}),
    "bmm of activations": (
        lambda n, x: n.h(torch.bmm(n.a(x).mT, n.b(x)).flatten(1)),
        {"a": lambda: nn.Linear(4, 8), "b": lambda: nn.Linear(4, 3), "h": lambda: nn.Linear(24, 3)},
        {"a:neuron": 8}),
    "dot products": (
        lambda n, x: torch.dot(n.a(x[0, 0]), n.b(x[1, 1])),
        {"a": lambda: nn.Linear(4, 8), "b": lambda: nn.Linear(4, 8)}, {"a:neuron": 8}),
    "outer product": (
        lambda n, x: torch.outer(n.a(x[0, 0]), x[1, 0]).mT @ n.v,
        {"a": lambda: nn.Linear(4, 8), "v": lambda: parameter(8, 3)}, {"a:neuron": 8}),
    "bilinear by two products": (
        lambda n, x: torch.einsum("bti,oij,btj->bto", n.a(x), n.w, n.b(x)),
        {"a": lambda: nn.Linear(4, 8), "b": lambda: nn.Linear(4, 6),
         "w": lambda: parameter(3, 8, 6)},
        {"a:neuron": 8, "b:neuron": 6}),
    "stacked experts": (
        lambda n, x: torch.einsum(
            "btek,eko,bte->bto", F.relu(torch.einsum("bti,eik->btek", x, n.w)), n.v,
            torch.sigmoid(n.g(x))),
        {"w": lambda: parameter(6, 4, 5), "v": lambda: parameter(6, 5, 3),
         "g": lambda: nn.Linear(4, 6)},
        {"w:expert": 6, "w:neuron": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_products(name: str) -> None:
    forward, parts, units = VECTORS[name]
    net = Net(forward, **{k: make() for k, make in parts.items()})
    proven(
        net, sequence(), units, forms=GRAPH if name in ("bmm of activations", "baddbmm") else MODULE
    )


MEETS = "it meets a tensor whose entries cannot be removed"
SUMMED = "it is summed over with a tensor that is fixed"
NOT_ZERO = "it is summed over and nothing makes it zero"


def between(fn: Forward, **parts: Any) -> nn.Module:
    """linear(4, 8) - `fn` - linear(8, 3), on (2, 5, 4)."""
    return Net(lambda n, x: n.c(fn(n, n.a(x))), a=nn.Linear(4, 8), c=nn.Linear(8, 3), **parts)


PINNED: dict[str, tuple[Forward, dict[str, Any], str]] = {
    "summed with a fixed tensor": (
        lambda n, x: x @ SQUARE, {}, SUMMED),
    "a letter twice": (
        lambda n, x: torch.einsum("bti,ii->bti", x, n.w), {"w": nn.Linear(8, 8).weight},
        "an einsum that repeats a letter in one tensor has no rule"),
    "two that are not zero": (
        lambda n, x: torch.sigmoid(x) * (torch.sigmoid(x) @ torch.sigmoid(x).mT).sum(-1, True), {},
        NOT_ZERO),
    "a vector as weight": (
        lambda n, x: x + F.linear(x, n.w)[..., None], {"w": parameter(8)},
        "a linear layer with a vector as weight has no rule"),
    "inner product of matrices": (
        lambda n, x: torch.inner(x, n.w), {"w": parameter(8, 8)}, "operator inner has no rule"),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_pinned(name: str) -> None:
    fn, parts, reason = PINNED[name]
    graph = proven(between(fn, **parts), sequence(), {})
    assert reason in why(graph, "a:neuron"), graph.summary()


def test_an_added_fixed_matrix_pins() -> None:
    net = Net(
        lambda n, x: n.c(torch.addmm(SQUARE[:3], x, n.w)), w=parameter(6, 8), c=nn.Linear(8, 3)
    )  # fmt: skip
    graph = proven(net, rows(), {})
    assert why(graph, "w:neuron") <= {MEETS, "its addend is fixed"}
    assert why(graph, "w:neuron")


# -- linear layers and embeddings ------------------------------------------------------------

WORDS = torch.randint(0, 10, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode: str) -> None:
    net = Net(lambda n, x: n.c(n.e(x)), e=nn.EmbeddingBag(10, 8, mode=mode), c=nn.Linear(8, 3))
    graph = proven(net, WORDS, {"e:embedding": 8})
    assert not why(graph, "e:embedding") - {"it is an entry of the vocabulary"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Embedding(10, 8),
        lambda: nn.Embedding(10, 8, padding_idx=0),
        lambda: nn.Embedding(10, 8, scale_grad_by_freq=True),
    ],
)
def test_embeddings(make: Callable[[], nn.Module]) -> None:
    net = Net(lambda n, x: n.c(F.relu(n.e(x))), e=make(), c=nn.Linear(8, 3))
    proven(net, WORDS, {"e:embedding": 8})


def test_a_table_indexed_by_hand() -> None:
    net = Net(lambda n, x: n.c(F.relu(n.w[x] @ n.v)), w=parameter(10, 6), v=parameter(6, 8),
              c=nn.Linear(8, 3))  # fmt: skip
    graph = proven(net, WORDS, {"v:neuron": 8})
    assert "its entries are picked by number" in why(graph, "w")


def test_a_table_that_is_also_the_last_layer() -> None:
    net = Net(lambda n, x: F.linear(n.b(F.relu(n.e(x))), n.e.weight), e=nn.Embedding(10, 8),
              b=nn.Linear(8, 8))  # fmt: skip
    graph = proven(net, WORDS, {"e:embedding": 8})
    assert why(graph, "e:neuron") == {"it is an entry of the vocabulary"}


def test_a_bias_without_units_and_units_without_a_bias() -> None:
    net = Net(
        lambda n, x: n.c(F.linear(x, n.w, SQUARE[0])), w=parameter(8, 6), c=nn.Linear(8, 3)
    )  # fmt: skip
    graph = proven(net, rows(), {})
    assert why(graph, "w:neuron") == {"its bias is a tensor that is fixed"}
    net = Net(lambda n, x: F.linear(x, SQUARE[:, :6], n.a(x[0])), a=nn.Linear(6, 8))
    graph = proven(net, rows(), {})
    assert why(graph, "a:neuron") == {"it is the bias of an output that is fixed"}


def test_weights_shared_by_two_layers() -> None:
    """a(x), then b whose weight is that of a: 8 units shared by input and output of both."""

    def forward(n: Any, x: Tensor) -> Tensor:
        h = F.relu(n.a(x))
        y: Tensor = n.c(F.relu(F.linear(h, n.b.weight)) + F.linear(n.a(x), n.b.weight))
        return y

    net = Net(
        forward,
        a=nn.Linear(6, 8), b=nn.Linear(8, 8, bias=False), c=nn.Linear(8, 3),
    )  # fmt: skip
    proven(net, rows(), {"a:neuron": 8, "b:neuron": 8})


# -- convolutions ----------------------------------------------------------------------------


def conv_net(fn: Forward, **parts: Any) -> nn.Module:
    return Net(lambda n, x: n.h(fn(n, x)), **parts)


def test_one_and_three_dimensions() -> None:
    net = Net(
        lambda n, x: n.c(F.relu(n.a(x))).mean(2),
        a=nn.Conv1d(4, 8, 3, dilation=2), c=nn.Conv1d(8, 3, 1),
    )  # fmt: skip
    proven(net, sequence(steps=9).mT.contiguous(), {"a:channel": 8})
    net = Net(
        lambda n, x: n.c(F.relu(n.a(x))).mean((2, 3, 4)),
        a=nn.Conv3d(3, 8, 2, stride=2), c=nn.Conv3d(8, 3, 1),
    )  # fmt: skip
    proven(net, torch.randn(2, 3, 4, 4, 4), {"a:channel": 8})


def test_strings_as_padding_and_other_borders() -> None:
    net = Net(
        lambda n, x: n.c(n.b(F.relu(n.a(x)))).mean((2, 3)),
        a=nn.Conv2d(3, 8, 3, padding="same"), c=nn.Conv2d(6, 3, 1, padding="valid"),
        b=nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"),
    )  # fmt: skip
    proven(net, image(), {"a:channel": 8, "b:channel": 6})


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions(groups: int, bias: bool) -> None:
    """Whole groups: 8 / groups channels each. Without groups input and output are apart."""
    net = Net(
        lambda n, x: n.c(F.relu(n.t(n.a(x)))),
        a=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 3, 1),
        t=nn.ConvTranspose2d(8, 8, 2, stride=2, groups=groups, bias=bias),
    )  # fmt: skip
    units = {"a:channel": groups} if groups > 1 else {"a:channel": 8, "t:channel": 8}
    proven(net, image(), units)


def test_transposed_convolution_that_widens() -> None:
    """Two outputs for each of four groups of two inputs."""
    net = Net(
        lambda n, x: n.c(F.relu(n.t(F.relu(n.a(x))))),
        a=nn.Conv1d(4, 8, 1), t=nn.ConvTranspose1d(8, 12, 2, groups=4), c=nn.Conv1d(12, 3, 1),
    )  # fmt: skip
    proven(net, sequence().mT.contiguous(), {"a:channel": 4})


def test_groups_over_a_fixed_input() -> None:
    reason = "a grouped convolution reads a fixed input"
    net = Net(lambda n, x: n.c(n.a(x)), a=nn.Conv2d(4, 8, 3, groups=2), c=nn.Conv2d(8, 3, 1))
    assert why(proven(net, image(channels=4), {}), "a:channel") == {reason}
    net = Net(
        lambda n, x: n.c(n.a(x)), a=nn.ConvTranspose2d(4, 8, 3, groups=2), c=nn.Conv2d(8, 3, 1)
    )
    assert why(proven(net, image(channels=4), {}), "a") >= {reason}


def test_kernels_and_what_they_run_over() -> None:
    """A kernel that a layer makes, and a convolution over channels laid out as an image."""
    net = Net(lambda n, x: F.conv1d(x, n.a(SQUARE[0]).view(1, 4, 2)), a=nn.Linear(8, 8))
    graph = proven(net, sequence().mT.contiguous(), {})
    assert why(graph, "a:neuron") == {"it is part of a convolution kernel"}
    net = Net(lambda n, x: n.b(n.a(x)[:, None]), a=nn.Linear(6, 8), b=nn.Conv1d(1, 3, 3))
    graph = proven(net, rows(), {})
    assert why(graph, "a:neuron") == {"a convolution runs over it"}


def test_patches_laid_out_over_units() -> None:
    """fold over positions that units make."""
    net = Net(
        lambda n, x: n.c(F.fold(n.a(x.mT), (3, 4), 1)),
        a=nn.Linear(5, 12), c=nn.Conv2d(4, 3, 1),
    )  # fmt: skip
    graph = proven(net, sequence(), {})
    assert why(graph, "a:neuron") == {"patches are laid out over it"}
