"""Rules: what each class of operators does to labels, all as `rule(labels, record) -> None`.

A rule reads the factors of the operator's inputs, ties or pins atoms, and assigns the factors of
its outputs. This module has the registry and the classes that carry labels along: moving data,
elementwise operators, joining, pooling, reductions. Operators with weights are in `contractions`.
An operator without a rule pins everything that it touches and is named in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, Tape, refs

__all__ = ["RULES", "interpret", "rule"]

Rule = Callable[[Labels, Record], None]
RULES: dict[str, Rule] = {}

SAME = (
    "clone contiguous alias detach dropout feature_dropout to _to_copy type_as lift_fresh_copy "
    "positive"
).split()
MOVE = (
    "view reshape _unsafe_view permute transpose t numpy_T select slice narrow squeeze unsqueeze "
    "flatten unflatten chunk split split_with_sizes tensor_split unbind movedim moveaxis swapaxes "
    "expand"
).split()
POINTWISE = (
    "hardswish log_sigmoid multiply divide subtract floor_divide __and__ __or__ fill copy rrelu"
).split()
LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like".split()
CREATE = "zeros ones full empty new_zeros new_ones new_full new_empty".split()
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


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for canonical operator names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, fn))
        return fn

    return register


def interpret(tape: Tape) -> Labels:
    """Run the rules over a tape: every tie, pin and fact, before the components are found."""
    labels = Labels(tape)
    for value in tape.values:
        if value.source in ("parameter", "buffer") and value.dtype.is_floating_point:
            labels.add_axes(value, value.shape, stored=True, z=True)
    for record in tape.records:
        found = RULES.get(record.op) or (_pointwise if record.pointwise else None)
        if record.outputs or record.inplace:
            (found or _unknown)(labels, record)
        if record.inplace:
            _write_back(labels, record)
    for out in tape.outputs:
        for factor in labels.factors(out):
            labels.pin(factor.labels, "it is part of the model's output")
    return labels


def _write_back(labels: Labels, record: Record) -> None:
    """The first argument of an in-place operator now holds the output."""
    target = next(refs(record.args), None)
    if target is None or not record.outputs:
        return
    out = labels.factors(record.outputs[0])
    labels.alias(record.outputs[0], target.id)
    labels.state[target.id] = out
    labels.overwrite(target.id, all(f.z for f in out))


def _unknown(labels: Labels, record: Record) -> None:
    labels.unknown[record.op] = labels.unknown.get(record.op, 0) + 1
    for ref in refs([record.args, record.kwargs]):
        for factor in labels.factors(ref):
            labels.pin(factor.labels, f"operator {record.op} has no rule", record.where)


# -- the same data, or data moved ----------------------------------------------------------


@rule(*SAME)
def _same(labels: Labels, record: Record) -> None:
    source = next(refs(record.args))
    labels.assign(record.outputs[0], labels.factors(source), moves=True)
    labels.alias(record.outputs[0], source.id)


@rule(*MOVE)
def _move(labels: Labels, record: Record) -> None:
    """Run the operator on the labels themselves and see where they land."""
    source = next(refs(record.args))
    shape = labels.value(source).shape
    found: list[list[Factor]] = [[] for _ in record.outputs]
    for factor in labels.factors(source):
        if record.op == "slice" and _steps(record) and _dim(record, len(shape)) in factor.dims:
            labels.pin(factor.labels, "it is sliced with a step", record.where)
            continue
        spread = _spread(factor, shape)
        if record.op in ("view", "_unsafe_view"):
            spread = spread.contiguous()  # views refuse some strides that the real tensor hasn't
        args = [spread if a == source else a for a in record.args]
        moved = record.fn(*args, **record.kwargs)
        for factors, out, result in zip(
            found, record.outputs, moved if isinstance(moved, (list, tuple)) else [moved],
            strict=True,
        ):  # fmt: skip
            new = _landed(labels, factor, result, out, record)
            if new is not None and any(set(new.dims) & set(f.dims) for f in factors):
                labels.pin(new.labels, "two prunable dimensions are merged into one", record.where)
            elif new is not None:
                factors.append(new)
    for out, factors in zip(record.outputs, found, strict=True):
        labels.assign(out, factors, moves=True)
        labels.alias(out, source.id)


def _spread(factor: Factor, shape: Sequence[int]) -> Tensor:
    """The labels of a factor as a tensor of the value's full shape (no memory for other dims)."""
    sizes = [n if d in factor.dims else 1 for d, n in enumerate(shape)]
    return torch.from_numpy(factor.labels.reshape(sizes)).expand(*shape)


def _steps(record: Record) -> bool:
    """Whether a slice skips entries."""
    return len(record.args) > 4 and record.args[4] != 1


