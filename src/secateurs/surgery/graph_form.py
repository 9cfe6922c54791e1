"""The graph form: the captured operators, rewritten for the smaller sizes.

It works even where the user's Python code has sizes written into it. Parameters keep their names;
train and eval mode are two graphs over the same parameters; the batch size stays dynamic, and the
length of sequences where the model lets it.

    Captures.of(model, example_inputs)        once: both modes, dense
    graph_form(captures, plan) -> PrunedGraph for each plan
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from secateurs.batches import clone_inputs
from secateurs.errors import CaptureError, PruningError, SoundnessError
from secateurs.graph.capture import Ids, export_module, matters, output_leaves, tape_of
from secateurs.graph.commute import LabelSizes, failing_moves
from secateurs.graph.labels import OPTIONS, Labels, Options
from secateurs.graph.rules import interpret
from secateurs.masks import apply_masks_, named_tensors
from secateurs.surgery.layers import cut_layers_, drop_tensors_
from secateurs.surgery.rewriter import Analysis, removed_atoms, rewrite_
from secateurs.surgery.slicing import slice_module_
from secateurs.types import Inputs, Plan

__all__ = [
    "Captured",
    "Captures",
    "PrunedGraph",
    "copied_tree",
    "duplicate",
    "flat_inputs",
    "graph_form",
    "in_float64",
    "region_module",
    "set_graphs_",
    "specs_of",
]


Sizes = tuple[tuple[int | None, ...], ...]
"""For each input leaf the size of each dimension, None where any will do; () for no tensor."""


@dataclass(frozen=True)
class Captured:
    """The graphs of a `PrunedGraph`, "eval" and perhaps "train", and how they are called.

    Attributes:
        sizes: those of the inputs; the graphs are wrong for others.
    """

    graphs: Mapping[str, fx.Graph]
    forwards: Mapping[str, Callable[..., Any]]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    notes: tuple[str, ...] = ()
    sizes: Sizes = ()


class PrunedGraph(nn.Module):
    """A model that runs captured graphs over its own parameters.

    All attributes but one are the parameters, buffers and children of the original, whatever
    their names, and the graphs of its regions.

    Attributes:
        secateurs_captured: the graphs, and what they cannot do.
    """

    def __init__(
        self,
        tree: nn.Module,
        graphs: Mapping[str, fx.Graph],
        notes: tuple[str, ...] = (),
        sizes: Sizes = (),
    ) -> None:
        super().__init__()
        for name, tensor in tree._parameters.items():
            self.register_parameter(name, tensor)
        for name, buffer in tree._buffers.items():
            persistent = name not in tree._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        for name, child in tree._modules.items():
            self.add_module(name, child)
        self._in_spec, self._out_spec = specs_of(graphs["eval"])  # read by the generated code
        self.secateurs_captured = Captured({}, {}, self._in_spec, self._out_spec, notes, sizes)
        set_graphs_(self, graphs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_sizes(args, kwargs)
        forwards = self.secateurs_captured.forwards
        mode = "train" if self.training and "train" in forwards else "eval"
        return forwards[mode](self, *args, **kwargs)

    def _check_sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sizes that are numbers in the graphs: others would give wrong results, or odd errors."""
        sizes = self.secateurs_captured.sizes
        order = self._in_spec.children()[1].context
        if not sizes or set(order or ()) != set(kwargs):
            return  # the call itself says what is wrong
        leaves = pytree.tree_leaves((args, {name: kwargs[name] for name in order or ()}))
        if len(leaves) != len(sizes):
            return
        for number, (leaf, known) in enumerate(zip(leaves, sizes, strict=True)):
            shape = leaf.shape if isinstance(leaf, torch.Tensor) else ()
            for dim, (size, wanted) in enumerate(zip(shape, known, strict=False)):
                if wanted is not None and size != wanted:
                    raise CaptureError(
                        f"input {number} has size {int(size)} along dimension {dim}; this graph "
                        f"form was captured with {wanted} there, which is written into it. Use "
                        "the module form, or shrink with example inputs of that size"
                    )

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedGraph:
        new = PrunedGraph.__new__(PrunedGraph)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            shared = key in ("secateurs_captured", "_in_spec", "_out_spec")
            new.__dict__[key] = value if shared else copy.deepcopy(value, memo)
        return new


