"""Take whole residual branches out: of the user's module, and of a captured graph.

In the module form, modules that only a removed branch uses become a `Removed`, which has no
parameters and returns zeros. In the graph form, each sum becomes its skip, and what nothing needs
any more is erased.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateurs.batches import call_model, clone_inputs, in_mode, preserve, tensors
from secateurs.errors import SoundnessError
from secateurs.graph.capture import region_of
from secateurs.graph.flow import Flow
from secateurs.graph.labels import Labels
from secateurs.graph.layers import find_branches
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import interpret
from secateurs.graph.tape import plain_kernels, record_run
from secateurs.graph.zeroing import LAYERS, PRODUCTS, SUMS, aliases, zero_cuts
from secateurs.masks import named_tensors
from secateurs.types import Inputs, Plan

__all__ = [
    "REMOVED",
    "Removed",
    "cut_layers_",
    "drop_tensors_",
    "gone_tensors",
    "removable_modules",
    "remove_modules_",
    "replace_module_",
    "without_layers",
]

MULTIPLY = PRODUCTS | LAYERS | {"scaled_dot_product_attention"}
REMOVED = "removed"
"""Key in the attributes of a `ShrinkInfo`: how many outputs the module at this path had."""


class Removed(nn.Module):
    """Stands for a module whose branch was removed: zeros in the shape of its first input.

    Args:
        n_outputs: 1 for a tensor, above 1 for a tuple of zeros and Nones.

    Example:
        >>> Removed()(torch.ones(2))
        tensor([0., 0.])
    """

    def __init__(self, n_outputs: int = 1) -> None:
        super().__init__()
        self.n_outputs = n_outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(tensors([args, kwargs])[0])
        return zeros if self.n_outputs == 1 else (zeros, *[None] * (self.n_outputs - 1))

    def extra_repr(self) -> str:
        return "" if self.n_outputs == 1 else f"n_outputs={self.n_outputs}"


def gone_tensors(plan: Plan) -> frozenset[str]:
    """Parameters and buffers that go with the removed branches."""
    return frozenset(name for names in plan.layers.values() for name in names)


# -- the module form -------------------------------------------------------------------------


def removable_modules(masked: nn.Module, plan: Plan, inputs: Inputs) -> dict[str, int]:
    """The outermost modules that can become `Removed`: path -> number of outputs.

    All that they hold goes, nothing else needs what they compute, and they return what has the
    shape of what they are given; those without modules in them may return any shape, as what
    follows them is removed as well.

    Args:
        masked: the dense model with zeros for all that is removed.
        plan: what is removed.
        inputs: what to run.
    """
    gone = gone_tensors(plan)
    if not gone:
        return {}
    labels = interpret(record_run(masked, inputs, plan.outputs))
    dead = Flow(labels).dead(_removed_sums(labels, plan).items())
    records = enumerate(labels.tape.records)
    busy = {r.module for n, r in records if n not in dead and not _idle(labels, r)}
    outputs = _fitting_outputs(masked, gone, inputs)
    found: dict[str, int] = {}
    for path, module in masked.named_modules(remove_duplicate=False):
        inside = any(path.startswith(p + ".") for p in found)
        used = any(m == path or m.startswith(path + ".") for m in busy)
        if path and not inside and not used and _only(path, module, gone):
            leaf = not any(named_tensors(c) for c in module.children())
            if path in outputs or leaf:
                found[path] = outputs.get(path, 1)
    return found


def _only(path: str, module: nn.Module, gone: frozenset[str]) -> bool:
    """Whether a module holds tensors, and all of them go."""
    names = [f"{path}.{name}" for name in named_tensors(module)]
    return bool(names) and gone.issuperset(names)


def _fitting_outputs(model: nn.Module, gone: frozenset[str], inputs: Inputs) -> dict[str, int]:
    """How many outputs each module of which all goes has, if the first is like its input."""
    fits: dict[str, bool] = {}
    outputs: dict[str, int] = {}
    handles = []
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or not _only(path, module, gone):
            continue

        def look(_: nn.Module, args: Any, kwargs: Any, made: Any, path: str = path) -> None:
            given = tensors([args, kwargs])[:1]
            parts = made if isinstance(made, tuple) and len(made) > 1 else (made,)
            like = [(t.shape, t.dtype) for t in (*given, parts[0]) if isinstance(t, Tensor)]
            fits[path] = fits.get(path, True) and len(like) == 2 and like[0] == like[1]
            outputs[path] = len(parts)

        handles.append(module.register_forward_hook(look, with_kwargs=True))
    try:
        with ExitStack() as stack:
            for context in (preserve(model), in_mode(model, training=False), plain_kernels(model)):
                stack.enter_context(context)
            stack.enter_context(torch.no_grad())
            call_model(model, clone_inputs(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {path: n for path, n in outputs.items() if fits[path]}


def remove_modules_(
    small: nn.Module,
    plan: Plan,
    paths: Mapping[str, int],
    attributes: dict[str, dict[str, int]],
) -> None:
    """Replace modules, and record it in place of what was recorded of them.

    Raises:
        SoundnessError: parameters of removed branches are left.
    """
    for path, n_outputs in paths.items():
        replace_module_(small, path, n_outputs)
        for other in [p for p in attributes if p == path or p.startswith(path + ".")]:
            del attributes[other]
        attributes[path] = {REMOVED: n_outputs}
    left = sorted(gone_tensors(plan) & {n for n, _ in small.named_parameters()})
    if left:
        raise SoundnessError(
            f"no module holds only what removed layers need of {', '.join(left[:3])}"
            + (" and others" if len(left) > 3 else "")
        )


def without_layers(
    model: nn.Module, plan: Plan, attributes: Mapping[str, Mapping[str, int]], inputs: Inputs
) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of the dense model with the same modules `Removed`, checked operator by operator.

    Where a sum adds zeros and where it adds a removed branch, it is its skip; what is left then
    must be the same calls on the same values.

    Returns:
        The copy, and a note if products of zeros are left, which no budget counts.

    Raises:
        SoundnessError: something else is left.
    """
    if not plan.layers:
        return model, ()
    new = copy.deepcopy(model)
    for path, sizes in attributes.items():
        if REMOVED in sizes:
            replace_module_(new, path, sizes[REMOVED])
    before, after = (interpret(record_run(m, inputs, plan.outputs)) for m in (model, new))
    cuts, sums = zero_cuts(after), {}
    for number, record in enumerate(after.tape.records):
        if record.op in SUMS and len(refs_of := list(refs(record.args))) == 2:
            added = [
                i for i, r in enumerate(refs_of) if cuts.get((record.index, r.id)) == frozenset()
            ]
            if added:
                sums[number] = 1 - added[-1]
    if why := _unlike(before, _removed_sums(before, plan), after, sums):
        raise SoundnessError(f"without the removed layers, the module does something else: {why}")
    dead = Flow(after).dead(sums.items())
    idle = [after.tape.records[n].where for n in dead if after.tape.records[n].op in MULTIPLY]
    more = f"the module form still multiplies zeros of removed layers: {', '.join(sorted(idle))}"
    return new, (more,) if idle else ()


