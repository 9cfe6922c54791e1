"""Sums, means, norms and their kin: exact over zeros, with the dense count, or pinned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.law import proven, why
from tests.graph.nets import Net, image, rows, sequence

Between = Callable[[Any, Tensor], Tensor]
EIGHT = {"a:neuron": 8}
COUNTS = 'a norm or mean counts it, and norm="pin" was asked'
NOT_ZERO = "it is reduced over and nothing makes it zero"
MODULE, GRAPH = ("module", "graph"), ("graph",)


def between(fn: Between, **parts: Any) -> nn.Module:
    """linear(4, 8) on (2, 5, 4) - `fn` - linear(8, 3)."""
    return Net(lambda n, x: n.c(fn(n, n.a(x))), a=nn.Linear(4, 8), c=nn.Linear(8, 3), **parts)


OVER_UNITS: dict[str, tuple[Between, tuple[str, ...]]] = {
    "sum": (lambda n, x: x * x.sum(-1, keepdim=True), MODULE),
    "sum, dim dropped": (lambda n, x: x + x.relu().sum(-1)[..., None], MODULE),
    "sum of everything": (lambda n, x: x * x.sum(), MODULE),
    "nansum": (lambda n, x: x * x.nansum(-1, True), MODULE),
    "norm": (lambda n, x: x * x.norm(dim=-1, keepdim=True), MODULE),
    "norm of order 1": (lambda n, x: x * torch.linalg.vector_norm(x, 1, -1, True), MODULE),
    "normalised": (lambda n, x: F.normalize(x, dim=-1), MODULE),
    "amax": (lambda n, x: x + x.amax(-1, True), GRAPH),
    "max": (lambda n, x: x + x.max(-1, True)[0], GRAPH),
    "amax of what is negative": (lambda n, x: x + (-x.abs()).amax(-1, True), GRAPH),
    "mean": (lambda n, x: x * x.mean(-1, keepdim=True), GRAPH),
    "centred": (lambda n, x: x - x.mean(-1, True), GRAPH),
    "root mean square": (lambda n, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5), GRAPH),
    "variance": (lambda n, x: x * x.var(-1, keepdim=True), GRAPH),
    "biased deviation": (lambda n, x: x * x.std(-1, unbiased=False, keepdim=True), GRAPH),
    "mean over units and steps": (lambda n, x: x * x.mean((1, 2), keepdim=True), GRAPH),
    "mean of everything": (lambda n, x: x + x.mean(), GRAPH),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER_UNITS)
def test_over_units_that_are_zero(name: str) -> None:
    fn, forms = OVER_UNITS[name]
    proven(between(fn), sequence(), EIGHT, forms=forms)


@pytest.mark.parametrize("name", ["mean", "root mean square", "variance"])
def test_means_are_pinned_by_wish(name: str) -> None:
    graph = proven(between(OVER_UNITS[name][0]), sequence(), {}, norm="pin")
    assert why(graph, "a:neuron") == {COUNTS}


@pytest.mark.parametrize(
    "fn",
    [
        lambda n, x: x + torch.sigmoid(x).sum(-1, True),
        lambda n, x: x + torch.exp(x).mean(-1, True),
        lambda n, x: x + (x + 1).norm(dim=-1, keepdim=True),
        lambda n, x: x + (x + 1).var(-1, keepdim=True),
    ],
)
def test_over_units_that_are_not_zero(fn: Between) -> None:
    assert why(proven(between(fn), sequence(), {}), "a:neuron") == {NOT_ZERO}


OVER_OTHERS: dict[str, Between] = {
    "sum": lambda n, x: x.sum(1),
    "mean": lambda n, x: torch.sigmoid(x).mean(1),
    "var": lambda n, x: x.var(1),
    "var_mean": lambda n, x: torch.var_mean(x, 1)[0],
    "norm": lambda n, x: x.norm(dim=1),
    "amax": lambda n, x: x.amax(1),
    "max with its place": lambda n, x: x.max(1)[0],
    "min": lambda n, x: x.min(1, keepdim=True).values,
    "median": lambda n, x: x.median(1)[0],
    "prod": lambda n, x: x.prod(1),
    "logsumexp": lambda n, x: x.logsumexp(1),
    "any": lambda n, x: (x > 0).any(1).double(),
    "all": lambda n, x: (x > 0).all(1).double() * x[:, 0],
    "places of maxima": lambda n, x: x[:, 0] * x.argmax(1),
    "softmax": lambda n, x: F.softmax(x, 1),
    "log_softmax": lambda n, x: F.log_softmax(x, 1),
    "cumsum": lambda n, x: x.cumsum(1),
    "cumprod": lambda n, x: torch.cumprod(x, 1),
    "cummax": lambda n, x: x.cummax(1)[0],
    "sort": lambda n, x: x.sort(1)[0],
    "sorted order": lambda n, x: x * x.argsort(1),
    "topk": lambda n, x: x.topk(2, 1)[0],
    "kthvalue": lambda n, x: x.kthvalue(2, 1)[0],
    "count": lambda n, x: x * (x > 0).count_nonzero(1)[:, None],
}


@pytest.mark.parametrize("name", OVER_OTHERS)
def test_over_other_dimensions(name: str) -> None:
    proven(between(OVER_OTHERS[name]), sequence(), EIGHT)


PINNED: dict[str, tuple[Between, str]] = {
    "max with its place": (lambda n, x: x + x.max(-1, True)[1], "max is taken over it"),
    "argmax": (lambda n, x: x + x.argmax(-1, True), "argmax is taken over it"),
    "prod": (lambda n, x: x + x.prod(-1, True), "prod is taken over it"),
    "median": (lambda n, x: x + x.median(-1, True)[0], "median is taken over it"),
    "logsumexp": (lambda n, x: x + x.logsumexp(-1, True), "logsumexp is taken over it"),
    "count": (lambda n, x: x + x.norm(0, -1, True), "is taken over it"),
    "softmax": (lambda n, x: x.softmax(-1), "softmax runs over it"),
    "cumsum": (lambda n, x: x.cumsum(-1), "cumsum runs over it"),
    "sort": (lambda n, x: x.sort(-1)[0], "sort runs over it"),
    "topk": (lambda n, x: x + x.topk(3, -1)[0].sum(-1, True), "topk runs over it"),
    "renorm": (lambda n, x: x.renorm(2, 0, 1.0), "renorm runs over it"),
}


@pytest.mark.parametrize("name", PINNED)
def test_pinned(name: str) -> None:
    fn, reason = PINNED[name]
    graph = proven(between(fn), sequence(), {})
    assert any(reason in r for r in why(graph, "a:neuron")), graph.summary()


def test_heads_are_kept_by_a_reduction_inside_them() -> None:
    """(2, 5, 3, 4): the maximum over a head's positions leaves three heads."""
    net = Net(
        lambda n, x: n.c(n.a(x).unflatten(-1, (3, 4)).amax(-1)),
        a=nn.Linear(4, 12), c=nn.Linear(3, 3),
    )  # fmt: skip
    proven(net, sequence(), {"a:neuron": 3}, forms=GRAPH)


