"""What an allocator must solve, and the registry of those that can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from secateurs.allocation.rounding import Rounding
from secateurs.errors import ConfigError

__all__ = ["ALLOCATORS", "Allocation", "Allocator", "FloatArray", "Problem", "allocator"]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Allocation = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """What an allocator must solve: the largest counts whose cost is within the limit.

    Each name is one decision: a target, or (`homogeneous=True`) the first of several targets that
    keep equal counts.

    Attributes:
        names: decisions, in graph order.
        n_units: units of a target of each, dense.
        values: scores of each, best first; only units that are left. For several targets the mean
            of their best scores, of their second best, and so on.
        low: fewest units that each may keep.
        high: most units that each can keep: those that are left.
        rounding: which counts between them are allowed.
        repeats: how many targets each stands for.
        quantity: what the budget limits: "units", "params" or "macs".
        cost: counts of all names -> that quantity.
        limit: the most it may be.
    """

    names: tuple[str, ...]
    n_units: Mapping[str, int]
    values: Mapping[str, FloatArray]
    low: Allocation
    high: Allocation
    rounding: Mapping[str, Rounding]
    repeats: Mapping[str, int]
    quantity: str
    cost: Callable[[Mapping[str, int]], int]
    limit: int

    def snap(self, name: str, count: float) -> int:
        """The largest allowed count that is not above `count` (the lowest allowed at least)."""
        if count >= self.high[name]:
            return self.high[name]
        return max(self.low[name], self.rounding[name].down(count))

    def step(self, name: str, count: int) -> int | None:
        """The next allowed count above `count`, if any."""
        if count >= self.high[name]:
            return None
        return min(self.high[name], self.rounding[name].up(count + 1))

    def nearest(self, name: str, count: float) -> int:
        """The allowed count nearest to `count`; the larger of two."""
        below = self.snap(name, count)
        above = self.step(name, below)
        return below if above is None or above - count > count - below else above


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
