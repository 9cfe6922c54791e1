"""What an allocator must solve, and the registry of those that can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from secateurs.allocation.curves import Sensitivity
from secateurs.allocation.rounding import Rounding
from secateurs.errors import BudgetError, ConfigError
from secateurs.types import Graph, IntArray

__all__ = [
    "ALLOCATORS",
    "BY_SIZE",
    "Allocation",
    "Allocator",
    "FloatArray",
    "Latency",
    "Limit",
    "MissedBudget",
    "Problem",
    "allocator",
]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Allocation = dict[str, int]


class Latency(Protocol):
    """What predicts the time of a call from counts: `secateurs.latency.LatencyTable`."""

    def curve(
        self, graph: Graph, orders: Mapping[str, IntArray]
    ) -> Callable[[Mapping[str, int]], float]:
        """Counts of all targets in `orders` -> milliseconds; never falls when a count rises.

        Args:
            graph: where the counts come from.
            orders: target -> (n_units,) all its units, the last to go first.

        Raises:
            ConfigError: it was measured for another model.
        """


class MissedBudget(BudgetError):
    """No counts are within the budget.

    Attributes:
        nearest: quantity -> the least that is reachable, of each limit that is missed.
    """

    def __init__(self, message: str, nearest: Mapping[str, float]) -> None:
        super().__init__(message)
        self.nearest = dict(nearest)


@dataclass(frozen=True)
class Limit:
    """One figure of a budget.

    Attributes:
        quantity: "units", "params", "macs", "bytes" or "latency_ms".
        cost: counts of all names -> that quantity; never falls when a count rises.
        most: the most that it may be.
    """

    quantity: str
    cost: Callable[[Mapping[str, int]], float]
    most: float

    def holds(self, counts: Mapping[str, int]) -> bool:
        """Whether counts of all names are within the limit."""
        return self.cost(counts) <= self.most


@dataclass(frozen=True)
class Problem:
    """What an allocator must solve: the largest counts that are within all limits.

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
        limits: what must hold, one or several.
        graph: where the targets come from.
        members: the targets that each stands for; left out, itself alone.
        sensitivity: what it costs to cut each target alone, if that was measured.
        scores: those of each as they came, -inf for units that are gone; only where all decisions
            are about the single weights of one tensor. `values` sorts them whenever it is read.
        sample: how many scores a ranking may go by instead of all; None for all.
    """

    names: tuple[str, ...]
    n_units: Mapping[str, int]
    values: Mapping[str, FloatArray]
    low: Allocation
    high: Allocation
    rounding: Mapping[str, Rounding]
    repeats: Mapping[str, int]
    limits: tuple[Limit, ...]
    graph: Graph
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    sample: int | None = None

    def targets(self, name: str) -> tuple[str, ...]:
        """The targets that a decision stands for."""
        return self.members.get(name, (name,))

    @property
    def in_units(self) -> bool:
        """Whether the only limit is the number of units."""
        return [limit.quantity for limit in self.limits] == ["units"]

    def fits(self, counts: Mapping[str, int]) -> bool:
        """Whether counts of all names are within every limit."""
        return all(limit.holds(counts) for limit in self.limits)

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
BY_SIZE: set[str] = set()
"""Names of allocators that read no scores: sizes alone decide."""


def allocator(name: str, *, reads_scores: bool = True) -> Callable[[Allocator], Allocator]:
    """Register a function as the allocator `name`; `reads_scores=False`: sizes alone decide."""

    def register(fn: Allocator) -> Allocator:
        if name in ALLOCATORS:
            raise ConfigError(f"allocator {name!r} is already registered; choose another name")
        ALLOCATORS[name] = fn
        if not reads_scores:
            BY_SIZE.add(name)
        return fn

    return register
