"""Rules for recurrent layers and cells."""

from __future__ import annotations

import numpy as np

from secateurs.graph.contractions import consume
from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import rule
from secateurs.types import IntArray

__all__ = ["CELLS", "GATES"]

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
CELLS = {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}


@rule(*GATES)
def _recurrent(labels: Labels, record: Record) -> None:
    """One set of hidden labels for all layers and directions (they share one hidden size).

    With an initial state of zero, a unit whose rows are zero stays zero at every step. A packed
    sequence comes as (data, batch sizes, states, ...) and without `batch_first`.
    """
    packed = not isinstance(record.args[3], bool)
    args = (record.args[0], *record.args[2:]) if packed else record.args
    x, states, weights = args[0], list(refs(args[1])), list(args[2])
    has_bias, n_layers, bidirectional = args[3], args[4], args[7]
    batch_first = not packed and args[8]
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (n_layers * directions)
    projected = per_cell == (5 if has_bias else 3)  # the last weight of each cell makes h smaller
    gates = GATES[record.op]
    hidden = labels.single(weights[per_cell - 1 if projected else 1], 1)
    passed = labels.single(weights[per_cell - 1], 0) if projected else hidden  # h, and the output
    z = all(f.z for w in weights for f in labels.factors(w))
    producers: frozenset[int] = frozenset()
    for cell in range(n_layers * directions):
        parameters = weights[cell * per_cell : (cell + 1) * per_cell]
        columns = labels.single(parameters[0], 1)
        if hidden is None or passed is None:
            for f in (f for p in parameters for f in labels.factors(p)):
                labels.pin(f.labels, "a recurrent layer needs at least one unit", record.where)
        else:
            ends = parameters[-1] if projected else None
            rows = parameters[:-1] if projected else parameters
            producers |= _cell_rows(labels, record, rows, hidden.labels, passed.labels, gates)
            if ends is not None:
                producers |= _projection(labels, record, ends, hidden.labels, passed.labels)
        if cell < directions:
            consume(labels, record, labels.single(x, -1), columns)
        elif passed is not None and columns is not None:
            below = np.tile(passed.labels, directions)
            labels.tie(below, columns.labels, "hidden units of the layer below", record.where)
            labels.read(columns.labels, record, -1)
    for number, state in enumerate(states):  # of an LSTM: h, then c
        start, own = labels.single(state, -1), hidden if number else passed
        if own is None:
            continue
        if start is None:
            why = "its initial state comes from outside"
            labels.pin(own.labels, why, record.where)
        else:
            labels.tie(own.labels, start.labels, "its initial state is fixed", record.where)
            z = z and start.z
    for i, out in enumerate(record.outputs):
        last = len(labels.value(out).shape) - 1
        own = hidden if i == 2 else passed
        block = None if own is None else np.tile(own.labels, directions if i == 0 else 1)
        kept = [] if block is None else [Factor((last,), block, z, producers)]
        labels.assign(out, kept)
    size = labels.value(x).shape
    steps = float(size[0] if len(size) == 2 or not batch_first else size[1])
    if packed:
        steps /= labels.tape.batch_size
    for k, weight in enumerate(weights):
        if k % per_cell < 2 or (projected and k % per_cell == per_cell - 1):
            labels.used(weight, steps)


def _projection(
    labels: Labels, record: Record, weight: Ref, hidden: IntArray, passed: IntArray
) -> frozenset[int]:
    """Rows make what is passed on, columns read the hidden units."""
    rows, columns = labels.single(weight, 0), labels.single(weight, 1)
    producers: frozenset[int] = frozenset()
    if rows is not None:
        labels.tie(passed, rows.labels, "one size is passed on by all layers", record.where)
        producers = labels.make(rows.labels, record, "hidden")
    if columns is not None:
        labels.tie(hidden, columns.labels, "gates of one hidden unit", record.where)
        labels.read(columns.labels, record, -1)
        labels.live(columns.labels)
    return producers


def _cell_rows(
    labels: Labels,
    record: Record,
    parameters: list[Ref],
    hidden: IntArray,
    passed: IntArray,
    gates: int,
) -> frozenset[int]:
    """Tie the gate rows of one cell to the hidden labels, its recurrent columns to what is passed
    from step to step."""
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
        labels.tie(passed, columns.labels, why, record.where)
        labels.read(columns.labels, record, -1)
        labels.live(columns.labels)
    return producers


@rule(*CELLS)
def _cell(labels: Labels, record: Record) -> None:
    """One step of a recurrent layer: the state comes in and goes out under the same labels."""
    x, *rest = list(refs(record.args))
    n_states = 2 if record.op == "lstm_cell" else 1
    states, parameters = rest[:n_states], rest[n_states:]
    gates = CELLS[record.op]
    hidden = labels.single(parameters[1], 1)
    consume(labels, record, labels.single(x, -1), labels.single(parameters[0], 1))
    starts = [labels.single(s, -1) for s in states]
    if hidden is None:
        for f in (f for p in parameters for f in labels.factors(p)):
            labels.pin(f.labels, "a recurrent layer needs at least one unit", record.where)
    else:
        producers = _cell_rows(labels, record, parameters, hidden.labels, hidden.labels, gates)
        for start in starts:
            if start is None:
                labels.pin(hidden.labels, "its initial state comes from outside", record.where)
            else:
                labels.tie(hidden.labels, start.labels, "its initial state is fixed", record.where)
        z = all(f.z for p in parameters for f in labels.factors(p))
        z = z and all(s is not None and s.z for s in starts)
        made = Factor(
            (len(labels.value(record.outputs[0]).shape) - 1,), hidden.labels, z, producers
        )
    for out in record.outputs:
        labels.assign(out, [] if hidden is None else [made])
    for weight in parameters[:2]:
        labels.used(weight, 1.0)
