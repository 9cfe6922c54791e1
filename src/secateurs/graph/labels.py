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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from secateurs.graph.facts import (
    OPTIONS,
    Axis,
    BoolArray,
    Factor,
    Options,
    Pin,
    Pins,
    Product,
    connected,
)  # fmt: skip
from secateurs.graph.records import Record, Ref, Tape, Value, refs
from secateurs.types import IntArray, Kind

__all__ = [
    "OPTIONS", "Axis", "BoolArray", "Factor", "Labels", "Options", "Pin", "Pins", "Product",
    "connected",
]  # fmt: skip


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
    unmasked: set[int] = field(default_factory=set)  # axes that are sliced but must not be zeroed
    heads: list[tuple[IntArray, Kind]] = field(default_factory=list)  # blocks that attention formed
    normalised: list[IntArray] = field(default_factory=list)  # atoms that a norm or mean counts
    products: list[Product] = field(default_factory=list)  # multiply-adds between activations
    options: Options = field(default_factory=Options)
    n_atoms: int = 1
    _edges: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _nonzero: list[IntArray] = field(default_factory=list)
    _live: list[IntArray] = field(default_factory=list)
    _obligations: list[IntArray] = field(default_factory=list)
    _root: dict[int, int] = field(default_factory=dict)
    _unsure: set[int] = field(default_factory=set)
    _offsets: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _handled: list[IntArray] = field(default_factory=list)

    # -- atoms -----------------------------------------------------------------------------

    def add_axes(self, value: Value, *, stored: bool, z: bool) -> None:
        """Give a tensor its own atoms on every dimension longer than 1."""
        factors = []
        for dim, size in enumerate(value.shape):
            if size <= 1:
                continue
            learned = value.source == "parameter"
            axis = Axis(value.id, value.name, dim, self.n_atoms, size, learned, stored)
            labels = np.arange(axis.offset, axis.offset + size, dtype=np.int64)
            factors.append(Factor((dim,), labels, z, frozenset({len(self.axes)})))
            self.axes.append(axis)
            self.n_atoms += size
        self.state[value.id] = tuple(factors)

    def fresh(self, out: int, dim: int, z: bool) -> Factor:
        """Atoms of their own for a dimension that the model makes by size (`expand`, `pad`).

        There is nothing to slice: the size that the operator is given follows the cut.
        """
        value = self.tape.values[out]
        return self.fresh_entries(value, dim, value.shape[dim], z)

    def fresh_entries(self, value: Value, dim: int, size: int, z: bool) -> Factor:
        """As `fresh`, for `size` entries along a dimension."""
        axis = Axis(value.id, value.name, dim, self.n_atoms, size, learned=False, stored=False)
        self.axes.append(axis)
        self.n_atoms += size
        labels = np.arange(axis.offset, axis.offset + size, dtype=np.int64)
        return Factor((dim,), labels, z, frozenset({len(self.axes) - 1}))

    def made_by_size(self, factor: Factor) -> bool:
        """Whether a factor consists of atoms from `fresh` alone."""
        return not any(self.axes[i].stored for i in self.axes_of(factor.labels))

    def root(self, ref: Ref) -> Value:
        """The value that this one is a view of; itself if of none."""
        return self.tape.values[self._root.get(ref.id, ref.id)]

    def is_weight(self, ref: Ref) -> bool:
        """Whether a value is a parameter or buffer, or a view of one."""
        return self.root(ref).source in ("parameter", "buffer")

    def axes_of(self, labels: IntArray) -> list[int]:
        """Numbers of the axes that the atoms belong to."""
        if len(self._offsets) != len(self.axes):
            self._offsets = np.array([a.offset for a in self.axes], dtype=np.int64)
        found = np.searchsorted(self._offsets, labels[labels > 0], side="right") - 1
        return [int(i) for i in np.flatnonzero(np.bincount(found))] if len(found) else []

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
        dim %= max(1, len(self.value(ref).shape))
        factor = self.on(ref, dim)
        return None if factor is None else self.narrow(ref, factor, (dim,))

    def drop(self, ref: Ref | int, dims: Iterable[int]) -> None:
        """Take `dims` out of every joint factor, by tying along them; what is left is kept.

        A factor that lies within `dims` stays as it is.
        """
        gone = set(dims)
        for factor in self.factors(ref):
            rest = tuple(d for d in factor.dims if d not in gone)
            if rest and rest != factor.dims:
                self.narrow(ref, factor, rest)

    def narrow(self, ref: Ref | int, factor: Factor, keep: Sequence[int]) -> Factor:
        """Coarsen a factor of a value to the dims `keep`, for all later readers of the value."""
        if factor.dims == tuple(keep):
            return factor
        ident = ref.id if isinstance(ref, Ref) else ref
        coarse = self.coarsen(factor, keep)
        self.state[ident] = tuple(coarse if f is factor else f for f in self.factors(ident))
        return coarse

    def coarsen(self, factor: Factor, keep: Sequence[int]) -> Factor:
        """Tie a joint factor along all its dims but `keep`."""
        stay = [factor.dims.index(d) for d in keep]
        others = [i for i in range(len(factor.dims)) if i not in stay]
        moved = factor.labels.transpose(*stay, *others)
        shape = moved.shape[: len(stay)]
        flat = moved.reshape(int(np.prod(shape, dtype=np.int64)), -1)
        self._tie_columns(flat)
        return replace(factor, dims=tuple(keep), labels=flat[:, 0].reshape(shape).copy())

    # -- knowledge -------------------------------------------------------------------------

    def tie(self, a: IntArray, b: IntArray, reason: str, where: str = "") -> None:
        """Atoms `a[i]` and `b[i]` share their fate; a tie with atom 0 is a pin with `reason`."""
        self._handled += [a, b]
        a, b = a.reshape(-1), b.reshape(-1)
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
        self._handled.append(labels)
        if (atoms := labels[labels > 0]).size:
            self.pins.append(Pin(atoms, reason, where))

    def _tie_columns(self, flat: IntArray) -> None:
        """Tie every column of a block to its first."""
        if flat.shape[1] > 1:
            first = np.broadcast_to(flat[:, :1], flat[:, 1:].shape)
            self.tie(first, flat[:, 1:], "it is one block with entries that are fixed")

    def forget(self) -> None:
        """Start noting anew which atoms a rule has tied or pinned."""
        self._handled = []

    def left_over(self, ref: Ref, outputs: Iterable[int]) -> IntArray:
        """Atoms of a value that the last rule neither tied, pinned nor passed on to `outputs`."""
        known = [*self._handled, *(f.labels for out in outputs for f in self.factors(out))]
        dealt_with = {id(k) for k in known}
        mine = [f.labels for f in self.factors(ref) if id(f.labels) not in dealt_with]
        if not mine:
            return np.zeros(0, dtype=np.int64)
        left = np.concatenate([m.reshape(-1) for m in mine])
        if not known:
            return left
        passed = np.zeros(self.n_atoms, dtype=bool)
        for k in known:
            passed[k] = True
        rest: IntArray = left[~passed[left]]
        return rest

    def ignore(self, ref: Ref) -> None:
        """The values of this operand play no part, only its size or type."""
        self._handled += [f.labels for f in self.factors(ref)]

    def pass_on(self, labels: IntArray) -> None:
        """These atoms of a further operand go on to the output."""
        self._handled.append(labels)

    def consume(self, labels: IntArray) -> None:
        """A rule has dealt with these atoms although no output carries them (a sum over them)."""
        self._handled.append(labels)
        self.live(labels)

    def live(self, labels: IntArray) -> None:
        """These atoms take part in a computation (not only in moving data)."""
        self._live.append(labels.reshape(-1))

    def nonzero(self, labels: IntArray) -> None:
        """The removed entries of these atoms reach a weight with a value that is not zero."""
        self._nonzero.append(labels.reshape(-1))

    def oblige(self, labels: IntArray) -> None:
        """What is removed of this block of atoms must be a product set over its dims."""
        self._obligations.append(labels)

    def alias(self, out: int, source: int, *, unsure: bool = False) -> None:
        """`out` is a view of (or the same tensor as) `source`; `unsure` if it may be a copy."""
        self._root[out] = self._root.get(source, source)
        if unsure or source in self._unsure:
            self._unsure.add(out)

    def overwrite(self, target: int, z: bool, record: Record) -> None:
        """An in-place operator changed `target`: every alias of it loses z unless `z`.

        Whether a reshape is a view may depend on the sizes: what is written through one stays if it
        is read under another name later.
        """
        root = self._root.get(target, target)
        if target in self._unsure and self._read_later(root, {target, *record.outputs}, record):
            for ident, factors in self.state.items():
                for f in factors if self._root.get(ident, ident) == root else ():
                    why = "it is overwritten through what may be a view or a copy"
                    self.pin(f.labels, why, record.where)
        if z:
            return
        for ident, factors in list(self.state.items()):
            if self._root.get(ident, ident) == root:
                self.state[ident] = tuple(replace(f, z=False) for f in factors)

    def _read_later(self, root: int, known: set[int], record: Record) -> bool:
        """Whether an alias other than those known is an argument of a later record."""
        others = {i for i in self.state if self._root.get(i, i) == root} - known
        return any(
            not others.isdisjoint(ref.id for ref in refs([later.args, later.kwargs]))
            for later in self.tape.records
            if later.index > record.index
        )

    def make(self, labels: IntArray, record: Record, kind: Kind | None = None) -> frozenset[int]:
        """Note that `record` produces units along these atoms' axes; return the axes."""
        axes = [i for i in self.axes_of(labels) if self.axes[i].stored]
        for i in axes:
            self.makers.setdefault(i, []).append(record)
            if kind is not None and self.kinds.get(i, "neuron") == "neuron":
                self.kinds[i] = kind
        return frozenset(axes)

    def read(self, labels: IntArray, record: Record, argument: int) -> None:
        """Note that `record` consumes units along these atoms' axes, from positional `argument`."""
        for i in self.axes_of(labels):
            self.readers.setdefault(i, []).append((record, argument))

    def normalise(self, labels: IntArray, record: Record) -> bool:
        """These atoms are counted by a norm or mean; False (and pinned) if the user says so."""
        if self.options.norm == "pin":
            self.pin(labels, 'a norm or mean counts it, and norm="pin" was asked', record.where)
            return False
        plain = record.op not in ("group_norm", "padded_group_norm")  # channels stay channels
        if plain and not self.is_weight(next(refs(record.args))):  # weights are standardised, too
            self.normalised.append(labels)
        self.consume(labels)
        return True

    def used(self, ref: Ref, macs_per_element: float) -> None:
        """A weight takes part in that many multiply-adds per element, for one sample."""
        root = self._root.get(ref.id, ref.id)
        self.uses[root] = self.uses.get(root, 0.0) + macs_per_element

    # -- solution --------------------------------------------------------------------------

    def solve(self) -> tuple[IntArray, Pins]:
        """Connected components of the atoms.

        Returns:
            component of every atom (the smallest atom in it), and which components are pinned, by
            the first pin that reached them.
        """
        while True:
            component = connected(self.n_atoms, self._edges)
            if not self._close_obligations(component):
                break
        pins = Pins(np.full(self.n_atoms, -1, dtype=np.int64))
        for pin in self.pins:
            pins.add(component[pin.atoms], pin)
        alive = np.zeros(self.n_atoms, dtype=bool)
        for labels in self._live:
            alive[component[labels]] = True
        idle = component[~alive[component]]
        pins.add(idle, Pin(idle, "takes no part in the computation for these inputs and mode", ""))
        pins.add(np.zeros(1, dtype=np.int64), Pin(np.zeros(1, dtype=np.int64), "", ""))
        return component, pins

    def reached_nonzero(self, component: IntArray) -> BoolArray:
        """(n_atoms,) components whose removed entries reach a consumer as other than zero."""
        reached = np.zeros(self.n_atoms, dtype=bool)
        for labels in self._nonzero:
            reached[component[labels]] = True
        return reached

    def _close_obligations(self, component: IntArray) -> bool:
        """Tie blocks that could lose a set which is not a product; True if something was tied."""
        held = np.zeros(self.n_atoms, dtype=bool)
        for pin in self.pins:
            held[component[pin.atoms]] = True
        fate = np.where(held[component], 0, component)  # all that is pinned shares its fate
        changed = False
        tied = np.zeros(self.n_atoms, dtype=bool)
        for labels in self._obligations:
            block = fate[labels]
            if tied[block].any():
                continue  # decided anew when these ties are known
            along = [d for d in range(block.ndim) if (block == np.take(block, [0], axis=d)).all()]
            if len(along) < block.ndim - 1:
                keep = int(np.argmax(block.shape))
                self._tie_columns(np.moveaxis(labels, keep, 0).reshape(labels.shape[keep], -1))
                tied[block] = True
                changed = True
        return changed
