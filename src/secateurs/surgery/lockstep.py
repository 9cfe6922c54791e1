"""Run the masked dense graph and the shrunk one node by node, and compare every value.

What a dense node computes, cut to what stays of it, must be what its counterpart computes. The
first pair that differs names the operator, module and line at fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateurs.masks import apply_masks_, named_tensors
from secateurs.surgery.comparing import relative_error
from secateurs.surgery.graph_form import Captures, PrunedGraph, copied_tree, flat_inputs
from secateurs.surgery.rewriter import DENSE, Analysis
from secateurs.types import Inputs, Plan

__all__ = ["Fault", "first_fault"]

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Fault:
    """A node whose value is not what is left of the dense one.

    Attributes:
        node: its name in the dense graph.
        where: operator, module and line in the user's code.
        what: how the values differ.
    """

    node: str
    where: str
    what: str

    def text(self) -> str:
        """One sentence for people."""
        return f"First node at fault: {self.node}, {self.where}: {self.what}"


def first_fault(
    captures: Captures, plan: Plan, small: PrunedGraph, example_inputs: Inputs
) -> Fault | None:
    """The first node, in order of execution in eval mode, that differs; None if none does.

    Raises:
        SoundnessError: the plan does not fit the captured graph.
    """
    analysis = captures.analysis("eval", plan)
    tree, graph = copied_tree(captures.graphs["eval"], {}), captures.graph("eval", plan.outputs)
    held = named_tensors(tree)
    apply_masks_(tree, {name: mask for name, mask in plan.masks.items() if name in held})
    tree.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        dense = _Keeper(tree, graph)
        dense.run(*flat_inputs(graph, example_inputs), enable_io_processing=False)
        torch.manual_seed(0)
        checker = _Checker(small, small.secateurs_captured.graphs["eval"], analysis, dense.values)
        try:
            checker.run(*flat_inputs(graph, example_inputs), enable_io_processing=False)
        except _Found as found:
            return found.fault
    return None


class _Found(Exception):
    """Ends a run."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.node)
        self.fault = fault


class _Keeper(fx.Interpreter):
    """Keeps a copy of every tensor, as it was when it was made."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op != "placeholder":
            self.values[n.name] = result.clone()
        return result


class _Checker(fx.Interpreter):
    """Compares every tensor with the dense one."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        analysis: Analysis,
        dense: Mapping[str, Tensor],
    ) -> None:
        super().__init__(module, graph=graph)
        self.analysis, self.dense = analysis, dense

    def run_node(self, n: fx.Node) -> Any:
        name = n.meta.get(DENSE, n.name)
        try:
            result = super().run_node(n)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise self.found(n, name or n.name, f"it does not run: {first}") from error
        ident = self.analysis.ids.get(name)
        if isinstance(result, Tensor) and name in self.dense and isinstance(ident, int):
            self.compare(n, name, self.analysis.sizes.cut(ident, self.dense[name]), result)
        return result

    def compare(self, n: fx.Node, name: str, expected: Tensor, result: Tensor) -> None:
        if expected.shape != result.shape:
            what = f"its shape is {tuple(result.shape)} instead of {tuple(expected.shape)}"
            raise self.found(n, name, what)
        error = relative_error([expected], [result])
        if error > LIMITS.get(expected.dtype, 0.05):
            raise self.found(n, name, f"its values differ by {error:.1e}")

    def found(self, n: fx.Node, name: str, what: str) -> _Found:
        records = self.analysis.sizes.labels.tape.records
        where = next((r.where for r in records if r.name == name), str(n.target))
        return _Found(Fault(name, where, what))
