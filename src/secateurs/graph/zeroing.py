"""Which parameters make a value zero: set them to zero, and all of the value is exactly zero.

    zero_cuts(labels) -> {(record, value id): the parameters nearest to the value that do so}

An interpreter of its own, over the same tape as the rules: a value is zero when the last layer that
makes it has zero weight and bias, when a factor of a product is zero, or when it only moves zeros.
What it does not know has no cut, so that nothing is claimed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateurs.graph.elementwise import at_zero
from secateurs.graph.labels import Labels
from secateurs.graph.records import Record, Ref, Tape, refs
from secateurs.graph.rules import MOVE, RULES

__all__ = ["Cut", "aliases", "zero_cuts"]

Cut = frozenset[int]
"""Value ids of parameters; none for what is zero anyway."""

SUMS = frozenset(["add", "sub"])
LAYERS = frozenset(
    "linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
    .split()
)  # fmt: skip
PRODUCTS = frozenset("matmul mm bmm mv dot einsum bilinear".split())
NORMS = frozenset(
    "layer_norm native_layer_norm rms_norm batch_norm group_norm instance_norm".split()
)
SAME = frozenset(
    "clone contiguous to _to_copy type_as alias detach lift_fresh dropout dropout_ native_dropout "
    "feature_dropout sum mean cumsum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_max_pool2d "
    "index index_select gather tril triu prelu".split()
)
"""Zero where the first argument is (all of it)."""
JOIN = frozenset("cat concat concatenate stack hstack vstack".split())
VIEWS = frozenset("contiguous to type_as reshape detach alias lift_fresh dropout flatten".split())
"""What may return its argument itself."""


def zero_cuts(labels: Labels) -> dict[tuple[int, int], Cut]:
    """For what each sum reads, if parameters alone can make it zero: the nearest such ones.

    Returns:
        (index of the record, value id) -> value ids of parameters.
    """
    seen: dict[tuple[int, int], Cut] = {}
    cuts: dict[int, Cut] = {
        v.id: frozenset({v.id})
        for v in labels.tape.values
        if v.source == "parameter" and v.dtype.is_floating_point and v.shape
    }
    root = aliases(labels.tape)
    for record in labels.tape.records:
        if not record.outputs and not record.inplace:
            continue
        if record.op in SUMS:
            read = [x.id for x in refs(record.args)]
            seen.update({(record.index, i): cuts[i] for i in read if i in cuts})
        found = _of(labels, record, cuts)
        if record.inplace and (target := next(refs(record.args), None)) is not None:
            written = root.get(target.id, target.id)
            for ident in [i for i in cuts if root.get(i, i) == written]:
                del cuts[ident]  # an alias may hold other entries than the output
        if found is not None:
            made = record.outputs if record.op in MOVE else record.outputs[:1]
            cuts.update(dict.fromkeys(made, found))
    return seen


def aliases(tape: Tape, skips: Mapping[int, int] | None = None) -> dict[int, int]:
    """Value id -> the value whose memory it may share.

    Args:
        tape: what ran.
        skips: sums (their number in the tape) that are replaced by their skip, which is at this
            position of their arguments.
    """
    root: dict[int, int] = {}
    for number, record in enumerate(tape.records):
        first = next(refs(record.args), None)
        if first is None:
            continue
        if skips and number in skips:
            skip = record.args[skips[number]].id
            root[record.outputs[0]] = root.get(skip, skip)
            continue
        schema = getattr(record.fn, "_schema", None)
        views = schema is None or any(r.alias_info is not None for r in schema.returns)
        if views or record.inplace or record.op in MOVE or record.op in VIEWS:
            for out in record.outputs:
                root[out] = root.get(first.id, first.id)
    return root


def _of(labels: Labels, record: Record, cuts: dict[int, Cut]) -> Cut | None:
    """The cut of the (first) output of a record."""

    def cut(x: Any) -> Cut | None:
        return cuts.get(x.id) if isinstance(x, Ref) else None

    args = [*record.args, *record.kwargs.values()]
    if record.inplace and record.op in MOVE:
        return None
    if record.op == "zeros_like":
        return frozenset()
    if record.op in LAYERS:
        return _with_shift(record, cut, weight=1, bias=2)
    if record.op in NORMS:
        return _norm(record, cut)
    if record.op in ("embedding", "_weight_norm", "_weight_norm_interface"):
        return cut(args[1 if "norm" in record.op else 0])
    if record.op in PRODUCTS:
        return _factor(labels, list(refs(args)), cut)
    if record.op == "scaled_dot_product_attention":
        return cut(args[2])
    if record.op in ("addmm", "baddbmm") and not record.kwargs:
        product = _factor(labels, list(refs(args[1:3])), cut)
        return _both(cut(args[0]), product)
    if record.op in JOIN:
        return _all([cut(x) for x in refs(args)])
    if record.op in ("pad", "constant_pad_nd"):
        plain = record.op != "pad" or (len(args) < 3 or args[2] == "constant")
        filled = any(isinstance(x, (int, float)) and x != 0 for x in args[2:])
        return cut(args[0]) if plain and not filled else None
    if record.op in MOVE or record.op in SAME:
        return cut(args[0])
    if record.pointwise or RULES.get(record.op) is RULES["pointwise"]:
        return _pointwise(labels, record, cut)
    return None


def _both(a: Cut | None, b: Cut | None) -> Cut | None:
    return None if a is None or b is None else a | b


def _all(found: list[Cut | None]) -> Cut | None:
    """The cut of what is zero only when all these are."""
    known = [c for c in found if c is not None]
    return frozenset().union(*known) if known and len(known) == len(found) else None


def _with_shift(
    record: Record, cut: Callable[[Any], Cut | None], *, weight: int, bias: int
) -> Cut | None:
    """Weight and bias of a layer; the bias may be absent."""
    scale, shift = (_argument(record, i, n) for i, n in ((weight, "weight"), (bias, "bias")))
    return cut(scale) if shift is None else _both(cut(scale), cut(shift))


def _argument(record: Record, position: int, name: str) -> Ref | None:
    found = record.args[position] if len(record.args) > position else record.kwargs.get(name)
    return found if isinstance(found, Ref) else None


def _norm(record: Record, cut: Callable[[Any], Cut | None]) -> Cut | None:
    """Scale and shift; without any, a norm of zeros is zero unless it subtracts a stored mean."""
    stored = record.op in ("batch_norm", "instance_norm")
    first = 1 if stored else 2
    scale = _argument(record, first, "weight")
    shift = None if record.op == "rms_norm" else _argument(record, first + 1, "bias")
    if scale is None:
        return None if stored or shift is not None else cut(record.args[0])
    return cut(scale) if shift is None else _both(cut(scale), cut(shift))


def _factor(labels: Labels, operands: list[Ref], cut: Callable[[Any], Cut | None]) -> Cut | None:
    """Any factor of a product will do: a parameter if there is one, else the last."""
    known = [x for x in operands if cut(x) is not None]
    known.sort(key=labels.is_weight)
    return cut(known[-1]) if known else None


def _pointwise(labels: Labels, record: Record, cut: Callable[[Any], Cut | None]) -> Cut | None:
    """One operand that makes it zero, else all of them together; measured on scalars."""
    operands = list(refs([record.args, record.kwargs]))
    known = {k: c for k, x in enumerate(operands) if (c := cut(x)) is not None}
    alone = [k for k in known if at_zero(labels, record, {k}) == "zero"]
    if alone:
        return known[max(alone, key=lambda k: labels.is_weight(operands[k]))]
    if known and at_zero(labels, record, set(known)) == "zero":
        return _all(list(known.values()))
    return None
