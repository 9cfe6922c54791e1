"""Scores and bounds in the shape that rules and allocators work on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from secateurs.allocation.problem import Allocation, FloatArray
from secateurs.allocation.rounding import Rounding, RoundTo, check_round_to, roundings
from secateurs.cost import CostCurve
from secateurs.errors import BudgetError, ConfigError, ScoringError
from secateurs.selection import order_of
from secateurs.types import Graph, IntArray, Scores

__all__ = ["Frame", "make_frame", "same_place"]

Classes = Mapping[str, tuple[str, ...]]


def same_place(graph: Graph, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """First target -> all targets in the same place of repeated blocks, itself included.

    Those have the same kind, the same number of units, and names that differ in numbers only.

    Example:
        >>> from secateurs.types import GroupTarget
        >>> names = ("blocks.0.fc:neuron", "blocks.1.fc:neuron", "head:neuron")
        >>> graph = Graph({n: GroupTarget(n, "neuron", 8, ()) for n in names})
        >>> same_place(graph, names)["blocks.0.fc:neuron"]
        ('blocks.0.fc:neuron', 'blocks.1.fc:neuron')
    """
    classes: dict[tuple[str, int, str], list[str]] = {}
    for name in names:
        target = graph.targets[name]
        place = re.sub(r"\d+", "#", name)
        classes.setdefault((target.kind, target.n_units, place), []).append(name)
    return {members[0]: tuple(members) for members in classes.values()}


@dataclass(frozen=True, eq=False)
class Frame:
    """Scores and bounds. A decision is the first target of a class; most classes have one.

    Attributes:
        graph: where the targets come from.
        orders: target -> its units from best to worst.
        lines: target -> scores of the units that are left, best first.
        classes: decision -> the targets that keep as many units as it.
        rounding: target -> which counts are allowed.
        low, high: decision -> fewest and most units: `min_keep` rounded up, and what is left.
        curve: counts of targets -> cost.
    """

    graph: Graph
    orders: Mapping[str, IntArray]
    lines: Mapping[str, FloatArray]
    classes: Classes
    rounding: Mapping[str, Rounding]
    low: Allocation
    high: Allocation
    curve: CostCurve

    def expand(self, decided: Mapping[str, int]) -> Allocation:
        """Counts of all targets, in graph order."""
        of = {t: decided[name] for name, members in self.classes.items() for t in members}
        return {name: of[name] for name in self.orders}


def make_frame(scores: Scores, min_keep: int, round_to: RoundTo, homogeneous: bool) -> Frame:
    if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 1:
        raise ConfigError(f"min_keep must be a whole number, at least 1, got {min_keep!r}")
    check_round_to(round_to)
    if not isinstance(homogeneous, bool):
        raise ConfigError(f"homogeneous must be True or False, got {homogeneous!r}")
    graph = scores.graph
    orders, lines = _ranked(scores)
    classes = same_place(graph, orders) if homogeneous else {name: (name,) for name in orders}
    rounding = roundings(round_to, graph, orders)
    high = {name: min(len(lines[t]) for t in members) for name, members in classes.items()}
    low = {name: min(rounding[name].up(min_keep), high[name]) for name in classes}
    curve = CostCurve(graph, orders)
    return Frame(graph, orders, lines, classes, rounding, low, high, curve)


def _ranked(scores: Scores) -> tuple[dict[str, IntArray], dict[str, FloatArray]]:
    """Units of each target from best to worst, and the scores of those that are left."""
    if not scores.values:
        raise ConfigError("there are no scores to allocate")
    orders, lines = {}, {}
    for name in [n for n in scores.graph.targets if n in scores.values]:
        line = scores.values[name].reshape(-1)
        if bool((line.isnan() | (line == float("inf"))).any()):
            raise ScoringError(f"{name}: a score is nan or inf; score the target again")
        order = order_of(line)
        best_first = line[order].float().numpy()
        orders[name] = order.numpy()
        lines[name] = best_first[best_first > -np.inf]
        if not len(lines[name]):
            raise BudgetError(f"{name} has no unit left; start from a plan that keeps some")
    return orders, lines
