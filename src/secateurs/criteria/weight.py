"""Criteria that look at the weights alone: no data, no gradient.

Cheap and a strong baseline, but blind to scale: halving a layer and doubling the next one changes
these scores and not the function.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import Stats, criterion


@criterion(
    "magnitude",
    needs={"weight"},
    family="weight",
    finish="abs",
    finish_on="element",
    formula="sum over the unit of |w|",
    reference="Han et al., Learning both Weights and Connections, 2015, arXiv:1506.02626",
)
def magnitude(stats: Stats) -> Tensor:
    """The size of a weight; for a unit the L1 norm of what produces it."""
    return stats["weight"]


@criterion(
    "l2_norm",
    needs={"weight"},
    family="weight",
    finish="sqrt",
    granularities="structured",
    formula="sqrt(sum over the unit of w^2)",
    reference="Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710",
)
def l2_norm(stats: Stats) -> Tensor:
    """The L2 norm of what produces a neuron, channel or hidden unit."""
    return stats["weight"].square()
