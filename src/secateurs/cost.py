"""What remains of a model when units go: parameters, MACs and bytes, exactly. A leaf.

The cost of a term is the product over its dimensions of the entries that remain. `cost_of` answers
for given units; `CostCurve` fixes the order in which each target loses its units and then answers
for counts, fast enough for a search over allocations.

Bytes are those of the tensors in `model.safetensors` as `save` writes it in the module form, every
name of a tied tensor with its own copy; the header (names, shapes) is left out, some hundred bytes
for each tensor. A tensor of which single weights went is stored as `packed_bytes` says. Others
count in full: one that holds many zeros of its own is packed as well, and the file is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from secateurs.errors import ConfigError, choose
from secateurs.types import CostDim, CostTerm, Graph, IntArray, WeightTarget

__all__ = [
    "BoolArray",
    "Cost",
    "CostCurve",
    "Stored",
    "cost_of",
    "cost_of_kept",
    "dense_cost",
    "without",
    "packed_bytes",
]

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Attributes:
        params: parameters; non-zero ones where single weights were removed.
        macs: multiply-adds for one sample.
        bytes: tensors of the stored model; 0 where the graph does not know what is stored.
    """

    params: int
    macs: int
    bytes: int = 0


def dense_cost(graph: Graph) -> Cost:
    """The cost of the whole model.

    Example:
        >>> from secateurs.types import CostDim, CostTerm
        >>> weight = CostTerm("fc.weight", (CostDim(3), CostDim(4)), uses=1.0)
        >>> dense_cost(Graph({}, costs=(weight,)))
        Cost(params=12, macs=12, bytes=0)
    """
    return cost_of_kept(graph, {})


def cost_of(graph: Graph, counts: Mapping[str, int]) -> Cost:
    """The cost when each named target keeps that many units; other targets keep all.

    Raises:
        ConfigError: an unknown target, a count out of range, or units of unequal size, for which a
            count says too little (use `cost_of_kept`).
    """
    uneven = {
        target
        for term in graph.costs
        for dim in term.dims
        for target, owned in dim.owned.items()
        if target in counts and 0 < counts[target] < len(owned) and len(np.unique(owned)) > 1
    }
    if uneven:
        raise ConfigError(
            f"units of {', '.join(sorted(uneven))} differ in size, so a count does not give a "
            "cost; pass the kept units to cost_of_kept"
        )
    kept = {}
    for name, count in counts.items():
        n = graph.targets[choose(name, graph.targets, "target")].n_units
        if not 0 <= count <= n:
            raise ConfigError(f"{name} has {n} units, it cannot keep {count}")
        kept[name] = np.arange(n) < count
    return cost_of_kept(graph, kept)


def cost_of_kept(graph: Graph, kept: Mapping[str, BoolArray]) -> Cost:
    """The cost when each named target keeps the units marked True; other targets keep all.

    For a weight target the marks are its elements in row-major order: what counts are the kept
    elements in rows and columns that remain.

    Raises:
        ConfigError: an unknown target, or marks of the wrong length.
    """
    for name, marks in kept.items():
        n = graph.targets[choose(name, graph.targets, "target")].n_units
        if marks.shape != (n,) or marks.dtype != np.bool_:
            raise ConfigError(
                f"kept[{name!r}] must be a bool array of shape ({n},), got {marks.dtype} of shape "
                f"{marks.shape}"
            )
    params, macs, stored = 0, 0.0, 0
    gone = {n: ~marks for n, marks in kept.items()}
    for term in graph.costs:
        left = size = _product(term, gone)
        target = graph.targets.get(term.name)
        if term.name in kept and isinstance(target, WeightTarget):
            left = _weights_left(graph, target, kept)
            left *= _product(replace(term, dims=term.dims[len(target.shape) :]), gone)
            stored += packed_bytes(size, left, term.item_bytes, len(target.shape), term.names)
        else:
            stored += size * term.item_bytes * term.names
        params += left if term.is_parameter else 0
        macs += left * term.uses
    return Cost(params, round(macs), stored)


SPARSE_BELOW = 0.9
SMALL = 64


