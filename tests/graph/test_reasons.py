"""Every reason that the engine can give is provoked by a small network.

The reasons are collected from the source, so that a new one without a network here fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import secateurs as sc
from secateurs.types import Inputs
from tests.graph.nets import Net, randomized, rows, sequence

ROOM = Path(sc.__file__).parent / "graph"
PLACE = {"pin": 1, "tie": 2, "unknown": 2, "without": 3, "Pin": 1}
"""Function -> position of the reason among its arguments."""


# -- the reasons in the source -----------------------------------------------------------------


def reasons_of(source: dict[str, str]) -> dict[str, str]:
    """Regular expression of every reason -> where it is given."""
    trees = {name: ast.parse(text) for name, text in source.items()}
    constants: dict[str, list[ast.expr]] = {}  # upper case: imported from one another
    locals_: dict[str, dict[str, list[ast.expr]]] = {name: {} for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            for key, value in _pairs(node) if isinstance(node, ast.Assign) else ():
                (constants if key.isupper() else locals_[name]).setdefault(key, []).append(value)
    found: dict[str, str] = {}
    for name, tree in trees.items():
        named = {**constants, **locals_[name]}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (given := _reason(node)) is not None:
                for text in _texts(given, named):
                    found.setdefault(text, f"{name}:{node.lineno}")
    return found


def _pairs(node: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
    """Names and what is assigned to them."""
    for target in node.targets:
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for t, v in zip(target.elts, node.value.elts, strict=True):
                if isinstance(t, ast.Name):
                    yield t.id, v


def _reason(call: ast.Call) -> ast.expr | None:
    """The argument that is a reason, if the function takes one."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in PLACE or len(call.args) <= PLACE[name]:
        return None
    return call.args[PLACE[name]]


