"""The graph form: the captured operators, rewritten for the smaller sizes.

It works even where the user's Python code has sizes written into it. Parameters keep their names;
train and eval mode are two graphs over the same parameters; the batch size stays dynamic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from secateurs.batches import batch_size
from secateurs.errors import PruningError, SoundnessError
from secateurs.graph.capture import export_module, is_free, tape_of
from secateurs.graph.labels import Labels
from secateurs.graph.rules import interpret
from secateurs.masks import named_tensors
from secateurs.surgery.slicing import Kept, kept_groups, slice_module_
from secateurs.types import Inputs

__all__ = ["Captured", "PrunedGraph", "graph_form", "in_float64"]

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Captured:
    """The graphs of a `PrunedGraph`, "eval" and perhaps "train", and how they are called."""

    graphs: Mapping[str, fx.Graph]
    forwards: Mapping[str, Callable[..., Any]]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    notes: tuple[str, ...] = ()


class PrunedGraph(nn.Module):
    """A model that runs captured graphs over its own parameters.

    All attributes but one are the parameters, buffers and children of the original, whatever
    their names.

    Attributes:
        secateurs_captured: the graphs, and what they cannot do.
    """

    def __init__(
        self, tree: nn.Module, graphs: Mapping[str, fx.GraphModule], notes: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        for name, tensor in tree._parameters.items():
            self.register_parameter(name, tensor)
        for name, buffer in tree._buffers.items():
            persistent = name not in tree._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        for name, child in tree._modules.items():
            self.add_module(name, child)
        into, out = graphs["eval"]._in_spec, graphs["eval"]._out_spec
        assert into is not None
        assert out is not None
        self._in_spec, self._out_spec = into, out  # read by the generated code
        self.secateurs_captured = Captured(
            {mode: g.graph for mode, g in graphs.items()},
            {mode: type(g).forward for mode, g in graphs.items()},
            into,
            out,
            notes,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forwards = self.secateurs_captured.forwards
        mode = "train" if self.training and "train" in forwards else "eval"
        return forwards[mode](self, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedGraph:
        new = PrunedGraph.__new__(PrunedGraph)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            shared = key in ("secateurs_captured", "_in_spec", "_out_spec")
            new.__dict__[key] = value if shared else copy.deepcopy(value, memo)
        return new


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64; a graph form has precisions written into it, which follow."""
    wide = copy.deepcopy(model).double()
    if isinstance(wide, PrunedGraph):
        graph = fx.Graph()
        narrow = wide.secateurs_captured.graphs["eval"]
        graph.set_codegen(narrow._codegen)
        made: dict[fx.Node, fx.Node] = {}
        for node in narrow.nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
            made[node].args = pytree.tree_map(_widest, made[node].args)
            made[node].kwargs = pytree.tree_map(_widest, made[node].kwargs)
        forwards = {"eval": type(fx.GraphModule(wide, graph)).forward}
        wide.secateurs_captured = replace(wide.secateurs_captured, forwards=forwards)
    return wide


def _widest(x: Any) -> Any:
    """float64 for any floating-point type, everything else as it is."""
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def graph_form(model: nn.Module, kept: Kept, example_inputs: Inputs) -> PrunedGraph:
    """Capture `model`, slice it to `kept` and rewrite sizes; parameters are new, sliced copies.

    Raises:
        CaptureError: eval mode cannot be captured.
        SoundnessError: the plan does not fit the captured graph.
    """
    graphs = {"eval": _rewritten(model, kept, example_inputs, training=False)}
    notes = _fixed_batch(graphs["eval"], example_inputs)
    try:
        graphs["train"] = _rewritten(model, kept, example_inputs, training=True)
    except PruningError as error:
        notes += (f"eval only, so dropout and batch norm rest in train mode: {error}",)
    tree = graphs["eval"]
    if "train" in graphs:
        _share(tree, graphs["train"], set(named_tensors(model)))
    slice_module_(tree, _present(tree, kept))
    result = PrunedGraph(tree, graphs, notes)
    result.train(model.training)
    return result


