"""Decisions for a budget: what limits it, whether that can be reached, and who distributes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from secateurs.allocation.frame import Frame
from secateurs.allocation.problem import ALLOCATORS, Allocation, FloatArray, Limit, Problem
from secateurs.cost import dense_cost
from secateurs.errors import BudgetError, ConfigError
from secateurs.types import Budget, WeightTarget

__all__ = ["spend"]


def spend(frame: Frame, asked: Budget, method: str) -> Allocation:
    """Decisions for a budget."""
    limits = _limits(frame, asked)
    for limit in limits:
        _check_reachable(frame, asked, limit)
    if all(limit.holds(frame.high) for limit in limits):
        return dict(frame.high)
    problem = Problem(
        names=tuple(frame.classes),
        n_units={name: len(frame.orders[name]) for name in frame.classes},
        values={name: _mean_line(frame, name) for name in frame.classes},
        low=frame.low,
        high=frame.high,
        rounding={name: frame.rounding[name] for name in frame.classes},
        repeats={name: len(members) for name, members in frame.classes.items()},
        limits=limits,
        graph=frame.graph,
    )
    return dict(ALLOCATORS[method](problem))


def _mean_line(frame: Frame, name: str) -> FloatArray:
    """(high,) mean over the targets of a class of their best scores, their second best, ..."""
    lines = [frame.lines[t][: frame.high[name]] for t in frame.classes[name]]
    mean: FloatArray = np.stack(lines).mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def _limits(frame: Frame, asked: Budget) -> tuple[Limit, ...]:
    """Every size of the budget that counts decide."""
    weights = any(isinstance(frame.graph.targets[n], WeightTarget) for n in frame.orders)
    if "macs" in asked.sizes and weights:
        raise ConfigError(
            "zeros among single weights save no dense multiply-adds: Budget(macs=...) cannot be met"
            " at weight granularity. Use params= or units=, or prune structure"
        )
    dense = _dense(frame)
    return tuple(
        Limit(quantity, _cost(frame, quantity), asked.limit(quantity, dense[quantity]))
        for quantity in asked.sizes
    )


def _cost(frame: Frame, quantity: str) -> Callable[[Mapping[str, int]], float]:
    def cost(decided: Mapping[str, int]) -> int:
        kept = frame.expand(decided)
        return sum(kept.values()) if quantity == "units" else getattr(frame.curve(kept), quantity)

    return cost


def _dense(frame: Frame) -> dict[str, int]:
    whole = dense_cost(frame.graph)
    units = sum(len(order) for order in frame.orders.values())
    return {"units": units, "params": whole.params, "macs": whole.macs}


def _check_reachable(frame: Frame, asked: Budget, limit: Limit) -> None:
    total = _dense(frame)[limit.quantity]
    if not total:
        raise ConfigError(
            f"the graph knows no {limit.quantity}; use a graph from trace, or another budget"
        )
    least = limit.cost(frame.low)
    if least > limit.most:
        raise BudgetError(
            f"Budget({limit.quantity}={asked.given[limit.quantity]!r}) allows {limit.most} of "
            f"{total} {limit.quantity}, but {least} ({least / total:.4g} of the model) remain when "
            f"every target keeps its fewest units; ask for at least "
            f"{limit.quantity}={_up(least / total)}, or prune more kinds of units"
        )


def _up(fraction: float) -> float:
    """Rounded up to four digits after the point."""
    return math.ceil(fraction * 1e4) / 1e4
