"""Counts what the units of a graph's targets own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from secateurs.inventory.rows import GroupRow, Inventory, Place, Reach, Share, WholeRow

__all__ = ["inventory"]

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class _Target(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def n_units(self) -> int: ...


class _Dim(Protocol):
    @property
    def size(self) -> int: ...
    @property
    def owned(self) -> Mapping[str, IntArray]: ...


class _Term(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dims(self) -> Sequence[_Dim]: ...
    @property
    def is_parameter(self) -> bool: ...
    @property
    def uses(self) -> float: ...


class _Excluded(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def where(self) -> str: ...


class _Graph(Protocol):
    @property
    def targets(self) -> Mapping[str, _Target]: ...
    @property
    def costs(self) -> Sequence[_Term]: ...
    @property
    def excluded(self) -> Sequence[_Excluded]: ...
    @property
    def unknown_ops(self) -> Sequence[str]: ...
    @property
    def notes(self) -> Sequence[str]: ...


def inventory(graph: _Graph, kinds: Collection[str], structured: Collection[str]) -> Inventory:
    """Count what the targets of these kinds own.

    Args:
        graph: as `trace` returns it.
        kinds: kinds of units that are listed.
        structured: kinds that are pruned unless others are asked for by name.
    """
    targets = [t for t in graph.targets.values() if t.kind in kinds]
    total = _counted((_size(term), term) for term in graph.costs)
    by_target: dict[str, list[_Term]] = defaultdict(list)
    for term in graph.costs:
        for name in dict.fromkeys(n for dim in term.dims for n in dim.owned):
            by_target[name].append(term)
        if getattr(graph.targets.get(term.name), "kind", "") == "weight":
            by_target[term.name].append(term)
    default = [t for t in targets if t.kind in structured]
    return Inventory(
        total=_share(total, total),
        groups=tuple(_row(t, by_target[t.name], total) for t in targets),
        reach=_reach(graph, targets, total),
        by_default=_reach(graph, default, total),
        by_name_only=tuple(dict.fromkeys(t.kind for t in targets if t.kind not in structured)),
        whole=tuple(WholeRow(e.name, e.reason, e.where) for e in graph.excluded),
        unknown_ops=tuple(graph.unknown_ops),
        notes=tuple(graph.notes),
    )


def _size(term: _Term) -> int:
    return int(np.prod([d.size for d in term.dims], dtype=np.int64))


def _left(term: _Term, gone: Collection[str]) -> int:
    """Elements of a term that belong to no unit of the targets in `gone`."""
    if term.name in gone:  # single weights: all its elements are units
        return 0
    left = 1
    for dim in term.dims:
        left *= max(0, dim.size - sum(int(o.sum()) for n, o in dim.owned.items() if n in gone))
    return left


def _counted(sizes: Iterator[tuple[int, _Term]]) -> tuple[int, int]:
    """Parameters and MACs of so many elements of each term."""
    params, macs = 0, 0.0
    for n, term in sizes:
        params += n if term.is_parameter else 0
        macs += n * term.uses
    return params, round(macs)


def _share(part: tuple[int, int], total: tuple[int, int]) -> Share:
    fractions = [p / t if t else 0.0 for p, t in zip(part, total, strict=True)]
    return Share(*part, *fractions)


def _reach(graph: _Graph, targets: list[_Target], total: tuple[int, int]) -> Reach:
    names = {t.name for t in targets}
    part = _counted((_size(term) - _left(term, names), term) for term in graph.costs)
    return Reach(len(targets), sum(t.n_units for t in targets), _share(part, total))


def _row(target: _Target, terms: list[_Term], total: tuple[int, int]) -> GroupRow:
    name = target.name
    own = _counted((_size(term) - _left(term, {name}), term) for term in terms)
    members = getattr(target, "members", None)
    places: tuple[Place, ...] = ()
    tensors = [name]
    per_unit = np.ones(1, dtype=np.int64)
    if members is not None:  # not single weights
        places = tuple(
            Place(m.tensor, m.dim, len(m.index), m.role, m.outermost) for m in members if m.learned
        )
        tensors = [p.tensor for p in places]
        per_unit = np.zeros(target.n_units, dtype=np.int64)
        for term in terms:
            if term.is_parameter:
                per_unit += _lost(term, name)
    limits = (int(per_unit.min()), int(per_unit.max())) if len(per_unit) else (0, 0)
    whole = [t for unit in getattr(target, "unit_tensors", ()) for t in unit]
    if whole:  # layers: of a removed one nothing stays
        own_terms = {term.name for term in terms if term.is_parameter}
        tensors = [t for t in whole if t in own_terms]
    return GroupRow(
        name=name,
        kind=target.kind,
        n_units=target.n_units,
        tensors=tuple(dict.fromkeys(tensors)),
        places=places,
        params_per_unit=limits,
        share=_share(own, total),
        unit_names=tuple(getattr(target, "unit_names", ())),
    )


def _lost(term: _Term, name: str) -> IntArray:
    """(n_units,) elements of a term that go with each single unit of a target."""
    left: Any = 1
    for dim in term.dims:
        left = left * (dim.size - dim.owned[name] if name in dim.owned else dim.size)
    return np.asarray(_size(term) - left, dtype=np.int64)
