"""Rules for operators across a dimension: joining, padding, pooling, reductions, softmax."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import rule, without

__all__: list[str] = []

POOL = {
    f"{kind}{n}d": n
    for n in (1, 2, 3)
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
} | {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
}
REDUCE = "mean sum amax amin".split()


@rule("cat", "concat", "concatenate")
def _cat(labels: Labels, record: Record) -> None:
    parts = [p for p in refs(record.args[0]) if labels.value(p).shape != (0,)]
    out = record.outputs[0]
    rank = len(labels.value(out).shape)
    dim = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)
    dim %= rank
    along = [labels.single(p, dim) for p in parts]
    result = []
    if any(f is not None for f in along):
        pieces = [
            f.labels if f is not None else np.zeros(labels.value(p).shape[dim], dtype=np.int64)
            for p, f in zip(parts, along, strict=True)
        ]
        known = [f for f in along if f is not None]
        producers = frozenset().union(*(f.producers for f in known))
        joined = Factor((dim,), np.concatenate(pieces), all(f.z for f in known), producers)
        if dim in labels.value(out).dynamic:
            labels.pin(joined.labels, "it is joined along a dynamic dimension", record.where)
        else:
            result.append(joined)
    result += _together(labels, parts, record, skip=dim)
    labels.assign(out, result)


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
        producers = frozenset().union(*(f.producers for f in have))
        result.append(Factor(dims, have[0].labels, all(f.z for f in have), producers))
    return result


@rule("pad", "constant_pad_nd")
def _pad(labels: Labels, record: Record) -> None:
    x, pads = record.args[0], record.args[1]
    mode = record.args[2] if record.op == "pad" and len(record.args) > 2 else "constant"
    value = record.args[-1] if record.op != "pad" and len(record.args) > 2 else 0
    if record.op == "pad":
        value = record.args[3] if len(record.args) > 3 else record.kwargs.get("value")
    rank = len(labels.value(x).shape)
    padded = {rank - 1 - i // 2 for i, p in enumerate(pads) if p != 0}
    zero = mode != "constant" or not value  # reflections copy zeros, constants may not be zero
    kept = []
    for f in labels.factors(x):
        if padded & set(f.dims):
            labels.pin(f.labels, "its dimension is padded", record.where)
        else:
            kept.append(replace(f, z=f.z and zero))
    labels.assign(record.outputs[0], kept)


@rule(*POOL)
def _pool(labels: Labels, record: Record) -> None:
    x = next(refs(record.args))
    rank = len(labels.value(x).shape)
    pooled = set(range(rank - POOL[record.op], rank))
    kept = without(labels, x, pooled, "its dimension is pooled", record)
    labels.assign(record.outputs[0], kept)
    for where in record.outputs[1:]:  # the positions of maxima are not zero
        labels.assign(where, [replace(f, z=False) for f in kept])


@rule(*REDUCE)
def _reduce(labels: Labels, record: Record) -> None:
    x = record.args[0]
    rank = len(labels.value(x).shape)
    given = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim")
    dims = range(rank) if given is None or given == [] else np.atleast_1d(given)
    gone = sorted(int(d) % rank for d in dims) if rank else []
    keepdim = record.args[2] if len(record.args) > 2 else record.kwargs.get("keepdim", False)
    kept = without(labels, x, set(gone), "it is reduced over, which has no rule yet", record)
    if not keepdim:
        kept = [replace(f, dims=tuple(d - sum(g < d for g in gone) for d in f.dims)) for f in kept]
    labels.assign(record.outputs[0], kept)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def _softmax(labels: Labels, record: Record) -> None:
    x, dim = record.args[0], record.args[1]
    over = {dim % max(1, len(labels.value(x).shape))}
    kept = without(labels, x, over, "a softmax runs over it", record)
    labels.assign(record.outputs[0], [replace(f, z=False) for f in kept])
