"""The proof behind every expectation of the rule tests: masked dense equals small, in float64.

The masked copy and the comparison are the test's own (`random_law`), not those of the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import secateurs as sc
from secateurs.types import Graph, Inputs, Plan
from tests.graph.nets import n_parameters, plan_of, randomized, units_of
from tests.graph.random_law import difference, light_export, masked_by

__all__ = ["doubled", "proven", "ran", "why"]

EXACT = 1e-10


def doubled(inputs: Inputs) -> Inputs:
    """Example inputs in float64."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    found: Inputs = pytree.tree_map(wide, inputs)
    return found


def ran(model: nn.Module, inputs: Inputs, names: Sequence[str] = ()) -> list[Tensor]:
    """The tensors that a model returns in eval mode, or those of them that are named."""
    given = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    was = model.training
    with torch.no_grad():
        model.eval()
        if isinstance(given, dict):
            found = model(**given)
        else:
            found = model(*(given if isinstance(given, (tuple, list)) else (given,)))
        model.train(was)
    wanted = [found[n] for n in names] if names else found
    return [t for t in pytree.tree_leaves(wanted) if isinstance(t, Tensor)]


def n_left(model: nn.Module, plan: Plan) -> int:
    """Parameters that a plan leaves, by its own account."""
    return sum(
        prod(len(plan.kept.get(name, {}).get(d, range(n))) for d, n in enumerate(p.shape))
        for name, p in model.named_parameters()
    )


def proven(
    model: nn.Module,
    inputs: Inputs,
    units: Mapping[str, int],
    *,
    forms: Sequence[str] = ("module", "graph"),
    heads: Literal["head", "head_dim"] = "head",
    norm: Literal["exact", "pin"] = "exact",
    outputs: Sequence[str] = (),
) -> Graph:
    """Trace, compare the units with those expected, cut half of them, shrink, compare the outputs.

    Args:
        model: gets random parameters and float64.
        units: family name -> units, by hand.
        forms: of the smaller model; each must work.
    """
    model, inputs = randomized(model).double(), doubled(inputs)
    graph = sc.trace(model, inputs, heads=heads, norm=norm, outputs=outputs)
    assert units_of(graph) == dict(units), graph.summary()
    assert not [e for e in graph.excluded if "does not fit this call" in e.reason], graph.summary()
    if not units:
        return graph
    plan = plan_of(model, graph)
    masked = masked_by(model, dict(plan.masks))
    expected = ran(masked, inputs, outputs)
    assert difference(ran(model, inputs, outputs), expected) > 1e-6
    for form in forms:
        with light_export():
            small = sc.shrink(model, plan, inputs, form=form)
        assert n_parameters(small) == n_left(model, plan) < n_parameters(model)
        assert difference(expected, ran(small, inputs, outputs)) <= EXACT, form
    return graph


def why(graph: Graph, name: str) -> set[str]:
    """The reasons why something was left whole."""
    return {e.reason for e in graph.excluded if e.name == name}
