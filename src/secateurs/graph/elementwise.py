"""Rules for elementwise operators, for tensors made by size, and for prelu.

Partners of one elementwise operator share their fate, with broadcasting. Whether zero stays zero is
measured on scalars, so that no table of activation functions is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import rule

__all__ = ["CREATE", "at_zero"]

POINTWISE = (
    "hardswish log_sigmoid multiply divide subtract floor_divide true_divide __and__ __or__ "
    "__xor__ fill copy rrelu rrelu_with_noise relu6 selu celu silu mish softplus softsign "
    "tanhshrink hardtanh hardshrink softshrink threshold square clip clamp logical_and logical_or "
    "logical_not masked_fill where addcmul addcdiv lerp rsub pow float_power arctan2 fix negative "
    "absolute greater less greater_equal less_equal not_equal nan_to_num isnan isinf isfinite "
    "fake_quantize dequantize _softplus glu_jvp zero special_expit special_expm1 special_log1p "
    "special_xlogy nextafter hypot polar complex real imag maximum minimum sgn"
).split()
LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like".split()
CREATE = (
    "zeros ones full empty new_zeros new_ones new_full new_empty rand randn new_empty_strided"
).split()
COUNT = "arange linspace logspace eye tril_indices triu_indices randperm randint".split()


@dataclass(frozen=True)
class _Operand:
    ref: Ref
    shape: tuple[int, ...]
    shift: int  # dims are aligned to the right
    factors: tuple[Factor, ...]

    def covers(self, dims: Sequence[int]) -> Factor | None:
        return next((f for f in self.factors if f.dims == tuple(dims)), None)

    def own(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Output dims as dims of the operand."""
        return tuple(d - self.shift for d in dims)

    def full(self, dim: int) -> bool:
        """Whether the operand has more than one entry along this output dim."""
        return dim >= self.shift and self.shape[dim - self.shift] > 1


def _aligned(labels: Labels, ref: Ref, rank: int) -> _Operand:
    shape = labels.value(ref).shape
    shift = rank - len(shape)
    moved = tuple(replace(f, dims=tuple(d + shift for d in f.dims)) for f in labels.factors(ref))
    return _Operand(ref, shape, shift, moved)


@rule("pointwise", *POINTWISE)
def _pointwise(labels: Labels, record: Record) -> None:
    """Tie operands with broadcasting; whether zero stays zero is measured, not tabulated."""
    out = record.outputs[0]
    operands = list(refs([record.args, record.kwargs]))
    rank = len(labels.value(out).shape)
    _coarsen_clashes(labels, operands, rank, record)
    aligned = [_aligned(labels, r, rank) for r in operands]
    blocks = {f.dims: None for o in aligned for f in o.factors}
    result = []
    for dims in blocks:
        holders = [(k, f) for k, o in enumerate(aligned) if (f := o.covers(dims)) is not None]
        first = holders[0][1]
        for _, other in holders[1:]:
            labels.tie(first.labels, other.labels, "elementwise partners differ", record.where)
        for o in aligned:
            if o.covers(dims) is None and any(o.full(d) for d in dims):
                why = "it meets a tensor whose entries cannot be removed"
                labels.pin(first.labels, why, record.where)
        zeros = {k for k, f in holders if f.z}
        outcome = at_zero(labels, record, zeros)
        if outcome == "undefined":
            why = f"{record.op} of a removed unit would be infinite or undefined"
            labels.pin(first.labels, why, record.where)
        z = outcome == "zero"
        alone = [k for k in sorted(zeros) if z and at_zero(labels, record, {k}) == "zero"][:1]
        for k, f in holders:
            labels.pass_on(f.labels)
            if labels.value(operands[k]).source == "parameter":
                labels.make(f.labels, record)
        producers = frozenset().union(*(f.producers for _, f in holders))
        if alone:
            own = next(f.producers for k, f in holders if k == alone[0])
            labels.inner |= producers - own
            producers = own
        merged = first.labels
        for _, other in holders[1:]:
            merged = np.minimum(merged, other.labels)  # a pinned partner shows
        result.append(Factor(dims, merged, z, producers))
    labels.assign(out, result)


def _coarsen_clashes(labels: Labels, operands: list[Ref], rank: int, record: Record) -> None:
    """Where a partner spans part of a joint factor, tie the joint factor down: to the dims on
    which the partners broadcast, or to those on which they carry labels of their own; heads rather
    than positions in a head, unless the user asked for these."""
    for ref in operands:
        me = _aligned(labels, ref, rank)
        for factor in me.factors:
            if len(factor.dims) < 2:
                continue
            others = [_aligned(labels, r, rank) for r in operands if r is not ref]
            partners = [o for o in others if any(o.full(d) for d in factor.dims)]
            if all(o.covers(factor.dims) is not None for o in partners):
                continue
            free = [d for d in factor.dims if not any(o.full(d) for o in partners)]
            shared = [
                d
                for d in factor.dims
                if d not in free
                and all(not o.full(d) or any(d in f.dims for f in o.factors) for o in partners)
            ]
            outer = labels.options.heads == "head"
            choices = [c for c in (free, shared) if c] or [[factor.dims[0 if outer else -1]]]
            best = min(choices) if outer else max(choices, key=lambda c: c[-1])
            now = next(f for f in labels.factors(ref) if f.dims == me.own(factor.dims))
            coarse = labels.narrow(ref, now, me.own(best))
            if not outer:
                labels.heads.append((coarse.labels, "head_dim"))


