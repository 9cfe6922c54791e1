"""What remains of a model when units go: parameters and MACs, exactly. A leaf.

The cost of a term is the product over its dimensions of the entries that remain. `cost_of` answers
for given units; `CostCurve` fixes the order in which each target loses its units and then answers
for counts, fast enough for a search over allocations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from secateurs.errors import ConfigError, choose
from secateurs.types import CostTerm, Graph, IntArray, WeightTarget

__all__ = ["BoolArray", "Cost", "CostCurve", "cost_of", "cost_of_kept", "dense_cost"]

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Attributes:
        params: parameters; non-zero ones where single weights were removed.
        macs: multiply-adds for one sample.
    """

    params: int
    macs: int


def dense_cost(graph: Graph) -> Cost:
    """The cost of the whole model.

    Example:
        >>> from secateurs.types import CostDim, CostTerm
        >>> weight = CostTerm("fc.weight", (CostDim(3), CostDim(4)), uses=1.0)
        >>> dense_cost(Graph({}, costs=(weight,)))
        Cost(params=12, macs=12)
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
    params, macs = 0, 0.0
    gone = {n: ~marks for n, marks in kept.items()}
    for term in graph.costs:
        target = graph.targets.get(term.name)
        if term.name in kept and isinstance(target, WeightTarget):
            left = _weights_left(graph, target, kept)
            left *= _product(replace(term, dims=term.dims[len(target.shape) :]), gone)
        else:
            left = _product(term, gone)
        params += left if term.is_parameter else 0
        macs += left * term.uses
    return Cost(params, round(macs))


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


class CostCurve:
    """Cost as a function of counts, for targets that lose their units in a fixed order.

    Args:
        graph: where the terms come from.
        orders: target -> (n_units,) all its units, the last to go first.

    Raises:
        ConfigError: structural and weight targets of the same tensor, which interact.
    """

    def __init__(self, graph: Graph, orders: Mapping[str, IntArray]) -> None:
        self._weights = {n for n in orders if isinstance(graph.targets[n], WeightTarget)}
        if self._weights and len(self._weights) < len(orders):
            raise ConfigError(
                "weights and structural units are mixed; prune them in two stages, each with its "
                "own budget"
            )
        self._orders = orders
        self._fixed = np.zeros(2)
        self._terms: list[tuple[float, float, list[tuple[int, list[tuple[str, IntArray]]]]]] = []
        for term in graph.costs:
            self._add(term)

    def _add(self, term: CostTerm) -> None:
        """Remember for each dimension how many entries the top c units of a target own."""
        is_parameter = float(term.is_parameter)
        if term.name in self._weights:
            size = int(np.prod([d.size for d in term.dims], dtype=np.int64))
            line = np.arange(size + 1, dtype=np.int64) - size
            self._terms.append((is_parameter, term.uses, [(size, [(term.name, line)])]))
            return
        dims = []
        for dim in term.dims:
            lost = []
            for target, owned in dim.owned.items():
                if target in self._orders:
                    held = np.concatenate([[0], np.cumsum(owned[self._orders[target]])])
                    lost.append((target, (held - held[-1]).astype(np.int64)))
            dims.append((dim.size, lost))
        if any(lost for _, lost in dims):
            self._terms.append((is_parameter, term.uses, dims))
        else:
            left = int(np.prod([size for size, _ in dims], dtype=np.int64))
            self._fixed += np.array([is_parameter * left, term.uses * left])

    def __call__(self, counts: Mapping[str, int]) -> Cost:
        """The cost when each target keeps its first `counts[target]` units; every target named."""
        params, macs = self._fixed
        for is_parameter, uses, dims in self._terms:
            left = 1
            for size, lost in dims:
                left *= size + sum(int(line[counts[target]]) for target, line in lost)
            params += is_parameter * left
            macs += uses * left
        return Cost(round(params), round(macs))
