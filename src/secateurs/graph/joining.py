"""Rules for operators that join, pad, pool or resize."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import rule, unknown, without

__all__: list[str] = []

POOL = {
    f"{kind}{n}d": n
    for n in (1, 2, 3)
    for kind in (
        "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool",
        "fractional_max_pool", "max_unpool",
    )
} | {
    "max_pool1d_with_indices": 1,
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "_adaptive_avg_pool2d": 2,
    "_adaptive_avg_pool3d": 3,
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
    "_upsample_nearest_exact3d": 3,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
    "reflection_pad1d": 1,
    "reflection_pad2d": 2,
    "reflection_pad3d": 3,
    "replication_pad1d": 1,
    "replication_pad2d": 2,
    "replication_pad3d": 3,
    "grid_sampler": 2,
    "grid_sampler_2d": 2,
    "grid_sampler_3d": 3,
}  # fmt: skip
"""Operators over the last dimensions -> how many of these."""


STACKS = {"hstack": 1, "vstack": 0, "dstack": 2, "row_stack": 0, "column_stack": 1}


@rule("cat", "concat", "concatenate", *STACKS)
def _cat(labels: Labels, record: Record) -> None:
    parts = [p for p in refs(record.args[0]) if labels.value(p).shape != (0,)]
    out = record.outputs[0]
    rank = len(labels.value(out).shape)
    given = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)
    dim = STACKS.get(record.op, given) % rank
    if any(len(labels.value(p).shape) < rank for p in parts):
        unknown(labels, record, f"{record.op} of tensors with fewer dimensions has no rule")
        return
    result = []
    joined = _joined(labels, parts, dim)
    if joined is not None:
        if len(joined.dims) > 1:
            labels.oblige(joined.labels)
        result.append(joined)
    result += _together(labels, parts, record, skip=dim)
    labels.assign(out, result)


def _joined(labels: Labels, parts: list[Ref], dim: int) -> Factor | None:
    """The labels along the joined dimension; entries of a part without labels are pinned."""
    along = [labels.on(p, dim) for p in parts]
    joint = {f.dims for f in along if f is not None}
    if len(joint) > 1 or (None in along and joint != {(dim,)}):
        for p in parts:  # heads can stay whole only if the parts agree
            if labels.options.heads == "head":
                labels.drop(p, {dim})
            else:
                labels.single(p, dim)
        along = [labels.on(p, dim) for p in parts]
    known = [f for f in along if f is not None]
    if not known:
        return None
    at = known[0].dims.index(dim)
    pieces = [
        f.labels if f is not None else np.zeros(labels.value(p).shape[dim], dtype=np.int64)
        for p, f in zip(parts, along, strict=True)
    ]
    for f in known:
        labels.pass_on(f.labels)
    producers = frozenset().union(*(f.producers for f in known))
    block = np.concatenate(pieces, axis=at)
    return Factor(known[0].dims, block, all(f.z for f in known), producers)


@rule("stack")
def _stack(labels: Labels, record: Record) -> None:
    parts = list(refs(record.args[0]))
    out = record.outputs[0]
    dim = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)
    dim %= len(labels.value(out).shape)
    shared = _together(labels, parts, record, skip=None)
    moved = [replace(f, dims=tuple(d + (d >= dim) for d in f.dims)) for f in shared]
    labels.assign(out, moved)


def _together(labels: Labels, parts: list[Ref], record: Record, skip: int | None) -> list[Factor]:
    """Factors on the dims that joined tensors share: tied, or pinned where one has none."""
    _agree(labels, parts)
    blocks = {f.dims: None for p in parts for f in labels.factors(p) if skip not in f.dims}
    result: list[Factor] = []
    for dims in blocks:
        have = [f for p in parts for f in labels.factors(p) if f.dims == dims]
        if len(have) < len(parts) or any(set(dims) & set(f.dims) for f in result):
            for f in have:
                labels.pin(f.labels, "it is joined with a tensor that is fixed", record.where)
            continue
        for other in have[1:]:
            labels.tie(have[0].labels, other.labels, "joined tensors differ", record.where)
        labels.pass_on(have[0].labels)
        producers = frozenset().union(*(f.producers for f in have))
        result.append(Factor(dims, have[0].labels, all(f.z for f in have), producers))
    return result


def _agree(labels: Labels, parts: list[Ref]) -> None:
    """Where one part carries labels on some dims of another's joint factor only, keep those."""
    for p in parts:
        for f in [f for f in labels.factors(p) if len(f.dims) > 1]:
            others = [{d for g in labels.factors(q) for d in g.dims} for q in parts if q is not p]
            exact = all(any(g.dims == f.dims for g in labels.factors(q)) for q in parts)
            shared = [d for d in f.dims if all(d in o for o in others)]
            if not exact and shared and len(shared) < len(f.dims):
                labels.drop(p, set(f.dims) - set(shared))


