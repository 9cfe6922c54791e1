"""From labels to targets: families of units, what is left whole and why, sites, and costs.

Components of atoms are units; units whose members lie in the same places form one `GroupTarget`.
"Places" includes every intermediate value, so units that end up in different halves of a split
are different families, and keeping at least one unit of each never empties a tensor.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from secateurs.graph.labels import Axis, BoolArray, Labels, Pin, Pins
from secateurs.graph.layers import with_layers
from secateurs.graph.sites import Owners, hookable_records, sites_of
from secateurs.types import (
    CostDim,
    CostTerm,
    Exclusion,
    GroupTarget,
    IntArray,
    Kind,
    Member,
    Target,
    WeightTarget,
)

__all__ = ["Detail", "find_targets", "tensor_costs"]


@dataclass(frozen=True, eq=False)
class Detail:
    """What later rooms need of the analysis beyond the targets.

    Attributes:
        shapes: dense shape of every parameter and buffer.
        labels: the state of the interpreter.
        component: (n_atoms,) unit component of every atom.
        families: components of each structural target, in the order of its units.
    """

    shapes: dict[str, tuple[int, ...]]
    labels: Labels
    component: IntArray
    families: list[IntArray]


@dataclass(frozen=True, eq=False)
class Found:
    """Targets, exclusions and costs of one analysis."""

    targets: dict[str, Target]
    excluded: tuple[Exclusion, ...]
    costs: tuple[CostTerm, ...]
    detail: Detail


def find_targets(labels: Labels, model: nn.Module) -> Found:
    """Solve the labels and describe the units they imply."""
    component, pins = labels.solve()
    free = pins.of[component] < 0
    made = _made(labels, component)
    families = []
    for family in _families(labels, component, free):
        why = ""
        if len(family) == 1:
            why = "it is the only unit of its kind: without it a tensor would be empty"
        elif not made[family[0]]:
            why = "no layer produces it: it belongs to a constant or to a parameter used as data"
        if why:
            pins.add(family, Pin(family, why, ""))
        else:
            families.append(family)
    free = pins.of[component] < 0
    hookable = hookable_records(labels, model)
    groups = _groups(labels, hookable, component, families)
    targets: dict[str, Target] = dict(groups)
    embeddings = {labels.axes[i].value for i, k in labels.kinds.items() if k == "embedding"}
    for value in labels.tape.named().values():
        prunable = value.source == "parameter" and len(value.shape) >= 2
        if prunable and value.dtype.is_floating_point and value.id not in embeddings:
            targets[value.name] = WeightTarget(value.name, value.shape)
    shapes = {name: value.shape for name, value in labels.tape.named().items()}
    found = Found(
        targets,
        _exclusions(labels, component, free, pins),
        _costs(labels, list(groups.values()), component, model),
        Detail(shapes, labels, component, families),
    )
    return with_layers(found, labels, model, hookable)


# -- families ------------------------------------------------------------------------------


def _families(labels: Labels, component: IntArray, free: np.ndarray) -> list[IntArray]:
    """Components grouped by where their atoms occur, each ascending; families by execution order.

    The signature of a component is a sum of one random number per place and occurrence: equal
    multisets of places give equal sums.
    """
    rng = np.random.default_rng(0)
    signature = np.zeros(labels.n_atoms, dtype=np.uint64)
    stored = np.zeros(labels.n_atoms, dtype=bool)
    places: dict[int, IntArray] = {}  # one array in several places says the same in each
    for axis in labels.axes:
        if axis.stored:
            stored[axis.offset : axis.offset + axis.size] = True
            number = rng.integers(1, 2**63, dtype=np.uint64)
            np.add.at(signature, component[axis.offset : axis.offset + axis.size], number)
    for factors in labels.state.values():
        places.update({id(f.labels): f.labels for f in factors})
    for block in places.values():
        number = rng.integers(1, 2**63, dtype=np.uint64)
        np.add.at(signature, component[block.reshape(-1)], number)
    components = np.unique(component[free & stored])
    by_signature: dict[int, list[int]] = defaultdict(list)
    for c, mark in zip(components.tolist(), signature[components].tolist(), strict=True):
        by_signature[mark].append(c)
    first = _order(labels, component)
    families = [np.array(f, dtype=np.int64) for f in by_signature.values()]
    return sorted(families, key=lambda f: (int(first[f[0]]), int(f[0])))


def _made(labels: Labels, component: IntArray) -> BoolArray:
    """(n_atoms,) components that some operator with weights produces."""
    made = np.zeros(labels.n_atoms, dtype=bool)
    for i in labels.kinds:
        axis = labels.axes[i]
        made[component[axis.offset : axis.offset + axis.size]] = True
    return made


def _order(labels: Labels, component: IntArray) -> IntArray:
    """(n_atoms,) for each component, when its first producer runs."""
    order = np.full(labels.n_atoms, len(labels.tape.values), dtype=np.int64)
    for number, makers in labels.makers.items():
        axis = labels.axes[number]
        at = min(r.index for r in makers)
        np.minimum.at(order, component[axis.offset : axis.offset + axis.size], at)
    return order


def _groups(
    labels: Labels, hookable: set[int], component: IntArray, families: list[IntArray]
) -> dict[str, GroupTarget]:
    """The targets of all families, in their order."""
    owners = Owners(
        np.full(labels.n_atoms, -1, dtype=np.int64), np.zeros(labels.n_atoms, dtype=np.int64)
    )
    for number, family in enumerate(families):
        owners.family[family], owners.unit[family] = number, np.arange(len(family))
    axes: list[list[int]] = [[] for _ in families]
    members: list[list[Member]] = [[] for _ in families]
    for number, axis in enumerate(labels.axes):
        if not axis.stored:
            continue
        own = component[axis.offset : axis.offset + axis.size]
        family = owners.family[own]
        for owner in np.unique(family[family >= 0]).tolist():
            index = np.flatnonzero(family == owner)
            axes[owner].append(number)
            members[owner].append(_member(labels, number, index, owners.unit[own[index]]))
    nonzero = labels.reached_nonzero(component)
    kinds = _kinds(labels, component)
    groups: dict[str, GroupTarget] = {}
    for number, family in enumerate(families):
        made = [i for i in axes[number] if i in labels.makers]
        leader = min(made or axes[number], key=lambda i: _first_record(labels, i))
        kind = _kind(labels, kinds, family, made, labels.kinds.get(leader, "neuron"))
        name = base = f"{stem(labels.axes[leader])}:{kind}"
        same = 2
        while name in groups:
            name = f"{base}#{same}"
            same += 1
        groups[name] = GroupTarget(
            name,
            kind,
            len(family),
            tuple(members[number]),
            sites_of(labels, hookable, axes[number], component, owners, number),
            "consumers" if nonzero[family].any() else "producers",
        )
    return groups


def _member(labels: Labels, number: int, index: IntArray, unit: IntArray) -> Member:
    axis = labels.axes[number]
    return Member(
        axis.name,
        axis.dim,
        index,
        unit,
        role="producer" if number in labels.makers else "consumer",
        outermost=number not in labels.inner,
        learned=axis.learned,
        masked=number not in labels.unmasked,
    )


def _kinds(labels: Labels, component: IntArray) -> dict[str, BoolArray]:
    """(n_atoms,) for each kind that attention forms, and "normalised": which components are."""
    found: dict[str, BoolArray] = defaultdict(lambda: np.zeros(labels.n_atoms, dtype=bool))
    for block, kind in labels.heads:
        found[kind][component[block]] = True
    for block in labels.normalised:
        found["normalised"][component[block]] = True
    return found


def _kind(
    labels: Labels,
    kinds: dict[str, BoolArray],
    family: IntArray,
    made: list[int],
    produced: Kind,
) -> Kind:
    """The kind of a family: of its first producer, unless attention or a norm says more."""
    for formed in ("kv_group", "head", "head_dim"):
        if kinds[formed][family].any():
            return formed
    own = {labels.kinds[i] for i in made if i in labels.kinds}
    for kind in ("expert", "embedding", "hidden"):
        if kind in own:
            return kind
    writers = {r.index for i in made if i in labels.kinds for r in labels.makers[i]}
    normed = bool(kinds["normalised"][family].any())
    return "embedding" if normed and len(writers) > 1 else produced


def _first_record(labels: Labels, number: int) -> tuple[int, int]:
    """Axes with a kind come first (a weight before its norm), then by execution."""
    last = len(labels.tape.records)
    first = min((r.index for r in labels.makers.get(number, [])), default=last)
    return (0 if number in labels.kinds else 1, first)


# -- exclusions and costs ------------------------------------------------------------------


def _exclusions(
    labels: Labels, component: IntArray, free: BoolArray, pins: Pins
) -> tuple[Exclusion, ...]:
    """One line per producing weight (or part of it) whose units must stay."""
    found: dict[tuple[str, str], Exclusion] = {}
    for number, axis in enumerate(labels.axes):
        if not axis.stored or number not in labels.kinds or not _is_main(labels, axis):
            continue
        own = component[axis.offset : axis.offset + axis.size]
        for number_of_pin in np.unique(pins.of[own][~free[own]]).tolist():
            pin = pins.pins[number_of_pin]
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
    owner = axis.name.rpartition(".")[0] or axis.name
    return owner.partition(".parametrizations.")[0]


def _is_main(labels: Labels, axis: Axis) -> bool:
    """A weight rather than its bias."""
    return len(labels.value(axis.value).shape) > 1


def _costs(
    labels: Labels, groups: list[GroupTarget], component: IntArray, model: nn.Module
) -> tuple[CostTerm, ...]:
    owned: dict[tuple[str, int], dict[str, IntArray]] = defaultdict(dict)
    for group in groups:
        for member in group.members:
            count = np.bincount(member.unit, minlength=group.n_units)
            owned[(member.tensor, member.dim)][group.name] = count.astype(np.int64)
    terms = [
        replace(
            term,
            dims=tuple(
                replace(dim, owned=owned.get((term.name, d), {})) for d, dim in enumerate(term.dims)
            ),
        )
        for term in tensor_costs(model, labels)
    ]
    terms += _product_costs(labels, groups, component)
    return tuple(terms)


def tensor_costs(model: nn.Module, labels: Labels | None = None) -> list[CostTerm]:
    """One term per parameter and buffer, those included that no operator reads; nothing owned."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in held.items():
        names[id(tensor)].append(name)
    captured = {} if labels is None else labels.tape.named()
    terms = []
    for same in names.values():
        name = next((n for n in same if n in captured), same[0])
        tensor = held[name]
        uses = labels.uses.get(captured[name].id, 0.0) if labels and name in captured else 0.0
        dims = tuple(CostDim(n) for n in tensor.shape)
        learned = name in parameters
        terms.append(CostTerm(name, dims, learned, uses, tensor.element_size(), len(same)))
    return terms


def _product_costs(
    labels: Labels, groups: list[GroupTarget], component: IntArray
) -> list[CostTerm]:
    """Multiply-adds between activations: the sizes of their dims follow the units."""
    owner = np.full(labels.n_atoms, -1, dtype=np.int64)
    unit = np.zeros(labels.n_atoms, dtype=np.int64)
    offsets = {(a.name, a.dim): a.offset for a in labels.axes if a.stored}
    for number, group in enumerate(groups):
        for member in group.members:
            atoms = component[offsets[(member.tensor, member.dim)] + member.index]
            owner[atoms], unit[atoms] = number, member.unit
    terms = []
    for product in labels.products:
        dims = []
        for size, block in product.dims:
            owned = {}
            if block is not None:
                atoms = component[block.reshape(-1)]
                for number in np.unique(owner[atoms][owner[atoms] >= 0]):
                    mine = unit[atoms[owner[atoms] == number]]
                    count = np.bincount(mine, minlength=groups[number].n_units)
                    owned[groups[number].name] = count.astype(np.int64)
            dims.append(CostDim(size, owned))
        terms.append(CostTerm(product.name, tuple(dims), False, product.times))
    return terms
