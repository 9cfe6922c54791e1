"""Normalisations: exact with the dense count, per channel, by whole groups, or pinned by wish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.graph.law import proven, why
from tests.graph.nets import Net, image, rows, sequence

COUNTS = 'a norm or mean counts it, and norm="pin" was asked'
NOT_ZERO = "it is normalised over and nothing makes it zero"
EIGHT = {"a:neuron": 8}
FIXED = torch.linspace(0.5, 2.0, 8).double()


def between(fn: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    """linear(4, 8) on (2, 5, 4) - `fn` - linear(8, 3)."""
    return Net(lambda n, x: n.c(fn(n, n.a(x))), a=nn.Linear(4, 8), c=nn.Linear(8, 3), **parts)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(8),
    "layer norm without shift": lambda: nn.LayerNorm(8, bias=False),
    "bare layer norm": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(8),
    "rms norm with eps": lambda: nn.RMSNorm(8, eps=1e-3),
    "bare rms norm": lambda: nn.RMSNorm(8, elementwise_affine=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_over_units(name: str) -> None:
    net = between(lambda n, x: n.norm(x), norm=LAYERS[name]())
    proven(net, sequence(), EIGHT)
    net = between(lambda n, x: n.norm(x), norm=LAYERS[name]())
    assert why(proven(net, sequence(), {}, norm="pin"), "a:neuron") == {COUNTS}


@pytest.mark.parametrize("name", LAYERS)
def test_of_what_is_not_zero(name: str) -> None:
    net = between(lambda n, x: n.norm(torch.sigmoid(x)), norm=LAYERS[name]())
    assert why(proven(net, sequence(), {}), "a:neuron") == {NOT_ZERO}


def test_a_norm_over_two_dimensions() -> None:
    """Steps and units: the dense count is that of both."""
    net = between(lambda n, x: n.norm(x), norm=nn.LayerNorm((5, 8)))
    proven(net, sequence(), EIGHT, forms=("graph",))


def test_a_stream_that_norms_read() -> None:
    """A residual stream of 8 is an embedding; what a branch makes inside is its own."""
    net = Net(
        lambda n, x: n.c(n.n2(n.e(x) + n.b(F.relu(n.a(n.n1(n.e(x))))))),
        e=nn.Linear(4, 8), n1=nn.LayerNorm(8), a=nn.Linear(8, 6), b=nn.Linear(6, 8),
        n2=nn.RMSNorm(8), c=nn.Linear(8, 3),
    )  # fmt: skip
    proven(net, sequence(), {"e:embedding": 8, "a:neuron": 6})


def test_norms_of_heads_keep_the_heads() -> None:
    """(2, 5, 3, 4): the scale of 4 is shared by all heads."""
    net = Net(
        lambda n, x: n.c(n.norm(n.a(x).unflatten(-1, (3, 4))).flatten(2)),
        a=nn.Linear(4, 12), norm=nn.LayerNorm(4), c=nn.Linear(12, 3),
    )  # fmt: skip
    proven(net, sequence(), {"a:neuron": 3}, forms=("graph",))


@pytest.mark.parametrize("reads", [F.layer_norm, F.rms_norm])
def test_scales_that_are_fixed(reads: Callable[..., Tensor]) -> None:
    net = between(lambda n, x: reads(x, (8,), FIXED))
    graph = proven(net, sequence(), {})
    assert why(graph, "a:neuron") == {"its scale or shift is a tensor that is fixed"}
    net = between(
        lambda n, x: x.sum(-1, True) + reads(FIXED.expand(2, 5, 8), (8,), n.s[0] * n.s[1]),
        s=nn.Parameter(torch.ones(2, 8)),
    )
    graph = proven(net, sequence(), EIGHT)
    assert why(graph, "s") >= {"it scales entries that are fixed"}


# -- channels --------------------------------------------------------------------------------


def on_images(norm: nn.Module, between: Callable[[Tensor], Tensor] = F.relu) -> nn.Module:
    return Net(
        lambda n, x: n.c(between(n.norm(n.a(x)))).mean((2, 3)),
        a=nn.Conv2d(3, 8, 3), norm=norm, c=nn.Conv2d(8, 3, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "units"),
    [
        (nn.GroupNorm(4, 8), 4),  # whole groups of two
        (nn.GroupNorm(2, 8), 4),  # the same index in both groups, padded
        (nn.GroupNorm(1, 8), 8),  # all but a layer norm
        (nn.GroupNorm(8, 8), 8),  # an instance norm
        (nn.GroupNorm(4, 8, affine=False), 4),
        (nn.GroupNorm(1, 8, affine=False), 8),
        (nn.BatchNorm2d(8), 8),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), 8),
        (nn.LocalResponseNorm(3), 0),
    ],
)
def test_channels(norm: nn.Module, units: int) -> None:
    found = {"a:channel": units} if units else {}
    bare = isinstance(norm, nn.GroupNorm) and not norm.affine  # nothing tells its module the size
    proven(on_images(norm), image(), found, forms=("graph",) if bare else ("module", "graph"))


def test_groups_are_pinned_by_wish_or_whole() -> None:
    graph = proven(on_images(nn.GroupNorm(1, 8)), image(), {}, norm="pin")
    assert why(graph, "a:channel") == {COUNTS}


def test_whole_groups_by_wish() -> None:
    proven(on_images(nn.GroupNorm(2, 8)), image(), {"a:channel": 2}, norm="pin")


def test_norms_of_the_input() -> None:
    reason = {"it normalises channels that are fixed"}
    for norm in (nn.BatchNorm2d(3), nn.GroupNorm(1, 3)):
        net = Net(lambda n, x: n.c(n.a(n.norm(x))), norm=norm, a=nn.Conv2d(3, 8, 1),
                  c=nn.Conv2d(8, 3, 1))  # fmt: skip
        graph = proven(net, image(), {"a:channel": 8})
        assert why(graph, "norm") == reason


def test_a_norm_over_positions_that_units_make() -> None:
    """(batch, 5 steps, 8 units) read as 5 channels of 8 positions."""
    reason = {"a normalisation runs over it"}
    for norm in (nn.BatchNorm1d(5), nn.GroupNorm(1, 5), nn.InstanceNorm1d(5)):
        net = between(lambda n, x: n.norm(x), norm=norm)
        assert why(proven(net, sequence(), {}), "a:neuron") == reason


def test_a_group_norm_with_a_fixed_scale() -> None:
    net = on_images(nn.Identity(), lambda x: F.group_norm(x, 8, FIXED))
    graph = proven(net, image(), {})
    assert why(graph, "a:channel") == {"its scale or shift is a tensor that is fixed"}


# -- weights ---------------------------------------------------------------------------------


def test_weight_norm_slices_the_direction_and_masks_the_length() -> None:
    """Zeroing both would be 0 / 0: the direction is sliced and never zeroed."""
    made = parametrizations.weight_norm
    net = nn.Sequential(made(nn.Linear(6, 8)), nn.ReLU(), made(nn.Linear(8, 5)), nn.ReLU(),
                        nn.Linear(5, 3))  # fmt: skip
    graph = proven(net, rows(), {"0:neuron": 8, "2:neuron": 5})
    member = {(m.tensor, m.dim): m for m in graph.groups()[0].members}
    stem = "0.parametrizations.weight"
    assert not member[f"{stem}.original1", 0].masked
    assert member[f"{stem}.original0", 0].masked
    assert member["2.parametrizations.weight.original1", 1].masked


def test_weight_norm_over_everything() -> None:
    """Without a dim the norm is one of the whole weight: a sum over zeros, one length for all."""
    normed = parametrizations.weight_norm(nn.Linear(6, 8), dim=None)  # type: ignore[arg-type]
    proven(nn.Sequential(normed, nn.ReLU(), nn.Linear(8, 3)), rows(), {"0:neuron": 8})


def test_lengths_that_are_fixed() -> None:
    net = Net(
        lambda n, x: n.c(F.linear(x, torch._weight_norm(n.v, FIXED[:, None], 0)).relu()),
        v=nn.Parameter(torch.randn(8, 6)), c=nn.Linear(8, 3),
    )  # fmt: skip
    graph = proven(net, rows(), {})
    assert "one scale serves all of it" in why(graph, "v") | why(graph, "v:neuron")


def test_spectral_norm() -> None:
    """u and v of the power iteration are cut along."""
    made = parametrizations.spectral_norm
    net = nn.Sequential(made(nn.Conv2d(3, 8, 3)), nn.ReLU(), made(nn.Conv2d(8, 6, 3)), nn.ReLU(),
                        nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1))  # fmt: skip
    graph = proven(net, image(), {"0:channel": 8, "2:channel": 6}, forms=("graph",))
    tensors = {m.tensor for t in graph.groups() for m in t.members}
    assert {"0.parametrizations.weight.0._u", "2.parametrizations.weight.0._v"} <= tensors


def test_standardised_weights() -> None:
    """Each kernel less its mean, over its deviation."""

    def forward(n: Any, x: Tensor) -> Tensor:
        w = n.a.weight
        w = (w - w.mean((1, 2, 3), True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        y: Tensor = n.c(F.relu(F.conv2d(x, w, n.a.bias))).mean((2, 3))
        return y

    net = Net(forward, a=nn.Conv2d(3, 8, 3), c=nn.Conv2d(8, 3, 1))
    proven(net, image(), {"a:channel": 8})