# -- joining, pooling, padding -------------------------------------------------------------------

CHANNELS: dict[str, tuple[Between, int]] = {
    "max pool with places": (lambda n, x: F.max_pool2d(x, 2, return_indices=True)[0], 8),
    "unpooled": (lambda n, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]), 8),
    "average pool": (lambda n, x: F.avg_pool2d(x, 3, 1, 1), 8),
    "adaptive": (
        lambda n, x: F.adaptive_avg_pool2d(x, (2, 3)) * F.adaptive_max_pool2d(x, (2, 3)), 8),
    "lp pool": (lambda n, x: F.lp_pool2d(x, 2, 2), 8),
    "nearest": (lambda n, x: F.interpolate(x, scale_factor=2), 8),
    "bilinear": (lambda n, x: F.interpolate(x, (4, 9), mode="bilinear", antialias=True), 8),
    "bicubic": (lambda n, x: F.interpolate(x, (4, 9), mode="bicubic"), 8),
    "grid": (lambda n, x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3).double().expand(2, 2, 3), [2, 3, 5, 5], False),
        align_corners=False), 8),
    "reflected": (lambda n, x: F.pad(x, (1, 2, 0, 1), mode="reflect"), 8),
    "replicated": (lambda n, x: F.pad(x, (1, 2, 0, 1), mode="replicate"), 8),
    "wrapped": (lambda n, x: F.pad(x, (1, 2, 0, 1), mode="circular"), 8),
    "gated": (lambda n, x: F.glu(torch.cat([x, x.sin()], 1), 1), 8),
    "prelu": (lambda n, x: F.prelu(x, n.slope), 8),
    "dropped": (lambda n, x: F.dropout2d(x, 0.5, n.training), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_pass(name: str) -> None:
    fn, channels = CHANNELS[name]
    net = Net(
        lambda n, x: n.c(fn(n, n.a(x))), a=nn.Conv2d(3, 8, 3, padding=1),
        c=nn.Conv2d(channels, 4, 1), slope=nn.Parameter(torch.randn(8)),
    )  # fmt: skip
    proven(net, image(), {"a:channel": 8})


def test_halves_of_a_gate_go_together() -> None:
    net = between(lambda n, x: F.glu(n.g(x), -1), g=nn.Linear(8, 16))
    proven(net, sequence(), {"a:neuron": 8, "g:neuron": 8})
    net = Net(lambda n, x: n.c(F.glu(torch.cat([n.a(x), FIXED.expand(2, 5, 8)], -1), -1)),
              a=nn.Linear(4, 8), c=nn.Linear(8, 3))  # fmt: skip
    graph = proven(net, sequence(), {})
    reason = "the other half of a gated unit is fixed"
    assert why(graph, "a:neuron") == {reason}


FIXED = torch.ones(1, 1, 8).double()


def test_stacked_and_joined() -> None:
    """Two layers side by side: units of their own; on top of each other: shared."""
    net = Net(
        lambda n, x: n.c(torch.stack([n.a(x), n.b(x)], 1).amax(1))
        + n.d(torch.cat([n.a(x), n.b(x).sin()], 0)).unflatten(0, (2, -1)).sum(0),
        a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 3), d=nn.Linear(8, 3),
    )  # fmt: skip
    proven(net, sequence(), {"a:neuron": 8})
    net = Net(
        lambda n, x: n.c(torch.hstack([n.a(x), n.b(x).relu(), x])),
        a=nn.Linear(6, 8), b=nn.Linear(6, 5), c=nn.Linear(19, 3),
    )  # fmt: skip
    proven(net, rows(), {"a:neuron": 8, "b:neuron": 5})


def test_stacked_with_something_fixed() -> None:
    net = between(lambda n, x: torch.stack([x, FIXED.expand(2, 5, 8)], 1).sum(1))
    graph = proven(net, sequence(), {})
    assert why(graph, "a:neuron") <= {
        "it is joined with a tensor that is fixed", "joined tensors differ"
    }  # fmt: skip


def test_pooled_units() -> None:
    net = Net(lambda n, x: n.c(F.avg_pool1d(n.a(x), 2)), a=nn.Linear(4, 8), c=nn.Linear(4, 3))
    assert why(proven(net, sequence(), {}), "a:neuron") == {"its dimension is pooled"}
