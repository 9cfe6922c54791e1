"""How operators that count what is there follow a cut: groups, norms, reductions, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, prod
from typing import Any

import numpy as np
import torch

import secateurs.graph.padded  # noqa: F401  (registers the operators)
from secateurs.graph.calls import (
    HANDLERS,
    Arguments,
    Call,
    CannotRewrite,
    Handler,
    Known,
    grouped,
    handler,
    size_left,
)

__all__: list[str] = []

aten = torch.ops.aten


@handler(*(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
def _convolution(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | None:
    if a["groups"] == 1:
        return None
    rows = known.keep(a["weight"], 0)
    if rows is None:
        channel = len(known.shape(a["input"])) - len(known.shape(a["weight"])) + 1
        rows = known.keep(outs[0], channel)
    if rows is not None and not isinstance(a["groups"], int):
        raise CannotRewrite("its number of groups is known at run time only")
    return None if rows is None else {**a, "groups": grouped(rows, a["groups"])}


@handler("group_norm")
def _group_norm(a: Arguments, outs: Sequence[Any], known: Known) -> Arguments | Call | None:
    keep = known.keep(a["input"], 1)
    if keep is None:
        return None
    groups, dense = a["num_groups"], len(keep) // a["num_groups"]
    left = grouped(keep, groups)
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
    return [size_left(size, keep) for size, keep in zip(sizes, keeps, strict=True)]


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
