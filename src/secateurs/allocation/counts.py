"""`allocate`: from scores and what is asked to counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateurs.allocation.cuts import Found, find_cuts, null_lines
from secateurs.allocation.previews import Preview, PreviewRow
from secateurs.allocation.problem import ALLOCATORS, Allocation, FloatArray, Problem
from secateurs.allocation.rounding import Rounding, RoundTo, check_round_to, roundings
from secateurs.allocation.thresholds import Line
from secateurs.cost import CostCurve, dense_cost
from secateurs.errors import BudgetError, ConfigError, ScoringError, choose
from secateurs.selection import order_of
from secateurs.types import Budget, Counts, Graph, IntArray, Scores, Threshold, WeightTarget

__all__ = ["allocate", "preview", "same_place"]

Classes = Mapping[str, tuple[str, ...]]


def allocate(
    scores: Scores,
    asked: Budget | Threshold,
    *,
    method: str = "uniform",
    min_keep: int = 1,
    round_to: RoundTo = "auto",
    homogeneous: bool = False,
    null: Sequence[Scores] = (),
) -> Counts:
    """Units that each target keeps.

    A budget in `units` is met exactly: the total is the limit rounded down (unless `round_to` or
    `homogeneous` forbid it). One in `params` or `macs` gives a model within the limit to which no
    single next step of any target can be added. Units removed earlier (score `-inf`) are never
    kept.

    Args:
        scores: larger = keep.
        asked: what may remain, or the rule of the cut.
        method: how a budget is distributed: "uniform" (the same fraction of every target), "global"
            (the lowest scores go, wherever they are) or "global_normalized" (the same after
            dividing by the root mean square of each target's scores).
        min_keep: units that each target keeps at least, >= 1.
        round_to: keep multiples of this many units (or all that are left); an int for all targets,
            a mapping for some kinds. "auto": of 16 for families of at least 128 channels of a model
            on the CPU (below 16 any count), no rounding elsewhere. A budget stays a limit; counts
            of a threshold are rounded up.
        homogeneous: targets in the same place of repeated blocks (see `same_place`) keep equal
            counts, so that one configured size fits all blocks. Which units stay is still decided
            for each target. A ranking compares the mean of their best scores, of their second
            best, and so on; with a threshold the largest count of a class holds for all of it.
        null: scores on shuffled labels, from `secateurs.controls.null_scores`; for
            Threshold("permutation") only.

    Returns:
        `Counts` with what they leave of the dense model.

    Raises:
        ConfigError: an option out of range, weights and structure mixed, or a budget in MACs for
            single weights.
        BudgetError: the budget cannot be reached, or the threshold would leave too little.
    """
    choose(method, ALLOCATORS, "allocation method")
    if isinstance(asked, Threshold) and method != "uniform":
        raise ConfigError(
            f"method={method!r} distributes a budget; a threshold takes scope='target' or 'global'"
        )
    frame = _frame(scores, min_keep, round_to, homogeneous)
    if isinstance(asked, Threshold):
        decided, cuts = _cut(frame, asked, null_lines(scores, asked, null))
    elif null:
        raise ConfigError("null scores are for a threshold; a budget takes none: leave null away")
    else:
        decided = _spend(frame, asked, method)
        cuts = {}
    kept = frame.expand(decided)
    if isinstance(asked, Budget):
        cuts = {name: float(frame.lines[name][kept[name] - 1]) for name in kept}
    multiples = {n: frame.rounding[n].multiple for n in kept if frame.rounding[n].multiple > 1}
    return Counts(kept, asked, _realised(frame, kept), cuts, multiples)


def preview(
    scores: Scores,
    asked: Threshold,
    *,
    min_keep: int = 1,
    round_to: RoundTo = "auto",
    homogeneous: bool = False,
    null: Sequence[Scores] = (),
) -> Preview:
    """What a threshold would remove from each target, and where its cut lies among the scores.

    Nothing is removed, and what `allocate` would refuse is a row with a `problem` instead of an
    error.

    Args:
        scores, asked, min_keep, round_to, homogeneous, null: as in `allocate`.

    Returns:
        A `Preview`: `table()` for people, `to_dict()` for JSON.

    Raises:
        ConfigError: an option out of range, or a rule that cannot be applied to these scores.

    Example:
        >>> import torch
        >>> graph = Graph({"fc.weight": WeightTarget("fc.weight", (1, 5))})
        >>> line = torch.tensor([1.0, 9.0, 2.0, 10.0, 11.0])
        >>> scores = Scores(graph, {"fc.weight": line}, "mine")
        >>> print(preview(scores, Threshold("otsu")).table())
        threshold otsu(log=False) per target, on scores of mine
        target     units  threshold  go  share  lowest  goes to  stays from  median  largest
        fc.weight      5          9   2  40.0%       1        2           9       9       11
        total          5              2  40.0%
    """
    frame = _frame(scores, min_keep, round_to, homogeneous)
    found = find_cuts(frame.lines, asked, null_lines(scores, asked, null))
    decided, problems = _reached(frame, found)
    kept = frame.expand(decided)
    rows = []
    for name, line in frame.lines.items():
        n, stay = len(line), kept[name]
        rows.append(
            PreviewRow(
                target=name,
                kind=frame.graph.targets[name].kind,
                units=n,
                threshold=found[name].cut,
                goes=n - stay,
                lowest=float(line[-1]),
                median=float(np.median(line.astype(np.float64))),
                largest=float(line[0]),
                goes_to=float(line[stay]) if stay < n else None,
                stays_from=float(line[stay - 1]) if stay else None,
                problem=problems.get(name, ""),
            )
        )
    return Preview(asked.text, scores.criterion, tuple(rows))


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
class _Frame:
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


def _frame(scores: Scores, min_keep: int, round_to: RoundTo, homogeneous: bool) -> _Frame:
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
    return _Frame(graph, orders, lines, classes, rounding, low, high, curve)


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


def _realised(frame: _Frame, kept: Mapping[str, int]) -> dict[str, float]:
    dense, cost = dense_cost(frame.graph), frame.curve(kept)
    realised = {"units": sum(kept.values()) / sum(len(o) for o in frame.orders.values())}
    if dense.params:
        realised["params"] = cost.params / dense.params
    if dense.macs:
        realised["macs"] = cost.macs / dense.macs
    return realised


def _spend(frame: _Frame, asked: Budget, method: str) -> Allocation:
    """Decisions for a budget."""
    quantity, graph = asked.quantity, frame.graph
    if quantity == "macs" and any(isinstance(graph.targets[n], WeightTarget) for n in frame.orders):
        raise ConfigError(
            "zeros among single weights save no dense multiply-adds: Budget(macs=...) cannot be met"
            " at weight granularity. Use params= or units=, or prune structure"
        )
    units = sum(len(order) for order in frame.orders.values())
    total = units if quantity == "units" else getattr(dense_cost(graph), quantity)
    if not total:
        raise ConfigError(
            f"the graph knows no {quantity}; use a graph from trace, or another budget"
        )

    def cost(decided: Mapping[str, int]) -> int:
        kept = frame.expand(decided)
        return sum(kept.values()) if quantity == "units" else getattr(frame.curve(kept), quantity)

    limit = _limit(asked, total)
    least = cost(frame.low)
    if least > limit:
        raise BudgetError(
            f"Budget({quantity}={getattr(asked, quantity)!r}) allows {limit} of {total} "
            f"{quantity}, but {least} ({least / total:.4g} of the model) remain when every target "
            f"keeps its fewest units; ask for at least {quantity}={_up(least / total)}, or prune "
            "more kinds of units"
        )
    if cost(frame.high) <= limit:
        return dict(frame.high)
    problem = Problem(
        names=tuple(frame.classes),
        n_units={name: len(frame.orders[name]) for name in frame.classes},
        values={name: _mean_line(frame, name) for name in frame.classes},
        low=frame.low,
        high=frame.high,
        rounding={name: frame.rounding[name] for name in frame.classes},
        repeats={name: len(members) for name, members in frame.classes.items()},
        quantity=quantity,
        cost=cost,
        limit=limit,
    )
    return dict(ALLOCATORS[method](problem))


def _mean_line(frame: _Frame, name: str) -> FloatArray:
    """(high,) mean over the targets of a class of their best scores, their second best, ..."""
    lines = [frame.lines[t][: frame.high[name]] for t in frame.classes[name]]
    mean: FloatArray = np.stack(lines).mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def _limit(asked: Budget, total: int) -> int:
    """The limit rounded down, safe against 0.29 * 100 = 28.999999999999996."""
    amount = asked.amount
    return math.floor(amount * total * (1 + 1e-12)) if isinstance(amount, float) else amount


def _up(fraction: float) -> float:
    """Rounded up to four digits after the point."""
    return math.ceil(fraction * 1e4) / 1e4


def _cut(
    frame: _Frame, asked: Threshold, nulls: Mapping[str, Line]
) -> tuple[Allocation, dict[str, float]]:
    """Counts of the scores that are not below the threshold, and the threshold of each target."""
    found = find_cuts(frame.lines, asked, nulls)
    decided, problems = _reached(frame, found)
    if problems:
        raise BudgetError(
            f"threshold {asked.rule!r} would leave too little. "
            + "; ".join(dict.fromkeys(problems.values()))
            + (". Raise fdr" if asked.needs_null else ". Lower the threshold")
            + ", or use a budget"
            + (" or scope='target'" if asked.scope == "global" else "")
        )
    return decided, {name: found[name].cut for name in frame.orders}


def _reached(frame: _Frame, found: Mapping[str, Found]) -> tuple[Allocation, dict[str, str]]:
    """Counts of the scores that reach their cut, and what is wrong with those that are too few."""
    decided, problems = {}, {}
    for name, members in frame.classes.items():
        best = max(members, key=lambda t: found[t].reach)
        decided[name] = min(frame.high[name], frame.rounding[name].up(found[best].reach))
        if found[best].reach < frame.low[name]:
            line = frame.lines[best]
            problems[best] = found[best].why or (
                f"{best}: {found[best].reach} of {len(line)} units reach the threshold "
                f"{found[best].cut:.6g}, its largest score is {line[0]:.6g}, at least "
                f"{frame.low[name]} must stay"
            )
    return decided, problems
