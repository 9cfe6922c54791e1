"""Rules: what each operator does to labels, all as `rule(labels, record) -> None`.

A rule reads the factors of the operator's inputs, ties or pins atoms, and assigns the factors of
its outputs. Here is the registry and the interpreter; the rules are in

    moves          the same data, or data moved: views, permutations, slices, splits
    elementwise    pointwise operators with broadcasting, tensors made by size, prelu
    indexing       entries picked or written by index tensors, packed sequences
    joining        cat, stack, padding, pooling and resizing
    reductions     sums, means, norms, extremes, softmax, cumulative operators
    contractions   linear layers and embeddings
    convolutions   convolutions of all kinds
    products       matmul and einsum: products of any two tensors
    attention      scaled dot product attention
    norms          batch, instance, group, layer and RMS norm, weight norm
    recurrent      LSTM, GRU, RNN: layers and cells

An operator without a rule pins everything that it touches and is named in the result. The same
happens to whatever a rule leaves unsaid: every label of an input that the rule has neither tied,
pinned nor passed on to an output is pinned.
"""

from __future__ import annotations

from collections.abc import Callable

from secateurs.errors import ConfigError
from secateurs.graph.labels import Factor, Labels, Options
from secateurs.graph.records import Record, Ref, Tape, refs

__all__ = ["MOVE", "RULES", "interpret", "register_rule", "rule", "unknown", "without"]

Rule = Callable[[Labels, Record], None]
RULES: dict[str, Rule] = {}
MOVE = frozenset(
    "view reshape _unsafe_view permute transpose t numpy_T mT mH matrix_H adjoint select slice "
    "narrow squeeze unsqueeze flatten unflatten chunk split split_with_sizes unsafe_chunk "
    "unsafe_split unsafe_split_with_sizes tensor_split hsplit vsplit dsplit unbind movedim "
    "moveaxis swapaxes swapdims "
    "expand expand_as broadcast_to view_as reshape_as repeat tile repeat_interleave flip fliplr "
    "flipud roll unfold im2col pixel_shuffle pixel_unshuffle channel_shuffle rot90 "
    "native_channel_shuffle diagonal atleast_2d atleast_3d view_as_complex view_as_real"
    .split()
)  # fmt: skip
"""Operators that keep every entry or leave some out, and only move them."""


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for canonical operator names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, fn))
        return fn

    return register


def register_rule(*ops: str) -> Callable[[Rule], Rule]:
    """Teach the engine an operator of your own: `@register_rule("mylib::scaled_add")`.

    The rule is called as `rule(labels, record)` when the engine meets the operator. It reads the
    factors of the inputs (`labels.factors`, `labels.single`), ties (`labels.tie`) or pins
    (`labels.pin`) them, and gives the outputs theirs (`labels.assign`). What it leaves unsaid is
    pinned.

    Args:
        ops: names with their namespace, as given to `torch.library`.

    Raises:
        ConfigError: a name has no namespace or has a rule already.

    Example:
        >>> @register_rule("mylib::negated")
        ... def negated(labels, record):
        ...     labels.assign(record.outputs[0], labels.factors(record.args[0]))
        >>> sorted(op for op in RULES if op.startswith("mylib"))
        ['mylib::negated']
        >>> del RULES["mylib::negated"]
    """
    for op in ops:
        if "::" not in op:
            raise ConfigError(f'name the operator with its namespace, as "mylib::op"; got {op!r}')
        if op.startswith("aten::"):
            raise ConfigError(f"{op!r} belongs to torch; rules are for operators of your own")
        if op in RULES:
            raise ConfigError(f"operator {op!r} already has a rule")
    return rule(*ops)


def interpret(tape: Tape, options: Options | None = None) -> Labels:
    """Run the rules over a tape: every tie, pin and fact, before the components are found."""
    labels = Labels(tape, options=options or Options())
    for value in tape.values:
        if value.source in ("parameter", "buffer") and value.dtype.is_floating_point:
            labels.add_axes(value, stored=True, z=True)
        elif value.source == "attribute":
            labels.add_axes(value, stored=False, z=False)
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
        why = f"operator {record.op} has no rule for this dimension"
        for i, ref in enumerate(refs([record.args, record.kwargs])):
            passed = record.outputs if i == 0 else ()  # the others' must be tied or passed on
            labels.pin(labels.left_over(ref, passed), why, record.where)
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
    labels.overwrite(target.id, all(f.z for f in out), record)


def unknown(labels: Labels, record: Record, reason: str | None = None) -> None:
    """Pin everything that an operator touches; its outputs carry nothing."""
    touched = [f for r in refs([record.args, record.kwargs]) for f in labels.factors(r)]
    for out in record.outputs:
        labels.state[out] = ()
    if reason is None and not all(labels.made_by_size(f) for f in touched):
        labels.unknown[record.op] = labels.unknown.get(record.op, 0) + 1
    for factor in touched:
        labels.pin(factor.labels, reason or f"operator {record.op} has no rule", record.where)


def without(labels: Labels, x: Ref, dims: set[int], reason: str, record: Record) -> list[Factor]:
    """The factors of `x` that do not touch `dims`; the others are pinned with `reason`.

    A joint factor is tied along `dims` and keeps its other dims.
    """
    labels.drop(x, dims)
    kept = []
    for f in labels.factors(x):
        if set(f.dims) & dims:
            labels.pin(f.labels, reason, record.where)
        else:
            kept.append(f)
    return kept
