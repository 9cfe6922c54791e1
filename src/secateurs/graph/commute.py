"""Do cutting and moving commute? Checked on numbered positions, without running the model.

For every operator that only moves data, and a set of removed atoms, moving the whole and cutting
the result must equal cutting first and moving what is left with the rewritten call:

    op(positions)[keep] == rewritten(op)(positions[keep])

Where they differ, the labels of that operator promise something that no cut can hold. `trace` pins
them; `shrink` refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rewriting import (
    BoolArray,
    Call,
    CannotRewrite,
    Positions,
    Scaled,
    SizeOf,
    rewritten,
)
from secateurs.graph.rules import MOVE

__all__ = ["MOVES", "LabelSizes", "failing_moves", "moved", "positions"]

MOVES = MOVE | frozenset("pad constant_pad_nd tril triu".split())
"""Operators that move data or put zeros beside or over it."""


class LabelSizes:
    """What the rewriting must know of tensors, from their labels (`rewriting.Known`)."""

    def __init__(self, labels: Labels, removed: BoolArray) -> None:
        self.labels, self.removed = labels, removed

    def shape(self, tensor: Ref | int) -> tuple[int, ...]:
        return self.labels.value(tensor).shape

    def keep(self, tensor: Ref | int, dim: int) -> BoolArray | None:
        factor = self.labels.on(tensor, dim)
        if factor is None:
            return None
        at = factor.dims.index(dim % len(self.shape(tensor)))
        stays = ~self.removed[factor.labels]
        others = tuple(i for i in range(stays.ndim) if i != at)
        along = np.asarray(stays.any(axis=others), dtype=np.bool_)
        return None if along.all() else along

    def cut(self, tensor: Ref | int, value: Tensor) -> Tensor:
        """The positions of a dense value that stay."""
        for dim in range(value.dim()):
            keep = self.keep(tensor, dim)
            if keep is not None:
                index = torch.from_numpy(np.flatnonzero(keep)).to(value.device)
                value = value.index_select(dim, index)
        return value


def failing_moves(labels: Labels, removed: BoolArray) -> list[tuple[Record, str]]:
    """Records that do not commute with a removal, and what is wrong with each.

    Args:
        labels: of an interpreted tape.
        removed: (n_atoms,) True where an atom goes; whole components.
    """
    known = LabelSizes(labels, removed)
    failing = []
    for record in labels.tape.records:
        if record.op not in MOVES or not record.outputs or record.inplace:
            continue
        source = next(refs(record.args), None)
        for factor in labels.factors(source) if source is not None else ():
            assert source is not None
            if not removed[factor.labels].any():
                continue
            why = _difference(record, source, factor, known)
            if why:
                failing.append((record, why))
                break
    return failing


def _difference(record: Record, source: Ref, factor: Factor, known: LabelSizes) -> str:
    """How the two ways differ for one factor; empty if they do not."""
    numbered = positions(factor, known.shape(source))
    others = {
        ref.id: torch.zeros(1, dtype=torch.float64).expand(known.shape(ref))
        for ref in refs([record.args, record.kwargs])
    }
    dense = {**others, source.id: numbered}
    try:
        whole = moved(Call(record.fn, record.args, record.kwargs), dense)
        cut = {ident: known.cut(ident, value) for ident, value in dense.items()}
        outs = [Ref(o) for o in record.outputs]
        call = rewritten(record.op, Call(record.fn, record.args, record.kwargs), outs, known)
        small = moved(call, cut)
    except CannotRewrite as error:
        return str(error)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return f"it does not run on what is left ({str(error).strip().splitlines()[0]})"
    if len(whole) != len(small):
        return f"it returns {len(small)} tensors instead of {len(whole)}"
    for ident, a, b in zip(record.outputs, whole, small, strict=True):
        if a.dim() == b.dim():  # along what is spread without memory, one entry says it all
            for d in range(a.dim()):
                thin = a.stride(d) == 0 == b.stride(d) and a.shape[d] == b.shape[d]
                if thin and known.keep(ident, d) is None:
                    a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        expected = known.cut(ident, a)
        if expected.shape != b.shape:
            return f"it returns shape {tuple(b.shape)} instead of {tuple(expected.shape)}"
        if not torch.equal(expected, b):
            return "entries land in other places"
    return ""


def positions(factor: Factor, shape: tuple[int, ...]) -> Tensor:
    """Numbers 1, 2, ... along the dims of a factor, the same along all others (no memory)."""
    sizes = [n if d in factor.dims else 1 for d, n in enumerate(shape)]
    count = torch.arange(1, factor.labels.size + 1, dtype=torch.float64)
    return count.reshape(sizes).expand(shape)


def moved(call: Call, tensors: Mapping[int, Tensor]) -> list[Tensor]:
    """The tensors that a call makes of these."""

    def plain(x: Any) -> Any:
        if isinstance(x, Ref):
            return tensors[x.id]
        if isinstance(x, Scaled):
            return x.size * x.kept // x.dense
        if isinstance(x, SizeOf):
            return tensors[x.tensor.id].shape[x.dim]
        if isinstance(x, Positions):
            return torch.from_numpy(x.index)
        return type(x)(plain(i) for i in x) if isinstance(x, (list, tuple)) else x

    with torch.no_grad():
        args, kwargs = plain(call.args), {k: plain(v) for k, v in call.kwargs.items()}
        if str(call.fn) in ("aten.view.default", "aten._unsafe_view.default"):
            result = args[0].reshape(args[1])  # strides of the real tensor may differ
        else:
            result = call.fn(*args, **kwargs)
        for fn, more in call.after:
            result = fn(result, *plain(more))
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
