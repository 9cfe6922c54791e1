"""Rule for attention: two products with a softmax between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from secateurs.graph.labels import Factor, Labels
from secateurs.graph.products import PAIRED, Operand, multiply, operand_of, store
from secateurs.graph.records import Record, Ref
from secateurs.graph.rules import rule

__all__: list[str] = []


@rule("scaled_dot_product_attention")
def _attention(labels: Labels, record: Record) -> None:
    """(..., heads, length, size): scores over the size, softmax, values over the key length."""
    q, k, v = record.args[:3]
    mask = record.args[3] if len(record.args) > 3 else record.kwargs.get("attn_mask")
    rank = len(labels.value(q).shape)
    lead = [f"b{rank - i}" for i in range(rank - 2)]
    query = operand_of(labels, q, [*lead, "l", "e"], 0)
    key = operand_of(labels, k, [*lead, "s", "e"], 1)
    value = operand_of(labels, v, [*lead, "s", "v"], 2)
    if record.kwargs.get("enable_gqa"):
        for side in (key, value):
            _repeat_heads(labels, side, labels.value(q).shape[-3], lead[-1])
    for side, dim in ((query, "l"), (key, "s"), (value, "s")):
        for letters in [f for f in side.factors if dim in f]:
            labels.pin(side.factors.pop(letters).labels, "a softmax runs over it", record.where)
    scores = multiply(labels, record, [query, key], [*lead, "l", "s"])
    scores = {k: replace(f, z=False) for k, f in scores.items()}
    sizes = [*labels.value(q).shape[:-1], labels.value(k).shape[-2]]
    if isinstance(mask, Ref):
        _masked(labels, record, scores, sizes, [*lead, "l", "s"], mask)
    weights = Operand(tuple(sizes), (*lead, "l", "s"), scores)
    found = multiply(labels, record, [weights, value], [*lead, "l", "v"])
    store(labels, record.outputs[0], [*lead, "l", "v"], found)


def _repeat_heads(labels: Labels, side: Operand, heads: int, letter: str) -> None:
    """Each head of keys and values serves several heads of queries."""
    at = side.letters.index(letter)
    times = heads // side.shape[at]
    if times == 1:
        return
    side.shape = (*side.shape[:at], heads, *side.shape[at + 1 :])
    for key in [k for k in side.factors if letter in k]:
        factor = side.factors.pop(key)
        if len(key) > 1:
            assert side.ref is not None
            factor = labels.narrow(side.ref, factor, [at])
            labels.heads.append((factor.labels, "head"))
        side.factors[(letter,)] = replace(factor, labels=np.repeat(factor.labels, times))
    side.ref = None


def _masked(
    labels: Labels,
    record: Record,
    scores: dict[tuple[str, ...], Factor],
    sizes: Sequence[int],
    letters: Sequence[str],
    mask: Ref,
) -> None:
    """A mask or bias added to the scores: heads that it tells apart must be its own, too."""
    shape = labels.value(mask).shape
    names = letters[len(letters) - len(shape) :]
    held = {names[f.dims[0]]: f for f in labels.factors(mask) if len(f.dims) == 1}
    for f in labels.factors(mask):
        if len(f.dims) > 1:
            labels.pin(f.labels, PAIRED, record.where)
    for letter, n in zip(names, shape, strict=True):
        own, there = held.get(letter), scores.get((letter,))
        if n == 1:
            continue
        if own is not None and there is not None:
            labels.tie(own.labels, there.labels, "its mask is fixed", record.where)
        elif there is not None:
            labels.pin(there.labels, PAIRED, record.where)
        elif own is not None:
            labels.pin(own.labels, PAIRED, record.where)
