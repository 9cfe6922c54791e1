"""Criteria from information theory: how much the activation of a unit tells, and to whom.

A unit is judged by one number for each sample: its activation averaged over all positions. Most
of these need no labels and no loss, and none needs a gradient. They judge each unit alone or by
what others know; whether the network makes use of what a unit tells, they do not see.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import STATISTICS, Statistic, Stats, criterion

_LUO = "Luo and Wu, An Entropy-based Pruning Method for CNN Compression, 2017, arXiv:1706.05791"
_COVER = "Cover and Thomas, Elements of Information Theory, 2nd edition, 2006, chapter 8"

STATISTICS["unit_samples"] = Statistic(
    "unit", "forward", False, False, "the activation of each unit, averaged over positions, for "
    "each of the first samples", options=("samples",),
)  # fmt: skip
STATISTICS["entropy"] = Statistic(
    "unit", "forward", False, False, "entropy of the unit's value over the samples",
    options=("estimator", "bins", "correction", "samples"),
)  # fmt: skip
STATISTICS["mutual_information"] = Statistic(
    "unit", "forward", False, False, "mutual information of the unit's value and the label",
    options=("estimator", "bins", "correction", "neighbors", "samples"), labels=True,
)  # fmt: skip
STATISTICS["information_next"] = Statistic(
    "unit", "forward", False, False, "mutual information of the unit's value and all outputs of "
    "the layers that read it", options=("noise", "samples"),
)  # fmt: skip
STATISTICS["residual_share"] = Statistic(
    "unit", "forward", False, False, "the share of the unit's variance that the other units of "
    "its family do not predict", options=("samples",),
)  # fmt: skip
STATISTICS["conditional_entropy"] = Statistic(
    "unit", "forward", False, False, "Gaussian entropy of the unit's value given the other units "
    "of its family", options=("samples",),
)  # fmt: skip

_SAMPLES = {"samples": (2, 10_000_000)}
_HISTOGRAM = {"bins": (2, 4096), "correction": ("none", "miller_madow")}


@criterion(
    "entropy",
    needs={"entropy"},
    family="information",
    options={"estimator": "histogram", "bins": 32, "correction": "none", "samples": 4096},
    allowed={"estimator": ("histogram", "gaussian"), **_HISTOGRAM, **_SAMPLES},
    formula="-sum_i p_i log p_i, p_i = share of samples whose mean activation is in bin i",
    reference=_LUO,
)
def entropy(stats: Stats) -> Tensor:
    """How differently the unit answers to different samples, in nats.

    A unit that answers everything alike has entropy 0. The activation is averaged over positions
    and sorted into `bins` of equal width between the least and the largest of that unit, so that
    scale and offset do not matter. The paper has 100 bins and pools the outputs of a convolution;
    here the value is pooled where it is read, behind the activation function.
    estimator="gaussian" is 1/2 log(2 pi e variance): it knows the scale, and may be negative.
    correction="miller_madow" adds (occupied bins - 1) / (2 samples). At most `samples` are kept,
    the first ones.

    Use it without labels and loss, to find units that are dead or always on.

    Avoid it where a rare answer matters: a unit that fires for one class only has little entropy
    and may be all the network knows of that class. A loud unit that nothing reads scores high.
    Scores of different layers do not compare: give each layer its share (method="uniform").
    """
    return stats["entropy"]


@criterion(
    "mutual_information",
    needs={"mutual_information"},
    family="information",
    options={
        "estimator": "histogram",
        "bins": 16,
        "correction": "none",
        "neighbors": 3,
        "samples": 4096,
    },
    allowed={
        "estimator": ("histogram", "knn"),
        **_HISTOGRAM,
        "neighbors": (1, 100),
        **_SAMPLES,
    },
    formula="I(a; y) = H(a) + H(y) - H(a, y), a = mean activation of the unit, y = label",
    reference=f"{_COVER}; knn: Ross, Mutual Information between Discrete and Continuous Data Sets, "
    "2014, doi:10.1371/journal.pone.0087357; Kraskov et al., Estimating Mutual Information, 2004, "
    "doi:10.1103/PhysRevE.69.066138",
)
def mutual_information(stats: Stats) -> Tensor:
    """How much the unit alone tells about the label, in nats.

    Targets are one class index or one number for each sample; numbers are sorted into `bins` too.
    No loss is needed. The histogram estimate is too high by about (bins - 1) (classes - 1) /
    (2 samples) for every unit; correction="miller_madow" takes that away. estimator="knn" has no
    bins (scikit-learn).

    Use it to find the units of the last hidden layers that tell classes apart, and as an
    explanation of what a unit knows.

    Avoid it in early layers, where a unit alone tells little and many together tell all; to compare
    layers, for the same reason; and where targets are sequences or boxes: it takes one label for
    each sample.
    """
    return stats["mutual_information"]


@criterion(
    "information_next",
    needs={"information_next"},
    family="information",
    options={"noise": 0.001, "samples": 4096},
    allowed={"noise": (1e-6, 1.0), **_SAMPLES},
    formula="I(a; b) = -1/2 log(1 - R^2), R^2 of predicting a linearly from all outputs b of the "
    "layers that read it",
    reference=f"{_COVER} (jointly normal variables)",
)
def information_next(stats: Stats) -> Tensor:
    """How much of the unit can be read from the outputs of the next layer, in nats.

    All values are averaged over positions and taken as jointly normal, so that one linear
    regression gives the information. The next layer is seen through independent noise of `noise`
    times its variance, which is a ridge penalty: without it, a layer with at least as many outputs
    as inputs would determine every unit, and the information would be infinite. With fewer samples
    than outputs the estimate is too high for all units.

    Use it without labels, where the next layer is narrow: units that it drowns out score low.

    Avoid it before a wide layer, in which every unit can be found again, important or not.
    """
    return stats["information_next"]


@criterion(
    "redundancy",
    needs={"residual_share"},
    family="information",
    options={"samples": 4096},
    allowed=_SAMPLES,
    formula="1 - R^2 of predicting the unit linearly from the other units of its family = "
    "1 / diag(C^-1), C their shrunk correlation matrix",
    reference="partial correlation; shrinkage: Ledoit and Wolf, A Well-Conditioned Estimator for "
    "Large-Dimensional Covariance Matrices, 2004, doi:10.1016/S0047-259X(03)00096-4",
)
def redundancy(stats: Stats) -> Tensor:
    """How much of the unit the others of its family do not know: 1 nothing, 0 everything.

    A low score means redundant: the others predict it, and the next layer could make up for it. A
    constant unit scores 0. The correlations are drawn towards 0 as far as the number of samples
    demands. Scale does not matter. Units that were removed earlier are not among the others.

    Use it before fine-tuning, which can give the work of a redundant unit to the others, or
    multiplied with a criterion of the effect on the loss.

    Avoid it in one large step: of two equal units both score 0, though one must stay. Prune in
    several steps and score again.
    """
    return stats["residual_share"]


@criterion(
    "conditional_entropy",
    needs={"conditional_entropy"},
    family="information",
    options={"samples": 4096},
    allowed=_SAMPLES,
    formula="1/2 log(2 pi e var(a | others)), var(a | others) = var(a) (1 - R^2)",
    reference=f"{_COVER} (jointly normal variables)",
)
def conditional_entropy(stats: Stats) -> Tensor:
    """How much the unit adds to what the others of its family tell, in nats.

    The Gaussian entropy of the part that `redundancy` finds unpredicted: it knows the scale of the
    unit, and may be negative. A constant unit has -42.2, the entropy of the smallest variance.

    Use it instead of `redundancy` where small activations mean a small effect.

    Avoid it in one large step, as `redundancy`; and to compare layers, whose scales differ.
    """
    return stats["conditional_entropy"]
