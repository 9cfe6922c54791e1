"""Rules for operators with weights: linear, convolution, batch norm, embedding, recurrent.

A contraction ties the dimension that it sums over to the weight's input columns (its consumers)
and gives its output the atoms of the weight's rows (its producers). Summing over entries that
were removed is exact because their columns are zero.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import rule, unknown
from secateurs.types import IntArray, Kind

__all__: list[str] = []

FIXED_INPUT = "its input is not prunable (the model's input, or a fixed tensor)"


def _consume(
    labels: Labels, record: Record, x: Factor | None, columns: Factor | None, argument: int = 0
) -> None:
    """Tie a summed dimension of `x` to the weight's columns."""
    if columns is not None and x is not None:
        labels.tie(x.labels, columns.labels, FIXED_INPUT, record.where)
        labels.read(columns.labels, record, argument)
        labels.live(columns.labels)
        if not x.z and not columns.z:
            labels.pin(x.labels, "it is summed over and nothing makes it zero", record.where)
        elif not x.z:
            labels.nonzero(x.labels)
    elif columns is not None:
        labels.read(columns.labels, record, argument)
        labels.pin(columns.labels, FIXED_INPUT, record.where)
    elif x is not None:
        labels.pin(x.labels, "it is summed over with a tensor that is fixed", record.where)


def _produce(
    labels: Labels, record: Record, rows: Factor | None, bias: Ref | None, kind: Kind
) -> Factor | None:
    """The factor of an output dimension: the weight's rows, with the bias tied to them."""
    if rows is None:
        for f in labels.factors(bias) if bias is not None else ():
            labels.pin(f.labels, "it is the bias of an output that is fixed", record.where)
        return None
    producers = labels.make(rows.labels, record, kind)
    z = rows.z
    if bias is not None:
        shift = labels.single(bias, 0)
        if shift is None:
            labels.pin(rows.labels, "its bias is a tensor that is fixed", record.where)
            z = False
        else:
            labels.tie(rows.labels, shift.labels, "its bias is fixed", record.where)
            z = z and shift.z
            producers |= labels.make(shift.labels, record, kind)
    return Factor(rows.dims, rows.labels, z, producers)


@rule("linear")
def _linear(labels: Labels, record: Record) -> None:
    x, weight = record.args[0], record.args[1]
    bias = record.args[2] if len(record.args) > 2 else record.kwargs.get("bias")
    out = record.outputs[0]
    size = labels.value(out).shape
    last = len(size) - 1
    if len(labels.value(weight).shape) != 2:
        unknown(labels, record, "a linear layer with a vector as weight has no rule")
        return
    _consume(labels, record, labels.single(x, -1), labels.single(weight, 1))
    rows = _produce(labels, record, labels.single(weight, 0), bias, "neuron")
    rest = [
        replace(f, z=f.z and bias is None)
        for f in labels.factors(x)
        if len(labels.value(x).shape) - 1 not in f.dims
    ]
    own = [replace(rows, dims=(last,))] if rows is not None else []
    labels.assign(out, [*rest, *own])
    features = labels.value(weight).shape[0]
    labels.used(weight, prod(size) / features / labels.tape.batch_size)


@rule("conv1d", "conv2d", "conv3d")
def _convolution(labels: Labels, record: Record) -> None:
    x, weight = record.args[0], record.args[1]
    bias = record.args[2] if len(record.args) > 2 else record.kwargs.get("bias")
    groups = record.args[6] if len(record.args) > 6 else record.kwargs.get("groups", 1)
    out = record.outputs[0]
    channel = len(labels.value(x).shape) - len(labels.value(weight).shape) + 1
    _pin_kernel(labels, record, x, weight, channel)
    inputs = labels.single(x, channel)
    rows = _produce(labels, record, labels.single(weight, 0), bias, "channel")
    if groups == 1:
        _consume(labels, record, inputs, labels.single(weight, 1))
    else:
        _grouped(labels, record, inputs, rows, groups)
    kept = [replace(rows, dims=(channel,))] if rows is not None else []
    labels.assign(out, kept)
    positions = prod(labels.value(out).shape) / labels.value(out).shape[channel]
    labels.used(weight, positions / labels.tape.batch_size)


