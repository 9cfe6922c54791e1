"""Which sizes of its inputs a graph form leaves free, and whether it is right at other sizes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateurs.batches import batch_size
from secateurs.errors import PruningError
from secateurs.graph.capture import is_free
from secateurs.surgery.graph_form import Captures, PrunedGraph, Sizes, flat_inputs, specs_of
from secateurs.surgery.verification import difference
from secateurs.types import Inputs

__all__ = ["fixed_sizes", "input_sizes", "other_sizes"]

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}


def fixed_sizes(module: fx.GraphModule, example_inputs: Inputs) -> tuple[str, ...]:
    """Notes on the batch size, and the lengths of integer inputs, that are numbers in a capture."""
    found = [(n.name, n.meta.get("val")) for n in module.graph.nodes if n.op == "placeholder"]
    shapes = [(name, t) for name, t in found if isinstance(t, Tensor) and t.dim()]
    if not shapes:
        return ()
    if not any(is_free(t.shape[0]) for _, t in shapes):
        n = batch_size(example_inputs)
        hint = "pass an example of two samples or more" if n == 1 else "it is written into the code"
        return (f"the batch size is fixed to {n}: {hint}",)
    return tuple(
        f"the size of input {name} is fixed to {size} along dimension {dim}"
        for name, t in shapes
        for dim, size in enumerate(t.shape)
        if dim and not is_free(size) and size > 1 and not t.is_floating_point()
    )


def input_sizes(
    masked: nn.Module, small: PrunedGraph, captures: Captures, names: tuple[str, ...] = ()
) -> Sizes:
    """Sizes that a graph form insists on: numbers in the capture, unless others prove to work.

    A length is tried with one step less and one more, an image with twice its sides: where the
    masked model runs and the small one equals it each time, the size is free.
    """
    graph = captures.graphs["eval"].graph
    metas = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]
    sizes = [
        [None if is_free(s) else int(s) for s in m.shape] if isinstance(m, Tensor) else []
        for m in metas
    ]
    leaves = flat_inputs(graph, captures.example_inputs)
    limit = LIMITS.get(next((p.dtype for p in masked.parameters()), torch.float32), 0.05)
    tried: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, shape in enumerate(sizes):
        for d, size in enumerate(shape):
            image = len(shape) > 3
            if size is not None and size > 2 and (d >= 2 if image else d == 1):
                tried[-len(shape) if image else size].append((i, d))
    for key, places in tried.items():
        changes = (0,) if key < 0 else (-1, 1)
        if all(_same_at(masked, small, graph, leaves, places, c, names, limit) for c in changes):
            for i, d in places:
                sizes[i][d] = None
    return tuple(tuple(shape) for shape in sizes)


def _same_at(
    masked: nn.Module,
    small: PrunedGraph,
    graph: fx.Graph,
    leaves: list[Any],
    places: list[tuple[int, int]],
    change: int,
    names: tuple[str, ...],
    limit: float,
) -> bool:
    """Whether the two models agree at another size: one less, one more, or (0) twice as much."""
    changed = list(leaves)
    for i, d in places:
        x = changed[i]
        if change < 0:
            changed[i] = x.narrow(d, 0, x.shape[d] - 1)
        else:
            changed[i] = torch.cat([x, x.narrow(d, 0, 1) if change else x], d)
    inputs = _inputs(graph, changed)
    try:
        return difference(masked, small, inputs, names) <= limit
    except PruningError:
        return False


def other_sizes(
    masked: nn.Module, small: PrunedGraph, captures: Captures, names: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Compare the two models at one more size of every free dimension; notes where they differ.

    Sizes that the masked model itself refuses say nothing.
    """
    limit = LIMITS.get(next((p.dtype for p in masked.parameters()), torch.float32), 0.05)
    notes = []
    for what, inputs in _variants(captures):
        try:
            difference(masked, masked, inputs, names)
        except PruningError:
            continue
        try:
            error = difference(masked, small, inputs, names)
        except PruningError as refusal:
            notes.append(f"sizes are fixed: with {what}, {refusal}")
        else:
            if not error <= limit:
                notes.append(
                    f"use it with sizes as in the example only: with {what}, outputs differ by "
                    f"{error:.1e}, because the model's Python code depends on sizes"
                )
    return tuple(notes)


def _variants(captures: Captures) -> list[tuple[str, Inputs]]:
    """Example inputs with one free size changed: one sample more, or one step less."""
    graph = captures.graphs["eval"].graph
    leaves = flat_inputs(graph, captures.example_inputs)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, node in enumerate(placeholders):
        meta = node.meta.get("val")
        for dim, size in enumerate(meta.shape if isinstance(meta, Tensor) else ()):
            if is_free(size):
                places[str(size.node.expr)].append((i, dim))  # type: ignore[attr-defined]
    variants = []
    for where in places.values():
        size = leaves[where[0][0]].shape[where[0][1]]
        batch = any(dim == 0 for _, dim in where)
        if not batch and size <= 2:
            continue
        changed = list(leaves)
        for i, dim in where:
            x = changed[i]
            less = x.narrow(dim, 0, size - 1)
            changed[i] = torch.cat([x, x.narrow(dim, 0, 1)], dim) if batch else less
        text = f"{size + 1} samples" if batch else f"{size - 1} steps instead of {size}"
        variants.append((text, _inputs(graph, changed)))
    return variants


def _inputs(graph: fx.Graph, leaves: list[Any]) -> Inputs:
    args, kwargs = pytree.tree_unflatten(leaves, specs_of(graph)[0])
    found: Inputs = dict(kwargs) if kwargs else tuple(args)
    return found
