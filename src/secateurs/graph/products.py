"""Rules for products of any two tensors: matmul and its kin, einsum.

Every product is read as an einsum: each dimension of each operand has a letter. A letter in no
output is summed over; one in several operands pairs them; the others pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from secateurs.graph.contractions import FIXED_INPUT
from secateurs.graph.labels import Factor, Labels, Product
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import rule, unknown
from secateurs.types import IntArray, Kind

__all__ = ["PAIRED", "Operand", "multiply", "operand_of", "store"]

SUMMED = "it is summed over with a tensor that is fixed"
PAIRED = "it meets a tensor whose entries cannot be removed"


@dataclass
class Operand:
    """One side of a product: a letter for every dim, and the factors over letters.

    Attributes:
        shape: sizes; a dim of size 1 broadcasts.
        letters: one per dim.
        factors: labels by letters, in the operand's order of dims.
        ref: the value, if it is one as it stands.
        argument: position among the operator's arguments, for sites; -1 for none.
    """

    shape: tuple[int, ...]
    letters: tuple[str, ...]
    factors: dict[tuple[str, ...], Factor]
    ref: Ref | None = None
    argument: int = -1
    weight: bool = False

    def has(self, letter: str) -> bool:
        """Whether the operand has more than one entry along a letter."""
        return letter in self.letters and self.shape[self.letters.index(letter)] > 1

    def labelled(self, letter: str) -> bool:
        return any(letter in key for key in self.factors)


def operand_of(labels: Labels, ref: Ref, letters: Sequence[str], argument: int) -> Operand:
    factors = {tuple(letters[d] for d in f.dims): f for f in labels.factors(ref)}
    shape = labels.value(ref).shape
    return Operand(shape, tuple(letters), factors, ref, argument, labels.is_weight(ref))


def multiply(
    labels: Labels, record: Record, operands: list[Operand], out: Sequence[str]
) -> dict[tuple[str, ...], Factor]:
    """Labels of a product, by letters of its output. Ties, pins, and notes who reads and makes."""
    summed = {x for o in operands for x in o.letters} - set(out)
    for operand in operands:
        others = [o for o in operands if o is not operand]
        for key in [k for k in operand.factors if len(k) > 1]:
            _settle(labels, operand, key, others, summed)
    result: dict[tuple[str, ...], Factor] = {}
    keys = dict.fromkeys(tuple(sorted(k)) for o in operands for k in o.factors)
    for key in keys:
        holders = [(o, f) for o in operands if (f := _ordered(o, key)) is not None]
        touching = [o for o in operands if any(o.has(x) for x in key)]
        whole = len(holders) == len(touching)
        if set(key) <= summed:
            _sum(labels, record, holders, whole=whole)
        elif set(key) & summed or not whole:
            for _, f in holders:
                labels.pin(f.labels, SUMMED if set(key) & summed else PAIRED, record.where)
        else:
            result[key] = _pair(labels, record, holders, key)
    _count(labels, record, operands, out)
    return result


def _settle(
    labels: Labels,
    operand: Operand,
    key: tuple[str, ...],
    others: list[Operand],
    summed: set[str],
) -> None:
    """Coarsen a joint factor where the partners do not carry the same one."""
    partners = [o for o in others if any(o.has(x) for x in key)]
    if all(_ordered(o, tuple(sorted(key))) is not None for o in partners) and (
        set(key) <= summed or not set(key) & summed
    ):
        return
    outer = labels.options.heads == "head"
    over = [x for x in key if x in summed]
    rest = [x for x in key if x not in summed]
    if over and rest and any(o.weight for o in (operand, *partners)):
        keep = over
    elif over and rest:
        keep = rest if outer else over
    else:
        free = [x for x in key if not any(o.has(x) for o in partners)]
        shared = [
            x for x in key if x not in free and all(not o.has(x) or o.labelled(x) for o in partners)
        ]
        choices = [c for c in (free, shared) if c] or [[key[0 if outer else -1]]]
        choices.sort(key=lambda c: key.index(c[0]))
        keep = choices[0 if outer else -1]
    factor = operand.factors.pop(key)
    dims = [operand.letters.index(x) for x in keep]
    if operand.ref is not None:
        now = labels.on(operand.ref, dims[0])
        coarse = labels.narrow(operand.ref, now if now is not None else factor, dims)
    else:
        own = tuple(operand.letters.index(x) for x in key)
        coarse = labels.coarsen(replace(factor, dims=own), dims)
    operand.factors[tuple(keep)] = coarse
    if not operand.weight and not any(o.weight for o in partners):
        labels.heads.append((coarse.labels, "head" if keep[0] == key[0] else "head_dim"))


def _ordered(operand: Operand, key: tuple[str, ...]) -> Factor | None:
    """The operand's factor over exactly these letters, with its labels in their order."""
    for own, factor in operand.factors.items():
        if len(own) == len(key) and set(own) == set(key):
            order = [own.index(x) for x in key]
            return replace(factor, labels=factor.labels.transpose(order))
    return None


