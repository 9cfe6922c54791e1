"""Rules for convolutions of all kinds: grouped, depthwise, transposed, and patches laid out."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from secateurs.graph.contractions import FIXED_INPUT, consume, produce
from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref
from secateurs.graph.rules import rule, without

__all__: list[str] = []


@rule("conv1d", "conv2d", "conv3d")
def _convolution(labels: Labels, record: Record) -> None:
    x, weight = record.args[0], record.args[1]
    bias = record.args[2] if len(record.args) > 2 else record.kwargs.get("bias")
    groups = record.args[6] if len(record.args) > 6 else record.kwargs.get("groups", 1)
    out = record.outputs[0]
    channel = len(labels.value(x).shape) - len(labels.value(weight).shape) + 1
    passing = _pin_kernel(labels, record, x, weight, channel)
    inputs = labels.single(x, channel)
    rows = produce(labels, record, labels.single(weight, 0), bias, "channel")
    if groups == 1:
        consume(labels, record, inputs, labels.single(weight, 1))
    else:
        _grouped(labels, record, inputs, rows, groups)
    kept = [replace(rows, dims=(channel,))] if rows is not None else []
    labels.assign(out, [*kept, *(replace(f, z=f.z and bias is None) for f in passing)])
    positions = prod(labels.value(out).shape) / labels.value(out).shape[channel]
    labels.used(weight, positions / labels.tape.batch_size)


def _pin_kernel(labels: Labels, record: Record, x: Ref, weight: Ref, channel: int) -> list[Factor]:
    """Pin what the kernel runs over; what it only passes (a kernel of 1) is returned."""
    for f in labels.factors(weight):
        if max(f.dims) > 1:
            labels.pin(f.labels, "it is part of a convolution kernel", record.where)
    size = labels.value(weight).shape
    still = not record.op.startswith("conv_transpose") and all(
        n == default
        for argument, default in ((3, 1), (4, 0))
        for n in np.atleast_1d(record.args[argument] if len(record.args) > argument else default)
    )
    passing = []
    for f in labels.factors(x):
        if channel in f.dims:
            continue
        over = [d for d in f.dims if d > channel and not (still and size[d - channel + 1] == 1)]
        if over or min(f.dims) < channel:
            labels.pin(f.labels, "a convolution runs over it", record.where)
        else:
            passing.append(f)
    return passing


def _grouped(
    labels: Labels, record: Record, x: Factor | None, rows: Factor | None, groups: int
) -> None:
    """Depthwise: a channel and its outputs are one unit. Else whole groups, or the same index in
    every group, whichever leaves more units; the number of groups follows."""
    columns = labels.single(record.args[1], 1)
    wide = labels.value(record.args[1]).shape[1] > 1
    if x is None or rows is None or (columns is None and wide):
        for f in (x, rows, columns):
            if f is not None:
                labels.pin(f.labels, "a grouped convolution reads a fixed input", record.where)
        return
    ins, outs = x.labels.reshape(groups, -1), rows.labels.reshape(groups, -1)
    why = "channels of one group"
    labels.inner |= x.producers & rows.producers
    if ins.shape[1] == 1 or groups >= ins.shape[1]:
        first = ins[:, :1]
        labels.tie(np.broadcast_to(first, ins.shape), ins, why, record.where)
        labels.tie(np.broadcast_to(first, outs.shape), outs, why, record.where)
        if columns is not None:
            labels.pin(columns.labels, "columns of a group stay while its group does", "")
        if ins.shape[1] == 1:
            labels.inner |= x.producers
    else:
        for block in (ins, outs):
            labels.tie(np.broadcast_to(block[:1], block.shape), block, why, record.where)
        assert columns is not None  # wide
        if not x.z and not columns.z:
            labels.pin(x.labels, "it is summed over and nothing makes it zero", record.where)
        labels.tie(ins[0], columns.labels, FIXED_INPUT, record.where)
        labels.read(columns.labels, record, 0)
    if not x.z:
        labels.nonzero(x.labels)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(labels: Labels, record: Record) -> None:
    x, weight = record.args[0], record.args[1]
    bias = record.args[2] if len(record.args) > 2 else record.kwargs.get("bias")
    groups = record.args[6] if len(record.args) > 6 else record.kwargs.get("groups", 1)
    channel = len(labels.value(x).shape) - len(labels.value(weight).shape) + 1
    _pin_kernel(labels, record, x, weight, channel)
    inputs = labels.single(x, channel)
    if groups == 1:
        consume(labels, record, inputs, labels.single(weight, 0))
        rows = produce(labels, record, labels.single(weight, 1), bias, "channel")
    else:
        rows = _transposed_groups(labels, record, inputs, bias, groups)
    kept = [replace(rows, dims=(channel,))] if rows is not None else []
    labels.assign(record.outputs[0], kept)
    size = labels.value(x).shape
    labels.used(weight, prod(size) / size[channel] / labels.tape.batch_size)


def _transposed_groups(
    labels: Labels, record: Record, x: Factor | None, bias: Ref | None, groups: int
) -> Factor | None:
    """Whole groups: the input channels of a group and its outputs are one unit."""
    weight = record.args[1]
    per_group = labels.value(weight).shape[1]
    rows, columns = labels.single(weight, 0), labels.single(weight, 1)
    if columns is not None:
        labels.pin(columns.labels, "columns of a group stay while its group does", "")
    if x is None or rows is None:
        for f in (x, rows, *(labels.factors(bias) if bias is not None else ())):
            if f is not None:
                labels.pin(f.labels, "a grouped convolution reads a fixed input", record.where)
        return None
    ins = x.labels.reshape(groups, -1)
    first = ins[:, :1]
    labels.tie(np.broadcast_to(first, ins.shape), ins, "channels of one group", record.where)
    labels.tie(x.labels, rows.labels, FIXED_INPUT, record.where)
    labels.live(rows.labels)
    outs = np.repeat(first[:, 0], per_group)
    producers = labels.make(rows.labels, record, "channel")
    labels.inner |= x.producers
    z = rows.z
    if bias is not None:
        shift = labels.single(bias, 0)
        if shift is None:
            labels.pin(outs, "its bias is a tensor that is fixed", record.where)
        else:
            labels.tie(outs, shift.labels, "its bias is fixed", record.where)
            producers |= labels.make(shift.labels, record, "channel")
        z = z and shift is not None and shift.z
    if not x.z:
        labels.nonzero(x.labels)
    return Factor((1,), outs, z, producers)


@rule("col2im")
def _col2im(labels: Labels, record: Record) -> None:
    """Patches (N, C * kernel, positions) summed into an image (N, C, H, W)."""
    x, kernel = record.args[0], record.args[2]
    channel = len(labels.value(x).shape) - 2
    for f in without(labels, x, {channel + 1}, "patches are laid out over it", record):
        if f.dims != (channel,):
            labels.pin(f.labels, "patches are laid out over it", record.where)
    columns = labels.single(x, channel)
    if columns is None:
        labels.assign(record.outputs[0], [])
        return
    block = columns.labels.reshape(-1, prod(kernel))
    first = np.broadcast_to(block[:, :1], block.shape)
    labels.tie(first, block, "positions of one patch", record.where)
    labels.assign(record.outputs[0], [replace(columns, labels=block[:, 0].copy())])
