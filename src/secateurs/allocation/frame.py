"""Scores and bounds in the shape that rules and allocators work on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateurs.allocation.demand import OnDemand
from secateurs.allocation.problem import Allocation, FloatArray
from secateurs.allocation.rounding import Rounding, RoundTo, check_round_to, roundings
from secateurs.cost import CostCurve, without
from secateurs.errors import BudgetError, ConfigError, ScoringError
from secateurs.kth import count_left, kth_largest
from secateurs.selection import order_of
from secateurs.types import Graph, GroupTarget, IntArray, Plan, Scores, WeightTarget

__all__ = ["Frame", "check_options", "make_frame", "same_place"]

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
        scores: target -> (n_units,) its scores as they came.
        orders: target -> its units from best to worst.
        lines: target -> scores of the units that are left, best first. Both are made when they
            are read, and kept for structure only: those of weights would fill the memory.
        classes: decision -> the targets that keep as many units as it.
        rounding: target -> which counts are allowed.
        low, high: decision -> fewest and most units: `min_keep` rounded up, and what is left.
        curve: counts of targets -> cost.
    """

    graph: Graph
    scores: Mapping[str, Tensor]
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
        return {name: of[name] for name in self.scores}

    @property
    def n_units(self) -> dict[str, int]:
        """Target -> its units, dense."""
        return {name: len(line) for name, line in self.scores.items()}

    def worst_kept(self, name: str, count: int) -> float:
        """The lowest score of the `count` best units of a target."""
        if not isinstance(self.graph.targets[name], WeightTarget):
            return float(self.lines[name][count - 1])
        return float(np.float32(kth_largest({name: self.scores[name]}, count).threshold))


def check_options(min_keep: int, round_to: RoundTo, homogeneous: bool) -> None:
    """Raise unless they are in range."""
    if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 1:
        raise ConfigError(
            f"min_keep must be a whole number, at least 1, got {min_keep!r}; nothing gets past a "
            "layer that is emptied (to remove whole residual branches, prune granularity='layer')"
        )
    check_round_to(round_to)
    if not isinstance(homogeneous, bool):
        raise ConfigError(f"homogeneous must be True or False, got {homogeneous!r}")


def make_frame(
    scores: Scores,
    min_keep: int,
    round_to: RoundTo,
    homogeneous: bool,
    previous: Plan | None = None,
) -> Frame:
    """The frame of an allocation.

    Args:
        scores, min_keep, round_to, homogeneous, previous: as in `allocate`.

    Raises:
        ConfigError: an option out of range, or no scores.
        ScoringError: a score is not a number.
        BudgetError: a target has nothing left.
    """
    check_options(min_keep, round_to, homogeneous)
    graph = scores.graph
    if not scores.values:
        raise ConfigError("there are no scores to allocate")
    lines = {n: scores.values[n].reshape(-1) for n in graph.targets if n in scores.values}
    left = {name: _left(name, line) for name, line in lines.items()}
    for name in [n for n, units in left.items() if not units]:
        if previous is None or not isinstance(graph.targets[name], WeightTarget):
            raise BudgetError(f"{name} has no unit left; start from a plan that keeps some")
        del lines[name], left[name]  # it went with its layer
    classes = same_place(graph, lines) if homogeneous else {name: (name,) for name in lines}
    rounding = roundings(round_to, graph, lines)
    high = {name: min(left[t] for t in members) for name, members in classes.items()}
    low = {name: min(rounding[name].up(min_keep), high[name]) for name in classes}
    structure = {name for name in lines if not isinstance(graph.targets[name], WeightTarget)}
    orders: OnDemand[IntArray] = OnDemand(lines, lambda n: order_of(lines[n]).numpy(), structure)
    best_first = OnDemand(lines, lambda n: _best_first(lines[n]), structure)
    gone = {} if previous is None else _gone(graph, previous, lines)
    curve = CostCurve(without(graph, gone), orders)
    return Frame(graph, lines, orders, best_first, classes, rounding, low, high, curve)


def _gone(graph: Graph, previous: Plan, scored: Mapping[str, Tensor]) -> dict[str, IntArray]:
    """Structural units that an earlier cut removed from targets that are not scored now."""
    return {
        name: units.numpy()
        for name, units in previous.removed.items()
        if name not in scored and isinstance(graph.targets.get(name), GroupTarget)
    }


def _left(name: str, line: Tensor) -> int:
    """How many units are left; checked to be scored."""
    best = torch.amax(line) if len(line) else torch.zeros(())  # nan if any is
    if bool(best.isnan()) or best == float("inf"):
        raise ScoringError(f"{name}: a score is nan or inf; score the target again")
    return count_left(name, line)


def _best_first(line: Tensor) -> FloatArray:
    """Scores of the units that are left, in float32."""
    values: FloatArray = line.float().numpy()
    values = values[values > -np.inf]
    np.negative(values, out=values).sort()
    return np.negative(values, out=values)
