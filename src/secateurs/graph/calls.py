"""Operator calls as data, and the registry of how each follows a cut.

A handler is `handler(arguments, outputs, known)`: it returns changed arguments, another call, or
None where nothing changes, and raises `CannotRewrite` where nothing would help. They are in

    resizing     sizes, shapes and parts: views, splits, slices, padding
    recounting   numbers that count what is there: groups, norms, reductions, attention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Protocol

import numpy as np

__all__ = [
    "HANDLERS", "Arguments", "BoolArray", "Call", "CannotRewrite", "Handler", "Known", "Positions",
    "Scaled", "SizeOf", "by_name", "size_left", "from_names", "grouped", "handler", "kept_groups",
]  # fmt: skip

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


class CannotRewrite(Exception):
    """No rewriting of this call fits what was removed; the message says why."""


class Known(Protocol):
    """What is known of tensors."""

    def shape(self, tensor: Any) -> tuple[int, ...]:
        """Dense shape, for the example inputs."""

    def keep(self, tensor: Any, dim: int) -> BoolArray | None:
        """(dense size,) True where a position stays; None when all do."""


@dataclass(frozen=True)
class Scaled:
    """A size that is known at run time only: `size * kept // dense`."""

    size: Any
    kept: int
    dense: int


@dataclass(frozen=True)
class SizeOf:
    """The size of a tensor at run time."""

    tensor: Any
    dim: int


@dataclass(frozen=True, eq=False)
class Positions:
    """A constant index tensor."""

    index: np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Call:
    """An operator call, and what is then applied to its output: `(fn, further arguments)`.

    Attributes:
        first: it makes only the first of the tensors that the dense call makes.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    after: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = ()
    first: bool = False


Arguments = dict[str, Any]
Handler = Callable[[Arguments, Sequence[Any], Known], "Arguments | Call | None"]
"""`handler(arguments by name, outputs, known)`: changed arguments, another call, or None."""
HANDLERS: dict[str, Handler] = {}


def handler(*ops: str) -> Callable[[Handler], Handler]:
    """Register a handler for canonical operator names."""

    def register(fn: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(ops, fn))
        return fn

    return register


def by_name(schema: Any, call: Call) -> Arguments:
    """All arguments of a call by name, defaults included."""
    found: Arguments = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(call.args):
            found[argument.name] = call.args[i]
        elif argument.name in call.kwargs:
            found[argument.name] = call.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value if argument.has_default_value() else None
    return found


def from_names(schema: Any, call: Call, arguments: Arguments) -> Call:
    """The call with the arguments that were given or that are no longer the default."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        value = arguments[argument.name]
        if not argument.kwarg_only and i == len(args):
            needed = i < len(call.args) or not argument.has_default_value()
            if needed or _differs(value, argument.default_value):
                args.append(value)
        elif argument.name in call.kwargs or _differs(value, argument.default_value):
            kwargs[argument.name] = value
    return Call(call.fn, tuple(args), kwargs)


def _differs(value: Any, default: Any) -> bool:
    """Whether an argument must be given; handles are never equal to a default."""
    return type(value) is not type(default) or value != default


def size_left(size: Any, keep: BoolArray | None) -> Any:
    """A size for what stays."""
    if keep is None or (isinstance(size, int) and size == -1):
        return size
    kept, dense = int(keep.sum()), len(keep)
    if isinstance(size, int):
        return kept
    common = gcd(kept, dense)
    return Scaled(size, kept // common, dense // common)


def kept_groups(keep: BoolArray, groups: int) -> int:
    """Groups that are left: fewer if whole groups went, else the same.

    Example:
        >>> kept_groups(np.array([True, True, False, False]), 2)  # the second group went
        1
        >>> kept_groups(np.array([True, False, True, False]), 2)  # one channel of each
        2
    """
    blocks = keep.reshape(groups, -1)
    whole = blocks.all(axis=1)
    return int(whole.sum()) if bool((whole == blocks.any(axis=1)).all()) else groups


def grouped(keep: BoolArray, groups: int) -> int:
    left = kept_groups(keep, groups)
    counts = keep.reshape(groups, -1).sum(1)
    if left == groups and len(set(counts.tolist())) > 1:
        raise CannotRewrite("its groups lose different numbers of channels")
    return left
