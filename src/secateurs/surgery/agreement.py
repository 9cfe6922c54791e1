"""Does the module form run the same operators as the cut graph would? Compared call by call.

Equal outputs on a few samples do not prove that two functions are the same: a slice bound written
into the user's code may miss a unit that happens to be silent on those samples. So the smaller
module is run once more under the recorder, and each operator call is compared with what the dense
call becomes when it is cut: the same operator, the same numbers, the same shapes, and the same
entries in the same places wherever data is only moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import SoundnessError
from secateurs.graph.commute import MOVES, LabelSizes, moved, positions
from secateurs.graph.labels import OPTIONS, Labels
from secateurs.graph.records import Record, Ref, Tape, refs
from secateurs.graph.rewriting import Call, CannotRewrite, Scaled, by_name, rewritten
from secateurs.graph.rules import interpret
from secateurs.graph.tape import record_run
from secateurs.surgery.rewriter import removed_atoms
from secateurs.types import Inputs, Plan

__all__ = ["disagreement"]


def disagreement(model: nn.Module, small: nn.Module, plan: Plan, example_inputs: Inputs) -> str:
    """The first operator call of `small` that is not the cut call of `model`; "" if all are.

    Args:
        model: the masked dense model, so that what depends on values goes the same way.
        small: the same code over sliced tensors.
        plan: what was removed.
        example_inputs: what to run.

    Raises:
        SoundnessError: the plan does not fit the model.
    """
    cut = record_run(small, example_inputs, plan.outputs)
    known = _at_hand(plan, cut)
    if known is not None and not _first_difference(known, cut):
        return ""
    return _first_difference(_sizes(record_run(model, example_inputs, plan.outputs), plan), cut)


def _first_difference(known: LabelSizes, cut: Tape) -> str:
    records = known.labels.tape.records
    if len(records) != len(cut.records):
        return f"it makes {len(cut.records)} operator calls instead of {len(records)}"
    for a, b in zip(records, cut.records, strict=True):
        if why := _differs(a, b, known, cut):
            return f"{b.where}: {why}"
    return ""


def _at_hand(plan: Plan, cut: Tape) -> LabelSizes | None:
    """What the trace of the plan's graph knows, if it ran on inputs of the same sizes."""
    labels = getattr(plan.detail, "labels", None)
    if plan.layers or not isinstance(labels, Labels) or labels.tape.front_end != cut.front_end:
        return None
    inputs = [
        [(v.shape, v.dtype) for v in t.values if v.source == "input"] for t in (labels.tape, cut)
    ]
    if inputs[0] != inputs[1]:
        return None
    try:
        return LabelSizes(labels, removed_atoms(labels, plan.kept))
    except SoundnessError:  # of an earlier plan for another graph
        return None


def _sizes(dense: Tape, plan: Plan) -> LabelSizes:
    """What stays of every value, under the options with which the plan was made."""
    problem: SoundnessError | None = None
    for options in OPTIONS:
        labels = interpret(dense, options)
        try:
            return LabelSizes(labels, removed_atoms(labels, plan.kept))
        except SoundnessError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _differs(a: Record, b: Record, known: LabelSizes, cut: Tape) -> str:
    if len(a.outputs) != len(b.outputs):
        return f"{b.op} is called instead of {a.op}"
    for out, small in zip(a.outputs, b.outputs, strict=True):
        shape = known.shape(out)
        stays = tuple(
            n if (k := known.keep(out, d)) is None else int(k.sum()) for d, n in enumerate(shape)
        )
        if stays != cut.values[small].shape:
            return f"it returns shape {cut.values[small].shape} instead of {stays}"
    if a.op in MOVES and b.op == a.op and a.outputs:
        return _moves_elsewhere(a, b, known, cut)
    try:
        outs = [Ref(o) for o in a.outputs]
        call = rewritten(a.op, Call(a.fn, a.args, a.kwargs), outs, known)
    except CannotRewrite as error:
        return str(error)
    if call.after:
        return "it counts only what is left"
    if getattr(call.fn, "_schema", call.fn) != getattr(b.fn, "_schema", b.fn):
        return f"{getattr(call.fn, '__name__', call.fn)} is needed instead"
    mine, theirs = (_numbers(c) for c in (call, Call(b.fn, b.args, b.kwargs)))
    wrong = [k for k in mine if not _equal(mine[k], theirs.get(k))]
    return f"{wrong[0]} is {theirs.get(wrong[0])} instead of {mine[wrong[0]]}" if wrong else ""


def _moves_elsewhere(a: Record, b: Record, known: LabelSizes, cut: Tape) -> str:
    """Whether the small call, on what is left, puts entries elsewhere than the dense one."""
    source, small_source = next(refs(a.args)), next(refs(b.args))
    partners = list(zip(refs([a.args, a.kwargs]), refs([b.args, b.kwargs]), strict=True))
    for factor in known.labels.factors(source):
        if not known.removed[factor.labels].any():
            continue
        numbered = positions(factor, known.shape(source))
        dense = {big.id: _blank(known.shape(big)) for big, _ in partners} | {source.id: numbered}
        small = {s.id: _blank(cut.values[s.id].shape) for _, s in partners}
        small[small_source.id] = known.cut(source, numbered)
        try:
            whole = moved(Call(a.fn, a.args, a.kwargs), dense)
            left = moved(Call(b.fn, b.args, b.kwargs), small)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            return str(error).strip().splitlines()[0]
        for out, x, y in zip(a.outputs, whole, left, strict=True):
            if not torch.equal(known.cut(out, x), y):
                return "it moves other entries than the dense model does"
    return ""


def _blank(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(1, dtype=torch.float64).expand(shape)


def _numbers(call: Call) -> Mapping[str, Any]:
    """The arguments of a call that are no tensors, by name."""
    schema = getattr(call.fn, "_schema", None)
    if schema is None:
        return {}
    return {k: v for k, v in by_name(schema, call).items() if not any(refs([v]))}


def _equal(a: Any, b: Any) -> bool:
    """Numbers up to rounding; everything else exactly."""
    if isinstance(a, Scaled):
        return isinstance(b, int) and a.size * a.kept // a.dense == b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)