def set_graphs_(model: PrunedGraph, graphs: Mapping[str, fx.Graph]) -> None:
    """Run these graphs, over the tensors that the model holds."""
    forwards = {mode: type(fx.GraphModule(model, g)).forward for mode, g in graphs.items()}
    model.secateurs_captured = replace(
        model.secateurs_captured, graphs=dict(graphs), forwards=forwards
    )


def specs_of(graph: fx.Graph) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
    """The nesting of inputs and of outputs."""
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    assert codegen.pytree_info.out_spec is not None
    return codegen.pytree_info.in_spec, codegen.pytree_info.out_spec


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64; a graph form has precisions written into it, which follow."""
    wide = copy.deepcopy(model).double()
    if isinstance(wide, PrunedGraph):
        for module in wide.modules():
            if isinstance(module, fx.GraphModule):  # the graph of a region: a copy already
                for node in module.graph.nodes:
                    _widen_(node)
                module.recompile()
        graph = duplicate(wide.secateurs_captured.graphs["eval"])
        for node in graph.nodes:
            _widen_(node)
        set_graphs_(wide, {"eval": graph})
    return wide


def _widen_(node: fx.Node) -> None:
    node.args = pytree.tree_map(_widest, node.args)
    node.kwargs = pytree.tree_map(_widest, node.kwargs)


def _widest(x: Any) -> Any:
    """float64 for any floating-point type, everything else as it is."""
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


# -- capturing -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Captures:
    """A model captured in both modes, dense, for any number of plans.

    Attributes:
        model: as given; the graphs are over its own tensors.
        graphs: "eval" and, where it can be captured, "train".
        example_inputs: as captured.
        notes: what the captures cannot do.
    """

    model: nn.Module
    graphs: Mapping[str, fx.GraphModule]
    example_inputs: Inputs
    notes: tuple[str, ...] = ()
    _analyses: dict[Any, tuple[Labels, Ids]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs) -> Captures:
        """Capture a model.

        Raises:
            CaptureError: eval mode cannot be captured.
        """
        graphs = {"eval": export_module(model, example_inputs, training=False)}
        notes: tuple[str, ...] = ()
        try:
            graphs["train"] = export_module(model, example_inputs, training=True)
        except PruningError as error:
            notes += (_eval_only(error),)
        return cls(model, graphs, example_inputs, notes)

    def analysis(self, mode: str, plan: Plan) -> Analysis:
        """Labels of one mode, and what a plan removes of them.

        Raises:
            SoundnessError: the plan does not fit the captured graph.
        """
        problem: SoundnessError | None = None
        for options in OPTIONS:  # as the plan's graph was traced
            try:
                labels, ids = self._labels(mode, plan.outputs, options)
                removed = removed_atoms(labels, plan.kept)
            except SoundnessError as error:
                problem = problem or error
                continue
            if failing := failing_moves(labels, removed):
                record, why = failing[0]
                raise SoundnessError(f"cutting does not commute with {record.where}: {why}")
            return Analysis(ids, LabelSizes(labels, removed))
        assert problem is not None
        raise problem

    def _labels(self, mode: str, outputs: tuple[str, ...], options: Options) -> tuple[Labels, Ids]:
        key = (mode, outputs, options)
        if key not in self._analyses:
            module = fx.GraphModule(self.graphs[mode], self.graph(mode, outputs))
            tape, ids = tape_of(module, self.model, self.example_inputs, outputs)
            self._analyses[key] = interpret(tape, options), ids
        return self._analyses[key]

    def graph(self, mode: str, outputs: tuple[str, ...] = ()) -> fx.Graph:
        """A copy of a dense graph; outputs that are neither named nor on the way to those are None
        (what they are computed from may lose different units)."""
        graph = duplicate(self.graphs[mode].graph)
        if outputs:
            leaves, wanted = output_leaves(graph, outputs)
            needed = {leaves[i] for i in wanted}
            for node in reversed(graph.nodes):
                if node in needed or (node.op == "call_function" and matters(node)):
                    needed |= set(node.all_input_nodes)
            last = next(iter(reversed(graph.nodes)))
            last.args = (tuple(x if x in needed else None for x in leaves),)
            graph.eliminate_dead_code(is_impure_node=matters)
        return graph


def _eval_only(error: PruningError) -> str:
    return f"eval only, so dropout and batch norm rest in train mode: {error}"


def flat_inputs(graph: fx.Graph, inputs: Inputs) -> list[Any]:
    """Copies of the inputs, in the order of the graph's placeholders."""
    inputs = clone_inputs(inputs)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, dict):
        order = specs_of(graph)[0].children()[1].context
        kwargs = {name: inputs[name] for name in order}
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return pytree.tree_leaves((args, kwargs))


