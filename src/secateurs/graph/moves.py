"""Rules for operators that keep the data or only move it.

The operator itself is run on the labels, spread to the full shape: where they land is the answer.
Whether its arguments can follow a cut is checked afterwards, on the labels alone (`commute`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, refs
from secateurs.graph.rules import MOVE, rule, without

__all__: list[str] = []

SAME = (
    "clone contiguous alias detach dropout feature_dropout alpha_dropout feature_alpha_dropout to "
    "_to_copy type_as lift_fresh_copy lift_fresh lift positive conj resolve_conj resolve_neg "
    "native_dropout _reshape_alias "
    "_autocast_to_reduced_precision _autocast_to_full_precision"
).split()
SPREADS = frozenset("expand expand_as broadcast_to".split())
VIEWS = frozenset("view _unsafe_view view_as reshape_as".split())
UNSURE = frozenset("reshape flatten reshape_as contiguous".split())  # a view or a copy
FLOATING = frozenset("im2col view_as_complex view_as_real".split())  # have no integer kernel


@rule(*SAME)
def _same(labels: Labels, record: Record) -> None:
    source = next(refs(record.args))
    value = labels.value(source)
    if (
        record.op.startswith("lift")
        and value.source == "constant"
        and source.id not in labels.state
    ):
        labels.add_axes(value, stored=False, z=False)
    for template in refs(record.args[1:]):
        labels.ignore(template)
    labels.assign(record.outputs[0], labels.factors(source), moves=True)
    labels.alias(record.outputs[0], source.id, unsure=record.op in UNSURE)


@rule(*MOVE)
def _move(labels: Labels, record: Record) -> None:
    """Run the operator on the labels themselves and see where they land."""
    source = next(refs(record.args))
    _prepare(labels, record)
    shape = labels.value(source).shape
    found: list[list[Factor]] = [[] for _ in record.outputs]
    for factor in labels.factors(source):
        moved = _run(record, _spread(factor, shape), labels.value(record.outputs[0]).shape)
        for factors, out, result in zip(found, record.outputs, moved, strict=True):
            new = _landed(labels, factor, result, out, record)
            if new is not None:
                _place(labels, factors, new, record)
    if record.op in SPREADS:
        _spread_sizes(labels, record, found[0], shape)
    for out, factors in zip(record.outputs, found, strict=True):
        labels.assign(out, factors, moves=True)
        labels.alias(out, source.id, unsure=record.op in UNSURE)


def _prepare(labels: Labels, record: Record) -> None:
    """Operators whose arguments cannot follow every cut: tie or pin what they touch."""
    x = next(refs(record.args))
    rank = len(labels.value(x).shape)
    touched: set[int] = set()
    why = "its entries change places in a way that sizes cannot follow"
    if record.op == "view" and isinstance(record.args[1], torch.dtype):
        touched, why = set(range(rank)), "its bits are read as another type"
    elif record.op == "slice" and len(record.args) > 4 and record.args[4] != 1:
        touched, why = {dim_of(record, rank)}, "it is sliced with a step"
    elif record.op == "roll":
        dims = record.args[2] if len(record.args) > 2 else record.kwargs.get("dims", ())
        touched = {d % rank for d in _listed(dims)} or set(range(rank))
    elif record.op in ("unfold", "diagonal", "rot90"):
        first = dim_of(record, rank)
        touched = {first} if record.op == "unfold" else set(range(rank))
    elif record.op == "repeat_interleave" and not isinstance(record.args[1], int):
        touched = set(range(rank))
    elif record.op == "im2col":
        touched = {rank - 1, rank - 2}
    elif record.op == "view_as_complex":
        touched = {rank - 1}
    elif record.op in ("pixel_shuffle", "channel_shuffle", "native_channel_shuffle"):
        _tie_blocks(labels, record)
    if touched:
        kept = without(labels, x, touched, why, record)
        labels.state[x.id] = tuple(kept)


def _tie_blocks(labels: Labels, record: Record) -> None:
    """A pixel shuffle spreads each r x r channels over space: they are one unit. A channel shuffle
    keeps the same positions in every group."""
    x, number = next(refs(record.args)), int(record.args[1])
    channel = len(labels.value(x).shape) - 3 if record.op == "pixel_shuffle" else 1
    factor = labels.single(x, channel)
    if factor is None:
        return
    if record.op == "pixel_shuffle":
        blocks = factor.labels.reshape(-1, number * number)
    else:
        blocks = factor.labels.reshape(number, -1).T
    tied = torch.from_numpy(blocks[:, :1]).expand(*blocks.shape).numpy()
    labels.tie(tied, blocks, "channels that are shuffled together", record.where)
    same = tied.reshape(-1) if record.op == "pixel_shuffle" else tied.T.reshape(-1)
    kept = Factor(factor.dims, same.copy(), factor.z, factor.producers)
    labels.state[x.id] = tuple(kept if f is factor else f for f in labels.factors(x))


def _run(record: Record, spread: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """The operator on labels; `shape` is that of its (first) output."""
    source = next(refs(record.args))
    if record.op in FLOATING:
        spread = spread.contiguous().double()  # exact up to 2^53
    if record.op == "expand_as":
        return [spread.expand(shape)]
    if record.op in VIEWS:  # they refuse some strides that the real tensor hasn't
        return [spread.reshape(shape)]
    args = [spread if a == source else a for a in record.args]
    moved = record.fn(*args, **record.kwargs)
    results = list(moved) if isinstance(moved, (list, tuple)) else [moved]
    if record.op == "view_as_complex":
        results = [r.real for r in results]
    return [r.long() if record.op in FLOATING else r for r in results]


def _place(labels: Labels, factors: list[Factor], new: Factor, record: Record) -> None:
    """Add a factor; of two on one dimension, the one made by size (or the later) is pinned."""
    for old in factors:
        if set(new.dims) & set(old.dims):
            loser = old if labels.made_by_size(old) else new
            labels.pin(loser.labels, "two prunable dimensions are merged into one", record.where)
            if loser is new:
                return
            factors.remove(old)
    factors.append(new)


def _spread_sizes(
    labels: Labels, record: Record, factors: list[Factor], shape: Sequence[int]
) -> None:
    """A dimension that is spread from one entry gets atoms: its size can follow a cut."""
    out = labels.value(record.outputs[0])
    shift = len(out.shape) - len(shape)
    covered = {d for f in factors for d in f.dims}
    for dim, size in enumerate(out.shape):
        single = dim < shift or shape[dim - shift] == 1
        if single and size > 1 and dim not in covered:
            factors.append(labels.fresh(out.id, dim, z=False))


def _spread(factor: Factor, shape: Sequence[int]) -> Tensor:
    """The labels of a factor as a tensor of the value's full shape (no memory for other dims)."""
    sizes = [n if d in factor.dims else 1 for d, n in enumerate(shape)]
    return torch.from_numpy(factor.labels.reshape(sizes)).expand(*shape)


def _listed(x: object) -> list[int]:
    return [int(i) for i in x] if isinstance(x, (list, tuple)) else [int(x)]  # type: ignore[call-overload]


def dim_of(record: Record, rank: int) -> int:
    """The dimension argument of slice, narrow, select, chunk, split, ..."""
    given = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)
    return int(given) % max(1, rank)


def _landed(
    labels: Labels, factor: Factor, moved: Tensor, out: int, record: Record
) -> Factor | None:
    """The factor that a moved label tensor amounts to."""
    if moved.numel() == 0:
        return None  # an empty piece holds no unit
    long = [d for d in range(moved.dim()) if moved.shape[d] > 1 and moved.stride(d) != 0]
    thin = moved[tuple(slice(None) if d in long else slice(1) for d in range(moved.dim()))]
    vary = [d for d in long if bool((thin != thin.narrow(d, 0, 1)).any())]
    corner = moved[tuple(slice(None) if d in vary else 0 for d in range(moved.dim()))]
    block = corner.contiguous().numpy()
    if not vary:
        labels.pin(block, "one index of the dimension is picked out", record.where)
        return None
    if len(vary) > 1:
        labels.oblige(block)
    return Factor(tuple(vary), block, factor.z, factor.producers)
