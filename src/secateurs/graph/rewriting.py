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
from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Any, Protocol

import numpy as np
import torch

import secateurs.graph.padded  # noqa: F401  (registers the operators)

__all__ = [
    "HANDLERS",
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

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
aten = torch.ops.aten


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
    return _from_names(schema, call, changed)


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


def _from_names(schema: Any, call: Call, arguments: Arguments) -> Call:
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


def _count(size: Any, keep: BoolArray | None) -> Any:
    """A size for what stays."""
    if keep is None or (isinstance(size, int) and size == -1):
        return size
    kept, dense = int(keep.sum()), len(keep)
    if isinstance(size, int):
        return kept
    common = gcd(kept, dense)
    return Scaled(size, kept // common, dense // common)


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


# -- sizes ---------------------------------------------------------------------------------


@handler(
    "view", "reshape", "_unsafe_view", "expand", "zeros", "ones", "full", "empty", "rand", "randn",
    "new_zeros", "new_ones", "new_full", "new_empty",
)  # fmt: skip
def _sizes(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Operators that take the sizes of their output as a list."""
    name = "shape" if "shape" in a else "size"
    if not isinstance(a.get(name), (list, tuple)):
        return None
    old = list(a[name])
    new = [_count(size, known.keep(outs[0], d)) for d, size in enumerate(old)]
    return None if new == old else {**a, name: new}


@handler("view_as", "reshape_as", "expand_as")
def _like(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
    """Explicit sizes, unless the template loses the same as the output."""
    other, out = a["other"], outs[0]
    rank = len(known.shape(out))
    pairs = [(known.keep(out, d), known.keep(other, d)) for d in range(rank)]
    if all(_equal(x, y) for x, y in pairs):
        return None
    sizes: list[Any] = []
    for d, (mine, theirs) in enumerate(pairs):
        plain = mine is None and theirs is None
        dense = known.shape(out)[d]
        sizes.append(SizeOf(other, d) if plain else dense if mine is None else int(mine.sum()))
    return Call(aten.expand.default if _expands(a, known) else aten.reshape.default,
                (a["self"], sizes))  # fmt: skip


def _expands(a: Arguments, known: Known) -> bool:
    return prod(known.shape(a["self"])) != prod(known.shape(a["other"]))


def _equal(a: BoolArray | None, b: BoolArray | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


@handler("unflatten")
def _unflatten(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    first = a["dim"] % len(known.shape(a["self"]))
    old = list(a["sizes"])
    new = [_count(size, known.keep(outs[0], first + i)) for i, size in enumerate(old)]
    return None if new == old else {**a, "sizes": new}


@handler("repeat", "tile")
def _repeat(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Whole copies may go; what is inside a copy follows the input."""
    name = "repeats" if "repeats" in a else "dims"
    old = list(a[name])
    shape, out = known.shape(a["self"]), outs[0]
    rank = len(known.shape(out))
    lead = rank - len(old)  # tile may name fewer than there are
    new = list(old)
    for i in range(len(old)):
        d = lead + i
        keep, at = known.keep(out, d), d - (rank - len(shape))
        if keep is None:
            continue
        inside = known.keep(a["self"], at) if at >= 0 else None
        copies = keep.reshape(-1, shape[at] if at >= 0 else 1)
        new[i] = _copies(old[i], copies, inside)
    return None if new == old else {**a, name: new}


def _copies(count: Any, copies: BoolArray, inside: BoolArray | None) -> Any:
    """How many copies (rows of a mask) stay, if each is the input as it is left."""
    whole = np.asarray(copies.any(axis=1), dtype=np.bool_)
    pattern = np.ones(copies.shape[1], dtype=np.bool_) if inside is None else inside
    if not (copies[whole] == pattern).all():
        raise CannotRewrite("its copies lose different entries")
    return count if whole.all() else _count(count, whole)


@handler("repeat_interleave")
def _interleave(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    if not isinstance(a.get("repeats"), int) or a["dim"] is None:
        return None
    shape = known.shape(a["self"])
    d = a["dim"] % len(shape)
    keep = known.keep(outs[0], d)
    if keep is None:
        return None
    copies = keep.reshape(shape[d], -1).T
    repeats = _copies(a["repeats"], copies, known.keep(a["self"], d))
    return {**a, "repeats": repeats, "output_size": None}


# -- parts ---------------------------------------------------------------------------------


@handler(
    "chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes",
)  # fmt: skip
def _split(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
    """By the number of positions left in each part."""
    if known.keep(a["self"], a["dim"]) is None:
        return None
    d = a["dim"] % len(known.shape(a["self"]))
    kept = [known.keep(out, d) for out in outs]
    counts = [
        known.shape(out)[d] if keep is None else int(keep.sum())
        for out, keep in zip(outs, kept, strict=True)
    ]
    return Call(aten.split_with_sizes.default, (a["self"], counts, d))


@handler("unbind")
def _unbind(a: Arguments, outs: Sequence[Any], known: Known) -> None:
    if known.keep(a["self"], a["dim"]) is not None:
        raise CannotRewrite("it would return fewer tensors")


@handler("slice", "slice_scatter", "narrow", "select", "select_scatter")
def _bounds(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """An index becomes the number of positions kept before it."""
    keep = known.keep(a["self"], a["dim"])
    if keep is None:
        return None
    if a.get("step", 1) != 1:
        raise CannotRewrite("it is sliced with a step")
    if "length" in a:
        _whole(a["start"], a["length"])
        start = a["start"] % len(keep) if a["start"] < 0 else a["start"]
        end = start + a["length"]
        return {**a, "start": _before(start, keep), "length": int(keep[start:end].sum())}
    if "index" in a:
        _whole(a["index"])
        at = a["index"] % len(keep)
        if not keep[at]:
            raise CannotRewrite(f"its index {at} was removed")
        return {**a, "index": int(keep[:at].sum())}
    bounds = {k: a[k] for k in ("start", "end") if a[k] is not None}
    _whole(*bounds.values())
    return {**a, **{k: _before(v, keep) for k, v in bounds.items()}}


def _whole(*bounds: Any) -> None:
    if not all(isinstance(b, int) for b in bounds):
        raise CannotRewrite("its bounds are computed at run time")


def _before(bound: int, keep: BoolArray) -> int:
    """Positions kept before a bound, which may be negative or too large."""
    bound = max(0, bound + len(keep)) if bound < 0 else min(bound, len(keep))
    return int(keep[:bound].sum())


@handler("squeeze")
def _squeeze(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
    """Name the dimensions that are squeezed: one that has shrunk to a single unit stays."""
    shape = known.shape(a["self"])
    given = np.atleast_1d(np.asarray(a["dim"] if "dim" in a else range(len(shape))))
    dims = [int(d) % max(1, len(shape)) for d in given]
    if all(known.keep(a["self"], d) is None for d in dims):
        return None
    return Call(aten.squeeze.dims, (a["self"], [d for d in dims if shape[d] == 1]))


@handler("pad", "constant_pad_nd")
def _pad(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Padding adds what stays of it; cropping takes off fewer."""
    rank = len(known.shape(a["self"]))
    new = list(a["pad"])
    for i, amount in enumerate(new):
        dim = rank - 1 - i // 2
        keep = known.keep(a["self"], dim)
        made = known.keep(outs[0], dim)
        if (keep is None and made is None) or (isinstance(amount, int) and amount == 0):
            continue
        _whole(amount)
        if a.get("mode", "constant") != "constant":
            raise CannotRewrite(f"padding by {a['mode']} copies entries")
        if amount > 0 and made is not None:
            new[i] = int((made[:amount] if i % 2 == 0 else made[-amount:]).sum())
        elif amount < 0 and keep is not None:
            gone = keep[:-amount] if i % 2 == 0 else keep[amount:]
            new[i] = -int(gone.sum())
    return None if new == list(a["pad"]) else {**a, "pad": new}


@handler("channel_shuffle", "native_channel_shuffle")
def _shuffle(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Whole groups may go, or the same channels of every group."""
    keep = known.keep(a["self"], 1)
    if keep is None:
        return None
    return {**a, "groups": _grouped(keep, a["groups"])}


# -- groups, norms, reductions, attention -----------------------------------------------------


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


def _grouped(keep: BoolArray, groups: int) -> int:
    left = kept_groups(keep, groups)
    counts = keep.reshape(groups, -1).sum(1)
    if left == groups and len(set(counts.tolist())) > 1:
        raise CannotRewrite("its groups lose different numbers of channels")
    return left


@handler(*(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
def _convolution(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    if a["groups"] == 1:
        return None
    rows = known.keep(a["weight"], 0)
    if rows is None:
        channel = len(known.shape(a["input"])) - len(known.shape(a["weight"])) + 1
        rows = known.keep(outs[0], channel)
    return None if rows is None else {**a, "groups": _grouped(rows, a["groups"])}


@handler("group_norm")
def _group_norm(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | Call | None:
    keep = known.keep(a["input"], 1)
    if keep is None:
        return None
    groups, dense = a["num_groups"], len(keep) // a["num_groups"]
    left = _grouped(keep, groups)
    if int(keep.sum()) == left * dense:
        return {**a, "num_groups": left}
    op = torch.ops.secateurs.padded_group_norm.default
    return Call(op, (a["input"], groups, a["weight"], a["bias"], a["eps"], dense))


def _normalized(a: Arguments, known: Known, x: str) -> list[Any] | None:
    """The normalised sizes that are left; None when all are."""
    sizes = list(a["normalized_shape"])
    rank = len(known.shape(a[x]))
    keeps = [known.keep(a[x], rank - len(sizes) + i) for i in range(len(sizes))]
    if all(k is None for k in keeps):
        return None
    return [_count(size, keep) for size, keep in zip(sizes, keeps, strict=True)]


@handler("layer_norm", "rms_norm")
def _norm(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
    sizes = _normalized(a, known, "input")
    if sizes is None:
        return None
    shape = known.shape(a["input"])
    dense = prod(shape[len(shape) - len(sizes) :])
    if "bias" in a:
        op = torch.ops.secateurs.padded_layer_norm.default
        return Call(op, (a["input"], sizes, a["weight"], a["bias"], a["eps"], dense))
    op = torch.ops.secateurs.padded_rms_norm.default
    return Call(op, (a["input"], sizes, a["weight"], a["eps"], dense))


@handler("padded_layer_norm", "padded_rms_norm")
def _padded(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """Pruned once more: the dense size stays."""
    sizes = _normalized(a, known, "x")
    return None if sizes is None else {**a, "normalized_shape": sizes}


def _reduced(a: Arguments, known: Known, x: str = "self") -> tuple[list[int], int, int]:
    """Dimensions of a reduction, how many entries it had, and how many are left."""
    shape = known.shape(a[x])
    given = a.get("dim")
    every = given is None or (isinstance(given, (list, tuple)) and not given)
    dims = range(len(shape)) if every else np.atleast_1d(np.asarray(given)).tolist()
    dims = [int(d) % max(1, len(shape)) for d in dims]
    keeps = [(shape[d], known.keep(a[x], d)) for d in dims]
    left = prod(n if k is None else int(k.sum()) for n, k in keeps)
    return dims, prod(n for n, _ in keeps), left


@handler("mean")
def _mean(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
    """A mean over what stays, times the share that stays."""
    dims, dense, left = _reduced(a, known)
    if left == dense:
        return None
    kwargs = {} if a.get("dtype") is None else {"dtype": a["dtype"]}
    after = ((torch.ops.secateurs.kept_share.default, (left / dense,)),)
    return Call(aten.mean.dim, (a["self"], dims, a.get("keepdim", False)), kwargs, after)


def _spread(
    op: Callable[..., Any], then: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = ()
) -> Handler:
    """Variance over what stays, as over all."""

    def change(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
        dims, dense, left = _reduced(a, known)
        if left == dense:
            return None
        if "unbiased" in a:
            correction = float(a["unbiased"])
        else:
            correction = 1.0 if a["correction"] is None else float(a["correction"])
        common = gcd(left, dense)
        args = (a["self"], dims, correction, a.get("keepdim", False), left // common)
        return Call(op, (*args, dense // common), {}, then)

    return change


HANDLERS["var"] = _spread(torch.ops.secateurs.padded_var.default)
HANDLERS["std"] = _spread(torch.ops.secateurs.padded_var.default, ((aten.sqrt.default, ()),))
HANDLERS["var_mean"] = _spread(torch.ops.secateurs.padded_var_mean.default)


def _extreme(op: Any, limit: Any) -> Handler:
    """The extreme of what stays and of one removed entry, which is zero."""

    def change(a: Arguments, outs: Sequence[Any], known: Known) -> Call | None:
        dims, dense, left = _reduced(a, known)
        if left == dense:
            return None
        args = (a["self"], dims, a.get("keepdim", False))
        return Call(op, args, {}, ((limit, (0,)),), first=len(outs) > 1)

    return change


HANDLERS["amax"] = HANDLERS["max"] = _extreme(aten.amax.default, aten.clamp_min.default)
HANDLERS["amin"] = HANDLERS["min"] = _extreme(aten.amin.default, aten.clamp_max.default)


@handler("scaled_dot_product_attention")
def _attention(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    """The scale of the dense head size is written down."""
    if a["scale"] is not None or known.keep(a["query"], -1) is None:
        return None
    return {**a, "scale": known.shape(a["query"])[-1] ** -0.5}
