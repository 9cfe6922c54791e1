"""Rules for entries picked or written by index tensors, and for packed sequences.

What is indexed must stay, because the indices are numbers in the dense tensor; the other
dimensions pass.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import rule, unknown, without

__all__: list[str] = []

INDEXED = "its entries are picked by number"


@rule("index", "_unsafe_index")
def _index(labels: Labels, record: Record) -> None:
    """x[..., indices, ...]: the operator is run on labels with indices of zero."""
    x, given = record.args[0], record.args[1]
    out = record.outputs[0]
    for f, dims in _carried(labels, record, x, given, labels.value(out).shape):
        labels.state.setdefault(out, ())
        labels.state[out] = (*labels.state[out], replace(f, dims=dims))
    labels.assign(out, labels.factors(out))
    if labels.is_weight(x):
        labels.alias(out, x.id)  # some of several stacked weights
    for ref in refs(given):
        for f in labels.factors(ref):
            labels.pin(f.labels, "it is used as an index", record.where)


def _carried(
    labels: Labels, record: Record, x: Ref, given: object, shape: tuple[int, ...]
) -> list[tuple[Factor, tuple[int, ...]]]:
    """Factors on the dims that are not indexed, and the dims of the result where they land."""
    size = labels.value(x).shape
    rank = len(size)
    indices: list[Ref | None] = list(given) if isinstance(given, (list, tuple)) else []
    touched: set[int] = set()
    dim = 0
    zeros: list[torch.Tensor | None] = []
    for ref in indices:
        if ref is None:
            zeros.append(None)
            dim += 1
            continue
        value = labels.value(ref)
        if value.dtype in (torch.bool, torch.uint8):
            span = range(dim, dim + len(value.shape))
            rest = prod(n for d, n in enumerate(size) if d not in span)
            found = max(1, prod(shape) // max(1, rest))  # where none was found, as if one was
            zeros += [torch.zeros(found, dtype=torch.int64)] * len(value.shape)
            touched |= set(span)
            dim += len(value.shape)
        else:
            sizes = [max(1, n) for n in value.shape]
            zeros.append(torch.zeros(sizes, dtype=torch.int64))
            touched.add(dim)
            dim += 1
    kept = without(labels, x, touched, INDEXED, record)
    result = []
    for f in kept:
        sizes = [n if d in f.dims else 1 for d, n in enumerate(size)]
        spread = torch.from_numpy(f.labels.reshape(sizes)).expand(*size)
        moved = spread[tuple(slice(None) if z is None else z for z in zeros)]
        vary = tuple(
            d
            for d in range(moved.dim())
            if moved.shape[d] > 1 and bool((moved != moved.narrow(d, 0, 1)).any())
        )
        if len(vary) == len(f.dims) and moved.numel():
            result.append((f, vary))
        else:
            labels.pin(f.labels, INDEXED, record.where)
    assert rank >= len(touched)
    return result


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(labels: Labels, record: Record) -> None:
    """x[..., indices, ...] = values: on the other dims the two share their fate."""
    x, given, values = record.args[:3]
    places = labels.value(values).shape
    marker = _written_shape(labels, x, given, places)
    kept = []
    for f, dims in _carried(labels, record, x, given, marker):
        shift = len(marker) - len(places)
        own = next(
            (v for v in labels.factors(values) if tuple(d + shift for d in v.dims) == dims), None
        )
        full = any(d >= shift and places[d - shift] > 1 for d in dims)
        if own is not None:
            labels.tie(f.labels, own.labels, "it is written into a tensor", record.where)
            kept.append(replace(f, z=f.z and own.z, producers=f.producers | own.producers))
        elif full:
            labels.pin(f.labels, "a fixed tensor is written into it", record.where)
        else:
            kept.append(replace(f, z=False))
    labels.assign(record.outputs[0], kept)


def _written_shape(
    labels: Labels, x: Ref, given: object, values: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of x[indices], as far as placing needs it: masks count what is written."""
    size = labels.value(x).shape
    indices = list(given) if isinstance(given, (list, tuple)) else []
    masks = [r for r in indices if r is not None and labels.value(r).dtype == torch.bool]
    if masks:
        covered = len(labels.value(masks[0]).shape)
        rest = size[covered:]
        return (values[0] if len(values) > len(rest) else 1, *rest)
    zeros = [
        None if r is None else torch.zeros(labels.value(r).shape, dtype=torch.int64)
        for r in indices
    ]
    picked = torch.empty(1).expand(*size)[tuple(slice(None) if z is None else z for z in zeros)]
    return tuple(picked.shape)