def _fixed_batch(module: fx.GraphModule, example_inputs: Inputs) -> tuple[str, ...]:
    """A note where the captured batch size is a number."""
    found = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    sizes = [t.shape[0] for t in found if isinstance(t, torch.Tensor) and t.dim()]
    if not sizes or any(is_free(size) for size in sizes):
        return ()
    n = batch_size(example_inputs)
    hint = "pass an example of two samples or more" if n == 1 else "it is written into the code"
    return (f"the batch size is fixed to {n}: {hint}",)


def _present(tree: nn.Module, kept: Kept) -> dict[str, Mapping[int, torch.Tensor]]:
    """The entries of the plan that this graph holds (an unused parameter is not captured)."""
    names = named_tensors(tree)
    return {name: dims for name, dims in kept.items() if name in names}


def _share(tree: nn.Module, other: fx.GraphModule, original: set[str]) -> None:
    """Add to `tree` what only the other mode's graph holds; its own constants get new names."""
    have = named_tensors(tree)
    for name, tensor in named_tensors(other).items():
        if name not in original and name in have:
            for node in other.graph.nodes:
                if node.op == "get_attr" and node.target == name:
                    node.target = name + "_train"
            name += "_train"
        if name in have:
            continue
        path, _, attribute = name.rpartition(".")
        own = tree
        for part in filter(None, path.split(".")):
            if part not in own._modules:
                own.add_module(part, nn.Module())
            own = own.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            own.register_parameter(attribute, tensor)
        else:
            own.register_buffer(attribute, tensor, persistent=name in original)
    other.recompile()


def _rewritten(
    model: nn.Module, kept: Kept, example_inputs: Inputs, *, training: bool
) -> fx.GraphModule:
    """Capture one mode and rewrite its sizes; its parameters are still the dense ones."""
    module = export_module(model, example_inputs, training=training)
    tape, ids = tape_of(module, model, example_inputs)
    labels = interpret(tape)
    removed = removed_atoms(labels, kept)
    rewriter = _Rewriter(labels, ids, removed, kept)
    for node in list(module.graph.nodes):
        rewriter.visit(node)
    module.graph.lint()
    module.recompile()
    return module


def removed_atoms(labels: Labels, kept: Kept) -> BoolArray:
    """Which atoms go when only `kept` stays: whole components, consistent with the plan.

    Raises:
        SoundnessError: the plan cuts a component in two, or one that is pinned.
    """
    component, pinned, _ = labels.solve()
    removed = np.zeros(labels.n_atoms, dtype=bool)
    for axis in labels.axes:
        if axis.stored and axis.dim in kept.get(axis.name, {}):
            mask = np.ones(axis.size, dtype=bool)
            mask[kept[axis.name][axis.dim].numpy()] = False
            removed[axis.offset : axis.offset + axis.size] = mask
    gone = np.zeros(labels.n_atoms, dtype=bool)
    gone[component[removed]] = True
    whole: BoolArray = gone[component]
    for axis in labels.axes:
        span = slice(axis.offset, axis.offset + axis.size)
        if axis.stored and not np.array_equal(whole[span], removed[span]):
            raise SoundnessError(
                f"the plan does not remove dimension {axis.dim} of {axis.name} together with what "
                "depends on it: was it made for another model or with other example inputs?"
            )
    if gone[pinned].any():
        raise SoundnessError("the plan removes something that is left whole in this capture")
    return whole


class _Rewriter:
    """Rewrites the sizes in one graph, node by node."""

    def __init__(
        self,
        labels: Labels,
        ids: Mapping[str, int | tuple[int, ...]],
        removed: BoolArray,
        kept: Kept,
    ) -> None:
        self.labels, self.ids, self.removed, self.kept = labels, ids, removed, kept

    def ident(self, node: Any) -> int:
        """The value that a node makes."""
        found = self.ids[node.name]
        assert isinstance(found, int)
        return found

    def keep(self, node: Any, dim: int) -> BoolArray | None:
        """Which positions of a dimension stay; None when all do."""
        ident = node if isinstance(node, int) else self.ident(node)
        factor = self.labels.on(ident, dim)
        if factor is None:
            return None
        at = factor.dims.index(dim % len(self.labels.value(ident).shape))
        stays = ~self.removed[factor.labels]
        others = tuple(i for i in range(stays.ndim) if i != at)
        along = np.asarray(stays.any(axis=others), dtype=np.bool_)
        return None if along.all() else along

    def visit(self, node: fx.Node) -> None:
        if node.op != "call_function":
            return
        name = str(getattr(getattr(node.target, "_schema", None), "name", ""))
        op = name.split("::")[-1].rstrip("_") if name else ""
        if name.split("::")[-1].startswith("_assert") and not node.users:
            node.graph.erase_node(node)
        elif (handler := HANDLERS.get(op)) is not None:
            handler(self, node)

    def fail(self, node: fx.Node, why: str) -> SoundnessError:
        return SoundnessError(f"cannot rewrite {node.name}: {why}")


