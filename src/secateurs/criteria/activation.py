"""Criteria from activations: data, but no labels and no gradient."""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import Stats, criterion


@criterion(
    "activation_mean",
    needs={"act"},
    family="activation",
    granularities="structured",
    formula="mean over samples and positions of |a|",
    reference="Molchanov et al., Pruning Convolutional Neural Networks, 2017, arXiv:1611.06440",
)
def activation_mean(stats: Stats) -> Tensor:
    """How strongly a unit is active where it is read."""
    return stats["act"]