def _removed_sums(labels: Labels, plan: Plan) -> dict[int, int]:
    """Sums of branches whose producers the plan makes zero: number -> position of the skip."""
    masked = {name for name, mask in plan.masks.items() if not bool(mask.any())}
    return {
        number: position
        for unit in find_branches(labels).units
        if {labels.tape.values[i].name for i in unit.producers} <= masked
        for number, position in unit.sums
    }


def _unlike(a: Labels, cut_a: Mapping[int, int], b: Labels, cut_b: Mapping[int, int]) -> str:
    """The first call that differs between what two tapes still need; "" if none does."""
    left = [_needed(labels, cut) for labels, cut in ((a, cut_a), (b, cut_b))]
    if len(left[0]) != len(left[1]):
        return f"{len(left[1])} operator calls are left instead of {len(left[0])}"
    ends = _skipped(a, cut_a), _skipped(b, cut_b)
    same: dict[int, Any] = {}

    def seen(x: Any, labels: Labels, end: Mapping[int, int]) -> Any:
        if isinstance(x, Ref):
            ident = end.get(x.id, x.id)
            value = labels.tape.values[ident]
            stored = value.source in ("parameter", "buffer", "input")
            return value.name if stored else same.get(ident if labels is a else -1 - ident, "?")
        if isinstance(x, (list, tuple)):
            return [seen(i, labels, end) for i in x]
        return x

    for number, (x, y) in enumerate(zip(*left, strict=True)):
        mine, theirs = (
            (r.fn, seen([r.args, list(r.kwargs.items())], labels, end))
            for r, labels, end in ((x, a, ends[0]), (y, b, ends[1]))
        )
        if mine != theirs:
            return str(y.where)
        same.update(dict.fromkeys(x.outputs, number))
        same.update(dict.fromkeys((-1 - o for o in y.outputs), number))
    return ""


def _needed(labels: Labels, sums: Mapping[int, int]) -> list[Record]:
    """What is left and does something."""
    dead = Flow(labels).dead(sums.items())
    records = enumerate(labels.tape.records)
    return [r for n, r in records if n not in dead and n not in sums and not _idle(labels, r)]


