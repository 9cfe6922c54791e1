"""How many units each target keeps: one rounding, totals exact.

    Scores, Budget | Threshold -> Counts

A budget says what may remain, and an allocator distributes it; every allocator has the signature
`allocator(problem) -> counts`. A threshold needs no allocator: units whose score is below it go.
Either way each target loses its worst units first, so counts are all there is to decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from secateurs.cost import Cost, CostCurve, dense_cost
from secateurs.errors import BudgetError, ConfigError, ScoringError, choose
from secateurs.selection import order_of
from secateurs.types import (
    Budget,
    Counts,
    Graph,
    IntArray,
    Scores,
    Threshold,
    WeightTarget,
)

__all__ = ["ALLOCATORS", "Problem", "allocate", "allocator"]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Allocation = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """What an allocator must solve: the largest counts whose cost is within the limit.

    Attributes:
        names: targets, in graph order.
        n_units: units of each, dense.
        values: scores of each, best first; only units that are left.
        low: fewest units that each may keep.
        high: most units that each can keep: those that are left.
        round_to: counts are multiples of it, or `high`.
        quantity: what the budget limits: "units", "params" or "macs".
        cost: counts of all targets -> that quantity.
        limit: the most it may be.
    """

    names: tuple[str, ...]
    n_units: Mapping[str, int]
    values: Mapping[str, FloatArray]
    low: Allocation
    high: Allocation
    round_to: int
    quantity: str
    cost: Callable[[Mapping[str, int]], int]
    limit: int

    def snap(self, name: str, count: float) -> int:
        """The largest allowed count that is not above `count` (the lowest allowed at least)."""
        if count >= self.high[name]:
            return self.high[name]
        return max(self.low[name], int(count) // self.round_to * self.round_to)

    def step(self, name: str, count: int) -> int | None:
        """The next allowed count above `count`, if any."""
        if count >= self.high[name]:
            return None
        return min(self.high[name], (count // self.round_to + 1) * self.round_to)


Allocator = Callable[[Problem], Allocation]
ALLOCATORS: dict[str, Allocator] = {}
"""The registry: name -> allocator."""


def allocator(name: str) -> Callable[[Allocator], Allocator]:
    """Register a function as the allocator `name`."""

    def register(fn: Allocator) -> Allocator:
        if name in ALLOCATORS:
            raise ConfigError(f"allocator {name!r} is already registered; choose another name")
        ALLOCATORS[name] = fn
        return fn

    return register


def allocate(
    scores: Scores,
    asked: Budget | Threshold,
    *,
    method: str = "uniform",
    min_keep: int = 1,
    round_to: int = 1,
) -> Counts:
    """Units that each target keeps.

    A budget in `units` is met exactly: the total is the limit rounded down (unless `round_to`
    forbids it). One in `params` or `macs` gives a model within the limit to which no single next
    unit of any target can be added. Units removed earlier (score `-inf`) are never kept.

    Args:
        scores: larger = keep.
        asked: what may remain, or the rule of the cut.
        method: how a budget is distributed: "uniform" (the same fraction of every target), "global"
            (the lowest scores go, wherever they are) or "global_normalized" (the same after
            dividing by the root mean square of each target's scores).
        min_keep: units that each target keeps at least, >= 1.
        round_to: keep multiples of this many units (or all that are left).

    Returns:
        `Counts` with what they leave of the dense model.

    Raises:
        ConfigError: an option out of range, weights and structure mixed, or a budget in MACs for
            single weights.
        BudgetError: the budget cannot be reached, or the threshold would leave too little.
    """
    choose(method, ALLOCATORS, "allocation method")
    for name, value in (("min_keep", min_keep), ("round_to", round_to)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    if isinstance(asked, Threshold) and method != "uniform":
        raise ConfigError(
            f"method={method!r} distributes a budget; a threshold takes scope='target' or 'global'"
        )
    orders, values = _ranked(scores)
    curve = CostCurve(scores.graph, orders)
    low, high = _bounds(orders, values, min_keep, round_to)
    if isinstance(asked, Threshold):
        kept, cuts = _cut(values, asked, low, high, round_to)
    else:
        kept, cuts = _spend(scores.graph, orders, values, asked, method, low, high, round_to, curve)
    return Counts(kept, asked, _realised(scores.graph, orders, kept, curve(kept)), cuts)


def _ranked(scores: Scores) -> tuple[dict[str, IntArray], dict[str, FloatArray]]:
    """Units of each target from best to worst, and the scores of those that are left."""
    if not scores.values:
        raise ConfigError("there are no scores to allocate")
    orders, values = {}, {}
    for name in [n for n in scores.graph.targets if n in scores.values]:
        line = scores.values[name].reshape(-1)
        if bool((line.isnan() | (line == float("inf"))).any()):
            raise ScoringError(f"{name}: a score is nan or inf; score the target again")
        order = order_of(line)
        best_first = line[order].float().numpy()
        orders[name] = order.numpy()
        values[name] = best_first[best_first > -np.inf]
        if not len(values[name]):
            raise BudgetError(f"{name} has no unit left; start from a plan that keeps some")
    return orders, values


def _bounds(
    orders: Mapping[str, IntArray], values: Mapping[str, FloatArray], min_keep: int, round_to: int
) -> tuple[Allocation, Allocation]:
    """Fewest and most units of each target: `min_keep` rounded up, and what is left."""
    high = {name: len(values[name]) for name in orders}
    low = {name: min(-(-min_keep // round_to) * round_to, high[name]) for name in orders}
    return low, high


def _realised(
    graph: Graph, orders: Mapping[str, IntArray], kept: Mapping[str, int], cost: Cost
) -> dict[str, float]:
    dense = dense_cost(graph)
    realised = {"units": sum(kept.values()) / sum(len(o) for o in orders.values())}
    if dense.params:
        realised["params"] = cost.params / dense.params
    if dense.macs:
        realised["macs"] = cost.macs / dense.macs
    return realised


def _spend(
    graph: Graph,
    orders: Mapping[str, IntArray],
    values: Mapping[str, FloatArray],
    asked: Budget,
    method: str,
    low: Allocation,
    high: Allocation,
    round_to: int,
    curve: CostCurve,
) -> tuple[Allocation, dict[str, float]]:
    """Counts for a budget, and the lowest score that each target keeps."""
    quantity = asked.quantity
    if quantity == "macs" and any(isinstance(graph.targets[n], WeightTarget) for n in orders):
        raise ConfigError(
            "zeros among single weights save no dense multiply-adds: Budget(macs=...) cannot be met"
            " at weight granularity. Use params= or units=, or prune structure"
        )
    n_units = {name: len(order) for name, order in orders.items()}
    total = sum(n_units.values()) if quantity == "units" else getattr(dense_cost(graph), quantity)
    if not total:
        raise ConfigError(
            f"the graph knows no {quantity}; use a graph from trace, or another budget"
        )

    def cost(counts: Mapping[str, int]) -> int:
        if quantity == "units":
            return sum(counts.values())
        return int(getattr(curve(counts), quantity))

    limit = _limit(asked, total)
    least = cost(low)
    if least > limit:
        raise BudgetError(
            f"Budget({quantity}={getattr(asked, quantity)!r}) allows {limit} of {total} "
            f"{quantity}, but {least} ({least / total:.4g} of the model) remain when every target "
            f"keeps its fewest units; ask for at least {quantity}={_up(least / total)}, or prune "
            "more kinds of units"
        )
    problem = Problem(tuple(orders), n_units, values, low, high, round_to, quantity, cost, limit)
    kept = high if cost(high) <= limit else ALLOCATORS[method](problem)
    return dict(kept), {name: float(values[name][kept[name] - 1]) for name in orders}


def _limit(asked: Budget, total: int) -> int:
    """The limit rounded down, safe against 0.29 * 100 = 28.999999999999996."""
    amount = asked.amount
    return math.floor(amount * total * (1 + 1e-12)) if isinstance(amount, float) else amount


def _up(fraction: float) -> float:
    """Rounded up to four digits after the point."""
    return math.ceil(fraction * 1e4) / 1e4


@allocator("uniform")
def uniform(problem: Problem) -> Allocation:
    """The same fraction of every target.

    Units: the shares that add up to the limit are rounded down, and the units left over go to the
    largest remainders. Other quantities: the largest fraction that is within the limit after
    rounding to the nearest count, then single units to the targets that rounding robbed most.
    """
    p = problem
    linear = p.quantity == "units"

    def share(name: str, fraction: float) -> float:
        return min(max(fraction * p.n_units[name], p.low[name]), p.high[name])

    def counts(fraction: float, shift: float) -> Allocation:
        return {n: p.snap(n, share(n, fraction) + shift) for n in p.names}

    def fits(fraction: float) -> bool:
        if linear:
            return sum(share(n, fraction) for n in p.names) <= p.limit * (1 + 1e-12)
        return p.cost(counts(fraction, p.round_to / 2)) <= p.limit

    within, above = 0.0, 1.0
    for _ in range(60):
        middle = (within + above) / 2
        within, above = (middle, above) if fits(middle) else (within, middle)
    start = counts(within, 1e-9 if linear else p.round_to / 2)
    return _fill(p, start, lambda name, count: share(name, within) - count)


def _fill(p: Problem, kept: Allocation, wish: Callable[[str, int], float]) -> Allocation:
    """Add the next unit of the target with the largest wish while one is within the limit."""
    kept = dict(kept)
    open_ = list(p.names)
    while open_:
        # Costs only grow, so a target whose next unit does not fit now never will.
        name = max(open_, key=lambda n: wish(n, kept[n]))
        more = p.step(name, kept[name])
        if more is None or p.cost({**kept, name: more}) > p.limit:
            open_.remove(name)
        else:
            kept[name] = more
    return kept


@allocator("global")
def global_(problem: Problem) -> Allocation:
    """The lowest scores go, wherever they are."""
    return _by_rank(problem, problem.values)


@allocator("global_normalized")
def global_normalized(problem: Problem) -> Allocation:
    """As global, after dividing by the root mean square of each target's scores."""
    scaled = {}
    for name, line in problem.values.items():
        scale = float(np.sqrt(np.mean(np.square(line.astype(np.float64)))))
        scaled[name] = (line / (scale or 1.0)).astype(np.float32)
    return _by_rank(problem, scaled)


def _by_rank(p: Problem, values: Mapping[str, FloatArray]) -> Allocation:
    """Keep the longest prefix of one ranking that is within the limit, then fill up."""
    free = {n: values[n][p.low[n] : p.high[n]] for n in p.names}  # the best `low` always stay
    line = np.concatenate([free[n] for n in p.names])
    owner = np.repeat(np.arange(len(p.names)), [len(free[n]) for n in p.names])
    ranked = owner[np.argsort(-line, kind="stable")]

    def counts(length: int) -> Allocation:
        extra = np.bincount(ranked[:length], minlength=len(p.names))
        return {n: p.snap(n, p.low[n] + int(e)) for n, e in zip(p.names, extra, strict=True)}

    within, above = 0, len(ranked) + 1
    while above - within > 1:
        middle = (within + above) // 2
        if p.cost(counts(middle)) <= p.limit:
            within = middle
        else:
            above = middle

    def wish(name: str, count: int) -> float:
        return float(values[name][count]) if count < p.high[name] else -math.inf

    return _fill(p, counts(within), wish)


def _cut(
    values: Mapping[str, FloatArray],
    asked: Threshold,
    low: Allocation,
    high: Allocation,
    round_to: int,
) -> tuple[Allocation, dict[str, float]]:
    """Counts of the scores that are not below the threshold."""
    everything = np.concatenate(list(values.values()))
    kept, cuts, problems = {}, {}, []
    for name, line in values.items():
        cut = _threshold(line if asked.scope == "target" else everything, asked)
        count = int((line >= cut).sum())
        if count < low[name]:
            problems.append(
                f"{name}: {count} of {len(line)} units reach the threshold {cut:.6g}, its largest "
                f"score is {line[0]:.6g}, at least {low[name]} must stay"
            )
        kept[name] = min(high[name], -(-count // round_to) * round_to)
        cuts[name] = float(cut)
    if problems:
        raise BudgetError(
            f"threshold {asked.rule!r} would leave too little. " + "; ".join(problems) + ". Lower "
            "the threshold, or use a budget"
            + (" or scope='target'" if asked.scope == "global" else "")
        )
    return kept, cuts


def _threshold(line: FloatArray, asked: Threshold) -> np.float32:
    """The score below which units go, in the precision of the scores."""
    wide = line.astype(np.float64)
    match asked.rule:
        case "value":
            cut = asked.value or 0.0
        case "mean":
            cut = float(wide.mean())
        case "k_std":
            cut = float(wide.mean() + (asked.k or 0.0) * wide.std())
        case "rate_mean":
            cut = (asked.rate or 0.0) * float(wide.mean())
        case _:
            first = math.floor((asked.q or 0.0) * len(line) * (1 + 1e-12))
            cut = float(np.sort(wide)[min(first, len(line) - 1)])
    return np.float32(cut)