def _sizes(argument: int) -> Callable[[_Rewriter, fx.Node], None]:
    """Operators that take the sizes of their output as a list."""

    def handler(self: _Rewriter, node: fx.Node) -> None:
        args: list[Any] = list(node.args)
        sizes = list(args[argument])
        shift = args[1] % len(args[0].meta["val"].shape) if argument == 2 else 0
        for i, size in enumerate(sizes):
            keep = self.keep(node, i + shift)
            if keep is not None and not (isinstance(size, int) and size == -1):
                sizes[i] = int(keep.sum())  # also where the model computes the dense size
        node.update_arg(argument, sizes)

    return handler


def _split(self: _Rewriter, node: fx.Node) -> None:
    args: list[Any] = list(node.args)
    dim = args[2] if len(args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    if self.keep(args[0], dim) is None:
        return
    outputs = self.ids[node.name]
    assert isinstance(outputs, tuple)
    counts = []
    for out in outputs:
        keep = self.keep(out, dim)
        counts.append(self.labels.value(out).shape[dim] if keep is None else int(keep.sum()))
    node.target = torch.ops.aten.split_with_sizes.default
    node.args = (args[0], counts, dim)
    node.kwargs = {}


def _bounds(self: _Rewriter, node: fx.Node) -> None:
    """Slice, narrow and select: an index becomes the number of positions kept before it."""
    args: list[Any] = list(node.args)
    keep = self.keep(args[0], args[1] if len(args) > 1 else 0)
    if keep is None:
        return
    narrow = "narrow" in str(node.target)
    if narrow:
        args[3] = args[2] + args[3] if args[2] >= 0 else len(keep) + args[2] + args[3]
    for position in (2, 3):
        if position >= len(args) or args[position] is None:
            continue
        bound = args[position]
        if not isinstance(bound, int):
            raise self.fail(node, "its bounds are computed at run time")
        bound = max(0, bound + len(keep)) if bound < 0 else min(bound, len(keep))
        args[position] = int(keep[:bound].sum())
    if narrow:
        args[3] -= args[2]
    node.args = tuple(args)


def _squeeze(self: _Rewriter, node: fx.Node) -> None:
    """Name the dimensions that are squeezed: one that has shrunk to a single unit stays."""
    shape = self.labels.value(self.ident(node.args[0])).shape
    given = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims = [int(d) % len(shape) for d in np.atleast_1d(np.asarray(given))]
    if any(self.keep(node.args[0], d) is not None for d in dims):
        node.target = torch.ops.aten.squeeze.dims
        node.args = (node.args[0], [d for d in dims if shape[d] == 1])


def _groups(self: _Rewriter, node: fx.Node) -> None:
    args: list[Any] = list(node.args)
    if len(args) <= 6 or args[6] == 1:
        return
    rows = self.keep(args[1], 0)
    if rows is not None:
        groups = kept_groups(torch.from_numpy(np.flatnonzero(rows)), len(rows), args[6])
        node.update_arg(6, groups)


HANDLERS: dict[str, Callable[[_Rewriter, fx.Node], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand"), _sizes(1)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _sizes(1)),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _sizes(0)),
    "unflatten": _sizes(2),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _split),
    "slice": _bounds,
    "narrow": _bounds,
    "squeeze": _squeeze,
    "select": _bounds,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups),
}
"""How sizes written into a captured operator follow the cut."""
