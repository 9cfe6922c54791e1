"""Rules for operators that keep the data or only move it.

The operator itself is run on the labels, spread to the full shape: where they land is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, refs
from secateurs.graph.rules import MOVE, rule

__all__: list[str] = []

SAME = (
    "clone contiguous alias detach dropout feature_dropout to _to_copy type_as lift_fresh_copy "
    "positive"
).split()


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
    rank = len(shape)
    found: list[list[Factor]] = [[] for _ in record.outputs]
    for factor in labels.factors(source):
        if record.op == "slice" and _steps(record) and _dim(record, rank) in factor.dims:
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
    if moved.numel() == 0:
        return None  # an empty piece holds no unit
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
    if len(vary) > 1:
        labels.oblige(block)
    return Factor(tuple(vary), block, factor.z, factor.producers)