Outcome = Literal["zero", "other", "undefined"]
_DRAWS = (-1.7, 0.6, 2.3, -0.4, 1.1, 3.2, -2.6)
_OUTCOMES: dict[Any, Outcome] = {}


def at_zero(labels: Labels, record: Record, zeros: set[int]) -> Outcome:
    """What the operator gives where these operands are zero, whatever the others are.

    Measured on scalars with a few draws. "undefined": not finite or an error, where the same draw
    without zeros is fine (a logarithm, a division by what may be removed).
    """
    if not zeros:
        return "other"
    dtypes = tuple(labels.value(r).dtype for r in refs([record.args, record.kwargs]))
    key = (record.fn, dtypes, frozenset(zeros), repr(_without_ids([record.args, record.kwargs])))
    if key not in _OUTCOMES:
        _OUTCOMES[key] = _measure(record, zeros, dtypes)
    return _OUTCOMES[key]


def _without_ids(tree: Any) -> Any:
    if isinstance(tree, Ref):
        return "tensor"
    if isinstance(tree, dict):
        return {k: _without_ids(v) for k, v in tree.items()}
    return [_without_ids(v) for v in tree] if isinstance(tree, (list, tuple)) else tree


def _measure(record: Record, zeros: set[int], dtypes: tuple[torch.dtype, ...]) -> Outcome:
    found = []
    for draw in range(len(_DRAWS)):
        if _on_scalars(record, set(), dtypes, draw) is None:
            continue  # outside the operator's domain with or without zeros
        result = _on_scalars(record, zeros, dtypes, draw)
        if result is None:
            return "undefined"
        found.append(bool((result == 0).all()))
    return "zero" if found and all(found) else "other"


def _on_scalars(
    record: Record, zeros: set[int], dtypes: tuple[torch.dtype, ...], draw: int
) -> Tensor | None:
    """The operator on one scalar per operand; None if it fails or is not finite."""
    count = iter(range(len(dtypes)))

    def scalar(x: Any) -> Any:
        if isinstance(x, Ref):
            k = next(count)
            number = 0.0 if k in zeros else _DRAWS[(draw + 5 * k) % len(_DRAWS)]
            if dtypes[k] is torch.bool:
                number = float(k not in zeros and (draw + k) % 2)
            return torch.tensor(number).to(dtypes[k])
        if isinstance(x, (list, tuple)):
            return type(x)(scalar(i) for i in x)
        return x

    with torch.random.fork_rng(devices=[]):
        try:
            args = [scalar(a) for a in record.args]
            result = record.fn(*args, **{k: scalar(v) for k, v in record.kwargs.items()})
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
    if not isinstance(result, Tensor) or not bool(torch.isfinite(result).all()):
        return None
    return result


@rule(*LIKE)
def _like(labels: Labels, record: Record) -> None:
    source = next(refs(record.args))
    z = record.op == "zeros_like"
    kept = [replace(f, z=z, producers=frozenset()) for f in labels.factors(source)]
    labels.assign(record.outputs[0], kept)


@rule(*CREATE)
def _create(labels: Labels, record: Record) -> None:
    """Tensors made by size: their sizes can be rewritten, so they get atoms of their own."""
    out = labels.value(record.outputs[0])
    for template in refs(record.args):
        labels.ignore(template)
    labels.add_axes(out, stored=False, z=record.op in ("zeros", "new_zeros"))


@rule(*COUNT)
def _count(labels: Labels, record: Record) -> None:
    """Constants that the model computes: the entries that stay can be picked from them."""
    out = labels.value(record.outputs[0])
    labels.add_axes(out, stored=False, z=False)


@rule("prelu")
def _prelu(labels: Labels, record: Record) -> None:
    x, weight = list(refs(record.args))[:2]
    slope = labels.single(weight, 0)
    here = labels.single(x, 1) if len(labels.value(x).shape) > 1 else None
    if slope is not None and here is not None:
        labels.tie(here.labels, slope.labels, "its slope is shared", record.where)
    elif slope is not None:
        labels.pin(slope.labels, "it meets a dimension that is not prunable", record.where)
    elif here is not None and prod(labels.value(weight).shape) > 1:
        labels.pin(here.labels, "it meets a tensor whose entries cannot be removed", record.where)
    labels.assign(record.outputs[0], labels.factors(x))
