"""Criteria by attribution methods that explain predictions, computed by Captum.

They need `pip install 'secateurs[attribution]'`, and are dear: for small networks and for
comparisons.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import STATISTICS, Statistic, Stats, criterion

STATISTICS["conductance"] = Statistic(
    "unit", "per unit", True, False, "mean over samples of |integrated gradients of the loss "
    "through the unit|", options=("steps",),
)  # fmt: skip
STATISTICS["shapley"] = Statistic(
    "unit", "per unit", True, False, "mean fall of the loss as the unit joins a random set of "
    "the others", options=("permutations",),
)  # fmt: skip


@criterion(
    "conductance",
    needs={"conductance"},
    family="attribution",
    options={"steps": 16},
    allowed={"steps": (2, 1000)},
    formula="mean over samples of |sum over positions of int_0^1 dL/da(alpha x) da(alpha x)/dalpha "
    "dalpha|",
    reference="Dhamdhere et al., How Important Is a Neuron?, 2018, arXiv:1805.12233",
)
def conductance(stats: Stats) -> Tensor:
    """How much of the loss of each sample flows through the unit on the way from an empty input.

    The input grows from zeros to the sample in `steps` steps; what the unit's change contributes to
    the change of the loss is summed up. Over all units of a layer that everything passes, the
    signed values sum to L(x) - L(0). The paper attributes the score of a class; here it is the
    loss, so that any task will do, and the size counts, not the sign. It costs a forward and
    backward pass of `steps` + 1 copies of the batch for every layer.

    Use it on networks of real-valued inputs for which zeros mean nothing there.

    Avoid it for tokens, which have no path from zero, and on large networks.
    """
    return stats["conductance"]


@criterion(
    "shapley",
    needs={"shapley"},
    family="attribution",
    members="removal",
    options={"permutations": 16},
    allowed={"permutations": (1, 100_000)},
    formula="mean over permutations of L(units before it) - L(units before it and itself)",
    reference="Castro et al., Polynomial Calculation of the Shapley Value Based on Sampling, 2009, "
    "doi:10.1016/j.cor.2008.04.004; of neurons: Ghorbani and Zou, Neuron Shapley, 2020, "
    "arXiv:2002.09815",
)
def shapley(stats: Stats) -> Tensor:
    """How much the unit lowers the loss on average when it joins a random set of the others.

    Units that have not joined are removed as in an ablation. Positive: the loss falls. Over the
    units of one family the values sum exactly to the loss with all of them removed minus the loss
    of the whole network. It costs `permutations` x (units + 1) forward passes for every family.

    Use it on small networks, to prune many units at once: an ablation only knows what a single unit
    is worth while all others stay, so that two copies of one unit both look useless.

    Avoid it for a few units of a large network: most sets that it looks at are ruins, whose loss
    says little about the pruned network.
    """
    return stats["shapley"]