def _dim(record: Record, rank: int) -> int:
    """The dimension argument of slice, narrow, select, chunk, split, ..."""
    given = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)
    return int(given) % max(1, rank)


def _landed(
    labels: Labels, factor: Factor, moved: Tensor, out: int, record: Record
) -> Factor | None:
    """The factor that a moved label tensor amounts to."""
    value = labels.value(out)
    long = [d for d in range(moved.dim()) if moved.shape[d] > 1]
    vary = [d for d in long if bool((moved != moved.narrow(d, 0, 1)).any())]
    corner = moved[tuple(slice(None) if d in vary else 0 for d in range(moved.dim()))]
    block = corner.contiguous().numpy()
    if not vary:
        labels.pin(block, "one index of the dimension is picked out", record.where)
        return None
    if set(vary) & value.dynamic:
        labels.pin(block, "the dimension is merged with the batch", record.where)
        return None
    if len(vary) > 1 and len(factor.dims) < len(vary):
        labels.oblige(block)
    return Factor(tuple(vary), block, factor.z, factor.producers)


# -- elementwise ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operand:
    ref: Ref
    shape: tuple[int, ...]
    shift: int  # dims are aligned to the right
    factors: tuple[Factor, ...]

    def covers(self, dims: Sequence[int]) -> Factor | None:
        return next((f for f in self.factors if f.dims == tuple(dims)), None)

    def full(self, dim: int) -> bool:
        """Whether the operand has more than one entry along this output dim."""
        return dim >= self.shift and self.shape[dim - self.shift] > 1


def _aligned(labels: Labels, ref: Ref, rank: int) -> _Operand:
    shape = labels.value(ref).shape
    shift = rank - len(shape)
    moved = tuple(replace(f, dims=tuple(d + shift for d in f.dims)) for f in labels.factors(ref))
    return _Operand(ref, shape, shift, moved)


@rule(*POINTWISE)
def _pointwise(labels: Labels, record: Record) -> None:
    """Tie operands with broadcasting; whether zero stays zero is measured, not tabulated."""
    out = record.outputs[0]
    operands = list(refs([record.args, record.kwargs]))
    rank = len(labels.value(out).shape)
    _coarsen_clashes(labels, operands, rank, record)
    aligned = [_aligned(labels, r, rank) for r in operands]
    blocks = {f.dims: None for o in aligned for f in o.factors}
    result = []
    for dims in blocks:
        holders = [(k, f) for k, o in enumerate(aligned) if (f := o.covers(dims)) is not None]
        first = holders[0][1]
        for _, other in holders[1:]:
            labels.tie(first.labels, other.labels, "elementwise partners differ", record.where)
        for o in aligned:
            if o.covers(dims) is None and any(o.full(d) for d in dims):
                why = "it meets a tensor whose entries cannot be removed"
                labels.pin(first.labels, why, record.where)
        zeros = [k for k, f in holders if f.z]
        alone = next((k for k in zeros if keeps_zero(labels, record, {k})), None)
        if alone is None:
            z = keeps_zero(labels, record, set(zeros))
            producers = frozenset().union(*(f.producers for _, f in holders))
        else:
            z, producers = True, next(f.producers for k, f in holders if k == alone)
            labels.inner |= frozenset().union(*(f.producers for _, f in holders)) - producers
        merged = first.labels
        for _, other in holders[1:]:
            merged = np.minimum(merged, other.labels)  # a pinned partner shows
        result.append(Factor(dims, merged, z, producers))
    labels.assign(out, result)


def _coarsen_clashes(labels: Labels, operands: list[Ref], rank: int, record: Record) -> None:
    """Where factors overlap without being equal, or a partner spans part of a joint factor,
    tie the joint factor down to one dim: the one on which the others broadcast."""
    for ref in operands:
        me = _aligned(labels, ref, rank)
        for factor in me.factors:
            if len(factor.dims) < 2:
                continue
            others = [_aligned(labels, r, rank) for r in operands if r is not ref]
            partners = [o for o in others if any(o.full(d) for d in factor.dims)]
            if all(o.covers(factor.dims) is not None for o in partners):
                continue
            free = [d for d in factor.dims if not any(o.full(d) for o in partners)]
            labels.single(ref, (free or list(factor.dims))[0] - me.shift)


_DRAWS = (-1.7, 0.6, 2.3, -0.4, 1.1, 3.2, -2.6)
_ZERO_CACHE: dict[Any, bool] = {}