def _pin_kernel(labels: Labels, record: Record, x: Ref, weight: Ref, channel: int) -> None:
    for f in labels.factors(weight):
        if max(f.dims) > 1:
            labels.pin(f.labels, "it is part of a convolution kernel", record.where)
    for f in labels.factors(x):
        if f.dims != (channel,) and channel not in f.dims:
            labels.pin(f.labels, "a convolution runs over it", record.where)


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
    if groups != 1:
        unknown(labels, record, "a transposed convolution with groups has no rule yet")
        return
    channel = len(labels.value(x).shape) - len(labels.value(weight).shape) + 1
    _pin_kernel(labels, record, x, weight, channel)
    _consume(labels, record, labels.single(x, channel), labels.single(weight, 0))
    rows = _produce(labels, record, labels.single(weight, 1), bias, "channel")
    kept = [replace(rows, dims=(channel,))] if rows is not None else []
    labels.assign(record.outputs[0], kept)
    size = labels.value(x).shape
    labels.used(weight, prod(size) / size[channel] / labels.tape.batch_size)


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
            labels.pin(f.labels, "a normalisation runs over it", record.where)
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


@rule("embedding")
def _embedding(labels: Labels, record: Record) -> None:
    weight = record.args[0]
    entries = labels.single(weight, 0)
    if entries is not None:
        labels.pin(entries.labels, "it is an entry of the vocabulary", record.where)
    rows = labels.single(weight, 1)
    if rows is None:
        labels.assign(record.outputs[0], [])
        return
    producers = labels.make(rows.labels, record, "embedding")
    last = len(labels.value(record.outputs[0]).shape) - 1
    labels.assign(record.outputs[0], [Factor((last,), rows.labels, rows.z, producers)])


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*GATES)
def _recurrent(labels: Labels, record: Record) -> None:
    """One set of hidden labels for all layers and directions (they share one hidden size).

    With an initial state of zero, a unit whose rows are zero stays zero at every step.
    """
    if not isinstance(record.args[3], bool):
        unknown(labels, record, "a recurrent layer on a packed sequence has no rule yet")
        return
    x, states, weights = record.args[0], list(refs(record.args[1])), list(record.args[2])
    has_bias, n_layers, bidirectional = record.args[3], record.args[4], record.args[7]
    batch_first = record.args[8]
    directions = 2 if bidirectional else 1
    per_cell = 4 if has_bias else 2
    if len(weights) != n_layers * directions * per_cell:
        unknown(labels, record, "a recurrent layer with a projection has no rule yet")
        return
    gates = GATES[record.op]
    hidden = labels.single(weights[1], 1)
    z = all(f.z for w in weights for f in labels.factors(w))
    producers: frozenset[int] = frozenset()
    for cell in range(n_layers * directions):
        parameters = weights[cell * per_cell : (cell + 1) * per_cell]
        if hidden is None:
            for f in (f for p in parameters for f in labels.factors(p)):
                labels.pin(f.labels, "a recurrent layer needs at least one unit", record.where)
        else:
            producers |= _cell_rows(labels, record, parameters, hidden.labels, gates)
        columns = labels.single(parameters[0], 1)
        if cell < directions:
            _consume(labels, record, labels.single(x, -1), columns)
        elif hidden is not None and columns is not None:
            below = np.tile(hidden.labels, directions)
            labels.tie(below, columns.labels, "hidden units of the layer below", record.where)
            labels.read(columns.labels, record, -1)
    for state in states:
        start = labels.single(state, -1)
        if hidden is None:
            continue
        if start is None:
            why = "its initial state comes from outside"
            labels.pin(hidden.labels, why, record.where)
        else:
            labels.tie(hidden.labels, start.labels, "its initial state is fixed", record.where)
            z = z and start.z
    for i, out in enumerate(record.outputs):
        last = len(labels.value(out).shape) - 1
        block = None if hidden is None else np.tile(hidden.labels, directions if i == 0 else 1)
        kept = [] if block is None else [Factor((last,), block, z, producers)]
        labels.assign(out, kept)
    size = labels.value(x).shape
    steps = size[0] if len(size) == 2 or not batch_first else size[1]
    for k, weight in enumerate(weights):
        if k % per_cell < 2:
            labels.used(weight, float(steps))


def _cell_rows(
    labels: Labels, record: Record, parameters: list[Ref], hidden: IntArray, gates: int
) -> frozenset[int]:
    """Tie the gate rows and the recurrent columns of one cell to the hidden labels."""
    producers: frozenset[int] = frozenset()
    why = "gates of one hidden unit"
    for ref in parameters:
        rows = labels.single(ref, 0)
        if rows is None:
            labels.pin(hidden, "a recurrent weight is a fixed tensor", record.where)
            continue
        labels.tie(np.tile(hidden, gates), rows.labels, why, record.where)
        producers |= labels.make(rows.labels, record, "hidden")
    columns = labels.single(parameters[1], 1)
    if columns is not None:
        labels.tie(hidden, columns.labels, why, record.where)
        labels.read(columns.labels, record, -1)
        labels.live(columns.labels)
    return producers
