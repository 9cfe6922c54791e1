"""Cutting and moving commute, or the check says where they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.graph.calls import HANDLERS
from secateurs.graph.commute import MOVES, failing_moves
from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, Tape, Value
from secateurs.graph.tape import operator_facts
from tests.graph.nets import Net, plan_of, randomized, rows

aten = torch.ops.aten


def labelled(fn: Any, shape: tuple[int, ...], dim: int, *args: Any, **kwargs: Any) -> Labels:
    """A tape of one operator, with labels 1, 2, ... along a dimension, where they land."""
    positions = torch.arange(1, shape[dim] + 1, dtype=torch.float64)
    spread = positions.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
    result = fn(spread.contiguous(), *args, **kwargs)
    outs = list(result) if isinstance(result, (list, tuple)) else [result]
    values = [Value(0, shape, torch.float64, "input", "x")]
    values += [Value(i + 1, tuple(t.shape), t.dtype, "op", "y") for i, t in enumerate(outs)]
    op = operator_facts(fn)[0]
    record = Record(op, fn, (Ref(0), *args), kwargs, tuple(range(1, len(values))), name=op)
    labels = Labels(Tape(values, [record], (), "test"))
    labels.n_atoms = shape[dim] + 1
    labels.state[0] = (Factor((dim,), np.arange(1, shape[dim] + 1), True),)
    for i, out in enumerate(outs):
        vary = [d for d in range(out.dim()) if bool((out != out.narrow(d, 0, 1)).any())]
        corner = out[tuple(slice(None) if d in vary else 0 for d in range(out.dim()))]
        if vary:
            block = corner.long().contiguous().numpy()
            labels.state[i + 1] = (Factor(tuple(vary), block, True),)
    return labels


def fails(labels: Labels, *gone: int) -> str:
    """What the check says when these atoms go; empty if nothing."""
    removed = np.zeros(labels.n_atoms, dtype=np.bool_)
    removed[list(gone)] = True
    found = failing_moves(labels, removed)
    assert all(record is labels.tape.records[0] for record, _ in found)
    return found[0][1] if found else ""


MOVING: dict[str, tuple[Any, ...]] = {
    "view": (aten.view.default, (2, 4), 1, [2, 2, 2]),
    "merge": (aten.reshape.default, (2, 3, 4), 1, [2, 12]),
    "transpose": (aten.transpose.int, (2, 4), 1, 0, 1),
    "split": (aten.split.Tensor, (2, 4), 1, 2, 1),
    "narrow": (aten.narrow.default, (2, 4), 1, 1, 1, 3),
    "flip": (aten.flip.default, (2, 4), 1, [1]),
    "unshuffle": (aten.pixel_unshuffle.default, (2, 3, 4, 4), 1, 2),
    "crop": (aten.constant_pad_nd.default, (2, 4), 1, [-1, -1]),
    "repeat": (aten.repeat.default, (2, 4), 1, [1, 3]),
}


@pytest.mark.parametrize("name", MOVING)
def test_what_commutes(name: str) -> None:
    fn, shape, dim, *args = MOVING[name]
    labels = labelled(fn, shape, dim, *args)
    assert labels.tape.records[0].op in MOVES
    assert not fails(labels)
    assert not fails(labels, 1, 3) or name in ("crop", "view")
    assert not fails(labels, 1, 2) or name == "crop"


def test_a_crop_is_rewritten_and_fails_without(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = labelled(aten.constant_pad_nd.default, (2, 5), 1, [-1, -1])
    assert not fails(labels, 1, 3)
    monkeypatch.delitem(HANDLERS, "constant_pad_nd")
    assert fails(labels, 1, 3) == "it returns shape (2, 1) instead of (2, 2)"


def test_a_shuffle_of_channels() -> None:
    labels = labelled(aten.native_channel_shuffle.default, (2, 4, 1, 1), 1, 2)
    assert not fails(labels, 1, 3)  # the same channel of both groups
    assert not fails(labels, 1, 2)  # a group
    assert "different numbers" in fails(labels, 1)


def test_a_shuffle_without_its_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = labelled(aten.native_channel_shuffle.default, (2, 6, 1, 1), 1, 2)
    monkeypatch.delitem(HANDLERS, "native_channel_shuffle")
    assert fails(labels, 1, 2) == "entries land in other places"


def test_a_roll_does_not_commute() -> None:
    labels = labelled(aten.roll.default, (2, 4), 1, [1], [1])
    assert fails(labels, 2) == ""  # by chance
    assert fails(labels, 4) == "entries land in other places"


def test_what_is_no_product_does_not_commute() -> None:
    labels = labelled(aten.view.default, (2, 4), 1, [2, 2, 2])
    assert "does not run" in fails(labels, 1)


def test_a_wrong_rewriting_is_refused_by_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(
        lambda n, x: n.c(torch.cat([n.a(x).narrow(1, 4, 4), n.a(x).narrow(1, 0, 4)], 1)),
        a=nn.Linear(6, 8), c=nn.Linear(8, 4),
    )  # fmt: skip
    randomized(net)
    plan = plan_of(net, sc.trace(net, rows()), 0.5)
    monkeypatch.delitem(HANDLERS, "narrow")
    with pytest.raises(sc.PruningError, match=r"does not commute with narrow \("):
        sc.shrink(net, plan, rows(), form="graph")
