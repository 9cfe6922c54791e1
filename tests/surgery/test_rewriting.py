"""How sizes in operator calls follow a cut: by hand, and on small networks in graph form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.graph.rewriting import BoolArray, Call, CannotRewrite, Scaled, SizeOf, rewritten
from secateurs.surgery.shrinking import info_of
from tests.graph.nets import Net, image, plan_of, randomized, rows, sequence, units_of

aten = torch.ops.aten


class Known:
    """Shapes and masks of tensors that are called by letters."""

    def __init__(self, **tensors: Any) -> None:
        self.tensors = tensors

    def shape(self, tensor: Any) -> tuple[int, ...]:
        found: tuple[int, ...] = self.tensors[tensor][0]
        return found

    def keep(self, tensor: Any, dim: int) -> BoolArray | None:
        shape, masks = self.tensors[tensor]
        mask = masks.get(dim % len(shape))
        return None if mask is None else np.array([c == "1" for c in mask])


def known(**tensors: tuple[tuple[int, ...], dict[int, str]]) -> Known:
    return Known(**tensors)


def change(op: str, fn: Any, args: tuple[Any, ...], what: Known, outs: str = "y") -> Call:
    return rewritten(op, Call(fn, args), list(outs), what)


LINE = {"x": ((2, 4), {1: "1010"})}


def test_sizes_that_are_numbers_unknown_or_inferred() -> None:
    what = known(**LINE, y=((2, 2, 2), {1: "10", 2: "11"}))
    assert change("view", aten.view.default, ("x", [2, 2, 2]), what).args == ("x", [2, 1, 2])
    assert change("view", aten.view.default, ("x", [2, -1, 2]), what).args == ("x", [2, -1, 2])
    size = object()
    new = change("view", aten.view.default, ("x", [2, size, 2]), what)
    assert new.args[1][1] == Scaled(size, 1, 2)


def test_nothing_to_do_gives_the_same_call() -> None:
    call = Call(aten.view.default, ("x", [8]))
    assert rewritten("view", call, ["y"], known(x=((2, 4), {}), y=((8,), {}))) is call
    assert rewritten("relu", call, ["y"], known(x=((2, 4), {}), y=((8,), {}))) is call


def test_merged_with_the_batch_the_share_is_reduced() -> None:
    what = known(x=((6, 4), {}), y=((12, 4), {0: "110110110110"}))
    size = object()
    new = change("reshape", aten.reshape.default, ("x", [size, 4]), what)
    assert new.args[1][0] == Scaled(size, 2, 3)


def test_templates_become_sizes() -> None:
    what = known(x=((2, 1), {}), t=((2, 4), {}), y=((2, 4), {1: "1010"}))
    new = change("expand_as", aten.expand_as.default, ("x", "t"), what)
    assert new.fn is aten.expand.default
    assert new.args == ("x", [SizeOf("t", 0), 2])
    same = known(x=((2, 1), {}), t=((2, 4), {1: "1010"}), y=((2, 4), {1: "1010"}))
    new = change("expand_as", aten.expand_as.default, ("x", "t"), same)
    assert new.fn is aten.expand_as.default


@pytest.mark.parametrize(
    ("op", "fn", "args", "expected"),
    [
        ("slice", aten.slice.Tensor, ("x", 1, 1, 3), ("x", 1, 1, 2)),
        ("slice", aten.slice.Tensor, ("x", 1, -3, 2**63 - 1), ("x", 1, 1, 2)),
        ("narrow", aten.narrow.default, ("x", 1, 1, 3), ("x", 1, 1, 1)),
        ("narrow", aten.narrow.default, ("x", 1, -4, 3), ("x", 1, 0, 2)),
        ("select", aten.select.int, ("x", 1, 2), ("x", 1, 1)),
        ("select", aten.select.int, ("x", -1, -2), ("x", -1, 1)),
        ("pad", aten.pad.default, ("x", [1, 2]), ("x", [1, 2])),
        ("pad", aten.pad.default, ("x", [-1, -1]), ("x", [-1, 0])),
        ("channel_shuffle", aten.channel_shuffle.default, ("x", 2), ("x", 2)),
    ],
)
def test_bounds(op: str, fn: Any, args: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert change(op, fn, args, known(**LINE, y=((2, 4), {}))).args == expected


def test_parts_by_what_is_left_of_them() -> None:
    what = known(**LINE, y=((2, 3), {1: "101"}), z=((2, 1), {1: "0"}))
    for fn, args in (
        (aten.split_with_sizes.default, ("x", [3, 1], 1)),
        (aten.tensor_split.indices, ("x", [3], 1)),
        (aten.split.Tensor, ("x", 3, -1)),
    ):
        name = fn._schema.name.split("::")[1]
        new = change(name, fn, args, what, "yz")
        assert new.fn is aten.split_with_sizes.default
        assert new.args == ("x", [2, 0], 1)


def test_copies() -> None:
    out = known(x=((2, 2), {1: "10"}), y=((2, 4), {1: "1010"}))
    assert change("repeat", aten.repeat.default, ("x", [1, 2]), out).args[1] == [1, 2]
    one = known(x=((2, 1), {}), y=((2, 4), {1: "1010"}))
    assert change("repeat", aten.repeat.default, ("x", [1, 4]), one).args[1] == [1, 2]
    apart = known(x=((2, 2), {}), y=((2, 4), {1: "1110"}))
    with pytest.raises(CannotRewrite, match="its copies lose different entries"):
        change("repeat", aten.repeat.default, ("x", [1, 2]), apart)
    each = known(x=((2, 2), {1: "10"}), y=((2, 4), {1: "1100"}))
    new = change("repeat_interleave", aten.repeat_interleave.self_int, ("x", 2, 1), each)
    assert new.args == ("x", 2, 1)


def test_what_cannot_be_rewritten() -> None:
    line = known(**LINE, y=((2, 4), {}))
    for op, fn, args, why in (
        ("slice", aten.slice.Tensor, ("x", 1, 0, 4, 2), "with a step"),
        ("slice", aten.slice.Tensor, ("x", 1, object()), "computed at run time"),
        ("select", aten.select.int, ("x", 1, 1), "its index 1 was removed"),
        ("unbind", aten.unbind.int, ("x", 1), "fewer tensors"),
        ("pad", aten.pad.default, ("x", [1, 0], "reflect"), "padding by reflect"),
    ):
        with pytest.raises(CannotRewrite, match=why):
            change(op, fn, args, line)


def test_norms_and_means_keep_the_dense_count() -> None:
    line = known(**LINE, w=((4,), {0: "1010"}), y=((2, 4), {1: "1010"}))
    new = change("layer_norm", aten.layer_norm.default, ("x", [4], "w", "w", 1e-5), line)
    assert new.args == ("x", [2], "w", "w", 1e-5, 4)
    again = change("padded_layer_norm", new.fn, ("x", [4], "w", "w", 1e-5, 9), line)
    assert again.args == ("x", [2], "w", "w", 1e-5, 9)
    mean = change("mean", aten.mean.default, ("x",), known(**LINE, y=((), {})))
    assert mean.args == ("x", [0, 1], False)
    assert mean.after[0][1] == (0.5,)
    attention = known(q=((2, 3, 4), {2: "1010"}), y=((2, 3, 4), {}))
    found = change("scaled_dot_product_attention", aten.scaled_dot_product_attention.default,
                   ("q", "q", "q"), attention)  # fmt: skip
    assert found.kwargs == {"scale": 0.5}


# -- networks --------------------------------------------------------------------------------

Forward = Callable[[Any, Tensor], Tensor]
BETWEEN: dict[str, tuple[Forward, dict[str, Callable[[], Any]]]] = {
    "layer norm": (lambda n, x: n.n(x), {"n": lambda: nn.LayerNorm(8)}),
    "layer norm without scale": (lambda n, x: F.layer_norm(x, [8]) * n.g,
                                 {"g": lambda: nn.Parameter(torch.ones(8))}),
    "rms norm": (lambda n, x: n.n(x), {"n": lambda: nn.RMSNorm(8)}),
    "mean": (lambda n, x: x - n.g * x.mean(-1, keepdim=True),
             {"g": lambda: nn.Parameter(torch.ones(8))}),
    "mean of squares": (
        lambda n, x: n.g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        {"g": lambda: nn.Parameter(torch.ones(8))},
    ),
    "mean over everything": (lambda n, x: x + n.g * x.mean(),
                             {"g": lambda: nn.Parameter(torch.ones(8))}),
    "unflatten": (lambda n, x: (torch.unflatten(x, 1, (2, 4)) * 1).flatten(1), {}),
    "split": (lambda n, x: torch.cat([*map(F.relu, torch.split(x, [3, 5], 1))][::-1], 1), {}),
    "tensor split": (lambda n, x: torch.cat(x.tensor_split(3, 1), 1), {}),
    "narrow": (lambda n, x: torch.cat([x.narrow(1, 2, 6), x.narrow(1, 0, 2)], 1), {}),
    "view as": (lambda n, x: x.view(-1, 2, 4).mul(1).reshape_as(x), {}),
    "expand": (lambda n, x: x * n.s.expand(8), {"s": lambda: nn.Parameter(torch.ones(1))}),
    "expand as": (lambda n, x: x * n.s.expand_as(x), {"s": lambda: nn.Parameter(torch.ones(1))}),
    "made by size": (lambda n, x: x + x.new_zeros(x.shape[0], 8), {}),
    "repeat": (lambda n, x: x[:, :4].repeat(1, 2), {}),
    "repeat each": (lambda n, x: x[:, :4].repeat_interleave(2, 1), {}),
    "flip": (lambda n, x: x.flip(1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_between_two_linear_layers(name: str) -> None:
    between, parts = BETWEEN[name]
    made = {k: v() for k, v in parts.items()}
    net = Net(lambda n, x: n.c(between(n, n.a(x))), a=nn.Linear(6, 8), c=nn.Linear(8, 4), **made)
    _exact(net.double(), rows().double())


def _exact(net: nn.Module, x: Any, ratios: tuple[float, ...] = (0.5, 0.2)) -> None:
    """Something is removed, and the graph form equals the masked model."""
    randomized(net)
    graph = sc.trace(net, x)
    assert units_of(graph)
    for ratio in ratios:
        plan = plan_of(net, graph, ratio)
        found = info_of(sc.shrink(net, plan, x, form="graph")).verification
        assert plan.n_removed
        assert found.changed > 0
        assert found.dtype == "float64"
        assert found.error < 1e-12


IMAGES: dict[str, tuple[Forward, dict[str, Callable[[], Any]]]] = {
    "group norm": (lambda n, f: n.n(f), {"n": lambda: nn.GroupNorm(4, 8)}),
    "one group": (lambda n, f: n.n(f), {"n": lambda: nn.GroupNorm(1, 8)}),
    "grouped": (lambda n, f: n.b(f), {"b": lambda: nn.Conv2d(8, 8, 3, groups=4)}),
    "depthwise transposed": (lambda n, f: n.b(f),
                             {"b": lambda: nn.ConvTranspose2d(8, 8, 3, groups=8)}),
    "pixel shuffle": (lambda n, f: n.b(F.pixel_shuffle(f, 2)), {"b": lambda: nn.Conv2d(2, 8, 1)}),
    "pixel unshuffle": (lambda n, f: n.b(F.pixel_unshuffle(f, 2)),
                        {"b": lambda: nn.Conv2d(32, 8, 1)}),
    "channel shuffle": (lambda n, f: n.b(F.channel_shuffle(f, 2)),
                        {"b": lambda: nn.Conv2d(8, 8, 1)}),
    "channels last norm": (lambda n, f: n.n(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                           {"n": lambda: nn.LayerNorm(8)}),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_between_two_convolutions(name: str) -> None:
    between, parts = IMAGES[name]
    made = {k: v() for k, v in parts.items()}
    net = Net(lambda n, x: n.h(between(n, n.a(x)).mean((2, 3))), a=nn.Conv2d(3, 8, 3, padding=1),
              h=nn.Linear(8, 4), **made)  # fmt: skip
    _exact(net.double(), image().double())


ATTENTION: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "fused projection": lambda n, x: F.scaled_dot_product_attention(
        *n.p(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    ).transpose(1, 2).reshape(2, 5, 8),
    "module": lambda n, x: n.m(n.e(x), n.e(x), n.e(x), need_weights=False)[0],
    "module with weights": lambda n, x: n.m(n.e(x), n.e(x), n.e(x))[0],
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    net = Net(
        lambda n, x: n.h(ATTENTION[name](n, x)), p=nn.Linear(4, 24), e=nn.Linear(4, 8),
        m=nn.MultiheadAttention(8, 2, batch_first=True), h=nn.Linear(8, 3),
    )  # fmt: skip
    _exact(net.double(), sequence().double())


def test_positions_in_the_head_that_all_heads_lose() -> None:
    """The scale of the dense head size is written down."""
    net = Net(
        lambda n, x: n.h(ATTENTION["fused projection"](n, x)), p=nn.Linear(4, 24),
        h=nn.Linear(8, 3),
    ).double()  # fmt: skip
    x = sequence().double()
    randomized(net)
    graph = sc.trace(net, x, heads="head_dim")
    plan = plan_of(net, graph, 0.5)
    info = info_of(sc.shrink(net, plan, x, form="graph"))
    assert info.verification.error < 1e-12
    assert info.verification.changed > 0