def _texts(node: ast.expr, named: dict[str, list[ast.expr]], depth: int = 0) -> Iterator[str]:
    """Regular expressions of the texts that an expression may have."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield re.escape(node.value)
    elif isinstance(node, ast.JoinedStr):
        parts = [
            re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".+" for p in node.values
        ]
        yield "".join(parts)
    elif isinstance(node, (ast.IfExp, ast.BoolOp)):
        branches = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
        for branch in branches:
            yield from _texts(branch, named, depth)
    elif isinstance(node, ast.Name) and depth < 2:
        for value in named.get(node.id, []):
            yield from _texts(value, named, depth + 1)


# -- networks that provoke them ------------------------------------------------------------------

Make = Callable[[], tuple[nn.Module, Inputs]]
EIGHT = torch.linspace(-1, 1, 8)
WIDE = torch.linspace(-1, 1, 64).view(8, 8)
PLACES = torch.zeros(3, 8, 1, dtype=torch.int64)
ORDER = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])


def after(fn: Callable[[Any, Tensor], Tensor], x: Tensor | None = None, **parts: Any) -> Make:
    """linear(6, 8) - `fn` - sum over all but the batch."""
    given = rows() if x is None else x

    def make() -> tuple[nn.Module, Inputs]:
        net = Net(lambda n, x: fn(n, n.a(x)).flatten(1).sum(1), a=nn.Linear(given.shape[-1], 8),
                  **{k: v() if callable(v) and not isinstance(v, nn.Module) else v
                     for k, v in parts.items()})  # fmt: skip
        return net, given

    return make


def half(x: Tensor) -> Tensor:
    """Four units and four fixed entries side by side."""
    return torch.cat([x[..., :4], EIGHT[:4].expand(*x.shape[:-1], 4)], -1)


def most(x: Tensor) -> Tensor:
    """Six units and two fixed entries."""
    return torch.cat([x[..., :6], EIGHT[:2].expand(*x.shape[:-1], 2)], -1)


def overwritten(n: Any, x: Tensor) -> Tensor:
    x.reshape(-1, 2, 4).add_(1)
    return x


def recurrent(n: Any, x: Tensor) -> Tensor:
    weights = [WIDE[:, :4], n.w, n.b, n.b]
    start = torch.zeros(1, 2, 8)
    found: Tensor = torch.rnn_tanh(x, start, weights, True, 1, 0.0, False, False, True)[0]
    return found.sum((1, 2))


def by_expert(n: Any, x: Tensor) -> Tensor:
    ends = torch.tensor([1, 1, 2, 3], dtype=torch.int32)
    return torch._grouped_mm(x, n.w, offs=ends)


def biased(n: Any, x: Tensor) -> Tensor:
    """Eight heads of one; the bias of half of them is fixed."""
    q = x[..., None].transpose(1, 2)
    mask = half(n.m)[0][:, None, None].expand(8, 5, 5)
    return F.scaled_dot_product_attention(q, q, q, mask)


def packed(n: Any, x: Tensor) -> Tensor:
    sizes = torch.tensor([5, 3])
    return pad_packed_sequence(pack_padded_sequence(x, sizes, batch_first=True), True)[0]


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def of(net: Callable[[], nn.Module], *inputs: Any) -> Make:
    return lambda: (net(), inputs)


NETS: list[Make] = [
    after(lambda n, x: x.argmax(-1, True) * x),
    after(lambda n, x: x.softmax(-1)),
    after(lambda n, x: x[:, ::2]),
    after(lambda n, x: x.roll(2, -1)),
    after(lambda n, x: x[:, 3:4] * 2 + x),
    after(lambda n, x: x[:, ORDER]),
    after(lambda n, x: WIDE[x.long().clamp(0, 7)]),
    after(lambda n, x: torch.cdist(x, x)),
    after(lambda n, x: torch.searchsorted(EIGHT, x) + x),
    after(lambda n, x: x.gather(0, torch.zeros(3, 8).long() + ORDER * 0)),
    after(lambda n, x: x.gather(0, (ORDER * 0).expand(3, 8))),
    after(lambda n, x: half(x).gather(0, torch.zeros(3, 1).long().expand(3, 8))),
    after(lambda n, x: F.pad(x, (-1, 0))),
    after(lambda n, x: F.avg_pool1d(x, 2)),
    after(lambda n, x: x.log()),
    after(lambda n, x: x * EIGHT),
    after(lambda n, x: x * half(n.b(x)), b=lambda: nn.Linear(8, 8)),
    after(lambda n, x: F.glu(half(x), -1)),
    after(lambda n, x: torch.stack([x, half(n.b(x))]).sum(0), b=lambda: nn.Linear(8, 8)),
    after(lambda n, x: torch.stack([x, EIGHT.expand(3, 8)]).sum(0)),
    after(lambda n, x: F.prelu(x, half(n.p)), p=parameter(8)),
    after(lambda n, x: F.prelu(EIGHT.expand(3, 8), n.p) + x.sum(-1, True), p=parameter(8)),
    after(lambda n, x: F.prelu(x, EIGHT)),
    after(lambda n, x: x @ WIDE),
    after(lambda n, x: torch.sigmoid(x) @ torch.sigmoid(x).T),
    after(lambda n, x: x + torch.sigmoid(x).sum(-1, True)),
    after(lambda n, x: F.linear(x, n.w)[:, None] + x, w=parameter(8)),
    after(lambda n, x: F.linear(x, n.w + 1, EIGHT), w=parameter(8, 8)),
    after(lambda n, x: F.linear(x, n.w, half(n.v)), w=parameter(8, 8), v=parameter(8)),
    after(lambda n, x: F.linear(EIGHT.expand(3, 8), WIDE, x[0])),
    after(lambda n, x: torch.einsum("bi,ii->bi", x, n.w), w=parameter(8, 8)),
    after(lambda n, x: torch.addmm(half(n.b(x)), x, n.w), w=parameter(8, 8),
          b=lambda: nn.Linear(8, 8)),
    after(lambda n, x: F.layer_norm(x.exp(), (8,))),
    after(lambda n, x: F.layer_norm(x, (8,), EIGHT)),
    after(lambda n, x: F.layer_norm(x, (8,), half(n.s)), s=parameter(8)),
    after(lambda n, x: F.layer_norm(EIGHT.expand(3, 8), (8,), n.s) * x.sum(1, True),
          s=parameter(8)),
    after(lambda n, x: n.b(x[:, None]), b=lambda: nn.BatchNorm1d(1)),
    after(lambda n, x: F.group_norm(EIGHT.expand(3, 8), 1, n.s) * x.sum(1, True), s=parameter(8)),
    after(lambda n, x: n.b(half(x)), b=lambda: nn.GroupNorm(2, 8)),
    after(lambda n, x: F.group_norm(x, 8, EIGHT)),
    after(lambda n, x: F.linear(x, torch._weight_norm(n.v, WIDE[:, :1], 0)), v=parameter(8, 8)),
    after(lambda n, x: F.linear(x, torch._weight_norm(n.v, half(n.g.T).T, 0)), v=parameter(8, 8),
          g=parameter(8, 1)),
    after(lambda n, x: x.view(-1, 2, 4)[:, :, :3] * half(n.b(x)).view(-1, 2, 4)[:, :, :3],
          b=lambda: nn.Linear(8, 8)),
    after(lambda n, x: (x[:, :, None] * n.b(x)[:, None]).flatten(1), b=lambda: nn.Linear(8, 8)),
    after(lambda n, x: x.index_copy(0, torch.tensor([1]), EIGHT[None])),
    after(lambda n, x: x.index_put((torch.tensor([1]),), EIGHT[None])),
    after(lambda n, x: x.index_put((torch.tensor([1]),), half(n.b(x))[:1]),
          b=lambda: nn.Linear(8, 8)),
    after(lambda n, x: x.index_copy(0, torch.tensor([1]), half(n.b(x))[:1]),
          b=lambda: nn.Linear(8, 8)),
    after(lambda n, x: half(x).view(-1, 2, 4).mul(2).flatten(1)),
    after(lambda n, x: F.pixel_shuffle(most(x)[:, :, None, None], 2)),
    after(lambda n, x: F.fold(most(x)[:, :, None], (2, 2), 2)),
    after(lambda n, x: F.fold(x[:, None].expand(3, 4, 8), (2, 4), 1)),
    after(lambda n, x: F.conv1d(x[:, None], n.k), k=parameter(3, 1, 3)),
    after(lambda n, x: F.conv1d(EIGHT.expand(1, 4, 8), x[:2, :].reshape(1, 4, 4))),
    after(lambda n, x: n.g(half(x)[:, :, None]), g=lambda: nn.Conv1d(8, 8, 1, groups=2)),
    after(lambda n, x: n.g(half(x)[:, :, None]), g=lambda: nn.ConvTranspose1d(8, 8, 1, groups=2)),
    after(lambda n, x: n.g(EIGHT.expand(1, 8)[..., None]) * x.sum(),
          g=lambda: nn.Conv1d(8, 8, 1, groups=2)),
    after(lambda n, x: F.conv_transpose1d(x[..., None], n.w, EIGHT, groups=2),
          w=parameter(8, 4, 1)),
    after(lambda n, x: F.conv_transpose1d(x[..., None], n.w, half(n.v), groups=2),
          w=parameter(8, 4, 1), v=parameter(8)),
    after(lambda n, x: F.scaled_dot_product_attention(
        x.mT[..., None], x.mT[..., None], x.mT[..., None]), sequence(features=6)),
    after(biased, sequence(features=6), m=parameter(1, 8)),
    after(overwritten),
    after(by_expert, w=parameter(4, 8, 8)),
    after(lambda n, x: x.tril()),
    after(lambda n, x: x.view(torch.int32)),
    after(lambda n, x: F.max_unpool1d(x[:, None, :4], (ORDER[:4] * 2).expand(3, 1, 4), [2])),
    after(lambda n, x: F.max_unpool1d(x[..., None], PLACES, [2])),
    of(lambda: Net(recurrent, w=parameter(8, 8)(), b=parameter(8)()), sequence()),
    of(lambda: Net(lambda n, x: F.linear(x, torch._weight_norm(n.v, WIDE[:, :1], 0)).sum(1),
                   v=parameter(8, 6)()), rows()),
    of(lambda: Net(lambda n, x: F.scaled_dot_product_attention(
        x, n.a(x.mT).mT, n.b(x.mT).mT).sum((1, 2)), a=nn.Linear(5, 6), b=nn.Linear(5, 6)),
       sequence()),
    after(packed, sequence(features=6)),
    after(lambda n, x: packed(n, x.mT.expand(2, 8, 5)), sequence(features=6)),
    of(lambda: Net(lambda n, x: n.e(x), e=nn.Embedding(9, 8)), torch.tensor([[1, 2], [3, 4]])),
    of(lambda: Net(lambda n, x: F.linear(F.relu(n.e(x)), n.e.weight), e=nn.Embedding(9, 8)),
       torch.tensor([[1, 2], [3, 4]])),
    of(lambda: Net(lambda n, x, h: n.r(x, h)[0].sum((1, 2)), r=nn.GRU(4, 6, batch_first=True)),
       sequence(), torch.randn(1, 2, 6)),
    of(lambda: Net(lambda n, x: n.r(x)[0].sum((1, 2)), r=nn.GRU(4, 1, batch_first=True)),
       sequence()),
    of(lambda: Net(lambda n, x: n.r(x, half(n.a(x))).sum(1), r=nn.GRUCell(6, 8),
                   a=nn.Linear(6, 8)), rows()),
    of(lambda: Net(lambda n, x: n.a(x)[:, :3].sum(1), a=nn.Linear(6, 8),
                   u=nn.Linear(3, 3)), rows()),
    of(lambda: Net(lambda n, x: n.a(x).sum(1) + n.t.sum(), a=nn.Linear(6, 1),
                   t=nn.Parameter(EIGHT)), rows()),
]  # fmt: skip


@cache
def given() -> frozenset[str]:
    """All reasons that the networks provoke."""
    found: set[str] = set()
    for make in NETS:
        net, inputs = make()
        randomized(net)
        for norm in ("exact", "pin"):
            graph = sc.trace(net, inputs, norm=norm)
            found |= {e.reason for e in graph.excluded}
    return frozenset(found)


ELSEWHERE = {
    ".+ cannot follow a cut: .+": "test_commute",
    "the rule for .+ does not fit this call (.+)": "test_register_rule, test_labels",
    "operator .+ has no rule for this dimension": "test_register_rule, test_labels",
    "columns of a group stay while its group does": "never of all of a weight: not listed",
    "its scale is fixed": "never of all of a weight: not listed",
    "experts are chosen by their number": "never of all of a weight: not listed",
    "hidden units of the layer below": "of parts of a recurrent layer: not listed",
    "gates of one hidden unit": "of parts of a recurrent layer: not listed",
    "one size is passed on by all layers": "of parts of a recurrent layer: not listed",
    "its positions come from elsewhere": "never yet: positions without labels are not met",
    "it is unpacked": "needs units along the steps of a packed sequence",
    ".+ of tensors with fewer dimensions has no rule": "hstack and its kin",
}
"""Reasons that no network here provokes -> who does, or why none can."""

SOURCE = {path.name: path.read_text() for path in sorted(ROOM.glob("*.py"))}
REASONS = reasons_of(SOURCE)


def plain(reason: str) -> str:
    """A regular expression as people read it."""
    return reason.replace("\\", "")


@pytest.mark.parametrize("reason", sorted(r for r in REASONS if plain(r) not in ELSEWHERE))
def test_every_reason_is_provoked(reason: str) -> None:
    found = [text for text in given() if re.fullmatch(reason, text)]
    assert found, f"no network for {REASONS[reason]}: {reason}"


def test_the_list_of_others_is_not_stale() -> None:
    assert set(ELSEWHERE) <= {plain(r) for r in REASONS}


def test_reasons_are_found_in_source() -> None:
    """Constants, names, both branches of a choice, and formatted texts."""
    text = """
WHY = "a constant"
def f(labels, x, record):
    why, n = f"it is {x}", 3
    labels.pin(x, why, record.where)
    labels.tie(x, x, WHY if x else "or this")
    labels.pin(x, "", "")
"""
    found = reasons_of({"a.py": text})
    assert set(found) == {"it\\ is\\ .+", "a\\ constant", "or\\ this"}
