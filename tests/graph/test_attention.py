"""Attention in the forms in which people write it: what the units are, by default and by wish."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.law import proven, why
from tests.graph.nets import Net, sequence

DIM, HEADS, SIZE = 12, 3, 4
BIAS = torch.linspace(-1, 1, HEADS * 25).view(HEADS, 5, 5).double()
WHERE = torch.linspace(-1, 1, 50).view(5, 5, 2).double()
MODULE, GRAPH = ("module", "graph"), ("graph",)
Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """(batch, steps, heads * size) -> (batch, heads, steps, size)."""
    found: Tensor = torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)
    return found


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def by_softmax(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT / math.sqrt(SIZE), -1) @ v


def fused(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def separate(attend: Attend, heads: int = HEADS, kv: int = HEADS, **parts: Any) -> nn.Module:
    """Three linear layers, `attend` on (batch, heads, steps, size), a linear layer to 3."""

    def forward(n: Any, x: Tensor) -> Tensor:
        q, k, v = split(n.q(x), heads), split(n.k(x), kv), split(n.v(x), kv)
        y: Tensor = n.o(joined(attend(n, q, k, v)))
        return y

    size = SIZE
    return Net(
        forward, q=nn.Linear(4, heads * size), k=nn.Linear(4, kv * size),
        v=nn.Linear(4, kv * size), o=nn.Linear(heads * size, 3), **parts,
    )  # fmt: skip


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def angles(steps: int) -> Tensor:
    return torch.arange(steps)[:, None] * torch.tensor([1.0, 0.1]).double()


def rope_halves(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angle = angles(q.shape[2]).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    return fused(n, rotated(q, cos, sin), rotated(k, cos, sin), v)


def rope_pairs(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angle = angles(q.shape[2])
    cos, sin = angle.cos(), angle.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    return fused(n, turned(q), turned(k), v)


def alibi(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A slope for each head."""
    steps = torch.arange(q.shape[2])
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    bias = -slopes[:, None, None] * (steps[None] - steps[:, None]).abs()
    return F.softmax(q @ k.mT + bias, -1) @ v