def _sum(
    labels: Labels, record: Record, holders: list[tuple[Operand, Factor]], *, whole: bool
) -> None:
    """Letters that vanish: tied, and zero on one side at least."""
    first = holders[0][1]
    if not whole:
        for o, f in holders:
            labels.pin(f.labels, FIXED_INPUT if o.weight else SUMMED, record.where)
            if o.weight:
                _read(labels, record, o, f, [h for h, _ in holders])
        return
    for _, f in holders[1:]:
        labels.tie(first.labels, f.labels, SUMMED, record.where)
    labels.consume(first.labels)
    if not any(f.z for _, f in holders):
        labels.pin(first.labels, "it is summed over and nothing makes it zero", record.where)
    for o, f in holders:
        if o.weight:
            _read(labels, record, o, f, [h for h, _ in holders])
        elif not f.z:
            labels.nonzero(f.labels)


def _read(
    labels: Labels, record: Record, weight: Operand, f: Factor, operands: list[Operand]
) -> None:
    other = next((o.argument for o in operands if o is not weight and not o.weight), -1)
    labels.read(f.labels, record, other)


def _pair(
    labels: Labels, record: Record, holders: list[tuple[Operand, Factor]], key: tuple[str, ...]
) -> Factor:
    """Letters that stay: tied between the operands; zero where any of them is."""
    first = holders[0][1]
    labels.pass_on(first.labels)
    for _, f in holders[1:]:
        labels.tie(first.labels, f.labels, PAIRED, record.where)
        if not any(o.weight for o, _ in holders) and _entries(f) != _entries(first):
            labels.heads.append((first.labels, "kv_group"))  # one side serves several of the other
    merged = first.labels
    for _, f in holders[1:]:
        merged = np.minimum(merged, f.labels)
    producers = frozenset().union(*(f.producers for _, f in holders))
    for o, f in holders:
        if o.weight:
            labels.make(f.labels, record, _kind(o, key))
    zero = [f for _, f in holders if f.z]
    if zero and len(holders) > 1:
        labels.inner |= producers - zero[0].producers
        producers = zero[0].producers
    return Factor((), merged, bool(zero), producers)


def _entries(factor: Factor) -> int:
    """How many different units a factor tells apart before it is tied to others."""
    return len(np.unique(factor.labels))


def _kind(weight: Operand, key: tuple[str, ...]) -> Kind:
    """What a weight makes: the first of three or more dims numbers stacked weights, experts."""
    stacked = len(weight.shape) > 2 and key == weight.letters[:1]
    return "expert" if stacked else "neuron"


def _count(labels: Labels, record: Record, operands: list[Operand], out: Sequence[str]) -> None:
    """Note the multiply-adds: on the weight, or as a product between activations."""
    sizes: dict[str, int] = {}
    for o in operands:
        for letter, n in zip(o.letters, o.shape, strict=True):
            sizes[letter] = max(n, sizes.get(letter, 1))
    total = prod(sizes.values())
    weights = [o for o in operands if o.weight and o.ref is not None]
    if weights and weights[0].ref is not None:
        own = prod(labels.root(weights[0].ref).shape)
        labels.used(weights[0].ref, total / max(1, own) / labels.tape.batch_size)
    elif len(operands) == 2:
        found: dict[str, IntArray] = {}
        for o in operands:
            for key, f in o.factors.items():
                for at, letter in enumerate(key):
                    start = tuple(slice(None) if i == at else 0 for i in range(len(key)))
                    found.setdefault(letter, f.labels[start])
        dims = tuple((n, found.get(x)) for x, n in sizes.items())
        labels.products.append(Product(record.name, dims, 1.0 / labels.tape.batch_size))


def store(
    labels: Labels, out: int, letters: Sequence[str], found: dict[tuple[str, ...], Factor]
) -> None:
    """Give an output the factors of a product."""
    factors = []
    for key, factor in found.items():
        dims = [letters.index(x) for x in key]
        order = np.argsort(dims)
        factors.append(
            replace(
                factor,
                dims=tuple(sorted(dims)),
                labels=factor.labels.transpose(*order) if len(dims) > 1 else factor.labels,
            )
        )
    labels.assign(out, factors)


# -- matmul and its kin ----------------------------------------------------------------------


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "linalg_vecdot", "outer", "ger")
def _matmul(labels: Labels, record: Record) -> None:
    a, b = record.args[0], record.args[1]
    ra, rb = len(labels.value(a).shape), len(labels.value(b).shape)
    if record.op in ("outer", "ger"):
        left, right, out = ["i"], ["j"], ["i", "j"]
    elif record.op in ("inner", "linalg_vecdot"):
        if ra != 1 or rb != 1:
            unknown(labels, record)
            return
        left, right, out = ["k"], ["k"], []
    else:
        left, right, out = _matmul_letters(ra, rb)
    operands = [operand_of(labels, a, left, 0), operand_of(labels, b, right, 1)]
    store(labels, record.outputs[0], out, multiply(labels, record, operands, out))


