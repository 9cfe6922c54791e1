"""How a budget is distributed: `allocator(problem) -> counts`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from secateurs.allocation.problem import Allocation, FloatArray, Problem, allocator

__all__ = ["global_", "global_normalized", "uniform"]


@allocator("uniform")
def uniform(problem: Problem) -> Allocation:
    """The same fraction of every target.

    Units: the shares that add up to the limit are rounded down, and the units left over go to the
    largest remainders. Other quantities: the largest fraction that is within the limit after
    rounding to the nearest count, then single units to the targets that rounding robbed most.
    """
    p = problem

    def share(name: str, fraction: float) -> float:
        return min(max(fraction * p.n_units[name], p.low[name]), p.high[name])

    def nearest(fraction: float) -> Allocation:
        return {n: p.nearest(n, share(n, fraction)) for n in p.names}

    def fits(fraction: float) -> bool:
        if p.in_units:
            total = sum(p.repeats[n] * share(n, fraction) for n in p.names)
            return total <= p.limits[0].most * (1 + 1e-12)
        return p.fits(nearest(fraction))

    within, above = 0.0, 1.0
    for _ in range(60):
        middle = (within + above) / 2
        within, above = (middle, above) if fits(middle) else (within, middle)
    down = {n: p.snap(n, share(n, within) + 1e-9) for n in p.names}
    start = down if p.in_units else nearest(within)
    return _fill(p, start, lambda name, count: share(name, within) - count)


def _fill(p: Problem, kept: Allocation, wish: Callable[[str, int], float]) -> Allocation:
    """Add the next unit of the target with the largest wish while one is within the limit."""
    kept = dict(kept)
    open_ = list(p.names)
    while open_:
        # Costs only grow, so a target whose next unit does not fit now never will.
        name = max(open_, key=lambda n: wish(n, kept[n]))
        more = p.step(name, kept[name])
        if more is None or not p.fits({**kept, name: more}):
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
        if p.fits(counts(middle)):
            within = middle
        else:
            above = middle

    def wish(name: str, count: int) -> float:
        return float(values[name][count]) if count < p.high[name] else -math.inf

    return _fill(p, counts(within), wish)
