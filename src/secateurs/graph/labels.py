"""Labels: which indices of which tensors must be kept or removed together.

An *atom* is one index of one dimension of one parameter or buffer (or of a tensor that the model
creates by size). Every value of the run carries `Factor`s: arrays of atoms along one dimension, or
jointly along several (channels viewed as heads x head size). Rules tie atoms to each other by
appending edges, or pin them with a reason; one vectorised pass at the end finds the components.
Atom 0 is the pinned one: what is tied to it is left whole.

`z` on a factor says: where atoms are removed (all their slices zeroed), this value is exactly
zero. It is what makes removal sound: a sum over a dimension may drop entries only if they are zero
or if a weight zeroes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from secateurs.graph.records import Record, Ref, Tape, Value
from secateurs.types import IntArray, Kind

__all__ = ["Axis", "Factor", "Labels", "Pin"]


@dataclass(frozen=True)
class Axis:
    """One dimension of a parameter, buffer or created tensor: a contiguous range of atoms."""

    value: int
    name: str
    dim: int
    offset: int
    size: int
    learned: bool
    stored: bool  # False for tensors created by size: nothing to slice


@dataclass(frozen=True, eq=False)
class Factor:
    """Atoms along `dims` of one value.

    Attributes:
        dims: ascending dimensions; `labels` has their sizes as shape.
        labels: int64 atoms; 0 is pinned.
        z: whether the value is zero where atoms are removed.
        producers: axes (by number) that make this value last: zeroing them makes it zero.
    """

    dims: tuple[int, ...]
    labels: IntArray
    z: bool
    producers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Pin:
    """Atoms that must stay, why, and which operator said so."""

    atoms: IntArray
    reason: str
    where: str


@dataclass
class Labels:
    """The state of one analysis: factors of every value, ties, pins and what was learned.

    Rules use `factors`, `assign`, `tie`, `pin`, `single`; `solve` finds the components.
    """

    tape: Tape
    axes: list[Axis] = field(default_factory=list)
    state: dict[int, tuple[Factor, ...]] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    uses: dict[int, float] = field(default_factory=dict)  # value id -> MACs per element, one sample
    kinds: dict[int, Kind] = field(default_factory=dict)  # axis -> kind of the units it produces
    makers: dict[int, list[Record]] = field(default_factory=dict)  # axis -> records producing
    readers: dict[int, list[tuple[Record, int]]] = field(default_factory=dict)  # -> (record, arg)
    inner: set[int] = field(default_factory=set)  # axes with another producer after them
    n_atoms: int = 1
    _edges: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _nonzero: list[IntArray] = field(default_factory=list)
    _live: list[IntArray] = field(default_factory=list)
    _obligations: list[IntArray] = field(default_factory=list)
    _root: dict[int, int] = field(default_factory=dict)
    _handled: list[IntArray] = field(default_factory=list)

    # -- atoms -----------------------------------------------------------------------------

    def add_axes(self, value: Value, sizes: Iterable[int | None], *, stored: bool, z: bool) -> None:
        """Give a tensor its own atoms on every dimension longer than 1 whose size is known."""
        factors = []
        for dim, size in enumerate(sizes):
            if size is None or size <= 1:
                continue
            learned = value.source == "parameter"
            axis = Axis(value.id, value.name, dim, self.n_atoms, size, learned, stored)
            labels = np.arange(axis.offset, axis.offset + size, dtype=np.int64)
            factors.append(Factor((dim,), labels, z, frozenset({len(self.axes)})))
            self.axes.append(axis)
            self.n_atoms += size
        self.state[value.id] = tuple(factors)

    def axes_of(self, labels: IntArray) -> list[int]:
        """Numbers of the axes that the atoms belong to."""
        offsets = np.array([a.offset for a in self.axes], dtype=np.int64)
        atoms = np.unique(labels)
        found = np.searchsorted(offsets, atoms[atoms > 0], side="right") - 1
        return [int(i) for i in np.unique(found)]

    # -- values ----------------------------------------------------------------------------

    def value(self, ref: Ref | int) -> Value:
        return self.tape.values[ref.id if isinstance(ref, Ref) else ref]

    def factors(self, ref: Ref | int) -> tuple[Factor, ...]:
        return self.state.get(ref.id if isinstance(ref, Ref) else ref, ())

    def assign(self, out: int, factors: Iterable[Factor], *, moves: bool = False) -> None:
        """Store the factors of an output. Unless the operator only moves data, they are alive."""
        self.state[out] = tuple(factors)
        if not moves:
            for factor in self.state[out]:
                self.live(factor.labels)

    def on(self, ref: Ref | int, dim: int) -> Factor | None:
        """The factor that covers `dim` (negative counts from the end), or None."""
        dim %= max(1, len(self.value(ref).shape))
        return next((f for f in self.factors(ref) if dim in f.dims), None)

    def single(self, ref: Ref | int, dim: int) -> Factor | None:
        """The factor on `dim` alone: a joint factor is coarsened by tying along its other dims."""
        ident = ref.id if isinstance(ref, Ref) else ref
        dim %= max(1, len(self.value(ident).shape))
        factor = self.on(ident, dim)
        if factor is None or factor.dims == (dim,):
            return factor
        coarse = self.coarsen(factor, dim)
        self.state[ident] = tuple(coarse if f is factor else f for f in self.factors(ident))
        return coarse

    def coarsen(self, factor: Factor, keep: int) -> Factor:
        """Tie a joint factor along all its dims but `keep`."""
        at = factor.dims.index(keep)
        flat = np.moveaxis(factor.labels, at, 0).reshape(factor.labels.shape[at], -1)
        self._tie_columns(flat)
        return replace(factor, dims=(keep,), labels=flat[:, 0].copy())

    # -- knowledge -------------------------------------------------------------------------

    def tie(self, a: IntArray, b: IntArray, reason: str, where: str = "") -> None:
        """Atoms `a[i]` and `b[i]` share their fate; a tie with atom 0 is a pin with `reason`."""
        a, b = a.reshape(-1), b.reshape(-1)
        self._handled += [a, b]
        differ = a != b
        a, b = a[differ], b[differ]
        pinned = (a == 0) | (b == 0)
        if pinned.any():
            self.pins.append(Pin(np.maximum(a, b)[pinned], reason, where))
            a, b = a[~pinned], b[~pinned]
        if len(a):
            self._edges.append((a, b))

    def pin(self, labels: IntArray, reason: str, where: str = "") -> None:
        """These atoms must stay."""
        self._handled.append(labels.reshape(-1))
        atoms = np.unique(labels)
        if (atoms := atoms[atoms > 0]).size:
            self.pins.append(Pin(atoms, reason, where))

    def _tie_columns(self, flat: IntArray) -> None:
        """Tie every column of a block to its first."""
        for column in range(1, flat.shape[1]):
            self.tie(flat[:, 0], flat[:, column], "it is one block with entries that are fixed")

    def forget(self) -> None:
        """Start noting anew which atoms a rule has tied or pinned."""
        self._handled = []

    def left_over(self, ref: Ref, outputs: Iterable[int]) -> IntArray:
        """Atoms of a value that the last rule neither tied, pinned nor passed on to an output."""
        passed = [f.labels for out in outputs for f in self.factors(out)]
        mine = [
            f.labels.reshape(-1)
            for f in self.factors(ref)
            if not any(f.labels is other for other in passed)
        ]
        if not mine:
            return np.zeros(0, dtype=np.int64)
        known = [*self._handled, *(p.reshape(-1) for p in passed)]
        if not known:
            return np.concatenate(mine)
        return np.setdiff1d(np.concatenate(mine), np.concatenate(known))

    def live(self, labels: IntArray) -> None:
        """These atoms take part in a computation (not only in moving data)."""
        self._live.append(labels.reshape(-1))

    def nonzero(self, labels: IntArray) -> None:
        """The removed entries of these atoms reach a weight with a value that is not zero."""
        self._nonzero.append(labels.reshape(-1))

    def oblige(self, labels: IntArray) -> None:
        """What is removed of this block of atoms must be a product set over its dims."""
        self._obligations.append(labels)

    def alias(self, out: int, source: int) -> None:
        """`out` is a view of (or the same tensor as) `source`."""
        self._root[out] = self._root.get(source, source)

    def overwrite(self, target: int, z: bool) -> None:
        """An in-place operator changed `target`: every alias of it loses z unless `z`."""
        if z:
            return
        root = self._root.get(target, target)
        for ident, factors in list(self.state.items()):
            if self._root.get(ident, ident) == root:
                self.state[ident] = tuple(replace(f, z=False) for f in factors)

    def make(self, labels: IntArray, record: Record, kind: Kind | None = None) -> frozenset[int]:
        """Note that `record` produces units along these atoms' axes; return the axes."""
        axes = [i for i in self.axes_of(labels) if self.axes[i].stored]
        for i in axes:
            self.makers.setdefault(i, []).append(record)
            if kind is not None:
                self.kinds.setdefault(i, kind)
        return frozenset(axes)

    def read(self, labels: IntArray, record: Record, argument: int) -> None:
        """Note that `record` consumes units along these atoms' axes, from positional `argument`."""
        for i in self.axes_of(labels):
            self.readers.setdefault(i, []).append((record, argument))

    def used(self, ref: Ref, macs_per_element: float) -> None:
        """A weight takes part in that many multiply-adds per element, for one sample."""
        root = self._root.get(ref.id, ref.id)
        self.uses[root] = self.uses.get(root, 0.0) + macs_per_element

    # -- solution --------------------------------------------------------------------------

    def solve(self) -> tuple[IntArray, IntArray, dict[int, Pin]]:
        """Connected components of the atoms.

        Returns:
            component of every atom (the smallest atom in it), the pinned components ascending,
            and for each pinned component the first pin that reached it.
        """
        while True:
            component = connected(self.n_atoms, self._edges)
            if not self._close_obligations(component):
                break
        pinned: dict[int, Pin] = {}
        for pin in self.pins:
            for c in np.unique(component[pin.atoms]):
                pinned.setdefault(int(c), pin)
        alive = np.zeros(self.n_atoms, dtype=bool)
        for labels in self._live:
            alive[component[labels]] = True
        idle = np.unique(component[1:])
        idle = idle[~alive[idle]]
        nothing = Pin(idle, "takes no part in the computation for these inputs and mode", "")
        for c in idle:
            pinned.setdefault(int(c), nothing)
        pinned.setdefault(0, Pin(np.zeros(1, dtype=np.int64), "", ""))
        return component, np.array(sorted(pinned), dtype=np.int64), pinned

    def reached_nonzero(self, component: IntArray) -> set[int]:
        """Components whose removed entries reach a consumer as something other than zero."""
        return {int(c) for labels in self._nonzero for c in np.unique(component[labels])}

    def _close_obligations(self, component: IntArray) -> bool:
        """Tie blocks that could lose a set which is not a product; True if something was tied."""
        held = np.zeros(self.n_atoms, dtype=bool)
        for pin in self.pins:
            held[component[pin.atoms]] = True
        fate = np.where(held[component], 0, component)  # all that is pinned shares its fate
        changed = False
        for labels in self._obligations:
            block = fate[labels]
            along = [d for d in range(block.ndim) if (block == np.take(block, [0], axis=d)).all()]
            if len(along) < block.ndim - 1:
                keep = int(np.argmax(block.shape))
                self._tie_columns(np.moveaxis(labels, keep, 0).reshape(labels.shape[keep], -1))
                changed = True
        return changed


def connected(n: int, edges: list[tuple[IntArray, IntArray]]) -> IntArray:
    """Smallest member of each atom's component: min-label propagation with pointer jumping."""
    label = np.arange(n, dtype=np.int64)
    if not edges:
        return label
    a = np.concatenate([e[0] for e in edges])
    b = np.concatenate([e[1] for e in edges])
    while True:
        low = np.minimum(label[a], label[b])
        before = label.copy()
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        np.minimum.at(label, a, low)
        np.minimum.at(label, b, low)
        while not np.array_equal(label, label[label]):
            label = label[label]
        if np.array_equal(before, label):
            return label
