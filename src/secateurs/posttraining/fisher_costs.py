"""How many units each target keeps so that the least importance is lost within a budget.

Where the cost of a unit does not depend on how many others stay, and there are few different costs
(a head, a neuron), the answer is exact: for every number of units kept of the other kinds, the most
numerous kind takes what is left of the budget, best units first (with two kinds this is Algorithm 1
of Kwon et al., 2022, arXiv:2204.09656). Everything else goes by importance for each unit of cost,
in `allocate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from secateurs.allocation import allocate
from secateurs.allocation.frame import check_options
from secateurs.allocation.problem import Latency
from secateurs.allocation.rounding import RoundTo
from secateurs.cost import CostCurve, cost_of_kept, dense_cost
from secateurs.selection import order_of
from secateurs.types import Budget, Counts, Graph, IntArray, Scores

__all__ = ["least_lost", "unit_costs"]

MOST_WAYS = 2**22
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def least_lost(
    importances: Mapping[str, Tensor],
    graph: Graph,
    budget: Budget,
    *,
    min_keep: int = 1,
    round_to: RoundTo = 1,
    latency: Latency | None = None,
) -> Counts:
    """The units to keep of each target: the most important ones that the budget pays for.

    Args:
        importances: target -> (n_units,) what is lost with each unit, at least 0; losses add up.
        graph: where the targets come from.
        budget: what may remain of the whole model, as for `allocate`.
        min_keep: units that each target keeps at least.
        round_to: as for `allocate`; other than 1 leaves the exact way.
        latency: a table, for a budget in `latency_ms`; leaves the exact way.

    Returns:
        `Counts`; `notes` says whether they are exact. No single further unit fits.

    Raises:
        ConfigError, BudgetError: as `allocate`.
    """
    check_options(min_keep, round_to, homogeneous=False)
    sizes, costs = budget.sizes, None
    if len(budget.given) == 1 and len(sizes) == 1 and round_to == 1:
        (quantity,) = sizes
        costs = unit_costs(graph, list(importances), quantity)
    if costs is not None:
        room = _room(graph, budget, costs, quantity)
        kept = _sweep(importances, costs, room, min_keep)
        if kept is not None:
            note = f"the least importance that {quantity} allow, exact by a sweep"
            return Counts(kept, budget, _realised(graph, kept), notes=(note,))
    return _by_density(importances, graph, budget, min_keep, round_to, latency)


def unit_costs(graph: Graph, names: Sequence[str], quantity: str) -> dict[str, float] | None:
    """What one unit of each target costs, or None where that depends on what else stays.

    Args:
        graph: where the targets come from.
        names: targets.
        quantity: "units", "params", "macs" or "bytes".
    """
    if quantity == "units":
        return dict.fromkeys(names, 1.0)
    costs = dict.fromkeys(names, 0.0)
    for term in graph.costs:
        each = {
            "params": float(term.is_parameter),
            "macs": term.uses,
            "bytes": float(term.item_bytes * term.names),
        }[quantity]
        shared = [d for d in term.dims if any(name in d.owned for name in names)]
        if not each or not shared:
            continue
        if len(shared) > 1:
            return None
        others = [d.size for d in term.dims if d is not shared[0]]
        for name in set(shared[0].owned) & set(names):
            owned = np.unique(shared[0].owned[name])
            if len(owned) > 1:
                return None
            costs[name] += each * float(owned[0]) * float(np.prod(others, dtype=np.float64))
    return costs


def _room(graph: Graph, budget: Budget, costs: Mapping[str, float], quantity: str) -> float:
    """What the budget leaves for the units, everything else paid."""
    whole = dense_cost(graph)
    units = sum(graph.targets[name].n_units for name in costs)
    dense = {"units": units, "params": whole.params, "macs": whole.macs, "bytes": whole.bytes}
    spent = sum(cost * graph.targets[name].n_units for name, cost in costs.items())
    return budget.limit(quantity, dense[quantity]) - (dense[quantity] - spent)


@dataclass(frozen=True, eq=False)
class _Kind:
    """Targets whose units cost the same, with those units that may go, best first."""

    cost: float
    names: tuple[str, ...]
    of: IntArray
    """(n,) the target of each, as its number in `names`."""
    total: FloatArray
    """(n + 1,) importance of the first so many."""


def _kind(
    cost: float, names: Sequence[str], importances: Mapping[str, Tensor], min_keep: int
) -> _Kind:
    lines = [np.sort(importances[n].double().numpy())[::-1][min_keep:] for n in names]
    every = np.concatenate([np.zeros(0), *lines])
    of = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    order = np.argsort(-every, kind="stable")
    return _Kind(cost, tuple(names), of[order], np.concatenate([[0.0], np.cumsum(every[order])]))


def _sweep(
    importances: Mapping[str, Tensor], costs: Mapping[str, float], room: float, min_keep: int
) -> dict[str, int] | None:
    """Target -> units kept, the most importance for at most `room`.

    None where that is too little, a unit costs nothing, or there are too many ways to try.
    """
    low = {name: min(min_keep, len(line)) for name, line in importances.items()}
    room -= sum(low[name] * cost for name, cost in costs.items())
    if room < 0 or not all(costs.values()):
        return None
    kinds = [
        _kind(cost, [n for n, c in costs.items() if c == cost], importances, min_keep)
        for cost in set(costs.values())
    ]
    kinds.sort(key=lambda k: (len(k.of), -k.cost))
    *tried, last = kinds
    if math.prod(len(k.total) for k in tried) > MOST_WAYS:
        return None
    left, value = np.full(1, room), np.zeros(1)
    for kind in tried:  # every number of its units beside every choice so far
        n = np.arange(len(kind.total))
        left = (left[:, None] - n * kind.cost).reshape(-1)
        value = (value[:, None] + kind.total).reshape(-1)
    fits = left >= 0
    n_last = np.minimum(np.where(fits, left, 0) // last.cost, len(last.of)).astype(np.int64)
    value = np.where(fits, value + last.total[n_last], -np.inf)
    best = int(len(value) - 1 - np.argmax(value[::-1]))  # of equal ones the one with more units
    ways = np.unravel_index(best, [len(k.total) for k in tried]) if tried else ()
    kept = dict(low)
    for kind, n_kept in zip(kinds, [*map(int, ways), int(n_last[best])], strict=True):
        more = np.bincount(kind.of[:n_kept], minlength=len(kind.names))
        for name, count in zip(kind.names, more.tolist(), strict=True):
            kept[name] += count
    return {name: kept[name] for name in importances}


def _realised(graph: Graph, kept: Mapping[str, int]) -> dict[str, float]:
    """What remains of the dense model, by quantity."""
    n_units = {name: graph.targets[name].n_units for name in kept}
    cost, whole = (
        cost_of_kept(graph, {t: np.arange(n) < c[t] for t, n in n_units.items()})
        for c in (kept, n_units)
    )
    left = {"params": cost.params, "macs": cost.macs, "bytes": cost.bytes}
    dense = {"params": whole.params, "macs": whole.macs, "bytes": whole.bytes}
    share = {q: left[q] / dense[q] for q in left if dense[q]}
    return {"units": sum(kept.values()) / sum(n_units.values()), **share}


def _by_density(
    importances: Mapping[str, Tensor],
    graph: Graph,
    budget: Budget,
    min_keep: int,
    round_to: RoundTo,
    latency: Latency | None,
) -> Counts:
    """Counts from a ranking by importance for each unit of cost, costs being shares of a limit."""
    orders = {name: order_of(line).numpy() for name, line in importances.items()}
    curve = CostCurve(graph, orders)
    whole = {name: len(line) for name, line in importances.items()}
    dense = dense_cost(graph)
    sizes = {"params": dense.params, "macs": dense.macs, "bytes": dense.bytes}
    clock = latency.curve(graph, orders) if latency is not None else None
    shares = dict.fromkeys(importances, 0.0)
    for name, n in whole.items():
        if n == 1:
            continue
        one = {**whole, name: 1}
        small = curve(one)
        saved = {q: sizes[q] - getattr(small, q) for q in sizes}
        for q, amount in budget.sizes.items():
            if q == "units":
                shares[name] += 1.0 / budget.limit(q, sum(whole.values()))
            elif sizes[q] and amount:
                shares[name] += saved[q] / (n - 1) / budget.limit(q, sizes[q])
        if clock is not None and budget.latency_ms:
            shares[name] += (clock(whole) - clock(one)) / (n - 1) / budget.latency_ms
    values = {}
    for name, line in importances.items():
        share = shares[name] or 1.0
        values[name] = (line.double() / share).float()
    largest = max(float(v.max()) for v in values.values()) or 1.0
    scores = Scores(graph, {n: v / largest for n, v in values.items()}, "fisher of gates by cost")
    counts = allocate(
        scores, budget, method="global", min_keep=min_keep, round_to=round_to, latency=latency
    )
    note = "units went by importance for each unit of cost"
    return Counts(counts.kept, budget, counts.realised, {}, counts.round_to, (*counts.notes, note))
