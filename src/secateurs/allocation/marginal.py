"""The method that knows what cuts cost in quality: measured curves against what must be saved."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from secateurs.allocation.curves import Sensitivity
from secateurs.allocation.filling import fill
from secateurs.allocation.problem import Allocation, Limit, Problem, allocator
from secateurs.errors import ConfigError
from secateurs.types import IntArray

__all__ = ["NEEDS_CURVES", "PIECES", "sensitivity", "summed_drop"]

NEEDS_CURVES = (
    "method='sensitivity' needs measured curves: give "
    "sensitivity=secateurs.sensitivity(model, ...), for the same targets"
)

PIECES = 64
"""A target is cut in at most about so many pieces, each as large as its curve is straight."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@allocator("sensitivity")
def sensitivity(problem: Problem) -> Allocation:
    """The counts with the smallest sum of measured drops that are within the limits, nearly.

    minimise  sum over targets of drop_t(1 - count_t / n_units_t)

    From all units downwards, the piece of a target goes next whose

        marginal drop / what it saves of the tightest limit

    is smallest. What a piece saves is recomputed as counts fall, since costs are products over
    coupled targets; the tightest limit is the one most exceeded, as a ratio. Of equal ratios the
    target that has lost the smallest fraction goes first. The last piece is cut only as far as
    needed, and what then still fits is filled up where it saves most drop. This is done twice, on
    the lower convex hulls of the curves, so that a steep start does not hide a cheap stretch behind
    it, and on the curves as they are; the smaller sum is taken. On the hulls, and for costs that
    add up, it is the Lagrangian optimum: one price of the limit for all targets.

    How far from the optimum: `tests/allocation/test_marginal.py` compares with brute force over all
    counts of small coupled problems.

    The sum supposes that drops add up, and curves of the dense model say little about deep cuts:
    what is harmless alone can hurt together. Use it for moderate budgets, about half of the model;
    for deeper ones cut in steps and measure again in between. In one shot to a tenth of the MACs it
    starves whole stages and is far behind "uniform" (`benchmarks/allocation_quality.py`).

    Units that are gone already count as removed: a curve counts fractions of the dense model.

    Raises:
        ConfigError: no curves were given, or one is missing.
    """
    p = problem
    if p.sensitivity is None:
        raise ConfigError(NEEDS_CURVES)
    p.sensitivity.check_covers(t for name in p.names for t in p.targets(name))
    curves = p.sensitivity
    plain = {name: _descent(p, curves, name) for name in p.names}

    def saves(name: str, count: int) -> float:
        more = p.step(name, count)
        if more is None:
            return -np.inf
        less, whole = _drops(p, curves, name, np.array([count, more], dtype=np.int64))
        return float(less - whole)

    hulls = {name: _hull(descent) for name, descent in plain.items()}
    found = [fill(p, _descend(p, way), saves) for way in (hulls, plain)]
    return min(found, key=lambda counts: summed_drop(p, counts))


def summed_drop(problem: Problem, counts: Mapping[str, int]) -> float:
    """The sum of the drops of all targets at these counts: what "sensitivity" minimises."""
    assert problem.sensitivity is not None
    curves = problem.sensitivity
    at = {n: np.array([counts[n]], dtype=np.int64) for n in problem.names}
    return float(sum(_drops(problem, curves, n, c)[0] for n, c in at.items()))


def _drops(p: Problem, curves: Sensitivity, name: str, counts: IntArray) -> Floats:
    """(n,) drop of a decision at each count, summed over its targets."""
    removed = 1 - counts / p.n_units[name]
    drops: Floats = np.sum([curves.curves[t].all_at(removed) for t in p.targets(name)], axis=0)
    return drops


@dataclass(frozen=True, eq=False)
class Descent:
    """A way down in pieces.

    Attributes:
        counts: (k,) descending, from most to fewest units.
        drops: (k,) the drop there.
    """

    counts: IntArray
    drops: Floats


