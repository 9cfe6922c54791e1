"""Weights inside units inside layers: one budget for all scales at once.

Whole units and single weights compete for the same parameters. What is decided is how many units
stay, of every kind; the best weights inside of what stays then fill the budget exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from secateurs.allocation.frame import same_place
from secateurs.allocation.pricing import Scaled, cheapest
from secateurs.allocation.problem import Allocation, Problem, allocator
from secateurs.allocation.ranking import by_rank
from secateurs.allocation.rounding import Rounding, RoundTo, roundings
from secateurs.allocation.tables import Lines, Ranks, blocks_of, losses, terms_of
from secateurs.cost import BoolArray, cost_of_kept, dense_cost
from secateurs.criteria import CRITERIA
from secateurs.errors import BudgetError, ConfigError, ScoringError
from secateurs.selection import order_of
from secateurs.types import Budget, Counts, Graph, Scores, WeightTarget

__all__ = ["allocate_scales", "check_comparable", "mixes_scales", "multi_scale"]

PREDICT = frozenset(
    {"gate", "slope", "curvature", "kronecker", "ablation", "shared_path", "flow", "flow_squared"}
)
"""Statistics that say how one quantity of the whole network changes when something goes."""
PREDICT_BY_WEIGHT = frozenset({"grad", "noisy_grad"})
"""Statistics that do when they are multiplied by the weight."""


@allocator("multi_scale")
def multi_scale(problem: Problem) -> Allocation:
    """Weights, units and layers together: `allocate_scales` decides that.

    A problem holds targets whose costs do not mix, that is, one scale: then the lowest scores go,
    wherever they are, as with "global". Nothing loses less when all units cost the same, as weights
    do.
    """
    return by_rank(problem, problem.values)


def mixes_scales(scores: Scores) -> bool:
    """Whether there are scores of single weights and of structure."""
    targets = [scores.graph.targets[n] for n in scores.values]
    return len({isinstance(t, WeightTarget) for t in targets}) == 2


def check_comparable(criterion: str) -> None:
    """Raise unless scores of that criterion are comparable between weights and units.

    They are when they predict the change of one quantity of the whole network: the loss (or its
    square), as with "taylor", or the flow of "synflow". A criterion that is not in the registry is
    taken at its word.

    Args:
        criterion: `Scores.criterion`.

    Raises:
        ConfigError: they are not.

    Example:
        >>> check_comparable("taylor(average=batch)")
        >>> check_comparable("magnitude")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        secateurs.errors.ConfigError: scores of 'magnitude' are not comparable between scales...
    """
    inner = criterion.removeprefix("shuffle(").removesuffix(")" * criterion.startswith("shuffle("))
    name, _, options = inner.partition("(")
    if name not in CRITERIA and not options:  # somebody's own scores
        return
    comparable = [n for n, c in CRITERIA.items() if c.covers("weight") and _predicts(c.needs)]
    if name not in comparable:
        raise ConfigError(
            f"scores of {criterion!r} are not comparable between scales: those of a unit and of a "
            "weight in it do not predict the change of one quantity, so that no price of a "
            f"parameter holds for both. Take one of {', '.join(comparable)}; or prune in two "
            "stages, each with its own budget"
        )


def _predicts(needs: frozenset[str]) -> bool:
    if "weight" in needs:
        return bool(needs - {"weight"}) and needs - {"weight"} <= PREDICT_BY_WEIGHT
    return needs <= PREDICT


def allocate_scales(
    scores: Scores,
    asked: Budget,
    *,
    min_keep: int,
    round_to: RoundTo,
    homogeneous: bool,
) -> Counts:
    """How many layers, units and single weights stay, decided together.

    What is predicted to be lost is made small,

        sum of the scores of units that go + sum of the scores of weights that go inside of others

    under the limits of the budget. A weight inside of a unit that goes is not counted twice, nor a
    unit inside of a layer that goes. That is what the criterion predicts if scores add up: they do
    for criteria that sum over elements ("fisher", "taylor_element", "snip", "synflow"); with
    "taylor", which squares the sum of a unit, what different removals do is taken as uncorrelated;
    "taylor_abs" and "directional" make many single weights look dearer than the unit they form.

    A limit on parameters is filled exactly, so that no single weight more fits, unless all weights
    inside are within it. Only structure saves MACs: with a limit on MACs alone all weights of what
    stays do, with both each is met.

    A price of a parameter is searched for among the scores (`pricing`), since for a given price
    counts are improved target by target quickly; of all counts on the way, leaving every unit
    included, those that lose least are taken. That is no proof of the optimum:
    `tests/allocation/test_scales.py` compares with an exhaustive search.

    Args:
        scores: of single weights and of structure.
        asked: limits in params, macs or both.
        min_keep: fewest units of each target and fewest weights of each tensor that stays.
        round_to: allowed counts, as in `allocate`; at every scale.
        homogeneous: equal widths in repeated blocks; which weights stay inside is free.

    Returns:
        `Counts`: of weights those kept in what remains; 0 for a tensor that goes with its layer.
        `realised` has "params" (non-zeros) and "macs" (of the structure).

    Raises:
        ConfigError: a criterion whose scores are not comparable, or a limit on something else.
        BudgetError: the budget cannot be reached.
    """
    check_comparable(scores.criterion)
    graph = scores.graph
    lines = _checked(scores)
    weights = [n for n in lines if isinstance(graph.targets[n], WeightTarget)]
    units = [n for n in lines if n not in weights]
    rounding = roundings(round_to, graph, lines)
    classes = same_place(graph, units) if homogeneous else {n: (n,) for n in units}
    problem = _scaled(scores, asked, lines, classes, rounding, min_keep)
    decided, lost = cheapest(problem)
    if math.isinf(lost):
        raise _missed(problem, asked, graph)
    inside = problem.inside(decided)
    shut = {t for n, ts in classes.items() for t in ts if not _stays(problem.ranks, t, decided)}
    kept = {t: decided[n] for n, ts in classes.items() for t in ts}
    # Nothing more is cut from what goes with its layer.
    kept |= {t: int((lines[t] > -np.inf).sum()) for t in shut}
    kept |= _spread(problem, inside, problem.room(decided), rounding)
    kept = {n: kept[n] for n in lines}
    return Counts(
        kept, asked, _realised(scores, kept), _cuts(lines, inside, kept),
        {n: rounding[n].multiple for n in kept if rounding[n].multiple > 1},
    )  # fmt: skip


def _checked(scores: Scores) -> dict[str, Lines]:
    """(n_units,) scores of each target, in graph order."""
    lines = {}
    for name in [n for n in scores.graph.targets if n in scores.values]:
        line = scores.values[name].reshape(-1).float().numpy()
        if np.isnan(line).any() or (line == np.inf).any():
            raise ScoringError(f"{name}: a score is nan or inf; score the target again")
        lines[name] = line
        structural = not isinstance(scores.graph.targets[name], WeightTarget)
        if structural and not (line > -np.inf).any():
            raise BudgetError(f"{name} has no unit left; start from a plan that keeps some")
    return lines


def _scaled(
    scores: Scores,
    asked: Budget,
    lines: Mapping[str, Lines],
    classes: Mapping[str, tuple[str, ...]],
    rounding: Mapping[str, Rounding],
    min_keep: int,
) -> Scaled:
    graph, dense = scores.graph, dense_cost(scores.graph)
    other = [q for q in asked.given if q not in ("params", "macs")]
    if other:
        raise ConfigError(
            f'method="multi_scale" takes a budget in params, macs or both, not {", ".join(other)}'
            + ": units of different scales do not add up" * ("units" in other)
        )
    limits = {q: asked.limit(q, getattr(dense, q)) for q in asked.sizes}
    none = [q for q in limits if not getattr(dense, q)]
    if none:
        raise ConfigError(f"the graph knows no {none[0]}; use a graph from trace")
    decision = {t: n for n, members in classes.items() for t in members}
    alive = {t: int((lines[t] > -np.inf).sum()) for t in lines}
    allowed = {}
    for name, members in classes.items():
        high, of = min(alive[t] for t in members), rounding[name]
        low = min(of.up(min_keep), high)
        counts = [c for c in range(low, high + 1) if c == high or of.down(c) == c]
        allowed[name] = np.array(counts, dtype=np.int64)
    orders = {t: order_of(scores.values[t].reshape(-1)).numpy() for t in decision}
    ranks = Ranks.of(graph, decision, orders)
    blocks = []
    for name, line in lines.items():
        target = graph.targets[name]
        if isinstance(target, WeightTarget):
            blocks += blocks_of(ranks, target, line)
    fewest = {n: rounding[n].up(min_keep) for n in lines if n not in decision}
    best_first = {t: lines[t][orders[t]][: alive[t]] for t in decision}
    return Scaled(
        ranks, allowed, blocks, fewest, losses(ranks, best_first), terms_of(ranks, fewest), limits
    )


def _missed(problem: Scaled, asked: Budget, graph: Graph) -> BudgetError:
    fewest = {n: int(a[0]) for n, a in problem.allowed.items()}
    least = {
        "params": problem.others(fewest) + sum(problem.least(problem.inside(fewest)).values()),
        "macs": problem.macs(fewest),
    }
    said = []
    for quantity, most in problem.limits.items():
        dense = getattr(dense_cost(graph), quantity)
        said.append(
            f"{quantity}={asked.given[quantity]!r} allows {most} of {dense}, and {least[quantity]} "
            f"({least[quantity] / dense:.4g} of the model) remain when every target keeps its "
            "fewest units and weights"
        )
    return BudgetError(
        f"Budget: no counts of units and weights are within it. {'; '.join(said)}. Ask for more, "
        "lower min_keep, or prune more kinds of units"
    )


def _stays(ranks: Ranks, target: str, counts: Mapping[str, int]) -> bool:
    """Whether a target is in no layer that goes."""
    return all(counts[decision] > rank for decision, rank in ranks.gate_of(target))


def _spread(
    problem: Scaled, inside: Mapping[str, Lines], room: int | None, rounding: Mapping[str, Rounding]
) -> dict[str, int]:
    """How many of the weights inside stay in each target: the best of all, within the room."""
    high = {n: len(line) for n, line in inside.items()}
    if room is None or sum(high.values()) <= room:
        return high
    low = problem.least(inside)
    free = {n: np.sort(line)[::-1][low[n] :] for n, line in inside.items()}
    owner = np.repeat(np.arange(len(free)), [len(line) for line in free.values()])
    ranked = owner[np.argsort(-np.concatenate(list(free.values())), kind="stable")]
    extra = np.bincount(ranked[: room - sum(low.values())], minlength=len(free))
    kept = {}
    for name, more in zip(free, extra.tolist(), strict=True):
        count = low[name] + more
        allowed = count if count == high[name] else rounding[name].down(count)
        kept[name] = max(low[name], allowed)
    # What rounding left over goes to whole steps while one fits, the best weights first.
    left, open_ = room - sum(kept.values()), [n for n in kept if kept[n] < high[n]]
    while open_:
        name = max(open_, key=lambda n: free[n][kept[n] - low[n]])
        step = min(high[name], rounding[name].up(kept[name] + 1)) - kept[name]
        if step <= left:
            left, kept[name] = left - step, kept[name] + step
        if step > left or kept[name] == high[name]:
            open_.remove(name)
    return kept


def _cuts(
    lines: Mapping[str, Lines], inside: Mapping[str, Lines], kept: Mapping[str, int]
) -> dict[str, float]:
    """The lowest score that stays in each target, those of weights inside of what stays."""
    cuts = {}
    for name, count in kept.items():
        line = inside.get(name, lines[name])
        if count:
            cuts[name] = float(np.partition(line, len(line) - count)[len(line) - count])
    return cuts


def _realised(scores: Scores, kept: Mapping[str, int]) -> dict[str, float]:
    """Non-zero parameters, counted element by element, and MACs of the structure."""
    graph, dense = scores.graph, dense_cost(scores.graph)
    marks: dict[str, BoolArray] = {}
    for name, count in kept.items():
        if not isinstance(graph.targets[name], WeightTarget):
            order = order_of(scores.values[name].reshape(-1)).numpy()
            marks[name] = np.zeros(len(order), dtype=np.bool_)
            marks[name][order[:count]] = True
    macs = cost_of_kept(graph, marks).macs
    gone = cost_of_kept(graph, {**marks, **_none(graph, kept)}).params
    weights = sum(c for n, c in kept.items() if isinstance(graph.targets[n], WeightTarget))
    realised = {"params": (gone + weights) / dense.params}
    return realised | ({"macs": macs / dense.macs} if dense.macs else {})


def _none(graph: Graph, names: Mapping[str, int]) -> dict[str, BoolArray]:
    """Weight targets without any weight."""
    return {
        n: np.zeros(t.n_units, dtype=np.bool_)
        for n in names
        if isinstance(t := graph.targets[n], WeightTarget)
    }