def packed_bytes(size: int, kept: int, item_bytes: int, n_dims: int, names: int = 1) -> int:
    """Bytes of a tensor of `size` elements in the file when only `kept` of them are not zero.

    Below a density of 0.9 a bit for each element, the values, and the shape; else, and for fewer
    than 64 elements, the dense tensor. The mask of what was removed adds a bit for each element.
    0 for what is not stored (`item_bytes` 0).

    Example:
        >>> packed_bytes(800, 800, 4, 2), packed_bytes(800, 80, 4, 2)
        (3200, 536)
    """
    if not item_bytes:
        return 0
    bits = -(-size // 8)
    mask = 0 if kept == size else bits
    if kept >= _dense_from(size):
        return names * size * item_bytes + mask
    return names * (bits + kept * item_bytes + 8 * n_dims) + mask


@cache
def _dense_from(size: int) -> int:
    """Fewest values with which a tensor is stored as it is."""
    if size < SMALL:
        return 0
    kept = int(SPARSE_BELOW * size)
    while float(np.float32(kept) / np.float32(size)) < SPARSE_BELOW:  # a mean in single precision
        kept += 1
    return kept


def _lower_bytes(size: int, kept: int, item_bytes: int, n_dims: int, names: int) -> int:
    """Fewest bytes with at least `kept` values: a few zeros cost more than they save."""
    least = packed_bytes(size, kept, item_bytes, n_dims, names)
    return min(least, packed_bytes(size, size, item_bytes, n_dims, names))


def _upper_bytes(size: int, kept: int, item_bytes: int, n_dims: int, names: int) -> int:
    """Most bytes with at most `kept` values."""
    turns = {kept, min(kept, _dense_from(size) - 1), min(kept, size - 1)}
    return max(packed_bytes(size, k, item_bytes, n_dims, names) for k in turns if k >= 0)


def _product(term: CostTerm, gone: Mapping[str, BoolArray]) -> int:
    left = 1
    for dim in term.dims:
        owned = (o[gone[t]].sum() for t, o in dim.owned.items() if t in gone)
        left *= dim.size - int(sum(owned))
    return left


def _weights_left(graph: Graph, target: WeightTarget, kept: Mapping[str, BoolArray]) -> int:
    """Kept elements of a weight target that lie in no removed row or column."""
    mask = kept[target.name].reshape(target.shape).copy()
    for group in graph.groups([t.kind for t in graph.targets.values() if t.kind != "weight"]):
        if group.name not in kept:
            continue
        for member in group.members:
            if member.tensor == target.name:
                gone = member.index[~kept[group.name][member.unit]]
                mask[(slice(None),) * member.dim + (gone,)] = False
    return int(mask.sum())


def without(graph: Graph, removed: Mapping[str, IntArray]) -> Graph:
    """The same graph with the costs of what these structural units leave.

    Args:
        graph: dense.
        removed: group target -> its removed units; it no longer takes part in any cost.

    Example:
        >>> from secateurs.types import CostDim, CostTerm
        >>> weight = CostTerm("fc.weight", (CostDim(4, {"a": np.array([1, 3])}), CostDim(5)))
        >>> dense_cost(without(Graph({}, costs=(weight,)), {"a": np.array([1])})).params
        5
    """

    def left(dim: CostDim) -> CostDim:
        gone = sum(int(owned[removed[t]].sum()) for t, owned in dim.owned.items() if t in removed)
        return CostDim(dim.size - gone, {t: o for t, o in dim.owned.items() if t not in removed})

    terms = tuple(replace(t, dims=tuple(map(left, t.dims))) for t in graph.costs)
    return replace(graph, costs=terms)


Stored = Literal["exact", "at_least", "at_most"]


@dataclass(frozen=True)
class _Weights:
    """One tensor whose single weights are targets."""

    name: str
    size: int
    n_dims: int
    term: CostTerm


class CostCurve:
    """Cost as a function of counts, for targets that lose their units in a fixed order.

    Args:
        graph: where the terms come from.
        orders: target -> (n_units,) all its units, the last to go first.

    Raises:
        ConfigError: structural and weight targets of the same tensor, which interact.
    """

    def __init__(self, graph: Graph, orders: Mapping[str, IntArray]) -> None:
        weights = {n for n in orders if isinstance(graph.targets[n], WeightTarget)}
        if weights and len(weights) < len(orders):
            raise ConfigError(
                "weights and structural units are mixed; prune them in two stages, each with its "
                "own budget"
            )
        self._orders = orders
        self._fixed = np.zeros(3)
        self._weights: list[_Weights] = []
        self._dims: dict[tuple[object, ...], int] = {}
        self._lost: list[tuple[int, list[tuple[str, IntArray]]]] = []
        self._terms: list[tuple[FloatArray, tuple[int, ...]]] = []
        for term in graph.costs:
            if term.name in weights:
                target = graph.targets[term.name]
                size = int(np.prod([d.size for d in term.dims], dtype=np.int64))
                n_dims = len(target.shape) if isinstance(target, WeightTarget) else 0
                self._weights.append(_Weights(term.name, size, n_dims, term))
            else:
                self._add(term)

    def _add(self, term: CostTerm) -> None:
        """Remember for each dimension how many entries the top c units of a target own."""
        each = np.array([term.is_parameter, term.uses, term.item_bytes * term.names], float)
        fixed, dims = 1, []
        for dim in term.dims:
            owned = {t: o for t, o in dim.owned.items() if t in self._orders}
            if owned:
                dims.append(self._dim(dim.size, owned))
            else:
                fixed *= dim.size
        if dims:
            self._terms.append((each * fixed, tuple(dims)))
        else:
            self._fixed += each * fixed

    def _dim(self, size: int, owned: Mapping[str, IntArray]) -> int:
        """The number of a dimension; equal ones are worked out once."""
        key = (size, *((name, own.tobytes()) for name, own in sorted(owned.items())))
        if key not in self._dims:
            lost = []
            for name, own in owned.items():
                held = np.concatenate([[0], np.cumsum(own[self._orders[name]])])
                lost.append((name, (held - held[-1]).astype(np.int64)))
            self._dims[key] = len(self._lost)
            self._lost.append((size, lost))
        return self._dims[key]

    def __call__(self, counts: Mapping[str, int], stored: Stored = "exact") -> Cost:
        """The cost when each target keeps its first `counts[target]` units; every target named.

        Args:
            stored: the bytes of a tensor rise when the first few weights go, since their mask is
                stored as well. "at_least" and "at_most" bound them by what never falls as a count
                rises: the fewest for as many weights or more, the most for as many or fewer.
        """
        left = [size + sum(int(line[counts[t]]) for t, line in lost) for size, lost in self._lost]
        params, macs, held = self._fixed
        for (per_param, per_mac, per_byte), dims in self._terms:
            n = 1
            for dim in dims:
                n *= left[dim]
            params += per_param * n
            macs += per_mac * n
            held += per_byte * n
        rule = _BYTES[stored]
        for w in self._weights:
            kept = counts[w.name]
            params += kept * w.term.is_parameter
            macs += kept * w.term.uses
            held += rule(w.size, kept, w.term.item_bytes, w.n_dims, w.term.names)
        return Cost(round(params), round(macs), round(held))


_BYTES = {"exact": packed_bytes, "at_least": _lower_bytes, "at_most": _upper_bytes}