@rule("index_select")
def _index_select(labels: Labels, record: Record) -> None:
    x, dim = record.args[0], record.args[1]
    over = {int(dim) % max(1, len(labels.value(x).shape))}
    labels.assign(record.outputs[0], without(labels, x, over, INDEXED, record))


@rule("index_fill", "index_add", "index_copy")
def _index_write(labels: Labels, record: Record) -> None:
    """Along the other dims, what is written shares the fate of what it is written into."""
    x, dim = record.args[0], record.args[1]
    over = {int(dim) % max(1, len(labels.value(x).shape))}
    kept = without(labels, x, over, INDEXED, record)
    source = record.args[3] if len(record.args) > 3 else None
    if not isinstance(source, Ref):
        zero = source == 0
        labels.assign(record.outputs[0], [replace(f, z=f.z and zero) for f in kept])
        return
    result = []
    labels.drop(source, over)
    for f in kept:
        own = next((s for s in labels.factors(source) if s.dims == f.dims), None)
        if own is None:
            labels.pin(f.labels, "a fixed tensor is written into it", record.where)
            continue
        labels.tie(f.labels, own.labels, "it is written into a tensor", record.where)
        producers = f.producers | own.producers
        result.append(replace(f, z=f.z and own.z, producers=producers))
    labels.assign(record.outputs[0], result)


@rule("gather", "take_along_dim")
def _gather(labels: Labels, record: Record) -> None:
    """On the other dims the index must shrink with the tensor: it can where it was spread."""
    x, dim, index = record.args[0], record.args[1], record.args[2]
    if record.op == "take_along_dim":
        x, index, dim = record.args[0], record.args[1], record.args[2]
    over = {int(dim) % max(1, len(labels.value(x).shape))}
    kept = []
    labels.drop(index, over)
    for f in without(labels, x, over, INDEXED, record):
        own = next((i for i in labels.factors(index) if i.dims == f.dims), None)
        if own is None:
            labels.pin(f.labels, "it is picked by a fixed index tensor", record.where)
            continue
        labels.tie(f.labels, own.labels, "it is picked by a fixed index tensor", record.where)
        kept.append(f)
    labels.assign(record.outputs[0], kept)


@rule("_pack_padded_sequence")
def _pack(labels: Labels, record: Record) -> None:
    """(batch, length, features) -> (all steps, features)."""
    x = record.args[0]
    kept = without(labels, x, {0, 1}, "it is packed", record)
    labels.assign(record.outputs[0], [replace(f, dims=tuple(d - 1 for d in f.dims)) for f in kept])
    for out in record.outputs[1:]:
        labels.assign(out, [])


@rule("_pad_packed_sequence")
def _unpack(labels: Labels, record: Record) -> None:
    x = record.args[0]
    fill = record.args[3] if len(record.args) > 3 else 0.0
    kept = without(labels, x, {0}, "it is unpacked", record)
    moved = [replace(f, dims=tuple(d + 1 for d in f.dims), z=f.z and not fill) for f in kept]
    labels.assign(record.outputs[0], moved)
    for out in record.outputs[1:]:
        labels.assign(out, [])


@rule("one_hot", "bucketize", "searchsorted", "nonzero", "nonzero_numpy")
def _as_numbers(labels: Labels, record: Record) -> None:
    """The values of a tensor become positions: whatever made them must stay."""
    unknown(labels, record, f"its values are used as positions by {record.op}")
