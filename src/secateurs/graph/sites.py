"""Where the activations of a family can be seen in a plain run of the model, to be hooked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from secateurs.graph.elementwise import CREATE
from secateurs.graph.labels import Labels
from secateurs.graph.records import Record, Ref
from secateurs.graph.recurrent import CELLS, GATES
from secateurs.types import IntArray, Role, Site

__all__ = ["Owners", "hookable_records", "sites_of"]


@dataclass(frozen=True, eq=False)
class Owners:
    """For every component: the family that it belongs to (-1 for none), and its unit there."""

    family: IntArray
    unit: IntArray


def hookable_records(labels: Labels, model: nn.Module) -> set[int]:
    """Records whose module has the same input and output as the operator: a module without
    children whose call makes no other operator call than creating tensors and reading sizes."""
    leaves = {name for name, m in model.named_modules() if name and not list(m.children())}
    calls: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in labels.tape.records:
        if record.outputs and record.op not in CREATE:
            calls[(record.module, record.call)].append(record)
    return {c[0].index for (module, _), c in calls.items() if module in leaves and len(c) == 1}


def sites_of(
    labels: Labels,
    hookable: set[int],
    axes: list[int],
    component: IntArray,
    owners: Owners,
    family: int,
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

        def units_of(block: IntArray) -> IntArray:
            own = component[block]
            return np.where(owners.family[own] == family, owners.unit[own], -1)

        found, whole = _role_sites(labels, hookable, role, pairs, units_of)
        sites += found if whole else [replace(s, gate_exact=False) for s in found]
    return tuple(sites)


def _role_sites(
    labels: Labels,
    hookable: set[int],
    role: Role,
    pairs: list[tuple[Record, int]],
    units_of: Callable[[IntArray], IntArray],
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
        whole = whole and not (role == "producer" and record.op in (*GATES, *CELLS))
        for factor in labels.factors(value):
            unit = units_of(factor.labels)
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
