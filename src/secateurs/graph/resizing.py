"""How sizes, shapes and parts follow a cut: views, splits, slices, padding, shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from secateurs.graph.calls import (
    Arguments,
    BoolArray,
    Call,
    CannotRewrite,
    Known,
    SizeOf,
    grouped,
    handler,
    size_left,
)

__all__: list[str] = []

aten = torch.ops.aten


# -- sizes ---------------------------------------------------------------------------------


@handler(
    "view", "reshape", "_unsafe_view", "expand", "zeros", "ones", "full", "empty", "rand", "randn",
    "new_zeros", "new_ones", "new_full", "new_empty",
)  # fmt: skip
def _sizes(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Operators that take the sizes of their output as a list."""
    name = "shape" if "shape" in a else "size"
    if not isinstance(a.get(name), (list, tuple)):
        return None
    old = list(a[name])
    new = [size_left(size, known.keep(outs[0], d)) for d, size in enumerate(old)]
    return None if new == old else {**a, name: new}


@handler("view_as", "reshape_as", "expand_as")
def _like(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
    """Explicit sizes, unless the template loses the same as the output."""
    other, out = a["other"], outs[0]
    rank = len(known.shape(out))
    pairs = [(known.keep(out, d), known.keep(other, d)) for d in range(rank)]
    if all(_equal(x, y) for x, y in pairs):
        return None
    sizes: list[Any] = []
    for d, (mine, theirs) in enumerate(pairs):
        plain = mine is None and theirs is None
        dense = known.shape(out)[d]
        sizes.append(SizeOf(other, d) if plain else dense if mine is None else int(mine.sum()))
    return Call(aten.expand.default if _expands(a, known) else aten.reshape.default,
                (a["self"], sizes))  # fmt: skip


def _expands(a: Arguments, known: Known) -> bool:
    return prod(known.shape(a["self"])) != prod(known.shape(a["other"]))


def _equal(a: BoolArray | None, b: BoolArray | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


@handler("unflatten")
def _unflatten(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    first = a["dim"] % len(known.shape(a["self"]))
    old = list(a["sizes"])
    new = [size_left(size, known.keep(outs[0], first + i)) for i, size in enumerate(old)]
    return None if new == old else {**a, "sizes": new}


@handler("repeat", "tile")
def _repeat(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Whole copies may go; what is inside a copy follows the input."""
    name = "repeats" if "repeats" in a else "dims"
    old = list(a[name])
    shape, out = known.shape(a["self"]), outs[0]
    rank = len(known.shape(out))
    lead = rank - len(old)  # tile may name fewer than there are
    new = list(old)
    for i in range(len(old)):
        d = lead + i
        keep, at = known.keep(out, d), d - (rank - len(shape))
        if keep is None:
            continue
        inside = known.keep(a["self"], at) if at >= 0 else None
        copies = keep.reshape(-1, shape[at] if at >= 0 else 1)
        new[i] = _copies(old[i], copies, inside)
    return None if new == old else {**a, name: new}


def _copies(number: Any, copies: BoolArray, inside: BoolArray | None) -> Any:
    """How many copies (rows of a mask) stay, if each is the input as it is left."""
    whole = np.asarray(copies.any(axis=1), dtype=np.bool_)
    pattern = np.ones(copies.shape[1], dtype=np.bool_) if inside is None else inside
    if not (copies[whole] == pattern).all():
        raise CannotRewrite("its copies lose different entries")
    return number if whole.all() else size_left(number, whole)


@handler("repeat_interleave")
def _interleave(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    if not isinstance(a.get("repeats"), int) or a["dim"] is None:
        return None
    shape = known.shape(a["self"])
    d = a["dim"] % len(shape)
    keep = known.keep(outs[0], d)
    if keep is None:
        return None
    copies = keep.reshape(shape[d], -1).T
    repeats = _copies(a["repeats"], copies, known.keep(a["self"], d))
    return {**a, "repeats": repeats, "output_size": None}


# -- parts ---------------------------------------------------------------------------------


@handler(
    "chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes",
)  # fmt: skip
def _split(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
    """By the number of positions left in each part."""
    if known.keep(a["self"], a["dim"]) is None:
        return None
    d = a["dim"] % len(known.shape(a["self"]))
    kept = [known.keep(out, d) for out in outs]
    counts = [
        known.shape(out)[d] if keep is None else int(keep.sum())
        for out, keep in zip(outs, kept, strict=True)
    ]
    return Call(aten.split_with_sizes.default, (a["self"], counts, d))


@handler("unbind")
def _unbind(a: Arguments, outs: Sequence[Any], known: Known) -> None:
    if known.keep(a["self"], a["dim"]) is not None:
        raise CannotRewrite("it would return fewer tensors")


@handler("slice", "slice_scatter", "narrow", "select", "select_scatter")
def _bounds(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """An index becomes the number of positions kept before it."""
    keep = known.keep(a["self"], a["dim"])
    if keep is None:
        return None
    if a.get("step", 1) != 1:
        raise CannotRewrite("it is sliced with a step")
    if "length" in a:
        _whole(a["start"], a["length"])
        start = a["start"] % len(keep) if a["start"] < 0 else a["start"]
        end = start + a["length"]
        return {**a, "start": _before(start, keep), "length": int(keep[start:end].sum())}
    if "index" in a:
        _whole(a["index"])
        at = a["index"] % len(keep)
        if not keep[at]:
            raise CannotRewrite(f"its index {at} was removed")
        return {**a, "index": int(keep[:at].sum())}
    bounds = {k: a[k] for k in ("start", "end") if a[k] is not None}
    _whole(*bounds.values())
    return {**a, **{k: _before(v, keep) for k, v in bounds.items()}}


def _whole(*bounds: Any) -> None:
    if not all(isinstance(b, int) for b in bounds):
        raise CannotRewrite("its bounds are computed at run time")


def _before(bound: int, keep: BoolArray) -> int:
    """Positions kept before a bound, which may be negative or too large."""
    bound = max(0, bound + len(keep)) if bound < 0 else min(bound, len(keep))
    return int(keep[:bound].sum())


@handler("squeeze")
def _squeeze(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
    """Name the dimensions that are squeezed: one that has shrunk to a single unit stays."""
    shape = known.shape(a["self"])
    given = np.atleast_1d(np.asarray(a["dim"] if "dim" in a else range(len(shape))))
    dims = [int(d) % max(1, len(shape)) for d in given]
    if all(known.keep(a["self"], d) is None for d in dims):
        return None
    return Call(aten.squeeze.dims, (a["self"], [d for d in dims if shape[d] == 1]))


@handler("pad", "constant_pad_nd")
def _pad(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Padding adds what stays of it; cropping takes off fewer."""
    rank = len(known.shape(a["self"]))
    new = list(a["pad"])
    for i, amount in enumerate(new):
        dim = rank - 1 - i // 2
        keep = known.keep(a["self"], dim)
        made = known.keep(outs[0], dim)
        if (keep is None and made is None) or (isinstance(amount, int) and amount == 0):
            continue
        _whole(amount)
        if a.get("mode", "constant") != "constant":
            raise CannotRewrite(f"padding by {a['mode']} copies entries")
        if amount > 0 and made is not None:
            new[i] = int((made[:amount] if i % 2 == 0 else made[-amount:]).sum())
        elif amount < 0 and keep is not None:
            gone = keep[:-amount] if i % 2 == 0 else keep[amount:]
            new[i] = -int(gone.sum())
    return None if new == list(a["pad"]) else {**a, "pad": new}


@handler("channel_shuffle", "native_channel_shuffle")
def _shuffle(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Whole groups may go, or the same channels of every group."""
    keep = known.keep(a["self"], 1)
    if keep is None:
        return None
    return {**a, "groups": grouped(keep, a["groups"])}
