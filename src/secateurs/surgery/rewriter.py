"""Rewrites the nodes of a captured graph for what stays (how: see `graph.rewriting`)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from secateurs.errors import SoundnessError
from secateurs.graph.capture import Ids, region_of
from secateurs.graph.commute import LabelSizes
from secateurs.graph.labels import Labels
from secateurs.graph.rewriting import (
    BoolArray,
    Call,
    CannotRewrite,
    Positions,
    Scaled,
    SizeOf,
    rewritten,
)
from secateurs.graph.tape import operator_facts
from secateurs.surgery.slicing import Kept, owner_of, set_tensor_

__all__ = ["DENSE", "Analysis", "removed_atoms", "rewrite_"]

DENSE = "secateurs_dense"
"""Key in the meta of a node whose name is not that of the dense node with its value: that name, or
"" for none."""
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Analysis:
    """The values of graph nodes, and what stays of each."""

    ids: Ids
    sizes: LabelSizes


def removed_atoms(labels: Labels, kept: Kept) -> BoolArray:
    """Which atoms go when only `kept` stays: whole components, consistent with the plan.

    Raises:
        SoundnessError: the plan cuts a component in two, or one that is pinned.
    """
    component, pins = labels.solve()
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
    held = np.flatnonzero(gone & (pins.of >= 0))
    if len(held):
        pin = pins[int(held[0])]
        axis = next(a for a in labels.axes if held[0] in component[a.offset : a.offset + a.size])
        raise SoundnessError(
            f"the plan removes something that is left whole in this capture: dimension {axis.dim} "
            f"of {axis.name}, because {pin.reason}" + (f" ({pin.where})" if pin.where else "")
        )
    return whole


def rewrite_(tree: nn.Module, graph: fx.Graph, analysis: Analysis) -> None:
    """Rewrite the sizes of a graph and its regions, and cut its constants, in place.

    Args:
        tree: holds what the graph refers to; parameters and buffers of the model stay dense.
        graph: a copy of the captured one, with the same node names.
        analysis: of the captured one.

    Raises:
        SoundnessError: an operator cannot be rewritten.
    """
    _Rewriter(tree, analysis, "").rewrite(graph)


class _Rewriter:
    """Rewrites one graph, node by node; also answers what the rewriting asks about nodes."""

    def __init__(self, tree: nn.Module, analysis: Analysis, prefix: str) -> None:
        self.tree, self.analysis, self.prefix = tree, analysis, prefix
        self.added: dict[str, int] = {}
        self.cut: set[str] = set()
        self.n_constants = 0

    # what is known of nodes (`rewriting.Known`)

    def ident(self, tensor: Any) -> int | None:
        if not isinstance(tensor, fx.Node):
            return int(tensor)
        found = self.added.get(tensor.name, self.analysis.ids.get(self.prefix + tensor.name))
        return found if isinstance(found, int) else None

    def shape(self, tensor: Any) -> tuple[int, ...]:
        ident = self.ident(tensor)
        return (
            tuple(tensor.meta["val"].shape) if ident is None else self.analysis.sizes.shape(ident)
        )

    def keep(self, tensor: Any, dim: int) -> BoolArray | None:
        ident = self.ident(tensor)
        return None if ident is None else self.analysis.sizes.keep(ident, dim)

    # the graph

    def rewrite(self, graph: fx.Graph) -> None:
        self.graph = graph
        for node in list(graph.nodes):
            if node.op == "get_attr":
                self.cut_constant(node)
            elif node.op == "call_function":
                self.visit(node)
        graph.lint()

    def visit(self, node: fx.Node) -> None:
        if (region := region_of(node, self.tree)) is not None:
            name = f"{self.prefix}{region[0]}/"
            body = self.tree.get_submodule(region[0])
            assert isinstance(body, fx.GraphModule)
            if any(key.startswith(name) for key in self.analysis.ids):
                _Rewriter(body, self.analysis, name).rewrite(body.graph)
                body.recompile()
            return
        op = operator_facts(node.target)[0]
        if op.startswith("_assert") and not node.users:
            node.graph.erase_node(node)
        elif op == "sym_size":
            self.dense_size(node)
        else:
            self.rewrite_call(node, op)

    def rewrite_call(self, node: fx.Node, op: str) -> None:
        call = Call(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        outputs = self.analysis.ids.get(self.prefix + node.name, ())
        outs = (outputs,) if isinstance(outputs, int) else [i for i in outputs if i is not None]
        try:
            new = rewritten(op, call, outs, self)
        except CannotRewrite as error:
            raise SoundnessError(f"cannot rewrite {self.where(node)}: {error}") from error
        if new is call:
            return
        graph = self.graph
        with graph.inserting_before(node):
            args, kwargs = (pytree.tree_map(self.plain, x) for x in (new.args, new.kwargs))
        node.target, node.args, node.kwargs = new.fn, args, kwargs
        parts = [u for u in node.users if u.target is operator.getitem] if new.first else []
        for part in parts:  # the first tensor is all that it makes now; no other is used
            if part.args[1] == 0:
                part.replace_all_uses_with(node)
            graph.erase_node(part)
        last = node
        for fn, more in new.after:
            with graph.inserting_after(last):
                step = graph.call_function(fn, (last,))
            with graph.inserting_before(step):
                step.args = (last, *pytree.tree_map(self.plain, more))
            self.follow(last, step, outs[0])
            last = step
        if last is not node:
            node.meta[DENSE], last.meta[DENSE] = "", self.prefix + node.name

    def follow(self, node: fx.Node, step: fx.Node, ident: int) -> None:
        """All users of `node` use `step` instead, which holds its dense value's remains."""
        node.replace_all_uses_with(step, delete_user_cb=lambda user: user is not step)
        step.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self.added[step.name] = ident

    def plain(self, x: Any) -> Any:
        """What only a graph can hold: sizes computed at run time, constant positions."""
        if isinstance(x, SizeOf):
            return self.graph.call_function(aten.sym_size.int, (x.tensor, x.dim))
        if isinstance(x, Scaled):
            times = self.graph.call_function(operator.mul, (x.size, x.kept))
            return self.graph.call_function(operator.floordiv, (times, x.dense))
        if isinstance(x, Positions):
            self.n_constants += 1
            name = f"kept_positions_{self.n_constants}"
            self.tree.register_buffer(name, torch.from_numpy(x.index), persistent=False)
            return self.graph.get_attr(name)
        return x

    def dense_size(self, node: fx.Node) -> None:
        """Sizes at run time are those of the dense model until an operator is given one."""
        keep = self.keep(node.args[0], int(node.args[1]))  # type: ignore[arg-type]
        if keep is None:
            return
        with self.graph.inserting_after(node):
            times = self.graph.call_function(operator.mul, (node, len(keep)))
        with self.graph.inserting_after(times):
            dense = self.graph.call_function(operator.floordiv, (times, int(keep.sum())))
        node.replace_all_uses_with(dense, delete_user_cb=lambda user: user is not times)

    def cut_constant(self, node: fx.Node) -> None:
        """Constants of the capture are cut as parameters are; they are in no plan."""
        target, ident = str(node.target), self.ident(node)
        if ident is None or target in self.cut:
            return
        if self.analysis.sizes.labels.value(ident).source in ("constant", "attribute"):
            self.cut.add(target)
            owner, attribute = owner_of(self.tree, target)
            dense = getattr(owner, attribute)
            set_tensor_(owner, attribute, self.analysis.sizes.cut(ident, dense))

    def where(self, node: fx.Node) -> str:
        return next(
            (r.where for r in self.analysis.sizes.labels.tape.records
             if r.name == self.prefix + node.name),
            node.name,
        )  # fmt: skip
