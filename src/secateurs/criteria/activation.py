"""Criteria from activations: data, but no labels and no gradient.

Units are seen where they are read: after the activation function and what else lies between.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import STATISTICS, Statistic, Stats, criterion

STATISTICS["active"] = Statistic(
    "unit", "forward", False, False, "fraction of samples and positions at which a is not zero"
)
STATISTICS["act_variance"] = Statistic(
    "unit", "forward", False, False, "variance of a over samples and positions"
)
STATISTICS["input_norm"] = Statistic(
    "element", "forward", False, True, "||X_j||_2 of the input feature that a weight multiplies"
)
STATISTICS["map_rank"] = Statistic(
    "unit", "forward", False, False, "mean numerical rank of the feature map of a channel",
    options=("samples",),
)  # fmt: skip
STATISTICS["independence"] = Statistic(
    "unit", "forward", False, False, "nuclear norm that is lost with the row of the unit",
    options=("samples",),
)  # fmt: skip
STATISTICS["influence"] = Statistic(
    "unit", "forward", False, False, "1 - mean cos(h_in, h_out) of the residual stream"
)


@criterion(
    "activation_mean",
    needs={"act"},
    family="activation",
    granularities="structured",
    formula="mean over samples and positions of |a|",
    reference="Molchanov et al., Pruning Convolutional Neural Networks, 2017, arXiv:1611.06440",
)
def activation_mean(stats: Stats) -> Tensor:
    """How strongly a unit is active where it is read.

    Several readers of one unit (a residual stream) are averaged, each as it sees the unit.

    Use it as a cheap baseline with data but without labels, within layers.

    Avoid it across layers, whose activations differ in scale, and for units whose mean is far from
    zero but constant: a bias could replace them (`activation_variance` knows).
    """
    return stats["act"]


@criterion(
    "apoz",
    needs={"active"},
    family="activation",
    granularities="structured",
    formula="1 - APoZ = fraction of samples and positions at which a is not zero",
    reference="Hu et al., Network Trimming, 2016, arXiv:1607.03250",
)
def apoz(stats: Stats) -> Tensor:
    """How often a unit is on: one minus its average percentage of zeros (APoZ).

    The paper prunes high APoZ; larger is keep here, so the score is 1 - APoZ. It is measured where
    the unit is read, after the activation function; a unit that can only be seen before it is not
    scored. Only an exact zero counts: after tanh, GELU, SiLU or a sigmoid nothing is ever zero, all
    units score 1, and a note says so. Max pooling between the unit and its reader hides zeros.

    Use it for networks with ReLU, to find units that are dead or nearly so.

    Avoid it for other activation functions, and beyond dead units: being on seldom is not being
    useless.
    """
    return stats["active"]


@criterion(
    "activation_variance",
    needs={"act_variance"},
    family="activation",
    granularities="structured",
    formula="E a^2 - (E a)^2 over samples and positions",
    reference="Molchanov et al., Pruning Convolutional Neural Networks, 2017, arXiv:1611.06440 "
    "(the standard deviation of activations; here its square)",
)
def activation_variance(stats: Stats) -> Tensor:
    """How much a unit varies over the data where it is read.

    A unit that is constant carries no information: the bias of its readers can replace it.

    Use it where units have large but constant values, which `activation_mean` would keep.

    Avoid it across layers of different scale. A constant unit scores zero although zeroing it does
    change the outputs, until fine-tuning has moved the biases.
    """
    return stats["act_variance"]


@criterion(
    "wanda",
    needs={"weight", "input_norm"},
    family="activation",
    finish="abs",
    finish_on="element",
    formula="|W_ij| ||X_j||_2, ||X_j||_2 = sqrt(mean over samples of sum over positions of x_j^2); "
    "of a unit: the sum over its weights",
    reference="Sun et al., A Simple and Effective Pruning Approach for LLMs (Wanda), 2024, "
    "arXiv:2306.11695",
)
def wanda(stats: Stats) -> Tensor:
    """The size of a weight times the norm of the input that it multiplies.

    The paper compares the weights within each output row: that is a matter of allocation, not of
    the score, and a budget for a whole layer or network compares them more widely.

    Inputs are features of a linear layer, channels of a convolution (one norm for each input
    channel, whatever the stride), the rows of an embedding (a one-hot input: how often the row is
    looked up), the projections of attention, and input and state of a recurrent layer of one
    level. The norm is per sample, so that it does not grow with the data. Biases and norm scales
    multiply no input and count as 0. For a unit the weights that produce it are summed;
    `members="consumers"` takes those that read it, which tells how much of it arrives.

    Use it for single weights of large language models: one forward pass, no labels, and it sees the
    outlier features that the magnitude alone would cut.

    Avoid it across layers without an allocation for each: norms of inputs grow with the depth.
    """
    return stats["weight"] * stats["input_norm"]


@criterion(
    "hrank",
    needs={"map_rank"},
    family="activation",
    granularities=("channel",),
    options={"samples": 500},
    allowed={"samples": (1, 1_000_000)},
    formula="mean over samples of the rank of the H x W feature map of the channel",
    reference="Lin et al., HRank: Filter Pruning using High-Rank Feature Map, 2020, "
    "arXiv:2002.10179",
)
def hrank(stats: Stats) -> Tensor:
    """The mean rank of the feature map that a channel makes.

    Singular values above max(H, W) eps of the largest count, eps being that of the activation's
    type but at least that of float32. Maps are seen where the channel is read as a map, else where
    it is made, before the activation function (a note says so). Only the first `samples` are used,
    500 as in the paper: one singular value decomposition for each sample and channel.

    Use it for convolutional networks whose maps are not too small: the rank changes little from
    batch to batch, so few samples suffice.

    Avoid it for maps of a few pixels, whose ranks are nearly all equal, and where time matters.
    """
    return stats["map_rank"]


@criterion(
    "chip",
    needs={"independence"},
    family="activation",
    granularities=("neuron", "channel", "hidden", "head_dim"),
    options={"samples": 64},
    allowed={"samples": (1, 1_000_000)},
    formula="mean over samples of ||A||_* - ||A without row i||_*, A: units x positions",
    reference="Sui et al., CHIP: CHannel Independence-based Pruning, 2021, arXiv:2110.13981",
)
def chip(stats: Stats) -> Tensor:
    """How much of the nuclear norm of all feature maps is lost with one of them.

    A channel that the others can express adds little to the nuclear norm (the sum of singular
    values) of the matrix of all channels. Positions are pixels or, in sequence models, steps; units
    that are read at one position only (neurons of a plain network) have no such matrix and are not
    scored. It is exact, and dear: for C channels C eigenvalue problems of size min(C, positions)
    for each sample. So only the first `samples` are used, 64 (the paper: 640), and a request that
    would take longer than `max_seconds` is refused with the time that it would take.

    Use it for convolutional networks with many similar channels in a layer.

    Avoid it for wide layers (more than some 500 channels), and across layers of different scale.
    """
    return stats["independence"]


@criterion(
    "block_influence",
    needs={"influence"},
    family="activation",
    granularities=("layer",),
    formula="1 - mean over samples and positions of cos(h_in, h_out)",
    reference="Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You "
    "Expect, 2024, arXiv:2403.03853",
)
def block_influence(stats: Stats) -> Tensor:
    """How much a residual branch turns the stream that it is added to.

    h_in is the stream before the sum, h_out the sum itself. The paper measures whole transformer
    blocks; a unit here is one branch (attention or feed-forward), and the cosine is taken at
    each step or pixel over the features. Padding counts as positions, too. Where both are zero the
    cosine is 1, where one is zero it is 0.

    Use it for deep residual networks, language models above all: it needs one forward pass, no
    labels, and finds the branches that do next to nothing.

    Avoid it for shallow networks, and where a branch rescales the stream: a cosine does not see it.
    """
    return stats["influence"]
