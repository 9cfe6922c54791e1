"""The search for a price of a parameter (and of a MAC) that meets a budget at several scales.

    Scaled, limits -> counts of structure

With a price for each parameter a weight goes when its score is below the price, and units go when
what they hold is worth less than their own score, given all that has gone already (`tables`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateurs.allocation.tables import (
    Block,
    FloatArray,
    Lines,
    Loss,
    Part,
    Ranks,
    Term,
    Worth,
)
from secateurs.types import IntArray

__all__ = ["Scaled", "cheapest"]

Counts = dict[str, int]

PRICES = 24
"""Prices that are tried at most."""
NEAR = 0.002
"""The search ends when the shares of weights that two prices stand for differ by this."""
STARTS = ((True, 1.0), (True, 0.05), (False, 0.05))
"""Where counts begin (all units, or the fewest), and how far a target may move in one turn."""
SMALL = 4 * 10**6
"""Up to so many weights that neighbours of the result would look at, those are tried as well."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """What is decided: counts of structure, and which weights stay inside.

    Attributes:
        ranks: structural targets in the order in which they lose units.
        allowed: decision -> counts that it may take, ascending.
        blocks: all weights.
        fewest: weight target -> weights that stay in it at least, if that many are inside.
        losses: what is lost with units.
        terms: what else costs parameters, or MACs.
        limits: "params", "macs" -> the most that there may be.
    """

    ranks: Ranks
    allowed: Mapping[str, IntArray]
    blocks: Sequence[Block]
    fewest: Mapping[str, int]
    losses: Sequence[Loss]
    terms: Sequence[Term]
    limits: Mapping[str, int]

    def others(self, counts: Counts) -> int:
        """Parameters that remain and are none of the weights."""
        return round(sum(float(t.params * t.left(counts)) for t in self.terms))

    def macs(self, counts: Counts) -> int:
        """MACs of the structure that remains."""
        return round(sum(float(t.macs * t.left(counts)) for t in self.terms))

    def inside(self, counts: Counts) -> dict[str, Lines]:
        """Weight target -> scores of the weights in what stays, in no order."""
        lines: dict[str, list[Lines]] = {}
        for block in self.blocks:
            lines.setdefault(block.name, []).append(block.inside(counts))
        return {n: ls[0] if len(ls) == 1 else np.concatenate(ls) for n, ls in lines.items()}

    def room(self, counts: Counts) -> int | None:
        """Weights that may stay inside; None without a limit."""
        return self.limits["params"] - self.others(counts) if "params" in self.limits else None

    def least(self, inside: Mapping[str, Lines]) -> dict[str, int]:
        """Weights that each target keeps at least."""
        return {n: min(len(line), self.fewest[n]) for n, line in inside.items()}

    def lost(self, counts: Counts) -> float:
        """What is lost with the best weights inside; infinite where a limit is not met."""
        if self.macs(counts) > self.limits.get("macs", math.inf):
            return math.inf
        units = float(sum(part.at(counts) for part in self.losses))
        room = self.room(counts)
        if room is None:
            return units
        inside = self.inside(counts)
        if room < sum(self.least(inside).values()):
            return math.inf
        line = np.concatenate(list(inside.values()))
        gone = len(line) - room
        if gone <= 0:
            return units
        worst = line if gone == len(line) else np.partition(line, gone - 1)[:gone]
        return units + float(worst.sum(dtype=np.float64))


def cheapest(problem: Scaled) -> tuple[Counts, float]:
    """Counts of structure that lose least, and what they lose; infinite if none are in the limits.

    Every counts that are best for some price on the way are compared by what they really lose, and
    so are all units and the fewest.
    """
    p = problem
    whole = {n: int(a[-1]) for n, a in p.allowed.items()}
    fewest = {n: int(a[0]) for n, a in p.allowed.items()}
    found: dict[tuple[int, ...], tuple[float, Counts]] = {}
    search = _prices(p, whole, fewest) if "params" in p.limits else _at(p, 0.0, whole, fewest)
    for counts in (whole, fewest, *search):
        key = tuple(counts.values())
        if key not in found:
            found[key] = (p.lost(counts), counts)
    # Of equal losses the one that leaves most units.
    lost, best = min(found.values(), key=lambda x: (x[0], -sum(x[1].values())))
    if math.isinf(lost):
        return best, lost
    limited = "params" in p.limits
    effort = sum(b.values.size for b in p.blocks) if limited else 100 * len(p.terms)
    if limited and effort * len(best) > SMALL:
        return best, lost
    return _polished(p, best, lost, pairs=effort * len(best) ** 2 <= SMALL)


def _prices(p: Scaled, whole: Counts, fewest: Counts) -> Iterator[Counts]:
    """Counts that are best for prices among the scores, by bisection."""
    ranked = np.sort(np.concatenate([b.values.reshape(-1) for b in p.blocks]))
    ranked = ranked[ranked > -np.inf]
    n, most = len(ranked), p.limits["params"]
    # Beyond the largest score prices go on, for the sake of parameters that are no weights.
    top = max(float(np.abs(ranked[[0, -1]]).max()), *map(_size, p.losses), 1e-30)

    def price(kept: int) -> float:
        return float(ranked[-kept]) if kept > 0 else top * 4.0 ** (1 - kept)

    low, high = -PRICES, n
    middle = max(1, min(n, most - p.others(whole)))
    for _ in range(PRICES):
        last = whole
        for last in _at(p, price(middle), whole, fewest):
            yield last
        inside = sum(int((x >= price(middle)).sum()) for x in p.inside(last).values())
        low, high = (middle, high) if inside + p.others(last) <= most else (low, middle)
        if high - low <= max(1, NEAR * n):
            return
        middle = (low + high) // 2 if low <= 0 else max(low + 1, round(math.sqrt(low * high)))


def _at(p: Scaled, params: float, whole: Counts, fewest: Counts) -> Iterator[Counts]:
    """Counts for a price of a parameter; with a limit on MACs, at prices of a MAC that meet it.

    The last ones are the best of those that meet it.
    """
    tables = [b.table(params) for b in p.blocks] if "params" in p.limits else []
    fixed: list[Part] = [*p.losses, *tables]

    def descend(macs: float) -> list[Counts]:
        worth = Worth(fixed, p.terms, params, macs)
        ends = [_improved(p, worth, whole if full else fewest, far) for full, far in STARTS]
        return sorted(ends, key=worth.total, reverse=True)

    most = p.limits.get("macs", math.inf)

    def fits(several: Sequence[Counts]) -> bool:
        return p.macs(several[-1]) <= most

    good = descend(0.0)
    yield from good
    if fits(good):
        return
    below, above = 0.0, sum(map(_size, fixed)) / p.macs(whole) * 1e-3 or 1.0
    for _ in range(20):
        good = descend(above)
        yield from good
        if fits(good):
            break
        below, above = above, above * 8
    for _ in range(8):
        middle = math.sqrt(below * above) if below else above / 8
        now = descend(middle)
        yield from now
        if fits(now):
            above, good = middle, now
        else:
            below = middle
    yield from good


def _improved(p: Scaled, worth: Worth, start: Counts, reach: float) -> Counts:
    """Counts at which no target alone would do better with another count.

    Args:
        p: the problem.
        worth: at some prices.
        start: where to begin.
        reach: the share of its counts by which a target may move in one turn; when small, no
            target goes far before the others have seen it go.
    """
    counts = dict(start)
    for _ in range(int(4 / reach)):
        before = dict(counts)
        for name, allowed in p.allowed.items():
            at = int(np.searchsorted(allowed, counts[name]))
            far = max(1, int(reach * len(allowed)))
            near = allowed[max(0, at - far) : at + far + 1][::-1]
            line = worth.line(name, counts, int(allowed[-1]))
            here = line[counts[name]]
            best = int(near[int(np.argmin(line[near]))])  # of equal ones the most units
            if line[best] < here - 1e-12 * abs(here):
                counts[name] = best
        if counts == before:
            break
    return counts


def _polished(p: Scaled, counts: Counts, lost: float, pairs: bool) -> tuple[Counts, float]:
    """Counts of which no neighbour loses less, or leaves more units for the same."""
    moved = True
    while moved:
        moved = False
        for other in _neighbours(p, counts, pairs):
            value = p.lost(other)
            if value < lost or (value == lost and sum(other.values()) > sum(counts.values())):
                counts, lost, moved = other, value, True
                break
    return counts, lost


def _neighbours(p: Scaled, counts: Counts, pairs: bool) -> Iterator[Counts]:
    """One target a step up or down; or one a step up and another a step or two down."""

    def moved(base: Counts, name: str, by: int) -> Iterator[Counts]:
        to = int(np.searchsorted(p.allowed[name], counts[name])) + by
        if 0 <= to < len(p.allowed[name]):
            yield {**base, name: int(p.allowed[name][to])}

    for name in counts:
        for more in moved(counts, name, 1):
            yield more
            for other in counts if pairs else ():
                if other != name:
                    yield from moved(more, other, -1)
                    yield from moved(more, other, -2)
        yield from moved(counts, name, -1)


def _size(part: Part) -> float:
    """The largest worth of a part, whatever the sign."""
    held: FloatArray = getattr(part, "tail", getattr(part, "sums", np.zeros(1)))
    return float(np.abs(held).max())
