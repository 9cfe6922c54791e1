"""Methods that rank the units of all targets together: the lowest values go, wherever they are.

What differs is how scores of different targets are made comparable. Within a target the order is
always that of the scores. With a limit in units the counts are nested: a smaller budget keeps no
more of any target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from secateurs.allocation.filling import fill
from secateurs.allocation.problem import Allocation, FloatArray, Problem, allocator
from secateurs.allocation.streaming import by_cut, normalized, streams

__all__ = ["by_rank", "density", "global_", "global_normalized", "lamp", "tail_share"]

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@allocator("global")
def global_(problem: Problem) -> Allocation:
    """The lowest scores go, wherever they are."""
    if streams(problem):
        return by_cut(problem, problem.scores)
    return by_rank(problem, problem.values)


@allocator("global_normalized")
def global_normalized(problem: Problem) -> Allocation:
    """As global, after dividing by the root mean square of each target's scores."""
    if streams(problem):
        return by_cut(problem, normalized(problem.scores))
    scaled = {}
    for name, line in problem.values.items():
        scale = float(np.sqrt(np.mean(np.square(line.astype(np.float64)))))
        scaled[name] = (line / (scale or 1.0)).astype(np.float32)
    return by_rank(problem, scaled)


@allocator("lamp")
def lamp(problem: Problem) -> Allocation:
    """As global, after s^2 / sum of the squares of the target's scores that are not smaller.

        value(u) = s_u^2 / sum over v with s_v >= s_u of s_v^2

    The best unit of every target has the value 1, so that none is emptied before all others are.
    Of equal scores the one that stays longer counts as the larger. With scores that are |w| this is
    the paper, and gives the counts of criterion "lamp" with method "global"; on scores of that
    criterion use "global", for lamp of lamp means nothing. Multiplying all scores of a target by a
    positive number changes nothing. The square supposes scores of the size of an effect; those that
    are squares already ("taylor", "fisher") are squared again, which favours targets in which few
    units matter.

    Signed scores: a negative one promises that the loss falls when the unit goes, so that all
    negative ones go before zeros and those before positive ones; among negative ones the value is
    the mirror image, minus that of |s| among the target's negative scores: the worst has -1.

    Use it for single weights, and wherever the scales of targets differ and nothing was measured.

    Reference: Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, 2021,
    arXiv:2010.07611.
    """

    def squared_share(scores: Floats) -> Floats:
        squares = np.square(scores)
        value: Floats = squares / np.cumsum(squares)
        return value

    values = {n: _mirrored(line, squared_share) for n, line in problem.values.items()}
    return by_rank(problem, values)


@allocator("density")
def density(problem: Problem) -> Allocation:
    """Every target keeps the fewest units that hold the same share of its total score.

        value(u) = sum over v with s_v <= s_u of s_v / sum over all v of s_v

    is what goes with the unit and everything worse; all below one value go. Where a few units hold
    most of the score, many go; where all matter alike, as many as the share. Of equal scores the
    one that stays longer counts as the larger. Multiplying all scores of a target by a positive
    number changes nothing. The share is that of the units that are left.

    Signed scores: a negative score is no mass. Such units go first, the target's worst before all;
    the value is the mirror image, minus the share of the target's negative scores that lie between
    zero and the unit, itself included: the worst has -1.

    Use it with scores that add up, such as "taylor" or "fisher"; then the same share of the
    predicted effect goes from every target.
    """
    return by_rank(problem, {n: _mirrored(v, tail_share) for n, v in problem.values.items()})


def tail_share(scores: Floats) -> Floats:
    """(n,) share of the total of positive scores, best first, that each and all after it hold."""
    tail: Floats = np.cumsum(scores[::-1])[::-1]
    share: Floats = tail / tail[0]
    return share


def _mirrored(line: FloatArray, value: Callable[[Floats], Floats]) -> Floats:
    """(n,) values of scores, best first: of positive ones, minus those of negative ones, and 0."""
    scores = line.astype(np.float64)
    found = np.zeros_like(scores)
    above, below = int((scores > 0).sum()), int((scores < 0).sum())
    if above:
        found[:above] = value(scores[:above])
    if below:
        found[len(scores) - below :] = -value(-scores[::-1][:below])[::-1]
    return found


def by_rank(p: Problem, values: Mapping[str, np.ndarray[Any, Any]]) -> Allocation:
    """Keep the longest prefix of one ranking that is within the limits, then fill up.

    Args:
        p: the problem.
        values: (units left,) for each name, best first and never rising. Of equal values the
            earlier target's stay.
    """
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

    return fill(p, counts(within), wish)