def table(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A learned bias for each head and distance."""
    steps = torch.arange(q.shape[2])
    bias = n.table[(steps[None] - steps[:, None]) + 4].permute(2, 0, 1)
    return F.softmax(q @ k.mT + bias, -1) @ v


def cosine(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * n.scale, -1) @ v


def normed(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_softmax(n, n.nq(q), n.nk(k), v)


def linear(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhse,bhsv->bhev", k, v)
    return torch.einsum("bhle,bhev->bhlv", q, state)


def masked(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.zeros(5, 5).double().fill_diagonal_(1.0))


def causal(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(torch.ones(5, 5).tril() == 0, -torch.inf)
    return F.softmax(scores, -1) @ v


ATTEND: dict[str, tuple[Attend, dict[str, Callable[[], Any]]]] = {
    "softmax": (by_softmax, {}),
    "fused": (fused, {}),
    "causal": (lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), {}),
    "causal by hand": (causal, {}),
    "with a mask": (masked, {}),
    "rotary, halves": (rope_halves, {}),
    "rotary, pairs": (rope_pairs, {}),
    "slopes": (alibi, {}),
    "relative table": (table, {"table": lambda: nn.Parameter(torch.randn(9, HEADS))}),
    "cosine": (cosine, {"scale": lambda: nn.Parameter(torch.ones(HEADS, 1, 1))}),
    "normed queries": (
        normed, {"nq": lambda: nn.LayerNorm(SIZE), "nk": lambda: nn.LayerNorm(SIZE)}),
    "root-mean-square queries": (
        normed, {"nq": lambda: nn.RMSNorm(SIZE), "nk": lambda: nn.RMSNorm(SIZE)}),
    "linear": (linear, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTEND)
def test_heads_are_units(name: str) -> None:
    attend, parts = ATTEND[name]
    net = separate(attend, **{k: make() for k, make in parts.items()})
    proven(net, sequence(), {"q:head": HEADS}, forms=GRAPH)


POSITIONS: dict[str, dict[str, int]] = {
    "softmax": {"q:head_dim": 4, "v:head_dim": 4},
    "fused": {"q:head_dim": 4, "v:head_dim": 4},
    "rotary, halves": {"q:head_dim": 2, "v:head_dim": 4},
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_in_a_head_are_units_by_wish(name: str) -> None:
    attend, parts = ATTEND[name]
    net = separate(attend, **{k: make() for k, make in parts.items()})
    proven(net, sequence(), POSITIONS[name], forms=GRAPH, heads="head_dim")


# -- queries that share keys and values --------------------------------------------------------


def spread(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(n, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def expanded(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def again(x: Tensor) -> Tensor:
        b, h, t, e = x.shape
        return x[:, :, None].expand(b, h, 2, t, e).reshape(b, 2 * h, t, e)

    return fused(n, q, again(k), again(v))


def enabled(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("attend", [spread, expanded, enabled])
def test_groups_of_queries(attend: Attend) -> None:
    """Six heads of queries, three of keys and values: three units of two and one."""
    graph = proven(separate(attend, heads=6, kv=3), sequence(), {"q:kv_group": 3}, forms=GRAPH)
    members = {(m.tensor, m.dim): len(m.index) for m in graph.groups()[0].members}
    assert members["q.weight", 0] == 6 * SIZE
    assert members["k.weight", 0] == members["v.weight", 0] == 3 * SIZE


# -- queries, keys and values from one layer --------------------------------------------------


def by_unbind(x: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = (
        torch.unflatten(x, -1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    return found


def by_select(x: Tensor) -> tuple[Tensor, ...]:
    y = x.view(x.shape[0], x.shape[1], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
    return y[0], y[1], y[2]


def by_chunk(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(split(y) for y in x.chunk(3, -1))


def by_split(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(split(y) for y in torch.split(x, DIM, -1))


def heads_first(x: Tensor) -> tuple[Tensor, ...]:
    """(heads, 3, size): as some models store them."""
    y = x.view(x.shape[0], x.shape[1], HEADS, 3, SIZE)
    return tuple(z.transpose(1, 2) for z in y.unbind(3))


def heads_and_all(x: Tensor) -> tuple[Tensor, ...]:
    """(heads, 3 * size), taken apart at the end."""
    return tuple(split(x, HEADS).chunk(3, -1))


@pytest.mark.parametrize(
    "parts", [by_unbind, by_select, by_chunk, by_split, heads_first, heads_and_all]
)
def test_one_layer_for_all_three(parts: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    net = Net(
        lambda n, x: n.o(joined(fused(n, *parts(n.qkv(x))))),
        qkv=nn.Linear(4, 3 * DIM), o=nn.Linear(DIM, 3),
    )  # fmt: skip
    graph = proven(net, sequence(), {"qkv:head": HEADS}, forms=GRAPH)
    (target,) = graph.groups()
    rows = next(m for m in target.members if (m.tensor, m.dim) == ("qkv.weight", 0))
    assert [int((rows.unit == u).sum()) for u in range(HEADS)] == [3 * SIZE] * HEADS


# -- layers of torch -------------------------------------------------------------------------


def test_multihead_attention() -> None:
    """The input is fixed, so the heads alone can go."""
    net = Net(
        lambda n, x: n.h(n.m(x, x, x, need_weights=False)[0].mean(1)),
        m=nn.MultiheadAttention(4, 2, batch_first=True), h=nn.Linear(4, 2),
    )  # fmt: skip
    proven(net, sequence(), {"m:head": 2, "m.out_proj:neuron": 4}, forms=GRAPH)


def test_weights_that_nobody_reads_do_not_pin() -> None:
    net = Net(
        lambda n, x: n.h(n.m(x, x, x)[0].mean(1)),
        m=nn.MultiheadAttention(4, 2, batch_first=True), h=nn.Linear(4, 2),
    )  # fmt: skip
    proven(net, sequence(), {"m:head": 2, "m.out_proj:neuron": 4}, forms=GRAPH)


def test_an_encoder_layer() -> None:
    net = Net(
        lambda n, x: n.h(n.m(n.e(x)).mean(1)),
        e=nn.Linear(4, 8), m=nn.TransformerEncoderLayer(8, 2, 6, batch_first=True),
        h=nn.Linear(8, 2),
    )  # fmt: skip
    units = {"e:embedding": 8, "m.self_attn:head": 2, "m.linear1:neuron": 6}
    proven(net, sequence(), units, forms=GRAPH)


# -- what stays -------------------------------------------------------------------------------


def test_steps_that_units_make() -> None:
    """A softmax over keys that are units of a mixing layer."""
    net = Net(
        lambda n, x: n.o(F.scaled_dot_product_attention(x, n.a(x.mT).mT, n.b(x.mT).mT)),
        a=nn.Linear(5, 6), b=nn.Linear(5, 6), o=nn.Linear(4, 3),
    )  # fmt: skip
    graph = proven(net, sequence(), {})
    assert "a softmax runs over it" in why(graph, "a:neuron")


def test_a_mask_that_tells_heads_apart() -> None:
    """A fixed bias for each head pins the heads."""
    net = separate(lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS))
    graph = proven(net, sequence(), {})
    assert "it meets a tensor whose entries cannot be removed" in why(graph, "q:neuron")


def test_a_mask_made_by_a_layer_goes_with_the_heads() -> None:
    def attend(n: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = n.b(WHERE).permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, bias)

    net = separate(attend, b=nn.Linear(2, HEADS))
    proven(net, sequence(), {"q:head": HEADS}, forms=GRAPH)
