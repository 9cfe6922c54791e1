"""What a choice of units costs and loses when single weights inside it may go as well.

The multipliers are a price for each parameter and one for each MAC. A weight is then worth
min(its score, the price), whichever of losing and keeping it is cheaper; so a model is worth

    scores of the units that go + sum of min(score, price) over the weights inside of what stays
    + price x its other parameters + price x its MACs

As targets lose their worst units first, the sum inside is a table over counts: one reading of all
weights for a price, and then the worth of any counts is a few look-ups, and of all counts of one
target a few rows, columns or diagonals.

Every part of the sum has the signature `part.at(counts) -> worth`, where one of the counts may be
an array: then so is the worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Protocol

import numpy as np

from secateurs.types import CostTerm, Graph, GroupTarget, IntArray, WeightTarget

__all__ = [
    "Block",
    "FloatArray",
    "Gate",
    "Lines",
    "Loss",
    "Part",
    "Ranks",
    "Term",
    "Worth",
    "blocks_of",
    "losses",
    "terms_of",
]

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Lines = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Index = Mapping[str, "int | IntArray"]
Gate = tuple[str, int]
"""Decision and rank of the unit of kind "layer" that something goes with: it stays while the count
of the decision is above the rank."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """Structural targets by the order in which they lose units.

    Attributes:
        graph: where they come from.
        decision: target -> the name under which its count is decided.
        rank: target -> (n_units,) int64 position of each unit, 0 = the last to go.
    """

    graph: Graph
    decision: Mapping[str, str]
    rank: Mapping[str, IntArray]

    @classmethod
    def of(cls, graph: Graph, decision: Mapping[str, str], orders: Mapping[str, IntArray]) -> Ranks:
        """From units listed best to worst."""
        rank = {}
        for name in decision:
            rank[name] = np.empty(len(orders[name]), dtype=np.int64)
            rank[name][orders[name]] = np.arange(len(orders[name]))
        return cls(graph, decision, rank)

    def gates(self, tensors: Iterable[str]) -> tuple[Gate, ...]:
        """Layers with which all of these tensors go."""
        names = set(tensors)
        found = []
        for name in self.rank:
            target = self.graph.targets[name]
            if isinstance(target, GroupTarget) and target.kind == "layer" and names:
                found += [
                    (self.decision[name], int(self.rank[name][unit]))
                    for unit, gone in enumerate(target.unit_tensors)
                    if names <= set(gone)
                ]
        return tuple(found)

    def gate_of(self, name: str) -> tuple[Gate, ...]:
        """Layers with which all units of a target go."""
        target = self.graph.targets[name]
        if isinstance(target, WeightTarget):
            return self.gates([name])
        if target.kind == "layer":
            return ()
        return self.gates(m.tensor for m in target.members if m.learned)


def _open(gates: Sequence[Gate], counts: Index) -> Any:
    """Whether what goes with these layers is still there: a bool, or an array of them."""
    alive: Any = True
    for decision, rank in gates:
        alive = alive & (counts[decision] > rank)
    return alive


class Part(Protocol):
    """One summand of the worth."""

    @property
    def decisions(self) -> frozenset[str]: ...
    def at(self, counts: Index) -> float | FloatArray: ...


# -- single weights --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Block:
    """Weights of one target whose rows (columns, ...) belong to the same structural targets.

    Attributes:
        name: the weight target.
        axes: decisions that own its dims.
        edges: for each of them (n_units + 1,) int64: positions that the first c units own.
        values: (positions of each axis, rest) float32 scores, the last to go first; -inf where a
            weight went earlier.
        gates: layers that it goes with.
        partial: whether some went earlier.
    """

    name: str
    axes: tuple[str, ...]
    edges: tuple[IntArray, ...]
    values: Lines
    gates: tuple[Gate, ...]
    partial: bool

    def inside(self, counts: Mapping[str, int]) -> Lines:
        """(n,) scores of the weights that lie in units that stay."""
        if not _open(self.gates, counts):
            return self.values[:0].reshape(-1)
        cut = tuple(slice(0, e[counts[a]]) for a, e in zip(self.axes, self.edges, strict=True))
        line: Lines = self.values[cut].reshape(-1)
        return line[line > -np.inf] if self.partial else line

    def table(self, price: float) -> _Table:
        """Sums of min(score, price) inside of all counts."""
        worth = np.minimum(self.values, np.float32(price))
        if self.partial:
            worth[self.values == -np.inf] = 0
        sums: FloatArray = worth.sum(axis=-1, dtype=np.float64)
        for axis, edges in enumerate(self.edges):
            shape = list(sums.shape)
            shape[axis] = 1
            sums = np.concatenate([np.zeros(shape), np.cumsum(sums, axis=axis)], axis=axis)
            sums = sums.take(edges, axis=axis)
        return _Table(self.axes, sums, self.gates)


@dataclass(frozen=True, eq=False)
class _Table:
    axes: tuple[str, ...]
    sums: FloatArray
    gates: tuple[Gate, ...]

    @property
    def decisions(self) -> frozenset[str]:
        return frozenset([*self.axes, *(g for g, _ in self.gates)])

    def at(self, counts: Index) -> float | FloatArray:
        found = self.sums[tuple(counts[a] for a in self.axes)]
        worth: float | FloatArray = found * _open(self.gates, counts)
        return worth


def blocks_of(ranks: Ranks, target: WeightTarget, scores: Lines) -> list[Block]:
    """The blocks of a weight target; together they hold each of its weights once.

    Args:
        ranks: the structural targets that are decided.
        target: the weights.
        scores: (n_units,) float32, -inf for weights that went earlier.
    """
    values = scores.reshape(target.shape)
    dims = [_parts(ranks, target.name, d, size) for d, size in enumerate(target.shape)]
    gates = ranks.gates([target.name])
    blocks = []
    for parts in product(*dims):
        owned = [d for d, (decision, _, _) in enumerate(parts) if decision]
        free = [d for d in range(len(parts)) if d not in owned]
        block = values[np.ix_(*(positions for _, positions, _ in parts))]
        block = block.transpose(*owned, *free)
        block = np.ascontiguousarray(block.reshape(*(block.shape[: len(owned)]), -1))
        blocks.append(
            Block(
                target.name,
                tuple(parts[d][0] for d in owned),
                tuple(parts[d][2] for d in owned),
                block,
                gates,
                bool((block == -np.inf).any()),
            )
        )
    return blocks


def _parts(ranks: Ranks, tensor: str, dim: int, size: int) -> list[tuple[str, IntArray, IntArray]]:
    """(decision, positions by rank, edges) for each owner of positions; "" for those of nobody."""
    free = np.ones(size, dtype=np.bool_)
    found = []
    for name, rank in ranks.rank.items():
        target = ranks.graph.targets[name]
        if not isinstance(target, GroupTarget) or target.kind == "layer":
            continue
        for member in target.members:
            if member.tensor == tensor and member.dim == dim:
                order = np.argsort(rank[member.unit], kind="stable")
                edges = np.searchsorted(rank[member.unit][order], np.arange(len(rank) + 1))
                found.append((ranks.decision[name], member.index[order], edges))
                free[member.index] = False
    if free.any():
        found.append(("", np.flatnonzero(free), np.zeros(0, dtype=np.int64)))
    return found


# -- whole units, other parameters and MACs --------------------------------------------------


@dataclass(frozen=True, eq=False)
class Loss:
    """Scores of the units of a target that go.

    Attributes:
        decision: whose count says how many stay.
        tail: (n_units + 1,) float64 sums of the scores from each rank on.
        gates: layers that the target goes with; nothing more is lost then.
    """

    decision: str
    tail: FloatArray
    gates: tuple[Gate, ...]

    @property
    def decisions(self) -> frozenset[str]:
        return frozenset([self.decision, *(g for g, _ in self.gates)])

    def at(self, counts: Index) -> float | FloatArray:
        found = self.tail[counts[self.decision]]
        worth: float | FloatArray = found * _open(self.gates, counts)
        return worth


def losses(ranks: Ranks, lines: Mapping[str, Lines]) -> list[Loss]:
    """One for each structural target, from scores of the units that are left, best first."""
    found = []
    for name, decision in ranks.decision.items():
        tail = np.zeros(len(ranks.rank[name]) + 1)
        line = lines[name].astype(np.float64)
        tail[: len(line)] = np.cumsum(line[::-1])[::-1]
        found.append(Loss(decision, tail, ranks.gate_of(name)))
    return found


@dataclass(frozen=True, eq=False)
class Term:
    """A cost term as a function of counts.

    Attributes:
        dims: (size, [(decision, what each count takes from it, at most 0), ...]).
        params: 1 where its elements are parameters that no weight target decides, else 0.
        macs: MACs of each element.
        price: what an element is worth.
    """

    dims: tuple[tuple[int, tuple[tuple[str, IntArray], ...]], ...]
    params: float
    macs: float
    price: float = 0.0
    decisions: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        names = frozenset(name for _, lost in self.dims for name, _ in lost)
        object.__setattr__(self, "decisions", names)

    def left(self, counts: Index) -> float | FloatArray:
        """Elements that remain."""
        left: Any = 1.0
        for size, lost in self.dims:
            left = left * (size + sum(line[counts[name]] for name, line in lost))
        elements: float | FloatArray = left
        return elements

    def at(self, counts: Index) -> float | FloatArray:
        return self.price * self.left(counts)


def terms_of(ranks: Ranks, decided: Iterable[str]) -> list[Term]:
    """The cost terms of the graph; parameters of weight targets that are decided count as MACs."""
    own = frozenset(decided)
    return [
        Term(
            tuple((dim.size, _taken(ranks, dim.owned)) for dim in term.dims),
            float(term.is_parameter and term.name not in own),
            term.uses,
        )
        for term in ranks.graph.costs
        if _counts(term, own)
    ]


def _counts(term: CostTerm, own: frozenset[str]) -> bool:
    return bool(term.uses) or (term.is_parameter and term.name not in own)


def _taken(ranks: Ranks, owned: Mapping[str, IntArray]) -> tuple[tuple[str, IntArray], ...]:
    found = []
    for name, each in owned.items():
        if name in ranks.decision:
            held = np.zeros(len(each) + 1, dtype=np.int64)
            held[ranks.rank[name] + 1] = each
            held = np.cumsum(held)
            found.append((ranks.decision[name], held - held[-1]))
    return tuple(found)


# -- all together ----------------------------------------------------------------------------


class Worth:
    """The sum of all parts, for one price of a parameter and one of a MAC.

    Args:
        fixed: parts that no price changes, and the tables of weights.
        terms: cost terms.
        params, macs: the prices.
    """

    def __init__(
        self, fixed: Sequence[Part], terms: Sequence[Term], params: float, macs: float
    ) -> None:
        priced = [replace(t, price=params * t.params + macs * t.macs) for t in terms]
        self._all = [*fixed, *(t for t in priced if t.price)]
        self._of: dict[str, list[Part]] = {}
        for part in self._all:
            for name in part.decisions:
                self._of.setdefault(name, []).append(part)

    def total(self, counts: Mapping[str, int]) -> float:
        """The worth of some counts."""
        return float(sum(part.at(counts) for part in self._all))

    def line(self, name: str, counts: Mapping[str, int], n: int) -> FloatArray:
        """(n + 1,) worth for 0 to n units of one decision, up to a constant."""
        index: Index = {**counts, name: np.arange(n + 1)}
        total: FloatArray = np.zeros(n + 1)
        for part in self._of.get(name, ()):
            total += part.at(index)
        return total