def keeps_zero(labels: Labels, record: Record, zeros: set[int]) -> bool:
    """Whether the operator gives exactly zero where these operands are zero, whatever the others.

    Evaluated on scalars with a few draws; a result that is not a number counts as not zero.
    """
    if not zeros:
        return False
    operands = list(refs([record.args, record.kwargs]))
    dtypes = tuple(labels.value(r).dtype for r in operands)
    key = (record.fn, dtypes, frozenset(zeros), repr(_without_ids([record.args, record.kwargs])))
    if key not in _ZERO_CACHE:
        _ZERO_CACHE[key] = _measure_zero(record, zeros, dtypes)
    return _ZERO_CACHE[key]


def _without_ids(tree: Any) -> Any:
    if isinstance(tree, Ref):
        return "tensor"
    if isinstance(tree, dict):
        return {k: _without_ids(v) for k, v in tree.items()}
    return [_without_ids(v) for v in tree] if isinstance(tree, (list, tuple)) else tree


def _measure_zero(record: Record, zeros: set[int], dtypes: tuple[torch.dtype, ...]) -> bool:
    for draw in range(4):
        count = iter(range(len(dtypes)))

        def scalar(x: Any, draw: int = draw, count: Any = count) -> Any:
            if isinstance(x, Ref):
                k = next(count)
                number = 0.0 if k in zeros else _DRAWS[(3 * draw + 5 * k) % 7]
                if dtypes[k] is torch.bool:
                    number = float(k not in zeros and (draw + k) % 2)
                return torch.tensor(number).to(dtypes[k])
            if isinstance(x, (list, tuple)):
                return type(x)(scalar(i) for i in x)
            return x

        try:
            args = [scalar(a) for a in record.args]
            kwargs = {k: scalar(v) for k, v in record.kwargs.items()}
            result = record.fn(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return False
        if not isinstance(result, Tensor) or not bool((result == 0).all()):
            return False
    return True


@rule(*LIKE)
def _like(labels: Labels, record: Record) -> None:
    source = next(refs(record.args))
    z = record.op == "zeros_like"
    kept = [replace(f, z=z, producers=frozenset()) for f in labels.factors(source)]
    labels.assign(record.outputs[0], kept)


@rule(*CREATE)
def _create(labels: Labels, record: Record) -> None:
    """Tensors made by size: their sizes can be rewritten, so they get atoms of their own."""
    out = labels.value(record.outputs[0])
    sizes = [None if d in out.dynamic else n for d, n in enumerate(out.shape)]
    labels.add_axes(out, sizes, stored=False, z=record.op in ("zeros", "new_zeros"))


@rule("prelu")
def _prelu(labels: Labels, record: Record) -> None:
    x, weight = list(refs(record.args))[:2]
    slope = labels.single(weight, 0)
    here = labels.single(x, 1) if len(labels.value(x).shape) > 1 else None
    if slope is not None and here is not None:
        labels.tie(here.labels, slope.labels, "its slope is shared", record.where)
    elif slope is not None:
        labels.pin(slope.labels, "it meets a dimension that is not prunable", record.where)
    labels.assign(record.outputs[0], labels.factors(x))


# -- joining, padding ----------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def _cat(labels: Labels, record: Record) -> None:
    parts = list(refs(record.args[0]))
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


# -- over other dimensions -----------------------------------------------------------------


@rule(*POOL)
def _pool(labels: Labels, record: Record) -> None:
    x = next(refs(record.args))
    rank = len(labels.value(x).shape)
    pooled = set(range(rank - POOL[record.op], rank))
    kept = _without(labels, x, pooled, "its dimension is pooled", record)
    for out in record.outputs:
        labels.assign(out, kept)


@rule(*REDUCE)
def _reduce(labels: Labels, record: Record) -> None:
    x = record.args[0]
    rank = len(labels.value(x).shape)
    given = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim")
    dims = range(rank) if given is None or given == [] else np.atleast_1d(given)
    gone = sorted(int(d) % rank for d in dims) if rank else []
    keepdim = record.args[2] if len(record.args) > 2 else record.kwargs.get("keepdim", False)
    kept = _without(labels, x, set(gone), "it is reduced over, which has no rule yet", record)
    if not keepdim:
        kept = [replace(f, dims=tuple(d - sum(g < d for g in gone) for d in f.dims)) for f in kept]
    labels.assign(record.outputs[0], kept)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def _softmax(labels: Labels, record: Record) -> None:
    x, dim = record.args[0], record.args[1]
    over = {dim % max(1, len(labels.value(x).shape))}
    kept = _without(labels, x, over, "a softmax runs over it", record)
    labels.assign(record.outputs[0], [replace(f, z=False) for f in kept])


def _without(labels: Labels, x: Ref, dims: set[int], reason: str, record: Record) -> list[Factor]:
    """The factors of `x` that do not touch `dims`; the others are pinned with `reason`."""
    kept = []
    for f in labels.factors(x):
        if set(f.dims) & dims:
            labels.pin(f.labels, reason, record.where)
        else:
            kept.append(f)
    return kept
