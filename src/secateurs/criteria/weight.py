"""Criteria that look at the weights alone: no data, no gradient.

Cheap and a strong baseline, but blind to scale: halving a layer and doubling the next one changes
these scores and not the function.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import STATISTICS, Statistic, Stats, criterion

STATISTICS["norm_scale"] = Statistic(
    "unit", "free", False, False, "mean |gamma| of the outermost norms of the unit"
)
STATISTICS["median_distance"] = Statistic(
    "unit", "free", False, False, "sum of the distances from the unit's weights to all others'"
)
STATISTICS["lamp"] = Statistic(
    "unit", "free", False, True, "w^2 over the sum of the squares that are not smaller"
)

_STRUCTURE = ("neuron", "channel", "hidden", "head", "head_dim", "kv_group", "expert", "embedding")


@criterion(
    "magnitude",
    needs={"weight"},
    family="weight",
    finish="abs",
    finish_on="element",
    formula="sum over the unit of |w|",
    reference="Han et al., Learning both Weights and Connections, 2015, arXiv:1506.02626; "
    "of units: Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710",
)
def magnitude(stats: Stats) -> Tensor:
    """The size of a weight; for a unit the L1 norm of what produces it.

    There is no criterion of its own for the L1 norm of a unit: this is it. It sums over everything
    that produces the unit, biases and norm scales included, where the paper takes the filter alone.

    Use it as the baseline that others must beat, and for single weights of a well-trained network:
    it needs no data and costs nothing.

    Avoid it across layers of different scale or width, and before a norm: the norm undoes the scale
    of the weights, so that it says nothing about the function.
    """
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
    """The L2 norm of what produces a neuron, channel or hidden unit.

    As `magnitude`, but a few large weights count for more than many small ones.

    Use it as a baseline for units.

    Avoid it where `magnitude` fails: scales that differ between layers, weights before a norm.
    """
    return stats["weight"].square()


@criterion(
    "norm_scale",
    needs={"norm_scale"},
    family="weight",
    granularities="structured",
    formula="mean over the entries of the unit in its outermost norms of |gamma|",
    reference="Liu et al., Learning Efficient Convolutional Networks through Network Slimming, "
    "2017, arXiv:1708.06519",
)
def norm_scale(stats: Stats) -> Tensor:
    """The scale that the last norm in front of the reader gives to the unit.

    After a batch norm the values of a channel have about the deviation |gamma|, whatever the
    convolution before it: so this is the size of the weights where they still mean something. Where
    several norms make the unit (a residual stream), it is their mean.

    Use it for channels that a batch norm makes, best after training with an L1 penalty on the
    scales, as in the paper, which spreads them out.

    Avoid it where shifts matter more than scales. Units without a learned norm are not scored.
    """
    return stats["norm_scale"]


@criterion(
    "geometric_median",
    needs={"median_distance"},
    family="weight",
    granularities=_STRUCTURE,
    formula="sum over the other units j of the target of ||w_i - w_j||_2",
    reference="He et al., Filter Pruning via Geometric Median (FPGM), 2019, arXiv:1811.00250",
)
def geometric_median(stats: Stats) -> Tensor:
    """How far the weights of a unit are from those of all other units of its layer.

    A unit near the geometric median of its layer can be replaced by the others; a small one need
    not be. Weights are those that produce the unit, matrices and filters only: biases and norms are
    left out, as in the paper. Units that were removed earlier are no neighbours.

    Use it where all filters have about the same norm, so that `magnitude` cannot tell them apart.

    Avoid it for comparing layers: sums of distances grow with the width and scale of a layer. A
    unit with large weights is far from all others, whether they matter or not.
    """
    return stats["median_distance"]


@criterion(
    "lamp",
    needs={"lamp"},
    family="weight",
    granularities=("weight",),
    formula="w_u^2 / sum over v with |w_v| >= |w_u| of w_v^2",
    reference="Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning (LAMP), 2021, "
    "arXiv:2010.07611",
)
def lamp(stats: Stats) -> Tensor:
    """The share of a weight in all weights of its layer that are not smaller.

    Within a layer the order is that of the magnitudes. Across layers, removing everything below a
    common score is removing what adds least relative error to a layer; the largest weight of every
    layer scores 1, so that no layer is emptied. Weights that were removed earlier do not count; of
    equal ones, the later counts as the larger.

    Use it with one threshold for all layers (a global budget of weights): it finds the densities of
    the layers by itself and needs no data.

    Avoid it for deciding within one layer (it is the magnitude there), and for units: it has no
    meaning for them.
    """
    return stats["lamp"]