def _idle(labels: Labels, record: Record) -> bool:
    """Whether an operator returns what it is given (a conversion to the type that it has)."""
    if record.op not in ("to", "contiguous", "type_as", "detach", "alias"):
        return False
    out, given = (labels.value(i) for i in (record.outputs[0], record.args[0]))
    return (out.shape, out.dtype) == (given.shape, given.dtype)


def _skipped(labels: Labels, sums: Mapping[int, int]) -> dict[int, int]:
    """Value of a replaced sum, or of what returns its argument -> what it is instead."""
    instead: dict[int, int] = {}
    for number, record in enumerate(labels.tape.records):
        if number in sums or _idle(labels, record):
            given = record.args[sums.get(number, 0)].id
            instead[record.outputs[0]] = instead.get(given, given)
    return instead


def replace_module_(model: nn.Module, path: str, n_outputs: int) -> None:
    """Put a `Removed` in place of a module."""
    home, _, name = path.rpartition(".")
    new = Removed(n_outputs)
    new.training = model.get_submodule(path).training
    model.get_submodule(home)._modules[name] = new


# -- the graph form --------------------------------------------------------------------------


def cut_layers_(tree: nn.Module, graph: fx.Graph, labels: Labels, plan: Plan) -> None:
    """Replace the sums of removed branches by their skips and erase what nothing needs, in place.

    Args:
        tree: holds what the graph refers to.
        graph: a copy of the captured one, with the same node names.
        labels: of the captured one.
        plan: what is removed.

    Raises:
        SoundnessError: a branch lies inside a region, or is not found in this capture.
    """
    if not plan.layers:
        return
    records = labels.tape.records
    skips = _removed_sums(labels, plan)
    nodes = {node.name: node for node in graph.nodes}
    flow = Flow(labels)
    dead = flow.dead(skips.items())
    root = aliases(labels.tape)
    written = {root.get(r.args[0].id, r.args[0].id) for r in records if _writes(r)}
    for number, position in skips.items():
        record = records[number]
        if record.name not in nodes:
            raise SoundnessError(f"{record.where} is inside a region that is captured as a whole")
        node = nodes[record.name]
        skip = node.args[position]
        assert isinstance(skip, fx.Node)
        ends = {root.get(i, i) for i in (record.outputs[0], record.args[position].id)}
        if ends & written and not (record.inplace and position == 0):
            with graph.inserting_before(node):  # what writes to one must not change the other
                skip = graph.call_function(torch.ops.aten.clone.default, (skip,))
            skip.meta = dict(node.meta)
        node.replace_all_uses_with(skip)
    _erase(tree, graph, {records[n].name for n in (*dead, *skips)} | _counters(graph, plan))


def _counters(graph: fx.Graph, plan: Plan) -> set[str]:
    """Nodes that write to a buffer that goes (the batch counters of norms, in train mode)."""
    gone, found = gone_tensors(plan), set()
    for node in graph.nodes:
        first = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(first, fx.Node) and (
            first.name in found or (first.op == "get_attr" and first.target in gone)
        ):
            found.add(node.name)
    return found


def _writes(record: Any) -> bool:
    return bool(record.inplace and record.args and hasattr(record.args[0], "id"))


def _erase(tree: nn.Module, graph: fx.Graph, dead: set[str]) -> None:
    """Erase nodes that nothing uses: dead records, and what has no effect."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        schema = getattr(node.target, "_schema", None)
        plain = node.op == "get_attr" or (schema is not None and not schema.is_mutable)
        own = (region := region_of(node, tree)) is not None and any(
            name.startswith(region[0] + "/") for name in dead
        )
        if plain or own or node.name in dead or not node.is_impure():
            graph.erase_node(node)
    graph.lint()


def drop_tensors_(tree: nn.Module, graphs: Mapping[str, fx.Graph], plan: Plan) -> None:
    """Take out the tensors of removed branches.

    Raises:
        SoundnessError: a graph still uses one.
    """
    gone = gone_tensors(plan)
    used = {str(n.target) for g in graphs.values() for n in g.nodes if n.op == "get_attr"}
    if left := sorted(gone & used):
        raise SoundnessError(
            f"in this capture {left[0]} is used by more than the removed layers: was the plan "
            "made for another model or with other example inputs?"
        )
    for name in gone & set(named_tensors(tree)):
        home, _, attribute = name.rpartition(".")
        owner = tree.get_submodule(home)
        (owner._parameters if attribute in owner._parameters else owner._buffers).pop(attribute)
