"""From labels to targets: families of units, what is left whole and why, sites, and costs.

Components of atoms are units; units whose members lie in the same places form one `GroupTarget`.
"Places" includes every intermediate value, so units that end up in different halves of a split
are different families, and keeping at least one unit of each never empties a tensor.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import nn

from secateurs.graph.contractions import GATES
from secateurs.graph.elementwise import CREATE
from secateurs.graph.labels import Axis, Labels, Pin
from secateurs.graph.records import Record, Ref
from secateurs.types import (
    CostDim,
    CostTerm,
    Exclusion,
    GroupTarget,
    IntArray,
    Kind,
    Member,
    Role,
    Site,
    Target,
    WeightTarget,
)

__all__ = ["Detail", "find_targets"]


@dataclass(frozen=True, eq=False)
class Detail:
    """What later rooms need of the analysis beyond the targets.

    Attributes:
        shapes: dense shape of every parameter and buffer.
        labels: the state of the interpreter.
        component: (n_atoms,) unit component of every atom.
    """

    shapes: dict[str, tuple[int, ...]]
    labels: Labels
    component: IntArray


@dataclass(frozen=True, eq=False)
class Found:
    """Targets, exclusions and costs of one analysis."""

    targets: dict[str, Target]
    excluded: tuple[Exclusion, ...]
    costs: tuple[CostTerm, ...]
    detail: Detail


def find_targets(labels: Labels, model: nn.Module) -> Found:
    """Solve the labels and describe the units they imply."""
    component, pinned_components, pins = labels.solve()
    pinned = np.zeros(labels.n_atoms, dtype=bool)
    pinned[pinned_components] = True
    free = ~pinned[component]
    made = _made(labels, component)
    families = []
    for family in _families(labels, component, free):
        why = ""
        if len(family) == 1:
            why = "it is the only unit of its kind: without it a tensor would be empty"
        elif int(family[0]) not in made:
            why = "no layer produces it: it belongs to a constant or to a parameter used as data"
        if why:
            free &= ~np.isin(component, family)
            pins.update(dict.fromkeys(family.tolist(), Pin(family, why, "")))
        else:
            families.append(family)
    hookable = _hookable(labels, model)
    nonzero = labels.reached_nonzero(component)
    groups: dict[str, GroupTarget] = {}
    for components in families:
        target = _group(labels, hookable, component, components, groups, nonzero)
        groups[target.name] = target
    targets: dict[str, Target] = dict(groups)
    for value in labels.tape.named().values():
        prunable = value.source == "parameter" and len(value.shape) >= 2
        if prunable and value.dtype.is_floating_point and not _is_embedding(labels, value.id):
            targets[value.name] = WeightTarget(value.name, value.shape)
    shapes = {name: value.shape for name, value in labels.tape.named().items()}
    return Found(
        targets,
        _exclusions(labels, component, free, pins),
        _costs(labels, list(groups.values())),
        Detail(shapes, labels, component),
    )


def _is_embedding(labels: Labels, value: int) -> bool:
    kinds = {labels.kinds.get(i) for i, a in enumerate(labels.axes) if a.value == value}
    return "embedding" in kinds


# -- families ------------------------------------------------------------------------------


def _families(labels: Labels, component: IntArray, free: np.ndarray) -> list[IntArray]:
    """Components grouped by where their atoms occur, each ascending; families by execution order.

    The signature of a component is a sum of one random number per place and occurrence: equal
    multisets of places give equal sums.
    """
    rng = np.random.default_rng(0)
    signature = np.zeros(labels.n_atoms, dtype=np.uint64)
    for axis in labels.axes:
        if axis.stored:
            atoms = np.arange(axis.offset, axis.offset + axis.size)
            np.add.at(signature, component[atoms], rng.integers(1, 2**63, dtype=np.uint64))
    for factors in labels.state.values():
        for factor in factors:
            number = rng.integers(1, 2**63, dtype=np.uint64)
            np.add.at(signature, component[factor.labels.reshape(-1)], number)
    stored = np.zeros(labels.n_atoms, dtype=bool)
    for axis in labels.axes:
        stored[axis.offset : axis.offset + axis.size] = axis.stored
    components = np.unique(component[free & stored])
    by_signature: dict[int, list[int]] = defaultdict(list)
    for c in components:
        by_signature[int(signature[c])].append(int(c))
    first = _order(labels, component)
    families = [np.array(sorted(f), dtype=np.int64) for f in by_signature.values()]
    return sorted(families, key=lambda f: (first.get(int(f[0]), len(first)), int(f[0])))


def _made(labels: Labels, component: IntArray) -> set[int]:
    """Components that some operator with weights produces."""
    axes = [labels.axes[i] for i in labels.makers]
    return {int(c) for a in axes for c in component[a.offset : a.offset + a.size]}


def _order(labels: Labels, component: IntArray) -> dict[int, int]:
    """For each component, when its first producer runs."""
    order: dict[int, int] = {}
    for number, makers in labels.makers.items():
        axis = labels.axes[number]
        at = min(r.index for r in makers)
        for c in np.unique(component[axis.offset : axis.offset + axis.size]):
            order[int(c)] = min(at, order.get(int(c), at))
    return order


def _group(
    labels: Labels,
    hookable: set[int],
    component: IntArray,
    components: IntArray,
    taken: dict[str, GroupTarget],
    nonzero: set[int],
) -> GroupTarget:
    unit_of = np.full(labels.n_atoms, -1, dtype=np.int64)
    unit_of[components] = np.arange(len(components))
    members: list[Member] = []
    axes: list[int] = []
    for number, axis in enumerate(labels.axes):
        unit = unit_of[component[axis.offset : axis.offset + axis.size]]
        index = np.flatnonzero(unit >= 0)
        if len(index) and axis.stored:
            outermost = number not in labels.inner
            role: Role = "producer" if number in labels.makers else "consumer"
            members.append(
                Member(axis.name, axis.dim, index, unit[index], role, outermost, axis.learned)
            )
            axes.append(number)
    made = [i for i in axes if i in labels.makers]
    leader = min(made or axes, key=lambda i: _first_record(labels, i))
    kind: Kind = labels.kinds.get(leader, "neuron")
    base = f"{stem(labels.axes[leader])}:{kind}"
    name = base
    number = 2
    while name in taken:
        name = f"{base}#{number}"
        number += 1
    removal: Literal["producers", "consumers"] = (
        "consumers" if nonzero.intersection(components.tolist()) else "producers"
    )
    sites = _sites(labels, hookable, axes, unit_of[component])
    return GroupTarget(name, kind, len(components), tuple(members), sites, removal)


def _first_record(labels: Labels, number: int) -> tuple[int, int]:
    """Axes with a kind come first (a weight before its norm), then by execution."""
    last = len(labels.tape.records)
    first = min((r.index for r in labels.makers.get(number, [])), default=last)
    return (0 if number in labels.kinds else 1, first)


# -- sites ---------------------------------------------------------------------------------


def _hookable(labels: Labels, model: nn.Module) -> set[int]:
    """Records whose module has the same input and output as the operator: a module without
    children whose call makes no other operator call than creating tensors and reading sizes."""
    leaves = {name for name, m in model.named_modules() if name and not list(m.children())}
    calls: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in labels.tape.records:
        if record.outputs and record.op not in CREATE:
            calls[(record.module, record.call)].append(record)
    return {c[0].index for (module, _), c in calls.items() if module in leaves and len(c) == 1}


def _sites(
    labels: Labels, hookable: set[int], axes: list[int], unit_of_atom: IntArray
) -> tuple[Site, ...]:
    """Module inputs and outputs where the units can be hooked.

    A role whose members cannot all be hooked gives sites that are not exact for gates.
    """
    calls: dict[Role, list[tuple[Record, int]]] = {
        "producer": [
            (r, -1)
            for i in axes
            if i in labels.makers and i not in labels.inner
            for r in labels.makers[i]
        ],
        "consumer": [p for i in axes for p in labels.readers.get(i, [])],
    }
    sites: list[Site] = []
    for role, pairs in calls.items():
        found, whole = _role_sites(labels, hookable, role, pairs, unit_of_atom)
        sites += found if whole else [replace(s, gate_exact=False) for s in found]
    return tuple(sites)


def _role_sites(
    labels: Labels,
    hookable: set[int],
    role: Role,
    pairs: list[tuple[Record, int]],
    unit_of_atom: IntArray,
) -> tuple[list[Site], bool]:
    """Sites of one role, and whether they cover all its members exactly."""
    found: dict[tuple[str, int], Site] = {}
    whole = True
    for record, argument in pairs:
        value = record.outputs[0] if role == "producer" else None
        if role == "consumer" and argument >= 0 and isinstance(record.args[argument], Ref):
            value = record.args[argument].id
        if value is None or record.index not in hookable:
            whole = False
            continue
        whole = whole and not (role == "producer" and record.op in GATES)
        for factor in labels.factors(value):
            unit = unit_of_atom[factor.labels]
            if len(factor.dims) != 1 or not (unit >= 0).any():
                continue
            index = np.flatnonzero(unit >= 0)
            found[(record.module, record.call)] = Site(
                module=record.module,
                call=record.call,
                side="output" if role == "producer" else "input",
                position=0,
                dim=factor.dims[0],
                index=index,
                unit=unit[index],
                role=role,
            )
    return list(found.values()), whole


# -- exclusions and costs ------------------------------------------------------------------


def _exclusions(
    labels: Labels, component: IntArray, free: np.ndarray, pins: dict[int, Pin]
) -> tuple[Exclusion, ...]:
    """One line per producing weight (or part of it) whose units must stay."""
    found: dict[tuple[str, str], Exclusion] = {}
    for number, axis in enumerate(labels.axes):
        if not axis.stored or number not in labels.kinds or not _is_main(labels, axis):
            continue
        atoms = np.arange(axis.offset, axis.offset + axis.size)
        held = atoms[~free[atoms]]
        for c in np.unique(component[held]):
            pin = pins[int(c)]
            key = (f"{stem(axis)}:{labels.kinds[number]}", pin.reason)
            found.setdefault(key, Exclusion(key[0], pin.reason, pin.where))
    mentioned = {name.rpartition(":")[0] for name, _ in found}
    mentioned |= {stem(a) for a in labels.axes if free[a.offset : a.offset + a.size].any()}
    for axis in labels.axes:
        if axis.learned and stem(axis) not in mentioned:
            pin = pins[int(component[axis.offset])]
            found.setdefault((stem(axis), pin.reason), Exclusion(stem(axis), pin.reason, pin.where))
    for op, count in labels.unknown.items():
        text = (
            f"no rule yet ({count} call{'s' if count > 1 else ''}); what it touches is left whole"
        )
        found[(f"operator {op}", text)] = Exclusion(f"operator {op}", text)
    return tuple(found.values())


def stem(axis: Axis) -> str:
    """The module that holds a parameter; the parameter itself at the root."""
    return axis.name.rpartition(".")[0] or axis.name


def _is_main(labels: Labels, axis: Axis) -> bool:
    """A weight rather than its bias."""
    return len(labels.value(axis.value).shape) > 1


def _costs(labels: Labels, groups: list[GroupTarget]) -> tuple[CostTerm, ...]:
    owned: dict[tuple[str, int], dict[str, IntArray]] = defaultdict(dict)
    for group in groups:
        for member in group.members:
            count = np.bincount(member.unit, minlength=group.n_units)
            owned[(member.tensor, member.dim)][group.name] = count.astype(np.int64)
    terms = []
    for name, value in labels.tape.named().items():
        if value.source != "parameter":
            continue
        dims = tuple(CostDim(n, owned.get((name, d), {})) for d, n in enumerate(value.shape))
        terms.append(CostTerm(name, dims, True, labels.uses.get(value.id, 0.0)))
    return tuple(terms)