# -- one plan --------------------------------------------------------------------------------


def graph_form(captures: Captures, plan: Plan) -> PrunedGraph:
    """Slice what a plan keeps out of a captured model and rewrite sizes; its tensors are new.

    Raises:
        SoundnessError: the plan does not fit the captured graph.
    """
    memo: dict[int, Any] = {}
    notes = captures.notes
    tree = copied_tree(captures.graphs["eval"], memo)
    eval_graph = captures.graph("eval", plan.outputs)
    analysis = captures.analysis("eval", plan)
    cut_layers_(tree, eval_graph, analysis.sizes.labels, plan)
    rewrite_(tree, eval_graph, analysis)
    graphs = {"eval": eval_graph}
    if "train" in captures.graphs:
        other = copied_tree(captures.graphs["train"], memo)
        train_graph = captures.graph("train", plan.outputs)
        try:
            analysis = captures.analysis("train", plan)
            cut_layers_(other, train_graph, analysis.sizes.labels, plan)
            rewrite_(other, train_graph, analysis)
        except PruningError as error:
            notes += (_eval_only(error),)
        else:
            _share(tree, other, train_graph, set(named_tensors(captures.model)))
            graphs["train"] = train_graph
    drop_tensors_(tree, graphs, plan)
    names = named_tensors(tree)  # an unused parameter is not captured
    apply_masks_(tree, {name: mask for name, mask in plan.masks.items() if name in names})
    slice_module_(tree, {name: dims for name, dims in plan.kept.items() if name in names})
    result = PrunedGraph(tree, graphs, notes)
    result.train(captures.model.training)
    return result


def duplicate(graph: fx.Graph) -> fx.Graph:
    """The same nodes, under the same names."""
    new = fx.Graph()
    new.set_codegen(graph._codegen)  # nestings of inputs and outputs: constants
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = new.node_copy(node, made.__getitem__)
    return new


def region_module(tree: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph of a region over its own constants, which are not part of any state dict."""
    module = fx.GraphModule(tree, graph)
    module._non_persistent_buffers_set.update(module._buffers)
    return module


def copied_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of all tensors and regions below a module; tensors copied before come from `memo`."""
    tree = nn.Module()
    for name, tensor in module._parameters.items():
        tree.register_parameter(name, copy.deepcopy(tensor, memo))
    for name, buffer in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        tree.register_buffer(name, copy.deepcopy(buffer, memo), persistent=persistent)
    for name, child in module._modules.items():
        if isinstance(child, fx.GraphModule):
            tree.add_module(name, region_module(copied_tree(child, memo), duplicate(child.graph)))
        elif child is not None:
            tree.add_module(name, copied_tree(child, memo))
    return tree


def _share(tree: nn.Module, other: nn.Module, graph: fx.Graph, original: set[str]) -> None:
    """Add to `tree` what only the other mode's graph holds; its own constants and regions get new
    names."""
    have = named_tensors(tree)
    for name, tensor in named_tensors(other).items():
        if name not in original and name in have:
            _rename(graph, name, name + "_train")
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
    for name, child in other._modules.items():
        if isinstance(child, fx.GraphModule):
            new = name + "_train" if name in tree._modules else name
            _rename(graph, name, new)
            tree.add_module(new, child)


def _rename(graph: fx.Graph, old: str, new: str) -> None:
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == old:
            node.target = new