def _descent(p: Problem, curves: Sensitivity, name: str) -> Descent:
    counts = _stops(p, curves, name)
    return Descent(counts, _drops(p, curves, name, counts))


def _hull(way: Descent) -> Descent:
    """The same with drops on their lower convex hull."""
    removed, drops = (way.counts[0] - way.counts).astype(np.float64), way.drops
    corners = [0]
    for i in range(1, len(drops)):
        while len(corners) > 1 and _above(removed, drops, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(i)
    return Descent(way.counts, np.interp(removed, removed[corners], drops[corners]))


def _above(x: Floats, y: Floats, a: int, b: int, c: int) -> bool:
    """Whether point b is on or above the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))


def _stops(p: Problem, curves: Sensitivity, name: str) -> IntArray:
    """Allowed counts, descending: all, or evenly spaced ones and the corners of the curves."""
    low, high = p.low[name], p.high[name]
    wanted: list[float] = list(np.linspace(low, high, min(PIECES, high - low) + 1))
    for target in p.targets(name):
        wanted += [(1 - r) * p.n_units[name] for r in curves.curves[target].removed]
    found = {low, high} | {p.nearest(name, w) for w in wanted if low < w < high}
    return np.array(sorted(found, reverse=True), dtype=np.int64)


def _descend(p: Problem, ways: Mapping[str, Descent]) -> Allocation:
    """Counts within the limits, piece by piece from the top."""
    at, counts = dict.fromkeys(p.names, 0), dict(p.high)
    tightest: Limit | None = None
    queue: list[tuple[float, float, int]] = []
    while True:
        costs = [limit.cost(counts) for limit in p.limits]
        ratios = [cost / limit.most for cost, limit in zip(costs, p.limits, strict=True)]
        number = int(np.argmax(ratios))
        if ratios[number] <= 1:
            return counts
        if p.limits[number] is not tightest:
            tightest = p.limits[number]
            left = [i for i, n in enumerate(p.names) if at[n] + 1 < len(ways[n].counts)]
            queue = [(0.0, 0.0, i) for i in left]
        name = _cheapest(p, ways, at, counts, tightest, costs[number], queue)
        before, at[name] = counts[name], at[name] + 1
        counts[name] = int(ways[name].counts[at[name]])
        if at[name] + 1 < len(ways[name].counts):
            heapq.heappush(queue, (0.0, 0.0, p.names.index(name)))
        if p.fits(counts):
            counts[name] = _most(p, counts, name, before)


def _cheapest(
    p: Problem,
    ways: Mapping[str, Descent],
    at: Mapping[str, int],
    counts: Allocation,
    limit: Limit,
    cost: float,
    queue: list[tuple[float, float, int]],
) -> str:
    """The decision whose next piece has the smallest ratio, taken from the queue.

    A piece saves less and less while others are cut, where costs are products, so an old ratio is a
    lower bound: it is renewed when its turn comes. (Measured latencies follow that about.)
    """
    while True:
        _, _, i = heapq.heappop(queue)
        name = p.names[i]
        way, k = ways[name], at[name]
        saved = cost - limit.cost({**counts, name: int(way.counts[k + 1])})
        marginal = float(way.drops[k + 1] - way.drops[k])
        lost = 1 - counts[name] / p.n_units[name]
        fresh = (marginal / saved if saved > 0 else np.inf, lost, i)
        if not queue or fresh <= queue[0]:
            return name
        heapq.heappush(queue, fresh)


def _most(p: Problem, counts: Allocation, name: str, too_many: int) -> int:
    """The largest allowed count below `too_many` that is within the limits; the present one is."""
    within, above = counts[name], too_many
    while above - within > 1:
        middle = (within + above) // 2
        if p.fits({**counts, name: p.snap(name, middle)}):
            within = middle
        else:
            above = middle
    return p.snap(name, within)
