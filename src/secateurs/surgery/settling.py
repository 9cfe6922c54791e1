"""`settle`: norms and means that count only what is left, where exact ones count what was removed.

It makes a shrunk model an ordinary one, without operators of secateurs, and changes what it
computes a little; by how much is measured.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateurs.batches import call_model, clone_inputs, in_mode, preserve, tensors
from secateurs.surgery.comparing import relative_error
from secateurs.surgery.graph_form import PrunedGraph, duplicate, set_graphs_
from secateurs.surgery.padded import PLAIN
from secateurs.types import Inputs

__all__ = ["Settled", "has_padded", "settle"]

operators = torch.ops.secateurs
SPREADS: dict[Any, Any] = {
    operators.padded_var.default: torch.ops.aten.var.correction,
    operators.padded_var_mean.default: torch.ops.aten.var_mean.correction,
}


@dataclass(frozen=True)
class Settled:
    """What `settle` did.

    Attributes:
        difference: max|exact - plain| / (1 + max|exact|) over all outputs, in eval mode.
        n_norms: norms and means that are plain now.
    """

    difference: float
    n_norms: int

    def text(self) -> str:
        """One sentence for people."""
        return (
            f"{self.n_norms} norms and means count only what is left: outputs differ from the "
            f"exact ones by {self.difference:.1e}; fine-tune to make up for it"
        )


def settle(small: nn.Module, example_inputs: Inputs) -> tuple[nn.Module, Settled]:
    """Return a copy whose norms and means count only what is left, and how much that changes.

    After fine-tuning, or before it, this makes a shrunk model an ordinary one: no operators of
    secateurs are left in it. What it computes changes; the difference is measured on the examples.

    Args:
        small: a result of `shrink`, in either form; not changed.
        example_inputs: what to compare on.
    """
    plain = copy.deepcopy(small)
    count = 0
    for module in list(plain.modules()):
        if type(module) in PLAIN:
            del module.n_dense
            module.__class__ = PLAIN[type(module)]
            count += 1
        elif isinstance(module, fx.GraphModule):  # the graph of a region
            count += _settle_graph(module.graph)
            module.recompile()
    if isinstance(plain, PrunedGraph):
        graphs = {m: duplicate(g) for m, g in plain.secateurs_captured.graphs.items()}
        counts = {mode: _settle_graph(graph) for mode, graph in graphs.items()}
        count += counts["eval"]
        set_graphs_(plain, graphs)
    exact, changed = (_run(m, example_inputs) for m in (small, plain))
    return plain, Settled(relative_error(exact, changed), count)


def has_padded(small: nn.Module) -> bool:
    """Whether a shrunk model counts removed entries anywhere."""
    graphs = [m.graph for m in small.modules() if isinstance(m, fx.GraphModule)]
    if isinstance(small, PrunedGraph):
        graphs += small.secateurs_captured.graphs.values()
    return any(type(m) in PLAIN for m in small.modules()) or any(
        _is_padded(n) for g in graphs for n in g.nodes
    )


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with preserve(model), in_mode(model, training=False), torch.no_grad():
        torch.manual_seed(0)
        return tensors(call_model(model, clone_inputs(inputs)))


def _is_padded(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "secateurs"


def _settle_graph(graph: fx.Graph) -> int:
    """Plain operators in place of padded ones, in place; how many there were."""
    aten = torch.ops.aten
    count = 0
    for node in list(graph.nodes):
        if not _is_padded(node):
            continue
        count += 1
        args = node.args
        if node.target is operators.kept_share.default:
            node.replace_all_uses_with(args[0])
            graph.erase_node(node)
        elif node.target in SPREADS:
            node.target = SPREADS[node.target]
            node.args, node.kwargs = args[:2], {"correction": args[2], "keepdim": args[3]}
        else:
            plain = {
                operators.padded_layer_norm.default: aten.layer_norm.default,
                operators.padded_rms_norm.default: aten.rms_norm.default,
                operators.padded_group_norm.default: aten.group_norm.default,
            }
            node.target, node.args = plain[node.target], args[:-1]
    return count
