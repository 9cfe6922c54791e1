"""The nouns of an analysis: axes of atoms, factors, pins, options. `labels` works with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from secateurs.types import IntArray

__all__ = [
    "OPTIONS", "Axis", "BoolArray", "Factor", "Options", "Pin", "Pins", "Product", "connected",
]  # fmt: skip

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


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
class Pins:
    """Which components are pinned, and by which pin.

    Attributes:
        of: (n_atoms,) number of the pin of each component; -1 for none.
        pins: the pins by number.
    """

    of: IntArray
    pins: list[Pin] = field(default_factory=list)

    def add(self, components: IntArray, pin: Pin) -> None:
        """Pin what is not pinned yet."""
        new = components[self.of[components] < 0]
        self.of[new] = len(self.pins)
        self.pins.append(pin)

    def __getitem__(self, component: int) -> Pin:
        return self.pins[int(self.of[component])]


@dataclass(frozen=True)
class Options:
    """What the user decides about an analysis.

    Attributes:
        heads: what attention keeps of channels viewed as heads x head size: whole heads, or
            positions that all heads share.
        norm: whether units may be removed from what a layer norm, RMS norm or mean counts
            ("exact": with the norm's dense size kept), or stay ("pin").
    """

    heads: Literal["head", "head_dim"] = "head"
    norm: Literal["exact", "pin"] = "exact"


OPTIONS = tuple(Options(heads, norm) for norm in ("exact", "pin") for heads in ("head", "head_dim"))
"""All of them, the defaults first."""


@dataclass(frozen=True, eq=False)
class Product:
    """Multiply-adds between activations: the product of the sizes of its dims, times `times`."""

    name: str
    dims: tuple[tuple[int, IntArray | None], ...]
    times: float


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
