"""Rules for normalisations.

Batch and instance norms work per channel. A layer or RMS norm counts what is removed: with the
dense count kept ("padded") it is exact, because removed entries are zero. A group norm loses whole
groups. A weight norm divides by a sum over zeros.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from secateurs.graph.contractions import FIXED_INPUT
from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref
from secateurs.graph.rules import rule, without

__all__: list[str] = []

NORMALISED = "a normalisation runs over it"


@rule("batch_norm", "instance_norm")
def _batch_norm(labels: Labels, record: Record) -> None:
    """Per channel: exact. With a scale, a removed channel is zero whatever comes in."""
    x = record.args[0]
    own = [a for a in record.args[1:5] if isinstance(a, Ref)]
    channels = labels.single(x, 1)
    scaled = isinstance(record.args[1], Ref)
    producers: frozenset[int] = frozenset()
    zero = dict.fromkeys(own, False)
    for ref in own:
        factor = labels.single(ref, 0)
        if factor is None or channels is None:
            for f in (factor, channels):
                if f is not None:
                    labels.pin(f.labels, "it normalises channels that are fixed", record.where)
            continue
        labels.tie(channels.labels, factor.labels, FIXED_INPUT, record.where)
        producers |= labels.make(factor.labels, record)
        zero[ref] = factor.z
    for f in labels.factors(x):
        if 1 not in f.dims:
            labels.pin(f.labels, NORMALISED, record.where)
    if channels is None:
        labels.assign(record.outputs[0], [])
        return
    if scaled:
        labels.inner |= channels.producers - producers
    scale, shift, *statistics = (zero.get(a, True) for a in record.args[1:5])
    centred = channels.z and (not statistics or statistics[0])  # zero less a mean of zero
    z = shift and ((scaled and scale) or centred)
    kept = [Factor((1,), channels.labels, z, producers if scaled else channels.producers)]
    labels.assign(record.outputs[0], kept)


@rule("layer_norm", "rms_norm", "padded_layer_norm", "padded_rms_norm", "native_layer_norm")
def _layer_norm(labels: Labels, record: Record) -> None:
    """(..., *normalised shape): a joint factor keeps the dims that are not normalised (heads)."""
    x, shape = record.args[0], record.args[1]
    rank = len(labels.value(x).shape)
    inside = set(range(rank - len(shape), rank))
    weight, bias = (_argument(record, i) for i in (2, 3))
    if "rms" in record.op:
        bias = None
    labels.drop(x, inside)
    kept = []
    for f in labels.factors(x):
        if not set(f.dims) & inside:
            kept.append(replace(f, z=f.z and bias is None))
        elif len(f.dims) > 1 or not f.z:
            why = "it is normalised over and nothing makes it zero"
            labels.pin(f.labels, why, record.where)
        elif labels.normalise(f.labels, record):
            kept.append(_scaled(labels, record, f, weight, bias, f.dims[0] - (rank - len(shape))))
    covered = {f.dims[0] - (rank - len(shape)) for f in kept if set(f.dims) & inside}
    for ref in (weight, bias):
        for f in labels.factors(ref) if isinstance(ref, Ref) else ():
            if not set(f.dims) <= covered:
                labels.pin(f.labels, "it scales entries that are fixed", record.where)
    labels.assign(record.outputs[0], kept)
    for out in record.outputs[1:]:
        labels.assign(out, [])


def _argument(record: Record, position: int) -> Ref | None:
    """An optional tensor argument of a norm."""
    found = record.args[position] if len(record.args) > position else None
    if found is None:
        found = record.kwargs.get({2: "weight", 3: "bias"}.get(position, ""))
    return found if isinstance(found, Ref) else None


def _scaled(
    labels: Labels, record: Record, x: Factor, weight: Ref | None, bias: Ref | None, dim: int
) -> Factor:
    """A normalised factor after scale and shift; `dim` counts within the normalised shape."""
    producers: frozenset[int] = frozenset()
    zero = "rms" in record.op  # without a mean, zero stays zero
    for ref in (weight, bias):
        own = labels.single(ref, dim) if ref is not None else None
        if ref is None:
            continue
        if own is None:
            labels.pin(x.labels, "its scale or shift is a tensor that is fixed", record.where)
            return replace(x, z=False)
        labels.tie(x.labels, own.labels, "its scale or shift is fixed", record.where)
        if len(labels.value(ref).shape) == 1:
            producers |= labels.make(own.labels, record)
        zero = own.z and (zero or ref is weight)
    if weight is None:
        return replace(x, z=zero and "rms" in record.op)
    if producers:
        labels.inner |= x.producers - producers
    return replace(x, z=zero, producers=producers or x.producers)


@rule("group_norm", "padded_group_norm")
def _group_norm(labels: Labels, record: Record) -> None:
    """Whole groups, or the same channels of every group, whose dense number the norm goes on to
    count; whichever leaves more units."""
    x, groups = record.args[0], int(record.args[1])
    size = labels.value(x).shape[1]
    rank = len(labels.value(x).shape)
    for f in without(labels, x, set(range(rank)) - {1}, NORMALISED, record):
        assert f.dims == (1,)
    channels = labels.single(x, 1)
    own = [a for a in (_argument(record, 2), _argument(record, 3)) if a is not None]
    if channels is None:
        for f in (f for ref in own for f in labels.factors(ref)):
            labels.pin(f.labels, "it normalises channels that are fixed", record.where)
        labels.assign(record.outputs[0], [])
        return
    whole = (groups >= size // groups and record.op == "group_norm") or not channels.z
    if labels.options.norm == "pin":
        whole = groups > 1
    if groups == 1 and whole and size > 1:
        labels.pin(channels.labels, "it is normalised over and nothing makes it zero", record.where)
    elif groups < size:
        block = channels.labels.reshape(groups, -1)
        block = block if whole else block.T
        first = np.broadcast_to(block[:, :1], block.shape)
        labels.tie(first, block, "channels that are normalised together", record.where)
        if not whole:
            labels.normalise(channels.labels, record)
    producers: frozenset[int] = frozenset()
    zeros = {}
    for ref in own:
        factor = labels.single(ref, 0)
        if factor is None:
            labels.pin(
                channels.labels, "its scale or shift is a tensor that is fixed", record.where
            )
            continue
        labels.tie(channels.labels, factor.labels, FIXED_INPUT, record.where)
        producers |= labels.make(factor.labels, record)
        zeros[ref] = factor.z
    scaled = bool(own) and zeros.get(own[0], False)
    z = all(zeros.get(ref, False) for ref in own) and (scaled or (channels.z and whole))
    if own:
        labels.inner |= channels.producers - producers
    kept = Factor((1,), channels.labels, z, producers if own else channels.producers)
    labels.assign(record.outputs[0], [kept])


@rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(labels: Labels, record: Record) -> None:
    """direction * scale / |direction|: zero where the scale is; elsewhere a sum over zeros.

    Zeroing both would give 0 / 0, so the direction is sliced but never zeroed along that dim.
    """
    v, g = record.args[0], record.args[1]
    dim = int(record.args[2]) if len(record.args) > 2 else 0
    scale, rows = labels.single(g, dim), labels.single(v, dim)
    kept = [f for f in labels.factors(v) if dim not in f.dims]
    if scale is not None and rows is not None:
        labels.tie(rows.labels, scale.labels, "its scale is fixed", record.where)
        labels.unmasked |= {i for i in labels.axes_of(rows.labels) if labels.axes[i].value == v.id}
        labels.live(rows.labels)
        kept.append(Factor((dim,), scale.labels, scale.z, scale.producers | rows.producers))
    elif rows is not None:
        labels.pin(rows.labels, "one scale serves all of it", record.where)
    for f in kept:
        labels.consume(f.labels)
        if dim not in f.dims:  # removing columns changes the length of every row
            labels.nonzero(f.labels)
    labels.assign(record.outputs[0], kept)
    labels.alias(record.outputs[0], v.id)
    for out in record.outputs[1:]:
        labels.assign(out, [])
