"""How the sizes written into an operator call follow the removal of positions: pure functions.

    rewritten(op, call, outputs, known) -> Call

Tensors are opaque handles; all that is asked of them is `Known`: their dense shape, and which
positions of a dimension stay. So one function serves the captured graph that is rewritten and the
check on labels alone (`commute`), whichever front end made the call. Sizes that are known only at
run time are opaque too: where one must shrink, the result holds a `Scaled`.

A handler returns None where nothing changes, and raises `CannotRewrite` where nothing would help.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from secateurs.graph import recounting, resizing  # noqa: F401  (their handlers register themselves)
from secateurs.graph.calls import (
    HANDLERS,
    Arguments,
    BoolArray,
    Call,
    CannotRewrite,
    Known,
    Positions,
    Scaled,
    SizeOf,
    by_name,
    from_names,
    kept_groups,
)

__all__ = [
    "BoolArray",
    "Call",
    "CannotRewrite",
    "Known",
    "Positions",
    "Scaled",
    "SizeOf",
    "by_name",
    "kept_groups",
    "rewritten",
]

aten = torch.ops.aten


def rewritten(op: str, call: Call, outputs: Sequence[Any], known: Known) -> Call:
    """The call for what stays.

    Args:
        op: canonical operator name, as in `Record.op`.
        call: the dense call; `fn` is an operator with a schema.
        outputs: handles of the tensors that it makes.
        known: shapes, and what stays.

    Raises:
        CannotRewrite: no rewriting fits.
    """
    found = HANDLERS.get(op)
    schema = getattr(call.fn, "_schema", None)
    if schema is None:
        return call
    arguments = by_name(schema, call)
    if found is None:
        return _selected(arguments, call, outputs, known)
    changed = found(arguments, outputs, known)
    if changed is None:
        return call
    if isinstance(changed, Call):
        return changed
    return from_names(schema, call, changed)


def _selected(arguments: Arguments, call: Call, outputs: Sequence[Any], known: Known) -> Call:
    """A tensor made from numbers alone (arange, linspace, eye): what stays of it is picked."""
    made = _is_made_of_numbers(arguments, known)
    if not made or len(outputs) != 1:
        return call
    after = _picks(outputs[0], known)
    return replace(call, after=after) if after else call


def _picks(out: Any, known: Known) -> tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]:
    """`index_select` along each dimension of a tensor that loses something."""
    masks = [(d, known.keep(out, d)) for d in range(len(known.shape(out)))]
    return tuple(
        (aten.index_select.default, (d, Positions(np.flatnonzero(m))))
        for d, m in masks
        if m is not None
    )


def _is_made_of_numbers(arguments: Arguments, known: Known) -> bool:
    made_by = torch.dtype, torch.device, torch.layout, torch.memory_format
    plain = (int, float, bool, str, type(None), *made_by)

    def number(x: Any) -> bool:
        return all(map(number, x)) if isinstance(x, (list, tuple)) else isinstance(x, plain)

    return all(number(x) for x in arguments.values())
