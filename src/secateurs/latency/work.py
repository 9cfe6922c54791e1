"""How much work each layer has left when units go: the scale on which its time is measured.

The work of a layer (a module, by its path) is its multiply-adds plus `ELEMENT` for every element
that its operators write. It never falls when a count rises. Channels of convolutions on a CPU count
in blocks of `BLOCK`, as the kernels take them.

    graph ── works_of ──> [Work]        graph, orders, layers ── work_curve ──> counts -> (layers,)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from secateurs.errors import ConfigError
from secateurs.graph.labels import Labels
from secateurs.graph.records import Ref, refs
from secateurs.types import CostDim, CostTerm, Graph, GroupTarget, IntArray

__all__ = ["BLOCK", "ELEMENT", "REST", "FloatArray", "Work", "work_curve", "works_of"]

ELEMENT = 30.0
"""Multiply-adds that take about as long as writing one element."""
BLOCK = 16
"""Channels that a convolution on the CPU works on at once."""
REST = "(rest)"
"""Stands for the whole model: Python, and what no layer does."""

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Work:
    """One product of sizes, done by one layer.

    Attributes:
        layer: path of the module.
        each: work for each entry of the product.
        dims: its factors.
        blocks: for each factor whether it is counted in blocks: "" (no), "all", or "large" (only
            above one block, as the inputs of a convolution are).
    """

    layer: str
    each: float
    dims: tuple[CostDim, ...]
    blocks: tuple[str, ...]


def works_of(graph: Graph) -> tuple[Work, ...]:
    """The work of every layer for one sample.

    Raises:
        ConfigError: the graph was made by hand, or the structure could not be captured.
    """
    labels = getattr(graph.detail, "labels", None)
    if not isinstance(labels, Labels):
        raise ConfigError(
            "times of layers need a graph from trace that knows the structure; this one "
            + ("; ".join(graph.notes) or "was made by hand")
        )
    if graph not in _KNOWN:
        _KNOWN[graph] = (*_multiplied(graph, labels), *_written(graph, labels))
    return _KNOWN[graph]


_KNOWN: WeakKeyDictionary[Graph, tuple[Work, ...]] = WeakKeyDictionary()


def _multiplied(graph: Graph, labels: Labels) -> list[Work]:
    """Multiply-adds with parameters, and between activations."""
    layer: dict[str, tuple[str, str]] = {}
    for record in labels.tape.records:
        layer.setdefault(record.name, (record.module, record.op))
        for ref in refs([record.args, record.kwargs]):
            layer.setdefault(labels.root(ref).name, (record.module, record.op))
    works = []
    for term in graph.costs:
        if term.uses:
            path, op = layer.get(term.name, ("", ""))
            conv = "conv" in op and graph.device == "cpu" and term.is_parameter
            works.append(Work(path, term.uses, term.dims, _blocks(term, conv)))
    return works


def _blocks(term: CostTerm, conv: bool) -> tuple[str, ...]:
    """Of the weight of a convolution, outputs come in blocks, and inputs if there are many."""
    return tuple(
        "" if not conv or not dim.owned else "all" if d == 0 else "large" if d == 1 else ""
        for d, dim in enumerate(term.dims)
    )


def _written(graph: Graph, labels: Labels) -> list[Work]:
    """Elements that operators write; views write none."""
    owner, unit, groups = _owners(graph)
    skipped = [t for t in graph.targets.values() if isinstance(t, GroupTarget) and t.unit_names]
    works = []
    for record in labels.tape.records:
        for out in record.outputs:
            value = labels.value(out)
            if labels.root(Ref(out)).id != out or not value.dtype.is_floating_point:
                continue
            factors = labels.factors(out)
            covered = {d for f in factors for d in f.dims}
            fixed = [n for d, n in enumerate(value.shape) if d not in covered]
            dims = [CostDim(int(np.prod(fixed, dtype=np.int64)))]
            for factor in factors:
                atoms = graph.detail.component[factor.labels.reshape(-1)]
                dims.append(CostDim(atoms.size, _owned(atoms, owner, unit, groups)))
            dims += [dim for t in skipped for dim in _gone_with(t, record.module)]
            each = ELEMENT / labels.tape.batch_size
            works.append(Work(record.module, each, tuple(dims), ("",) * len(dims)))
    return works


def _owners(graph: Graph) -> tuple[IntArray, IntArray, list[GroupTarget]]:
    """(n_atoms,) number of the target that owns each component, and which of its units it is."""
    labels = graph.detail.labels
    offsets = {(a.name, a.dim): a.offset for a in labels.axes if a.stored}
    owner = np.full(labels.n_atoms, -1, dtype=np.int64)
    unit = np.zeros(labels.n_atoms, dtype=np.int64)
    targets = graph.targets.values()
    groups = [t for t in targets if isinstance(t, GroupTarget) and not t.unit_names]
    for number, group in enumerate(groups):
        for member in group.members:
            atoms = graph.detail.component[offsets[(member.tensor, member.dim)] + member.index]
            owner[atoms], unit[atoms] = number, member.unit
    return owner, unit, groups


def _owned(
    atoms: IntArray, owner: IntArray, unit: IntArray, groups: Sequence[GroupTarget]
) -> dict[str, IntArray]:
    """Target -> entries among these that each of its units owns."""
    of, owned = owner[atoms], {}
    for number in np.unique(of[of >= 0]).tolist():
        group = groups[number]
        count = np.bincount(unit[atoms[of == number]], minlength=group.n_units)
        owned[group.name] = count.astype(np.int64)
    return owned


def _gone_with(target: GroupTarget, module: str) -> list[CostDim]:
    """A factor of one or zero for each unit of kind "layer" that a module is part of."""
    dims = []
    for number, name in enumerate(target.unit_names):
        if module == name or module.startswith(f"{name}."):
            alone: IntArray = np.zeros(target.n_units, dtype=np.int64)
            alone[number] = 1
            dims.append(CostDim(1, {target.name: alone}))
    return dims


def work_curve(
    works: Sequence[Work], orders: Mapping[str, IntArray], layers: Sequence[str]
) -> Callable[[Mapping[str, int]], FloatArray]:
    """Counts of all targets in `orders` -> (layers,) work of each layer.

    Work of a module that is not among the layers belongs to the nearest one around it; `REST` has
    the work of the whole model.

    Args:
        works: from `works_of`.
        orders: target -> (n_units,) all its units, the last to go first.
        layers: paths, or `REST`.
    """
    place = {name: i for i, name in enumerate(layers)}
    sizes = _Sizes(orders)
    rows: list[tuple[int, float, list[int]]] = []
    for work in works:
        each, which = work.each, list[int]()
        for dim, blocks in zip(work.dims, work.blocks, strict=True):
            number = sizes.number(dim, blocks)
            if number is None:
                each *= dim.size
            else:
                which.append(number)
        for layer in {_nearest(work.layer, place), REST}.intersection(place):
            rows.append((place[layer], each, which))  # noqa: PERF401
    width = max([1, *(len(which) for _, _, which in rows)])
    index = np.array([i for i, _, _ in rows], dtype=np.int64)
    coefficients = np.array([each for _, each, _ in rows])
    one = len(sizes.dims)
    factors = np.full((len(rows), width), one, dtype=np.int64)
    for row, (_, _, numbers) in enumerate(rows):
        factors[row, : len(numbers)] = numbers

    def curve(counts: Mapping[str, int]) -> FloatArray:
        left = np.array([*sizes(counts), 1.0])
        done = coefficients * left[factors].prod(axis=1)
        return np.bincount(index, weights=done, minlength=len(layers)).astype(np.float64)

    return curve


def _nearest(path: str, place: Mapping[str, int]) -> str:
    """The layer that a module is, or lies in; "" if none."""
    while path not in place and path:
        path = path.rpartition(".")[0]
    return path


class _Sizes:
    """Sizes of dimensions as functions of counts; equal ones are worked out once."""

    def __init__(self, orders: Mapping[str, IntArray]) -> None:
        self.orders = orders
        self.dims: list[tuple[int, str, list[tuple[str, list[int]]]]] = []
        self.known: dict[tuple[object, ...], int] = {}

    def number(self, dim: CostDim, blocks: str) -> int | None:
        """The number of a dimension; None if no target in `orders` owns any of it."""
        owned = {t: o for t, o in dim.owned.items() if t in self.orders}
        if not owned:
            return None
        key = (dim.size, blocks, *((t, o.tobytes()) for t, o in sorted(owned.items())))
        if key not in self.known:
            lost = []
            for name, own in owned.items():
                held = np.concatenate([[0], np.cumsum(own[self.orders[name]])])
                lost.append((name, (held - held[-1]).astype(np.int64).tolist()))
            self.known[key] = len(self.dims)
            self.dims.append((dim.size, blocks, lost))
        return self.known[key]

    def __call__(self, counts: Mapping[str, int]) -> list[float]:
        sizes = []
        for size, blocks, lost in self.dims:
            left = size + sum(line[counts[name]] for name, line in lost)
            if blocks == "all" or (blocks == "large" and left > BLOCK):
                left = -(-left // BLOCK) * BLOCK
            sizes.append(float(left))
        return sizes
