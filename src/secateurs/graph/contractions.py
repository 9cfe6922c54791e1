"""Rules for linear layers and embeddings, and what all operators with weights share.

A contraction ties the dimension that it sums over to the weight's input columns (its consumers)
and gives its output the atoms of the weight's rows (its producers). Summing over entries that
were removed is exact because their columns are zero.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref
from secateurs.graph.rules import rule, unknown
from secateurs.types import Kind

__all__ = ["FIXED_INPUT", "consume", "produce"]

FIXED_INPUT = "its input is not prunable (the model's input, or a fixed tensor)"


def consume(
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


def produce(
    labels: Labels, record: Record, rows: Factor | None, bias: Ref | None, kind: Kind
) -> Factor | None:
    """The factor of an output dimension: the weight's rows, with the bias tied to them."""
    if rows is None:
        for f in labels.factors(bias) if bias is not None else ():
            labels.pin(f.labels, "it is the bias of an output that is fixed", record.where)
        return None
    labels.pass_on(rows.labels)
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
    consume(labels, record, labels.single(x, -1), labels.single(weight, 1))
    rows = produce(labels, record, labels.single(weight, 0), bias, "neuron")
    rest = [
        replace(f, z=f.z and bias is None)
        for f in labels.factors(x)
        if len(labels.value(x).shape) - 1 not in f.dims
    ]
    own = [replace(rows, dims=(last,))] if rows is not None else []
    labels.assign(out, [*rest, *own])
    features = labels.value(weight).shape[0]
    labels.used(weight, prod(size) / features / labels.tape.batch_size)


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


@rule("embedding_bag", "_embedding_bag")
def _embedding_bag(labels: Labels, record: Record) -> None:
    """Sums, means or maxima of rows: columns stay apart."""
    _embedding(labels, record)
    found = labels.factors(record.outputs[0])
    size = labels.value(record.outputs[0]).shape
    for out in record.outputs[1:]:  # of these, the positions of maxima have the same columns
        same = labels.value(out).shape == size
        labels.assign(out, [replace(f, z=False) for f in found] if same else [])


@rule("embedding_renorm")
def _renorm(labels: Labels, record: Record) -> None:
    """Rows that are too long are scaled down: a norm is a sum over zeros."""
    weight, indices = record.args[0], record.args[1]
    for f in labels.factors(indices):
        labels.pin(f.labels, "it is used as an index", record.where)
    labels.assign(record.outputs[0], labels.factors(weight))
