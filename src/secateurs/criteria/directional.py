"""Criteria along the direction v = -(the unit's weights) that removes a unit.

With f the loss or the output of the network, `finite_difference` is the quotient
(f(theta + t v) - f(theta)) / t: at t = 1 the exact effect of the removal, the oracle against which
the others are measured. `directional` is its limit for t -> 0, the derivative along v. With the
loss that is <dL/dtheta, v>, one backward pass for all units; with the output it is J v, and needs
no labels. `path_integral` adds the derivative up on the way out, `smoothed` around the weights.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import STATISTICS, Statistic, Stats, criterion

STATISTICS["quadratic"] = Statistic(
    "unit", "per unit", True, True, "D_v L + 1/2 v'Hv, v = minus the unit", options=("of",)
)
STATISTICS["unit_path"] = Statistic(
    "unit", "per unit", True, True,
    "the integral of the derivative while the unit alone goes from 1 to 0", options=("steps",),
)  # fmt: skip
STATISTICS["shared_path"] = Statistic(
    "unit", "backward", True, True,
    "the integral of -sum w dL/dw while all units of a target or the network go from 1 to 0",
    options=("path", "steps"),
)  # fmt: skip
STATISTICS["noisy_grad"] = Statistic(
    "element", "backward", True, True, "dL/dw averaged over noisy weights theta (1 + sigma z)",
    options=("samples", "sigma"),
)  # fmt: skip


@criterion(
    "directional",
    needs={"gate"},
    family="directional",
    linear=True,
    finish="abs",
    members="removal",
    options={"of": "loss", "order": 1},
    allowed={"of": ("loss", "output"), "order": ("1", "2")},
    variants={
        "of=output": {"needs": frozenset({"jvp_output"})},
        "order=2": {"needs": frozenset({"quadratic"}), "finish": "none"},
    },
    formula="|<dL/dtheta, v>|; order=2: <dL/dtheta, v> + 1/2 v'Hv, signed; "
    'of="output": mean over samples of ||J v||_2',
    reference="Baydin et al., Automatic Differentiation: a Survey, 2018, arXiv:1502.05767",
)
def directional(stats: Stats) -> Tensor:
    """The derivative of the loss or output along the direction that removes the unit.

    With the loss this is the first-order Taylor term of the whole data set, its absolute value
    taken last: one backward pass for all units. `order=2` adds the curvature along the same
    direction, exactly and without a matrix, and keeps the sign, as it predicts what
    `finite_difference` measures; it costs a forward, a backward and a second backward pass for
    every unit. `of="output"` asks how fast the output of each sample moves, whatever the labels.

    Use it when the loss is far from a minimum (`of="loss"`), when there are no labels
    (`of="output"`), or, with `order=2`, to rank the units of a small network nearly as well as by
    removing them, where a quadratic is a good picture of the loss.

    Avoid it with `of="loss"` on a network trained to the end: the mean gradient vanishes at a
    minimum, and what is left is noise; `taylor` squares for each sample and does not. A relu has no
    curvature, so that `order=2` does not see the kinks between here and the removal.
    """
    if "quadratic" in stats:
        return stats["quadratic"]
    return stats["jvp_output"] if "jvp_output" in stats else -stats["gate"]


@criterion(
    "finite_difference",
    needs={"ablation"},
    family="directional",
    members="removal",
    options={"step": 1.0, "of": "loss"},
    allowed={"step": (1e-6, 1.0), "of": ("loss", "output")},
    formula='(L(theta + t v) - L(theta)) / t; of="output": mean of ||f(theta + t v) - f(theta)||/t',
    reference="exact ablation: Mozer and Smolensky, Skeletonization, 1989",
)
def finite_difference(stats: Stats) -> Tensor:
    """The change of the loss or output after a step t towards removal; t = 1 is the exact ablation.

    With the loss it is signed: a unit whose removal lowers the loss scores below zero and goes
    first. One forward pass for each unit and batch; units whose activations can be seen share a
    run, which pays for small networks and small batches.

    Use it as the truth against which cheaper criteria are judged, and on networks with up to some
    thousand units, where it is simply affordable.

    Avoid it for single weights and large networks (it refuses to take longer than `max_seconds`),
    with steps near 1e-4 in single precision (the quotient is then mostly rounding), and where
    several units do the same: each alone is harmless, all together are not.
    """
    return stats["ablation"]


@criterion(
    "path_integral",
    needs={"shared_path"},
    family="directional",
    members="removal",
    options={"path": "target", "steps": 8},
    allowed={"path": ("unit", "target", "all"), "steps": (1, 128)},
    variants={"path=unit": {"needs": frozenset({"unit_path"})}},
    formula="integral from 0 to 1 over a of -sum over the unit of w dL/dw, at weights a w of "
    "the unit, its target, or all targets",
    reference="Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, 2017, "
    "arXiv:1703.01365; for the weights instead of the inputs",
)
def path_integral(stats: Stats) -> Tensor:
    """The derivative along the removal, added up from the whole network to the one without.

    The paper integrates over inputs; here the weights go from full to zero, and what the loss gains
    on the way is shared among the units without a remainder: the scores of a target add up to
    L(without all its units) - L(full) with `path="target"`, those of all targets together to
    L(without all of them) - L(full) with `path="all"`. With `path="unit"` each unit goes alone and
    its score is the exact ablation, at many times the price: it is there to check the others.
    The integral is a Gauss-Legendre sum of `steps` points, each one forward and one backward pass
    for each target ("target"), for everything ("all") or for each unit ("unit").

    Use it when a sum that is accounted for matters, or when the gradient at the full network says
    little because the loss has saturated.

    Avoid it for light pruning: on the way out the network passes through states that no pruned
    network will be in, and the scores then speak about removing everything.
    """
    return stats["unit_path"] if "unit_path" in stats else stats["shared_path"]


@criterion(
    "smoothed",
    needs={"weight", "noisy_grad"},
    family="directional",
    finish="abs",
    members="removal",
    options={"samples": 8, "sigma": 0.1},
    allowed={"samples": (1, 1024), "sigma": (0.0, 10.0)},
    formula="|mean over noisy points theta (1 + sigma z) of <dL/dtheta at that point, v>|",
    reference="Smilkov et al., SmoothGrad: Removing Noise by Adding Noise, 2017, arXiv:1706.03825; "
    "with noise on the weights instead of the inputs",
)
def smoothed(stats: Stats) -> Tensor:
    """The derivative towards removal, averaged over random points around the weights.

    The paper adds noise to the input; here every weight is multiplied by 1 + sigma z, so that large
    and small layers are shaken alike. The points depend on the seed only and are the same for
    every batch. `samples` forward and backward passes for each batch.

    Use it when the gradient at the weights themselves is an accident: kinks of relus, or a very
    sharp minimum.

    Avoid it with a sigma so large that the noisy networks no longer work: a look at their loss
    tells. With sigma=0 it is `directional`, at a higher price.
    """
    return -stats["weight"] * stats["noisy_grad"]
