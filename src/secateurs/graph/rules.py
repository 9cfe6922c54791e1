"""Rules: what each operator does to labels, all as `rule(labels, record) -> None`.

A rule reads the factors of the operator's inputs, ties or pins atoms, and assigns the factors of
its outputs. Here is the registry and the interpreter; the rules are in

    moves          the same data, or data moved: views, permutations, slices, splits
    elementwise    pointwise operators with broadcasting, tensors made by size, prelu
    across         joining, padding, pooling, reductions, softmax
    contractions   operators with weights: linear, convolution, batch norm, embedding, recurrent

An operator without a rule pins everything that it touches and is named in the result. The same
happens to whatever a rule leaves unsaid: every label of an input that the rule has neither tied,
pinned nor passed on to an output is pinned.
"""

from __future__ import annotations

from collections.abc import Callable

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, Tape, refs

__all__ = ["MOVE", "RULES", "interpret", "rule", "unknown", "without"]

Rule = Callable[[Labels, Record], None]
RULES: dict[str, Rule] = {}
MOVE = (
    "view reshape _unsafe_view permute transpose t numpy_T select slice narrow squeeze unsqueeze "
    "flatten unflatten chunk split split_with_sizes tensor_split unbind movedim moveaxis swapaxes "
    "expand"
).split()


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
        if record.outputs or record.inplace:
            _apply(labels, record)
    for out in tape.outputs:
        for factor in labels.factors(out):
            labels.pin(factor.labels, "it is part of the model's output")
    return labels


def _apply(labels: Labels, record: Record) -> None:
    found = RULES.get(record.op) or (RULES["pointwise"] if record.pointwise else unknown)
    if record.inplace and record.op in MOVE:
        found = unknown  # the shape of an existing value changes
    labels.forget()
    try:
        found(labels, record)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # arguments in a form that the rule does not expect: never wrong, at worst left whole
        unknown(labels, record, f"the rule for {record.op} does not fit this call ({error})")
    if record.op not in MOVE:  # which may well drop labels: a slice does
        for ref in refs([record.args, record.kwargs]):
            why = f"operator {record.op} has no rule for this dimension"
            labels.pin(labels.left_over(ref, record.outputs), why, record.where)
    if record.inplace:
        _write_back(labels, record)


def _write_back(labels: Labels, record: Record) -> None:
    """The first argument of an in-place operator now holds the output."""
    target = next(refs(record.args), None)
    if target is None or not record.outputs:
        return
    out = labels.factors(record.outputs[0])
    labels.alias(record.outputs[0], target.id)
    labels.state[target.id] = out
    labels.overwrite(target.id, all(f.z for f in out))


def unknown(labels: Labels, record: Record, reason: str | None = None) -> None:
    """Pin everything that an operator touches; its outputs carry nothing."""
    touched = [f for r in refs([record.args, record.kwargs]) for f in labels.factors(r)]
    for out in record.outputs:
        labels.state[out] = ()
    if touched and reason is None:
        labels.unknown[record.op] = labels.unknown.get(record.op, 0) + 1
    for factor in touched:
        labels.pin(factor.labels, reason or f"operator {record.op} has no rule", record.where)


def without(labels: Labels, x: Ref, dims: set[int], reason: str, record: Record) -> list[Factor]:
    """The factors of `x` that do not touch `dims`; the others are pinned with `reason`."""
    kept = []
    for f in labels.factors(x):
        if set(f.dims) & dims:
            labels.pin(f.labels, reason, record.where)
        else:
            kept.append(f)
    return kept
