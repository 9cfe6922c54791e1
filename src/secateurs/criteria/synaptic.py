"""Criteria that need neither data nor a loss: how much can flow through a weight.

All parameters are replaced by their absolute values (or squares), all inputs by ones. In a network
of layers and ReLU the sum R of the outputs is then a sum over all paths of the products of their
weights, and |theta| dR/d|theta| is the part of it that goes through a weight. Without biases the
parts add up to R in every layer, so that no layer is emptied: what is removed elsewhere makes the
weights that are left more important.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import STATISTICS, Statistic, Stats, criterion

STATISTICS["flow"] = Statistic(
    "unit", "free", False, True, "|theta| dR/d|theta| / |R|, inputs of ones",
    options=("iterations",),
)  # fmt: skip
STATISTICS["flow_squared"] = Statistic(
    "unit", "free", False, True, "the same with theta^2 in place of |theta|",
    options=("iterations",),
)  # fmt: skip


@criterion(
    "synflow",
    needs={"flow"},
    family="data-free",
    members="removal",
    options={"iterations": 1},
    allowed={"iterations": (1, 10_000)},
    formula="|theta| dR/d|theta| / |R| with R = 1' f(|theta|; 1); of a unit: the sum over what "
    "removes it",
    reference="Tanaka et al., Pruning neural networks without any data by iteratively conserving "
    "synaptic flow, 2020, arXiv:2006.05467",
)
def synflow(stats: Stats) -> Tensor:
    """The share of all paths through the network that leads through a weight or unit.

    With `iterations` above 1 (the paper: 100) the weakest are removed step by step, so that the
    densities fall exponentially to 0.01, over all targets that are scored together; the score is
    then the share of them that is gone when a unit goes, so that one threshold for all layers
    follows that order. (The paper lets the densities fall to that of the budget.) Each iteration
    costs one forward and backward pass on inputs of ones. When less is left than one path, the last
    order is kept.

    Where we differ from the paper: R is divided out, because it overflows (and all runs in
    float64); batch norms forget their running means, whose absolute values would silence whole
    channels (at initialisation they are zero); other buffers stay as they are; an embedding reads
    all its rows in equal parts, which is its input of ones. Inputs have the shapes that the model
    was traced with.

    Use it before training, or where no data can be had; for single weights at extreme sparsities
    with iterations, because no layer is emptied.

    Avoid it as a measure of what a trained network has learned: it knows no data. The theory is for
    ReLU networks without biases. Softmax, tanh, sigmoid gates and layer norms saturate or rescale:
    R is no sum over paths there, the score is only |theta dR/dtheta| at the absolute weights, and a
    note on the scores says so.
    """
    return stats["flow"]


@criterion(
    "path_norm",
    needs={"flow_squared"},
    family="data-free",
    members="removal",
    options={"iterations": 1},
    allowed={"iterations": (1, 10_000)},
    formula="theta^2 dR/d(theta^2) / |R| with R = 1' f(theta^2; 1), the squared L2 path norm",
    reference="Neyshabur et al., Path-SGD: Path-Normalized Optimization in Deep Neural Networks, "
    "2015, arXiv:1506.02617; as a criterion: Gebhart et al., A Unified Paths Perspective for "
    "Pruning at Initialization, 2021, arXiv:2101.10552",
)
def path_norm(stats: Stats) -> Tensor:
    """The share of the squared path norm that leads through a weight or unit.

    As `synflow` with squares: a path counts by the square of the product of its weights, so that
    few strong paths outweigh many weak ones. The square of the sum over all paths of a network is
    bounded by it, and rescaling a unit does not change it.

    Use it where `synflow` is used, when strong paths should stay together.

    Avoid it where `synflow` fails: trained networks, and networks that are not made of ReLU.
    """
    return stats["flow_squared"]