@rule("pad", "constant_pad_nd")
def _pad(labels: Labels, record: Record) -> None:
    """Zeros beside prunable entries are entries made by size: the padding follows the cut."""
    x, pads = record.args[0], record.args[1]
    mode, fill = _filling(record)
    out = labels.value(record.outputs[0])
    rank = len(out.shape)
    amount = {rank - 1 - i // 2: tuple(pads[i : i + 2]) for i in range(0, len(pads), 2)}
    padded = {d for d, sides in amount.items() if any(sides)}
    zero = mode != "constant" or not fill  # reflections copy zeros, constants may not be zero
    labels.drop(x, padded)
    kept = []
    for f in labels.factors(x):
        if not padded & set(f.dims):
            kept.append(replace(f, z=f.z and zero))
        elif mode == "constant" and min(amount[f.dims[0]]) >= 0:
            dim = f.dims[0]
            left, right = (
                labels.fresh_entries(out, dim, n, z=zero).labels if n else np.zeros(0, np.int64)
                for n in amount[dim]
            )
            block = np.concatenate([left, f.labels, right])
            kept.append(Factor(f.dims, block, f.z and zero, f.producers))
        else:
            labels.pin(f.labels, "its dimension is padded or cropped", record.where)
    labels.assign(record.outputs[0], kept)


def _filling(record: Record) -> tuple[str, float]:
    """How a padding fills, and with what."""
    if record.op == "constant_pad_nd":
        return "constant", record.args[2] if len(record.args) > 2 else 0.0
    mode = record.args[2] if len(record.args) > 2 else record.kwargs.get("mode", "constant")
    value = record.args[3] if len(record.args) > 3 else record.kwargs.get("value")
    return mode, value or 0.0


@rule(*POOL)
def _pool(labels: Labels, record: Record) -> None:
    x = next(refs(record.args))
    rank = len(labels.value(x).shape)
    pooled = set(range(rank - POOL[record.op], rank))
    kept = without(labels, x, pooled, "its dimension is pooled", record)
    if record.op.startswith("max_unpool"):
        kept = _unpooled(labels, record, kept, pooled)
    labels.assign(record.outputs[0], kept)
    for where in record.outputs[1:]:  # the positions of maxima are not zero
        labels.assign(where, [replace(f, z=False) for f in kept])


@rule("glu")
def _glu(labels: Labels, record: Record) -> None:
    """The first half times the sigmoid of the second: an entry of each is one unit."""
    x = record.args[0]
    rank = len(labels.value(x).shape)
    dim = int(record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", -1)) % rank
    halves = labels.single(x, dim)
    kept = [f for f in labels.factors(x) if dim not in f.dims]
    if halves is not None:
        first, second = halves.labels.reshape(2, -1)
        labels.tie(first, second, "the other half of a gated unit is fixed", record.where)
        kept.append(replace(halves, labels=first))
    labels.assign(record.outputs[0], kept)


def _unpooled(labels: Labels, record: Record, kept: list[Factor], pooled: set[int]) -> list[Factor]:
    """Entries go where a tensor of positions says, which must lose the same channels."""
    places = list(refs(record.args))[1]
    own = {f.dims: f for f in without(labels, places, pooled, "its dimension is pooled", record)}
    for f in kept:
        if f.dims in own:
            why = "its positions come from elsewhere"
            labels.tie(f.labels, own[f.dims].labels, why, record.where)
        else:
            labels.pin(f.labels, "its positions come from elsewhere", record.where)
    return [f for f in kept if f.dims in own]
