"""Methods that give each target a share of its units, whatever the scores: scores only rank within.

share(target, t) -> units, never falling in t; the largest t within the limits is taken
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from secateurs.allocation.filling import fill
from secateurs.allocation.problem import Allocation, Problem, allocator
from secateurs.types import CostTerm, Graph, WeightTarget

__all__ = ["GENTLE", "by_share", "densities", "erk", "first_and_last", "uniform", "uniform_plus"]

Share = Callable[[str, float], float]

GENTLE = 0.2
"""With "uniform_plus", the fraction of the last layer that stays."""


@allocator("uniform", reads_scores=False)
def uniform(problem: Problem) -> Allocation:
    """The same fraction of every target.

    Units: the shares that add up to the limit are rounded down, and the units left over go to the
    largest remainders. Other quantities: the largest fraction that is within the limit after
    rounding to the nearest count, then single units to the targets that rounding robbed most.
    """
    return by_share(problem, _alike(problem))


@allocator("uniform_plus", reads_scores=False)
def uniform_plus(problem: Problem) -> Allocation:
    """The same fraction of every target but those of the first layer (whole) and the last (20 %).

    The first layer stays dense and the last keeps at least 20 %, as in the paper. First and last
    are, in the order of the model's parameters, the first and the last matrix that multiplies (a
    table that is only looked up is no layer), whether it is pruned or not.

    Weights: the first and the last matrix themselves. Units: the model's outputs are never pruned,
    so that the last layer can only lose inputs, and the last hidden family is not the output. Every
    family that owns rows or columns of the first layer stays whole; every family that owns some of
    the last keeps at least 20 %.

    The others give way first, down to half the fraction that "uniform" would leave them. If that is
    not enough (the first matrix of a small Transformer, or a residual stream, can hold most of the
    model), first and last give way in proportion, towards that same half: nothing starves so that
    they stay whole.

    Use it instead of "uniform" at high sparsities of weights, or where the first layer is small.

    Reference: Gale et al., The State of Sparsity in Deep Neural Networks, 2019, arXiv:1902.09574
    (section on ResNet-50), where it is for weights; the reading for units and what gives way when
    are ours.
    """
    p = problem
    first, last = first_and_last(p)
    half = _largest(p, _alike(p)) / 2

    def share(name: str, t: float) -> float:
        given, others = min(2 * t, 1.0), max(2 * t - 1, 0.0)
        fraction = half + (1 - half) * others
        if name in first:
            fraction = half + (1 - half) * given
        elif name in last:
            fraction = max(fraction, half + (GENTLE - half) * given)
        return fraction * p.n_units[name]

    return by_share(p, share)


def _alike(p: Problem) -> Share:
    return lambda name, t: t * p.n_units[name]


def first_and_last(p: Problem) -> tuple[set[str], set[str]]:
    """Decisions that touch the first layer, and those that touch the last and not the first."""
    layers = [t for t in p.graph.costs if t.uses and len(_dims(p.graph, t)) > 1]
    if not layers:
        return set(), set()
    first, last = ({n for n in p.names if _touches(p, n, t)} for t in (layers[0], layers[-1]))
    return first, last - first


def _touches(p: Problem, name: str, term: CostTerm) -> bool:
    """Whether a decision takes weights of a term, or rows or columns."""
    owners = {t for size, owned in _dims(p.graph, term) for t in owned}
    return any(t == term.name or t in owners for t in p.targets(name))


def _dims(graph: Graph, term: CostTerm) -> list[tuple[int, set[str]]]:
    """Size and owners of the dims of a parameter: without the factor of a removable layer."""
    if not term.is_parameter:
        return []
    found = []
    for dim in term.dims:
        owners = {t for t in dim.owned if graph.targets[t].kind != "layer"}
        if owners or not dim.owned:
            found.append((dim.size, owners))
    return found


@allocator("erk", reads_scores=False)
def erk(problem: Problem) -> Allocation:
    """Densities in proportion to sum of dims / product of dims (Erdos-Renyi-Kernel).

    Weights, of a convolution for example:

        density = eps * (n_in + n_out + k_h + k_w) / (n_in * n_out * k_h * k_w), at most 1

    with the one eps that meets the budget, so that layers which would exceed 1 stay dense and the
    others share the rest. Large layers lose most; scores decide within a layer only.

    Units: a matrix between two families keeps the product of both densities, so each takes the
    root, of the figure of all matrices that it owns rows or columns of:

        density = eps * sqrt(sum over matrices of sum of dims / sum over matrices of parameters)

    A family that owns nothing but vectors (norms, biases) counts as dense. Only the root is ours.

    Use it for single weights at high sparsity when scores say little about layers. For units it is
    no more than a prior: wide families lose more than narrow ones.

    Reference: Evci et al., Rigging the Lottery: Making All Tickets Winners, 2020, arXiv:1911.11134,
    appendix; Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
    Connectivity, 2018, arXiv:1707.04780.
    """
    p = problem
    raw = densities(p)
    most = 1 / min(raw.values())
    return by_share(p, lambda name, t: t * most * raw[name] * p.n_units[name])


def densities(p: Problem) -> dict[str, float]:
    """The density of each decision before scaling; the largest that there can be is 1."""
    return {name: _density(p.graph, p.targets(name)) for name in p.names}


def _density(graph: Graph, targets: Iterable[str]) -> float:
    sums = products = 0
    weights = False
    for name in targets:
        target = graph.targets[name]
        if isinstance(target, WeightTarget):
            weights = True
            shapes: list[tuple[int, ...]] = [target.shape]
        else:
            shapes = _matrices(graph, name)
        sums += sum(sum(shape) for shape in shapes)
        products += sum(math.prod(shape) for shape in shapes)
    density = min(1.0, sums / products) if products else 1.0
    return density if weights else math.sqrt(density)


def _matrices(graph: Graph, name: str) -> list[tuple[int, ...]]:
    """Shapes of the matrices that lose something with units of a family."""
    found = []
    for term in graph.costs:
        shape = tuple(size for size, _ in _dims(graph, term))
        if len(shape) > 1 and any(name in dim.owned for dim in term.dims):
            found.append(shape)
    return found


def by_share(p: Problem, share: Share) -> Allocation:
    """The counts nearest to the shares at the largest t in [0, 1] within the limits, filled up.

    Args:
        p: the problem.
        share: units of a name, never falling in t and at t = 1 at least all. Fewest and most units
            are seen to here.
    """
    t = _largest(p, share)
    down = {n: p.snap(n, _bounded(p, share, n, t) + 1e-9) for n in p.names}
    start = down if p.in_units else _nearest(p, share, t)
    return fill(p, start, lambda name, count: _bounded(p, share, name, t) - count)


def _largest(p: Problem, share: Share) -> float:
    """The largest t within the limits: of shares that are not rounded if they are in units."""

    def fits(t: float) -> bool:
        if p.in_units:
            total = sum(p.repeats[n] * _bounded(p, share, n, t) for n in p.names)
            return total <= p.limits[0].most * (1 + 1e-12)
        return p.fits(_nearest(p, share, t))

    within, above = 0.0, 1.0
    for _ in range(60):
        middle = (within + above) / 2
        within, above = (middle, above) if fits(middle) else (within, middle)
    return within


def _nearest(p: Problem, share: Share, t: float) -> Allocation:
    return {n: p.nearest(n, _bounded(p, share, n, t)) for n in p.names}


def _bounded(p: Problem, share: Share, name: str, t: float) -> float:
    return min(max(share(name, t), p.low[name]), p.high[name])
