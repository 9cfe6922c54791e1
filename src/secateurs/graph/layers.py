"""Residual branches that can be removed whole: what a sum adds to its skip.

    find_branches(labels) -> Branches     on any tape
    with_layers(found, ...) -> found      the target "layers:layer" and its costs, for `trace`

A branch is removable when some parameters make all of it exactly zero (`zeroing`), when it computes
from what it is added to, and when neither it nor these parameters serve anything else. Removing it
leaves its skip. Branches that share these parameters are one unit, those inside another are units
of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol, TypeVar

import numpy as np
from torch import nn

from secateurs.graph.flow import Flow
from secateurs.graph.labels import Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.sums import operands, sum_places
from secateurs.graph.zeroing import LAYERS, NORMS, Cut, zero_cuts
from secateurs.types import (
    CostDim,
    CostTerm,
    Exclusion,
    GroupTarget,
    IntArray,
    Member,
    Site,
    Target,
    WeightTarget,
)

__all__ = ["LAYER_TARGET", "Branch", "Branches", "find_branches", "with_layers"]

LAYER_TARGET = "layers:layer"
ELSEWHERE = "its value is also used elsewhere, not only by the sum"
SHARED = "what makes it zero is also used outside of it"
PROJECTED = "its skip goes through layers of its own, so nothing would be left without it"
NOTHING = "no parameters of its last layers make all of it zero"


@dataclass(frozen=True)
class Branch:
    """What one unit removes.

    Attributes:
        sums: (number in the tape, position of the skip among its arguments) of every sum.
        producers: value ids of the parameters that make it zero.
        dead: numbers of the records that nothing else needs.
        name: for people: the longest module path that holds its layers.
    """

    sums: tuple[tuple[int, int], ...]
    producers: Cut
    dead: frozenset[int]
    name: str


@dataclass(frozen=True)
class Branches:
    """Removable branches in execution order, and the others with reasons."""

    units: tuple[Branch, ...]
    left_whole: tuple[Exclusion, ...]


def find_branches(labels: Labels) -> Branches:
    """Find what can be removed on a tape whose labels are known."""
    flow, cuts = Flow(labels), zero_cuts(labels)
    found: list[Branch] = []
    refused: list[tuple[int, str]] = []
    projected: list[int] = []
    for number, record in enumerate(labels.tape.records):
        pair = operands(labels, record)
        if pair is None:
            continue
        found_skip = _skip(flow, pair, record)
        if found_skip is None:
            if _both_have_layers(flow, pair):
                projected.append(number)
            continue
        skip, start = found_skip
        branch = pair[1 - skip]
        if not _layers_between(flow, start, branch):
            continue  # arithmetic on one value (an activation function by hand)
        if branch in labels.tape.outputs or flow.users[branch] != [number]:
            refused.append((number, ELSEWHERE))
        elif not cuts.get((record.index, branch)):
            refused.append((number, NOTHING))
        else:
            sums = ((number, skip),)
            dead = flow.dead(sums) - flow.useless
            found.append(Branch(sums, cuts[record.index, branch], dead, ""))
    units = []
    for unit in _joined(flow, found):
        if all(flow.only_in(p, unit.dead) for p in unit.producers):
            units.append(unit)
        else:
            refused += [(n, SHARED) for n, _ in unit.sums]
    covered = {n for u in units for n in u.dead} | {n for u in units for n, _ in u.sums}
    refused += [(n, PROJECTED) for n in projected if n not in covered]
    records = labels.tape.records
    return Branches(_named(flow, units), _exclusions([(records[n], why) for n, why in refused]))


def _skip(flow: Flow, pair: tuple[int, int], record: Record) -> tuple[int, int] | None:
    """Position of the skip, and what the branch starts from: the skip, or a summand of it."""
    alpha = record.args[2] if len(record.args) > 2 else record.kwargs.get("alpha", 1)
    for position in (0, 1):
        scaled = position == 1 and (record.op == "sub" or alpha != 1)
        start = None if scaled else _start(flow, pair[position], pair[1 - position])
        if start is not None:
            return position, start
    return None


def _start(flow: Flow, skip: int, branch: int) -> int | None:
    """`x` of `x + f(x)`; in `x + f(x) + g(x)` the skip of the second sum is the first one."""
    todo, seen = [skip], {skip}
    while todo:
        value = todo.pop()
        if flow.depends(branch, value) and flow.tape.values[value].source in ("op", "input"):
            return value
        record = flow.made_by.get(value)
        if record is not None and record.op == "add":
            more = {x.id for x in record.args[:2] if isinstance(x, Ref)} - seen
            seen |= more
            todo += sorted(more)
    return None


def _layers_between(flow: Flow, start: int, end: int) -> bool:
    """Whether a layer lies on a way from one value to another."""
    return any(
        (out == end or flow.depends(end, out)) and flow.depends(out, start)
        for number in flow.layers
        for out in flow.tape.records[number].outputs
    )


def _both_have_layers(flow: Flow, pair: tuple[int, int]) -> bool:
    """Whether two values come from one, each through layers of its own."""
    a, b = (flow.above.get(i, 0) | (1 << i) for i in pair)
    common = a & b
    inner = [i for i in _bits(common) if flow.tape.values[i].source in ("op", "input")]
    if not inner:
        return False
    last = inner[-1]
    return all(_layers_between(flow, last, end) for end in pair)


def _bits(number: int) -> list[int]:
    return [i for i, bit in enumerate(bin(number)[:1:-1]) if bit == "1"]


def _joined(flow: Flow, found: list[Branch]) -> list[Branch]:
    """One unit for all branches that share producers, unless one lies inside the other."""
    units = list(found)
    merged = True
    while merged:
        merged = False
        for i, a in enumerate(units):
            for j in range(i + 1, len(units)):
                b = units[j]
                nested = any(n in b.dead for n, _ in a.sums) or any(n in a.dead for n, _ in b.sums)
                if a.producers & b.producers and not nested:
                    sums = tuple(sorted({*a.sums, *b.sums}))
                    dead = flow.dead(sums) - flow.useless
                    units[i] = Branch(sums, a.producers | b.producers, dead, "")
                    del units[j]
                    merged = True
                    break
            if merged:
                break
    return sorted(units, key=lambda u: u.sums[0])


# -- names -----------------------------------------------------------------------------------


def _named(flow: Flow, units: list[Branch]) -> tuple[Branch, ...]:
    """The longest common path of the layers of each unit; that of its last ones on a clash."""
    wide = [_common(_homes(flow, u, 2) or _homes(flow, u, 0)) for u in units]
    last = [_common([_home(flow, p) for p in sorted(u.producers)]) for u in units]
    names: list[str] = []
    for unit, w, narrow in zip(units, wide, last, strict=True):
        others = [
            o
            for o, u in zip(wide, units, strict=True)
            if u is not unit and not any(n in unit.dead for n, _ in u.sums)
        ]
        clear = w and not any(o == w or o.startswith(w + ".") for o in others)
        name = w if clear else narrow or w or "layer"
        tries = [name, *(f"{name}#{k}" for k in range(2, len(units) + 2))]
        names.append(next(t for t in tries if t not in names))
    return tuple(replace(u, name=n) for u, n in zip(units, names, strict=True))


def _homes(flow: Flow, unit: Branch, rank: int) -> list[str]:
    """Modules of the parameters of a unit with at least so many dims (two: no norms)."""
    values = [flow.tape.values[i] for i in flow.parameters(unit.dead)]
    chosen = [v.id for v in values if v.source == "parameter" and len(v.shape) >= rank]
    return [_home(flow, i) for i in chosen]


def _home(flow: Flow, value: int) -> str:
    owner = flow.tape.values[value].name.rpartition(".")[0]
    return owner.partition(".parametrizations.")[0]


def _common(paths: list[str]) -> str:
    """The longest common module path.

    Example:
        >>> _common(["block.0.attn.q", "block.0.attn.out"])
        'block.0.attn'
    """
    parts = [p.split(".") for p in paths]
    if not parts:
        return ""
    shared = reduce(
        lambda a, b: a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                              min(len(a), len(b)))],
        parts,
    )  # fmt: skip
    return ".".join(shared)


def _exclusions(refused: list[tuple[Record, str]]) -> tuple[Exclusion, ...]:
    found: dict[tuple[str, str, str], Exclusion] = {}
    for record, reason in refused:
        name = f"{record.module or record.name}:layer"
        key = (record.module, record.where, reason)  # once for each line of code
        found.setdefault(key, Exclusion(name, reason, record.where))
    return tuple(found.values())


# -- the target ------------------------------------------------------------------------------


class _Found(Protocol):
    """Targets, exclusions and costs of one analysis (`units.Found`)."""

    @property
    def targets(self) -> dict[str, Target]: ...
    @property
    def excluded(self) -> tuple[Exclusion, ...]: ...
    @property
    def costs(self) -> tuple[CostTerm, ...]: ...


F = TypeVar("F", bound=_Found)


def with_layers(found: F, labels: Labels, model: nn.Module, hookable: Collection[int]) -> F:
    """Add the target of removable branches, what it does to costs, and why others stay.

    Args:
        found: targets, exclusions and costs of the other units.
        labels: of the same analysis.
        model: for all names of tied tensors, and buffers that no operator reads.
        hookable: records whose output is that of their module.
    """
    branches = find_branches(labels)
    excluded = (*found.excluded, *branches.left_whole)
    if not branches.units:
        return replace(found, excluded=excluded)  # type: ignore[type-var]
    flow = Flow(labels)
    tensors = _vanishing(flow, branches.units, model)
    target = GroupTarget(
        LAYER_TARGET,
        "layer",
        len(branches.units),
        tuple(_members(labels, branches.units)),
        _sites(labels, branches.units, hookable),
        unit_names=tuple(u.name for u in branches.units),
        unit_tensors=tuple(tensors),
        sums=tuple(sum_places(labels, branches.units)),
    )
    groups = {n: t for n, t in found.targets.items() if not isinstance(t, WeightTarget)}
    targets = {**groups, target.name: target, **found.targets}
    vanish = [
        (set(names), {labels.tape.records[n].name for n in unit.dead})
        for unit, names in zip(branches.units, tensors, strict=True)
    ]
    costs = tuple(_cost(term, vanish) for term in found.costs)
    return replace(found, targets=targets, excluded=excluded, costs=costs)  # type: ignore[type-var]


def _vanishing(flow: Flow, units: Iterable[Branch], model: nn.Module) -> list[tuple[str, ...]]:
    """For each unit every name of a parameter or buffer that only it uses.

    Buffers that no operator reads (batch counters) go with the parameters beside them.
    """
    values = flow.tape.values
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    names: dict[int, list[str]] = {}
    beside: dict[str, set[str]] = {}
    for name, tensor in held.items():
        names.setdefault(id(tensor), []).append(name)
        beside.setdefault(name.rpartition(".")[0], set()).update({name} & set(parameters))
    read = {id(held[values[i].name]) for i in flow.users if values[i].name in held}
    unread = [n for n, t in held.items() if n not in parameters and id(t) not in read]
    found = []
    for unit in units:
        own = [values[i].name for i in flow.parameters(unit.dead) if flow.only_in(i, unit.dead)]
        gone = dict.fromkeys(n for name in own for n in names[id(held[name])])
        for name in unread:
            mates = beside[name.rpartition(".")[0]]
            if mates and mates <= set(gone):
                gone[name] = None
        found.append(tuple(gone))
    return found


def _members(labels: Labels, units: tuple[Branch, ...]) -> list[Member]:
    members = []
    for number, unit in enumerate(units):
        for ident in sorted(unit.producers):
            value = labels.tape.values[ident]
            index = np.arange(value.shape[0], dtype=np.int64)
            members.append(Member(value.name, 0, index, np.full_like(index, number), "producer"))
    return members


def _sites(
    labels: Labels, units: tuple[Branch, ...], hookable: Collection[int]
) -> tuple[Site, ...]:
    """Outputs of the modules that hold the producers; none unless there is one for each use."""
    sites: list[Site] = []
    readers: dict[int, dict[int, Record]] = {}
    for record in labels.tape.records:
        for ref in refs([record.args, record.kwargs]):
            readers.setdefault(ref.id, {})[record.index] = record
    for number, unit in enumerate(units):
        uses = {k: r for i in unit.producers for k, r in readers.get(i, {}).items()}
        for _, record in sorted(uses.items()):
            if record.index not in hookable or record.op not in LAYERS | NORMS:
                return ()
            shape = labels.value(record.outputs[0]).shape
            last = record.op in ("linear", "layer_norm", "rms_norm", "native_layer_norm")
            batched = record.op != "linear" and not last and len(shape) > 1
            dim = 1 if batched else len(shape) - 1
            index = np.arange(shape[dim], dtype=np.int64)
            sites.append(
                Site(record.module, record.call, "output", 0, dim, index,
                     np.full_like(index, number), "producer")
            )  # fmt: skip
    return tuple(sites)


def _cost(term: CostTerm, vanish: list[tuple[set[str], set[str]]]) -> CostTerm:
    """A factor of one or zero for each unit that takes the term (a tensor, a record) along."""
    more = []
    for number, (tensors, records) in enumerate(vanish):
        if term.name in (tensors if term.is_parameter or term.item_bytes else records):
            alone: IntArray = np.zeros(len(vanish), dtype=np.int64)
            alone[number] = 1
            more.append(CostDim(1, {LAYER_TARGET: alone}))
    return replace(term, dims=(*term.dims, *more)) if more else term