def _matmul_letters(ra: int, rb: int) -> tuple[list[str], list[str], list[str]]:
    """Letters of `torch.matmul`: leading dims broadcast, counted from the end."""
    left = [f"b{ra - i}" for i in range(ra - 2)] + (["i", "k"] if ra > 1 else ["k"])
    right = [f"b{rb - i}" for i in range(rb - 2)] + (["k", "j"] if rb > 1 else ["k"])
    lead = left[:-2] if ra >= rb else right[:-2]
    out = [*lead, *(["i"] if ra > 1 else []), *(["j"] if rb > 1 else [])]
    return left, right, out


@rule("addmm", "baddbmm", "addbmm", "addmv")
def _with_addend(labels: Labels, record: Record) -> None:
    """addend + a @ b: the addend meets the product elementwise."""
    addend, a, b = record.args[:3]
    if record.op == "addbmm":
        unknown(labels, record)
        return
    left, right, out = _matmul_letters(len(labels.value(a).shape), len(labels.value(b).shape))
    operands = [operand_of(labels, a, left, 1), operand_of(labels, b, right, 2)]
    found = multiply(labels, record, operands, out)
    store(labels, record.outputs[0], out, found)
    _add(labels, record, record.outputs[0], addend)


def _add(labels: Labels, record: Record, out: int, addend: Ref) -> None:
    """Add a tensor to an output that has its factors already."""
    product = labels.factors(out)
    rank, shape = len(labels.value(out).shape), labels.value(addend).shape
    shift = rank - len(shape)
    for f in product:
        if len(f.dims) > 1 and any(d >= shift and shape[d - shift] > 1 for d in f.dims):
            own = labels.on(addend, f.dims[0] - shift) if f.dims[0] >= shift else None
            if own is None or tuple(d + shift for d in own.dims) != f.dims:
                labels.narrow(out, f, [f.dims[0] if labels.options.heads == "head" else f.dims[-1]])
    result = []
    for f in labels.factors(out):
        full = [d for d in f.dims if d >= shift and shape[d - shift] > 1]
        if not full:
            result.append(replace(f, z=False))
            continue
        own = labels.on(addend, f.dims[0] - shift)
        if own is None or tuple(d + shift for d in own.dims) != f.dims:
            labels.pin(f.labels, PAIRED, record.where)
            continue
        labels.tie(f.labels, own.labels, "its addend is fixed", record.where)
        producers = f.producers | own.producers
        if labels.is_weight(addend):
            labels.make(own.labels, record)
        result.append(replace(f, z=f.z and own.z, producers=producers))
    kept = {d for f in result for d in f.dims}
    for f in labels.factors(addend):
        if not {d + shift for d in f.dims} <= kept:
            labels.pin(f.labels, PAIRED, record.where)
    labels.assign(out, result)


@rule("einsum")
def _einsum(labels: Labels, record: Record) -> None:
    equation, operands = record.args[0].replace(" ", ""), list(refs(record.args[1]))
    if "->" not in equation or not len(operands) >= 1:
        sides = equation.split(",")
        once = sorted(x for x in set("".join(sides)) if "".join(sides).count(x) == 1 and x != ".")
        equation += "->" + ("..." if "..." in equation else "") + "".join(once)
    left, right = equation.split("->")
    ranks = [len(labels.value(r).shape) for r in operands]
    terms = [_letters(t, n) for t, n in zip(left.split(","), ranks, strict=True)]
    out = _letters(right, len(labels.value(record.outputs[0]).shape))
    if any(len(set(t)) < len(t) for t in terms):
        unknown(labels, record, "an einsum that repeats a letter in one tensor has no rule")
        return
    sides = [
        operand_of(labels, r, t, i) for i, (r, t) in enumerate(zip(operands, terms, strict=True))
    ]
    for o in sides:
        o.argument = -1  # nested in a list: no site
    store(labels, record.outputs[0], out, multiply(labels, record, sides, out))


def _letters(term: str, rank: int) -> list[str]:
    """Letters of one term; those of an ellipsis are numbered from the end."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped(labels: Labels, record: Record) -> None:
    """(tokens, in) @ (experts, in, out), tokens sorted by expert: like one linear layer."""
    a, b = record.args[0], record.args[1]
    if len(labels.value(a).shape) != 2 or len(labels.value(b).shape) != 3:
        unknown(labels, record)
        return
    for f in labels.factors(b):
        if 0 in f.dims:
            labels.drop(b, {0})
    for f in [f for f in labels.factors(b) if f.dims == (0,)]:
        labels.pin(f.labels, "experts are chosen by their number", record.where)
    operands = [operand_of(labels, a, ["t", "k"], 0), operand_of(labels, b, ["e", "k", "j"], 1)]
    operands[1].factors.pop(("e",), None)
    found = multiply(labels, record, operands, ["e", "t", "j"])
    store(labels, record.outputs[0], ["t", "j"], {k: f for k, f in found.items() if "e" not in k})
