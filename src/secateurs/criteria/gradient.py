"""Criteria from gradients of the loss: first order.

Removing a unit moves its weights from w to 0, so the loss changes by about -sum w dL/dw. The
family differs only in what is summed before the square: elements, units, samples or batches.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import Stats, criterion

_MOLCHANOV = (
    "Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv:1906.10771"
)


@criterion(
    "gradient",
    needs={"grad"},
    family="gradient",
    finish="abs",
    finish_on="element",
    formula="sum over the unit of |dL/dw|, the gradient being the mean over all samples",
    reference="baseline: the sensitivity of the loss to the weight",
)
def gradient(stats: Stats) -> Tensor:
    """The size of the full-batch gradient: how fast the loss changes with the weight."""
    return stats["grad"]


@criterion(
    "taylor",
    needs={"gate"},
    family="gradient",
    finish="square",
    average="sample",
    members="removal",
    formula="mean over samples of (sum over the unit of w dL/dw)^2",
    reference=_MOLCHANOV,
)
def taylor(stats: Stats) -> Tensor:
    """First-order change of the loss when the unit is removed, squared for each sample.

    The paper squares for each batch of its training loop; that is `taylor_batch`. Squaring for
    each sample does not depend on how the data is cut into batches, and does not vanish at a
    minimum, where the mean gradient does.
    """
    return -stats["gate"]


@criterion(
    "taylor_batch",
    needs={"gate"},
    family="gradient",
    finish="square",
    average="batch",
    members="removal",
    formula="mean over batches of (sum over the unit of w dL/dw)^2",
    reference=_MOLCHANOV,
)
def taylor_batch(stats: Stats) -> Tensor:
    """As `taylor`, squared for each batch as in the paper; the batch size matters."""
    return -stats["gate"]


@criterion(
    "taylor_element",
    needs={"gate"},
    family="gradient",
    finish="square",
    finish_on="element",
    average="batch",
    members="removal",
    formula="mean over batches of (sum over the unit of (w dL/dw)^2)",
    reference=_MOLCHANOV,
)
def taylor_element(stats: Stats) -> Tensor:
    """As `taylor_batch`, each weight squared before the sum: opposite signs do not cancel."""
    return -stats["gate"]
