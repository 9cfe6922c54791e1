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
    linear=True,
    finish="abs",
    finish_on="element",
    formula="sum over the unit of |dL/dw|, the gradient being the mean over all samples",
    reference="baseline: the sensitivity of the loss to the weight",
)
def gradient(stats: Stats) -> Tensor:
    """The size of the full-batch gradient: how fast the loss changes with the weight.

    The gradient is added up over all samples first, with its sign, and made positive for each
    weight at the end. The size of the weight plays no part.

    Use it as a baseline, and where a threshold on |dL/dw| is asked for.

    Avoid it for removing units: a weight near zero with a large gradient costs nothing to remove,
    and a rescaled network gives other scores. `snip` and `taylor` put that right.
    """
    return stats["grad"]


@criterion(
    "taylor",
    needs={"gate"},
    family="gradient",
    linear=True,
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
    minimum, where the mean gradient does. For a channel with a batch norm the sum runs over scale
    and shift of the norm, which is the paper's gate behind it.

    Use it as the first choice: one forward and one backward pass, no weight gradients, and among
    the best of the cheap criteria.

    Avoid it where the loss is far from linear along the removal, as when units carry much of the
    output each; there the exact ablation (`finite_difference`) is worth its price.
    """
    return -stats["gate"]


@criterion(
    "taylor_batch",
    needs={"gate"},
    family="gradient",
    linear=True,
    finish="square",
    average="batch",
    members="removal",
    formula="mean over batches of (sum over the unit of w dL/dw)^2",
    reference=_MOLCHANOV,
)
def taylor_batch(stats: Stats) -> Tensor:
    """As `taylor`, squared for each batch as in the paper; the batch size matters.

    The larger the batches, the more the samples cancel before the square; with one batch it ranks
    as `directional` does.

    Use it to compare with published numbers, at their batch size.

    Avoid it when scores of different runs are compared: record the batch size, or take `taylor`.
    """
    return -stats["gate"]


@criterion(
    "taylor_element",
    needs={"gate"},
    family="gradient",
    linear=True,
    finish="square",
    finish_on="element",
    average="batch",
    members="removal",
    formula="mean over batches of (sum over the unit of (w dL/dw)^2)",
    reference=_MOLCHANOV,
)
def taylor_element(stats: Stats) -> Tensor:
    """As `taylor_batch`, each weight squared before the sum: opposite signs do not cancel.

    With `average="sample"` it is squared for each sample and weight.

    Use it to reproduce the weight form of the paper, and for single weights.

    Avoid it for units: a unit goes as a whole, so that its terms of opposite sign do cancel.
    """
    return -stats["gate"]


@criterion(
    "taylor_abs",
    needs={"gate"},
    family="gradient",
    linear=True,
    finish="abs",
    average="sample",
    members="removal",
    formula="mean over samples of |sum over the unit of w dL/dw|",
    reference="Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient "
    "Inference, 2017, arXiv:1611.06440; for heads: Michel, Levy and Neubig, 2019, arXiv:1905.10650",
)
def taylor_abs(stats: Stats) -> Tensor:
    """As `taylor`, with the absolute value of each sample instead of the square.

    The first of the Taylor criteria. The paper takes the mean over the positions of a feature map
    where we take the sum, a constant factor for each layer, and divides by the norm of each layer;
    that is left to the allocation. For attention heads it is the head importance of Michel et al.

    Use it instead of `taylor` when few samples are so hard that their squares drown the others.

    Avoid it where the paper's normalisation is needed to compare layers, unless the allocation
    normalises too.
    """
    return -stats["gate"]


@criterion(
    "snip",
    needs={"weight", "grad"},
    family="gradient",
    linear=True,
    finish="abs",
    finish_on="element",
    formula="sum over the unit of |w dL/dw|, the gradient being the mean over all samples",
    reference="Lee, Ajanthan and Torr, SNIP: Single-shot Network Pruning based on Connection "
    "Sensitivity, 2019, arXiv:1810.02340",
)
def snip(stats: Stats) -> Tensor:
    """How much the loss reacts to each connection, added up over the unit.

    The absolute value is taken for each weight, after the mean over the samples, so that nothing
    cancels inside a unit. The paper divides by the sum over all weights, which changes no ranking.
    For single weights it ranks as `directional` does.

    Use it before training, at initialisation, as the paper does, or as a cheap weight criterion.

    Avoid it on a trained network: the mean gradient of each weight is nearly zero there.
    """
    return -stats["weight"] * stats["grad"]
