"""What may be pruned: targets, their members in parameters, their sites in a run.

A `WeightTarget` is one parameter, its units are its elements. A `GroupTarget` is a family of
structural units that are kept or removed together. Index arrays are numpy int64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateurs.errors import choose

__all__ = [
    "KINDS",
    "STRUCTURED",
    "BranchSum",
    "GroupTarget",
    "IntArray",
    "Kind",
    "Member",
    "Role",
    "Site",
    "Target",
    "WeightTarget",
    "expand_granularity",
    "learned_tensors",
]

Kind = Literal[
    "weight",
    "neuron",
    "channel",
    "hidden",
    "head",
    "head_dim",
    "kv_group",
    "expert",
    "embedding",
    "layer",
]
Role = Literal["producer", "consumer"]
IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Member:
    """Where the units of a group live along one dimension of one parameter or buffer.

    Position `index[i]` of dimension `dim` of `tensor` belongs to unit `unit[i]`. A unit may own
    several positions (the four gate rows of an LSTM unit) and a tensor may appear twice (a
    recurrent weight: rows as producer, columns as consumer).

    Attributes:
        tensor: fully qualified name, as in `model.state_dict()`.
        dim: dimension of the tensor.
        index: (n,) int64, positions along `dim`, each at most once.
        unit: (n,) int64, the unit in [0, n_units) that owns each position.
        role: "producer" makes the unit's value (output rows, bias, norm scale and shift);
            "consumer" reads it (input columns).
        outermost: for producers, False when another producer follows in series (a convolution
            whose output goes through a batch norm): scaling both would scale the unit twice.
        learned: False for buffers.
        masked: False for what is sliced away with the unit but must not be zeroed before (the
            direction of a weight norm, which is divided by its own length).
    """

    tensor: str
    dim: int
    index: IntArray
    unit: IntArray
    role: Role
    outermost: bool = True
    learned: bool = True
    masked: bool = True


@dataclass(frozen=True, eq=False)
class Site:
    """Where the activation of a group can be seen in a plain run of the model.

    Attributes:
        module: module path, as in `model.get_submodule`.
        call: 0 for the module's first call in a forward pass, 1 for its second, ...
        side: "input" or "output" of that call.
        position: which tensor: the position among the positional inputs, or among the
            tensors of the (possibly nested) output.
        dim: dimension of that tensor that holds the units.
        index: (n,) int64 positions along `dim`.
        unit: (n,) int64 unit of each position.
        role: "producer" sites are outputs of the outermost producers, before any activation
            function; "consumer" sites are the inputs of the consumers.
        gate_exact: True when activation x gradient at this site is exactly the derivative of
            the loss with respect to scaling this producer or use of the unit. False for a
            recurrent layer, whose units also act on themselves inside the kernel.
    """

    module: str
    call: int
    side: Literal["input", "output"]
    position: int
    dim: int
    index: IntArray
    unit: IntArray
    role: Role
    gate_exact: bool = True


@dataclass(frozen=True)
class BranchSum:
    """Where a unit of kind "layer" is added to its skip, in a plain run of the model.

    Attributes:
        unit: the unit.
        module: path of the innermost module whose code adds.
        call: 0 for the module's first call in a forward pass, 1 for its second, ...
        order: which sum of that call it is, of those of two different floating-point tensors of
            one shape and type.
        of: how many such sums the call makes.
        skip: position of the skip among the two.
        dim: dimension of the sum that holds the features.
    """

    unit: int
    module: str
    call: int
    order: int
    of: int
    skip: int
    dim: int


@dataclass(frozen=True, eq=False)
class WeightTarget:
    """One parameter; its units are its elements, in row-major order."""

    name: str
    shape: tuple[int, ...]
    kind: Kind = "weight"

    @property
    def n_units(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class GroupTarget:
    """A family of interchangeable structural units that must be kept or removed together.

    Attributes:
        name: stable: the module that first produces the units, a colon, the kind.
        kind: comes from the producing operator.
        n_units: how many units the family has.
        members: every place in parameters and buffers that belongs to the units.
        sites: where the activations can be hooked; empty for values inside fused kernels.
        removal: whose zeroing alone removes a unit exactly: "producers" when zero survives up
            to the consumers (relu, tanh, gelu), "consumers" when it does not (sigmoid).
        unit_names: of kind "layer": the module path of each unit, for people.
        unit_tensors: of kind "layer": parameters and buffers that go with each unit; those of its
            members alone make it zero.
        sums: of kind "layer": where each unit is added to its skip.
    """

    name: str
    kind: Kind
    n_units: int
    members: tuple[Member, ...]
    sites: tuple[Site, ...] = ()
    removal: Literal["producers", "consumers"] = "producers"
    unit_names: tuple[str, ...] = ()
    unit_tensors: tuple[tuple[str, ...], ...] = ()
    sums: tuple[BranchSum, ...] = ()


Target = WeightTarget | GroupTarget


def learned_tensors(target: Target) -> tuple[str, ...]:
    """Names of the parameters in which the units of a target live."""
    if isinstance(target, WeightTarget):
        return (target.name,)
    return tuple(dict.fromkeys(m.tensor for m in target.members if m.learned))


KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
STRUCTURED: frozenset[str] = frozenset(KINDS) - {"weight", "embedding", "layer"}


def expand_granularity(granularity: str | Iterable[str]) -> frozenset[str]:
    """Kinds named by a granularity.

    Example:
        >>> sorted(expand_granularity(["channel", "hidden"]))
        ['channel', 'hidden']
    """
    names = [granularity] if isinstance(granularity, str) else list(granularity)
    kinds: set[str] = set()
    for name in names:
        choose(name, [*KINDS, "structured"], "granularity")
        kinds |= STRUCTURED if name == "structured" else {name}
    return frozenset(kinds)
