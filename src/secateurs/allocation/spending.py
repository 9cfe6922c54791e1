"""Decisions for a budget: what limits it, whether that can be reached, and who distributes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from secateurs.allocation.curves import Sensitivity
from secateurs.allocation.demand import OnDemand
from secateurs.allocation.frame import Frame
from secateurs.allocation.problem import (
    ALLOCATORS,
    Allocation,
    FloatArray,
    Latency,
    Limit,
    MissedBudget,
    Problem,
)
from secateurs.cost import Cost, Stored, dense_cost
from secateurs.errors import ConfigError
from secateurs.types import Budget, WeightTarget

__all__ = ["dense_sizes", "spend"]

Costs = Callable[[Mapping[str, int]], float]


def spend(
    frame: Frame,
    asked: Budget,
    method: str,
    *,
    sensitivity: Sensitivity | None = None,
    latency: Latency | None = None,
    sample: int | None = None,
) -> Allocation:
    """Decisions for a budget: within every limit, and no single next step of any target fits."""
    _check_asked(frame, asked, latency)
    limits = _limits(frame, asked, latency, "at_least")
    _check_reachable(frame, asked, limits)
    weights = {n for n in frame.scores if isinstance(frame.graph.targets[n], WeightTarget)}
    alone = all(len(members) == 1 for members in frame.classes.values())
    n_units = frame.n_units
    problem = Problem(
        names=tuple(frame.classes),
        n_units={name: n_units[name] for name in frame.classes},
        values=OnDemand(
            frame.classes, lambda name: _mean_line(frame, name), {*frame.classes} - weights
        ),
        low=frame.low,
        high=frame.high,
        rounding={name: frame.rounding[name] for name in frame.classes},
        repeats={name: len(members) for name, members in frame.classes.items()},
        limits=limits,
        graph=frame.graph,
        members=frame.classes,
        sensitivity=sensitivity,
        scores=frame.scores if alone and len(weights) == len(frame.scores) else {},
        sample=sample,
    )
    decided = _distributed(problem, method)
    exact = _limits(frame, asked, latency, "exact")
    if not all(limit.holds(decided) for limit in exact):
        # Another limit keeps a tensor from being whole, and its few zeros cost more than they save.
        limits = _limits(frame, asked, latency, "at_most")
        _check_reachable(frame, asked, limits)
        decided = _distributed(replace(problem, limits=limits), method)
    return decided


def _distributed(problem: Problem, method: str) -> Allocation:
    """What the allocator says; checked, since anyone may register one."""
    if problem.fits(problem.high):
        return dict(problem.high)
    decided = dict(ALLOCATORS[method](problem))
    wrong = [n for n in problem.names if problem.snap(n, decided.get(n, -1)) != decided.get(n)]
    if wrong or not problem.fits(decided):
        what = f"a count that is not allowed for {wrong[0]}" if wrong else "more than the budget"
        raise ConfigError(
            f"allocator {method!r} returned {what}; counts must be such that problem.snap leaves "
            "them as they are and problem.fits holds"
        )
    return _filled(problem, decided)


def _filled(problem: Problem, decided: Allocation) -> Allocation:
    """Every next step that fits is taken, targets in turn; most allocators leave none."""
    kept = dict(decided)
    open_ = list(problem.names)
    while open_:
        for name in tuple(open_):
            more = problem.step(name, kept[name])
            if more is None or not problem.fits({**kept, name: more}):
                open_.remove(name)  # costs only grow: what does not fit now never will
            else:
                kept[name] = more
    return kept


def _mean_line(frame: Frame, name: str) -> FloatArray:
    """(high,) mean over the targets of a class of their best scores, their second best, ..."""
    if len(frame.classes[name]) == 1:
        return frame.lines[name][: frame.high[name]]
    lines = [frame.lines[t][: frame.high[name]] for t in frame.classes[name]]
    mean: FloatArray = np.stack(lines).mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


# -- limits ----------------------------------------------------------------------------------


def _check_asked(frame: Frame, asked: Budget, latency: Latency | None) -> None:
    """Whether counts can decide what is asked for."""
    weights = any(isinstance(frame.graph.targets[n], WeightTarget) for n in frame.orders)
    for quantity, what in (("macs", "multiply-adds"), ("latency_ms", "time")):
        if quantity in asked.given and weights:
            raise ConfigError(
                f"zeros among single weights save no dense {what}: Budget({quantity}=...) cannot "
                "be met at weight granularity. Use params=, bytes= or units=, or prune structure"
            )
    if asked.metric_drop is not None:
        raise ConfigError(
            f"Budget(metric_drop={asked.metric_drop!r}): counts do not tell how good the model is "
            "without being tried; leave it away here, or ask prune or search for it"
        )
    if asked.latency_ms is not None and latency is None:
        raise ConfigError(
            f"Budget(latency_ms={asked.latency_ms!r}) needs a table of what widths cost on this "
            "machine: pass latency=secateurs.latency.measure_table(model, graph, example_inputs)"
        )


def _limits(
    frame: Frame, asked: Budget, latency: Latency | None, stored: Stored
) -> tuple[Limit, ...]:
    """Every limit of the budget.

    Raises:
        ConfigError: the graph does not know a quantity.
    """
    dense = dense_sizes(frame)
    for quantity in asked.sizes:
        if not dense[quantity]:
            raise ConfigError(
                f"the graph knows no {quantity}; use a graph from trace, or another budget"
            )
    cost = _last(lambda decided: frame.curve(frame.expand(decided), stored))
    of: dict[str, Costs] = {
        "units": lambda decided: sum(frame.expand(decided).values()),
        "params": lambda decided: cost(decided).params,
        "macs": lambda decided: cost(decided).macs,
        "bytes": lambda decided: cost(decided).bytes,
    }
    limits = [Limit(q, of[q], asked.limit(q, dense[q])) for q in asked.sizes]
    if asked.latency_ms is not None and latency is not None:
        curve = latency.curve(frame.graph, frame.orders)
        limits.append(Limit("latency_ms", lambda d: curve(frame.expand(d)), asked.latency_ms))
    return tuple(limits)


def _last(cost: Callable[[Mapping[str, int]], Cost]) -> Callable[[Mapping[str, int]], Cost]:
    """The same, remembering its last answer: several limits ask about the same counts."""
    known: dict[tuple[int, ...], Cost] = {}

    def remembered(decided: Mapping[str, int]) -> Cost:
        key = tuple(decided.values())
        if key not in known:
            known.clear()
            known[key] = cost(decided)
        return known[key]

    return remembered


def dense_sizes(frame: Frame) -> dict[str, int]:
    """Quantity -> what the dense model has of it."""
    whole = dense_cost(frame.graph)
    units = sum(frame.n_units.values())
    return {"units": units, "params": whole.params, "macs": whole.macs, "bytes": whole.bytes}


def _check_reachable(frame: Frame, asked: Budget, limits: tuple[Limit, ...]) -> None:
    """Raise unless the fewest units of every target are within all limits.

    Costs never fall when a count rises, so where those are too many nothing is few enough, and
    where they are not the limits do not contradict each other.
    """
    missed = [(limit, limit.cost(frame.low)) for limit in limits if not limit.holds(frame.low)]
    if not missed:
        return
    dense = {**dense_sizes(frame), "latency_ms": 0}
    said = [_missed(asked, limit, least, dense[limit.quantity]) for limit, least in missed]
    raise MissedBudget(
        "; ".join(said) + "; or prune more kinds of units",
        {limit.quantity: least for limit, least in missed},
    )


def _missed(asked: Budget, limit: Limit, least: float, total: int) -> str:
    """One limit, what remains at least, and what to ask for."""
    quantity = limit.quantity
    given = f"Budget({quantity}={asked.given[quantity]!r})"
    if quantity == "latency_ms":
        return (
            f"{given} allows {limit.most:.4g} ms, but the table predicts {least:.4g} ms when every "
            f"target keeps its fewest units; ask for at least latency_ms={_up(least)}"
        )
    share = f"{quantity}={_up(least / total)} or " if least <= total else ""
    return (
        f"{given} allows {limit.most:.0f} of {total} {quantity}, but {least:.0f} "
        f"({least / total:.4g} of the model) remain when every target keeps its fewest units; ask "
        f"for at least {share}{quantity}={least:.0f}"
    )


def _up(figure: float) -> float:
    """Rounded up to four digits after the point."""
    return math.ceil(figure * 1e4) / 1e4
