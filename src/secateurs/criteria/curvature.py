"""Criteria from the curvature of the loss, and from how its gradient would change.

Near trained weights the first derivative says little: removing the weights w of a unit changes the
loss by about -g'w + 1/2 w'Hw, and g is nearly zero. The family estimates the second term: by the
squares of gradients (`fisher`), by products with the Hessian (`obd`, `taylor_second`), by small
matrices for each layer (`kfac`), or by blocks in which the remaining weights may answer (`obs`).
`grasp` asks something else: how a removal changes the size of the gradient, the speed of training.

The squared derivative of a gate on the whole unit, E[(sum_u w g)^2], is the Fisher information of
removing it (Kwon et al., 2022, arXiv:2204.09656). That is `taylor`; half of it is the predicted
increase of the loss. `fisher` differs: each weight is squared before the sum.
"""

from __future__ import annotations

import math

from torch import Tensor

from secateurs.criteria.registry import STATISTICS, Statistic, Stats, criterion

STATISTICS["curvature"] = Statistic(
    "unit", "second order", True, True,
    "w' H w of the weights w of each unit, estimated with random signs", options=("probes",),
)  # fmt: skip
STATISTICS["slope"] = Statistic(
    "unit", "second order", True, True,
    "w' dL/dw of each unit, from the run that also gives its curvature", options=("probes",),
)  # fmt: skip
STATISTICS["whole_gradient"] = Statistic(
    "element", "backward", True, True, "dL/dw of every parameter of the model, scored or not"
)
STATISTICS["gradient_flow"] = Statistic(
    "element", "second order", True, True,
    "H g: the Hessian times the mean gradient of the whole model, in a second pass",
)  # fmt: skip
STATISTICS["kronecker"] = Statistic(
    "unit", "backward", True, True,
    "1/2 w' F w, F the Kronecker-factored Fisher of each layer", options=("compensate", "damping"),
)  # fmt: skip
STATISTICS["blocks"] = Statistic(
    "unit", "backward", True, True,
    "w^2 / (2 [F^-1]_qq), F the empirical Fisher in blocks",
    options=("block", "gradients", "damping"),
)  # fmt: skip
STATISTICS["gauss_newton"] = Statistic(
    "unit", "backward", True, False,
    "j' H_i j, mean over samples: j the derivative of the outputs to scaling the unit, H_i the "
    "second derivative of the loss with respect to them",
    options=("probes",),
)  # fmt: skip
STATISTICS["output_slope"] = Statistic(
    "unit", "backward", True, False,
    "w' dL/dw of each unit, from the run that also gives gauss_newton", options=("probes",),
)  # fmt: skip

HALF = math.sqrt(0.5)
_LECUN = "LeCun, Denker and Solla, Optimal Brain Damage, 1989"
_GRASP = (
    "Wang, Zhang and Grosse, Picking Winning Tickets Before Training by Preserving Gradient Flow, "
    "2020, arXiv:2002.07376"
)


@criterion(
    "fisher",
    needs={"gate"},
    family="curvature",
    linear=True,
    finish="square",
    finish_on="element",
    average="sample",
    members="removal",
    formula="1/2 sum over the unit of w^2 mean over samples of (dL/dw)^2",
    reference=f"{_LECUN}, with the Fisher information for the Hessian; Theis et al., Faster gaze "
    "prediction with dense networks and Fisher pruning, 2018, arXiv:1801.05787",
)
def fisher(stats: Stats) -> Tensor:
    """The diagonal of the empirical Fisher information: half of w^2 times the squared gradient.

    Optimal Brain Damage with the Fisher information in place of the Hessian. It is never negative,
    and does not vanish at a minimum, because every sample is squared by itself. For whole units
    `taylor` is the sister with cross terms: its square comes after the sum over the unit, and half
    of it is the Fisher information of a gate on the unit.

    Use it for single weights of a trained network, where it is the standard cheap curvature.

    Avoid it for units whose weights act together: the cross terms that it drops are then most of
    the effect, and `taylor` keeps them at less cost.
    """
    return -HALF * stats["gate"]


@criterion(
    "fisher_batch",
    needs={"gate"},
    family="curvature",
    linear=True,
    finish="square",
    finish_on="element",
    average="batch",
    members="removal",
    formula="1/2 sum over the unit of w^2 mean over batches of (dL/dw)^2",
    reference=f"{_LECUN}; squared for each batch, as common implementations do",
)
def fisher_batch(stats: Stats) -> Tensor:
    """As `fisher`, squared for each batch: one ordinary backward pass, and smaller values.

    The gradient of a batch is a mean, so its square is about 1/n of that of a sample, plus the
    square of the full gradient: far from a minimum the two rank differently. `taylor_element` is
    twice this.

    Use it when gradients of single samples are too slow.

    Avoid it when scores must not depend on the batch size.
    """
    return -HALF * stats["gate"]


@criterion(
    "obd",
    needs={"curvature"},
    family="curvature",
    members="removal",
    options={"probes": 4},
    allowed={"probes": (1, 1024)},
    formula="1/2 w'Hw of each unit (one weight: 1/2 h w^2), mean over probes of z_u w_u'(H v) with "
    "v = sum of z_u w_u, z_u random signs",
    reference=f"{_LECUN}; the estimate: Hutchinson, 1990; Bekas et al., 2007",
)
def obd(stats: Stats) -> Tensor:
    """Half the second derivative of the loss along the removal of the unit, with the true Hessian.

    The paper has the diagonal of the Gauss-Newton matrix by its own backward pass, and single
    weights. Here one product of the full Hessian with a direction of random signs serves all units
    at once; the mean over the signs is exact, cross terms inside the unit included, and `probes`
    products are averaged. Where the loss curves down, the score is negative.

    Use it on converged networks, where the gradient is nearly zero and curvature is all there is.

    Avoid it with few probes in large networks: cross terms of all other units are the noise, and it
    grows with their number. For units `gauss_newton` is cheaper and far steadier, for single
    weights `fisher`.
    """
    return 0.5 * stats["curvature"]


@criterion(
    "taylor_second",
    needs={"slope", "curvature"},
    family="curvature",
    members="removal",
    options={"probes": 4},
    allowed={"probes": (1, 1024)},
    formula="-w'g + 1/2 w'Hw of each unit, the second term estimated as in obd",
    reference="Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, "
    "arXiv:1906.10771",
)
def taylor_second(stats: Stats) -> Tensor:
    """The predicted change of the loss when the unit is removed, to second order.

    Signed, as the exact ablation is: a unit whose removal should lower the loss goes first. The
    paper multiplies each weight with the product of H and *all* weights and squares the result;
    that also counts what other units would do if they were removed as well. Random signs restrict
    the product to the unit itself, which agrees better with the exact ablation.

    Use it where the second derivatives of the network itself matter (smooth activation functions,
    gating), with many probes.

    Avoid it where a few probes are all that can be paid: their noise then outweighs what they add,
    and `gauss_newton` comes nearer to the exact ablation.
    """
    return -stats["slope"] + 0.5 * stats["curvature"]


@criterion(
    "gauss_newton",
    needs={"output_slope", "gauss_newton"},
    family="curvature",
    members="removal",
    options={"probes": 1},
    allowed={"probes": (1, 1024)},
    formula="-w'g + 1/2 mean over samples of j' H_i j, j = df/dgate of the unit, H_i = d2l/df2",
    reference="Schraudolph, Fast Curvature Matrix-Vector Products for Second-Order Gradient "
    "Descent, 2002; the part of the Hessian that Optimal Brain Damage keeps (LeCun et al., 1989)",
)
def gauss_newton(stats: Stats) -> Tensor:
    """The predicted change of the loss when the unit is removed: its slope and its curvature.

    The curvature is that of the loss with respect to the outputs, carried back to the gate of the
    unit. What it leaves out are second derivatives of the network itself, which are zero along the
    gate of a unit in networks of relu. It costs one backward pass more than `taylor`, whatever the
    number of classes: vectors with random signs whose squares have the Hessian of each sample's
    loss as their mean are sent back through the network. No sample and no unit disturbs another.
    Signed, as the exact ablation is.

    Use it for units of any trained classifier or regressor: of all criteria that cost about two
    passes it comes nearest to the exact ablation.

    Avoid it when the loss is computed inside the model, which hides the outputs: it says so. Units
    of recurrent layers are seen one sample at a time, which is slow.
    """
    return -stats["output_slope"] + 0.5 * stats["gauss_newton"]


@criterion(
    "kfac",
    needs={"kronecker"},
    family="curvature",
    options={"compensate": "none", "damping": 0.01},
    allowed={"compensate": ("none", "others"), "damping": (1e-12, 1e6)},
    formula="weight: 1/2 w_ij^2 S_ii A_jj; unit with rows R: 1/2 tr(S_RR W_R A W_R'); "
    'compensate="others": 1 / [S^-1]_ii for S_ii, 1 / [A^-1]_jj for A_jj',
    reference="Wang, Grosse, Fidler and Zhang, EigenDamage: Structured Pruning in the "
    "Kronecker-Factored Eigenbasis, 2019, arXiv:1905.05934; convolutions: Grosse and Martens, "
    "2016, arXiv:1602.01407",
)
def kfac(stats: Stats) -> Tensor:
    """The curvature of whole output rows, from two small matrices for each layer.

    The Fisher of a layer is taken as A (x) S: A the second moments of its inputs, summed over
    positions, S those of its output gradients, their mean over positions and samples. A unit is
    scored by its rows in linear and convolution layers; scales and shifts of norms do not count.
    For a unit nothing but outputs and their gradients is needed: w'Aw is the second moment of the
    output itself, bias included, so that it costs about as much as `taylor`. With
    compensate="others" (C-OBS in the paper; C-OBD is the default) what stays may answer, and the
    inverses, damped by `damping` times the mean of the diagonal, take the place of the diagonals.

    The method that gives the paper its name rotates each layer into the eigenbasis of A and S and
    prunes rows and columns there. Its units are not those of the model: each layer becomes three,
    the outer two rotations. We do not build it, because then nothing is removed from the model that
    was given; score and plan would speak of layers that it does not have.

    Use it for units of convolutions and linear layers with wide inputs, and for weights when
    gradients of single samples are too slow: it needs one ordinary backward pass.

    Avoid it where inputs and output gradients of a layer depend on each other strongly (gating,
    attention), and for recurrent layers, which it refuses.
    """
    return stats["kronecker"]


@criterion(
    "obs",
    needs={"blocks"},
    family="curvature",
    granularities=("weight",),
    options={"block": 64, "gradients": "sample", "damping": 0.01},
    allowed={"block": (1, 4096), "gradients": ("sample", "batch"), "damping": (1e-12, 1e6)},
    formula="w_q^2 / (2 [F^-1]_qq), F = damping + mean of g g' in blocks of a row",
    reference="Hassibi and Stork, Optimal Brain Surgeon, 1992; Singh and Alistarh, WoodFisher: "
    "Efficient Second-Order Approximation for Neural Network Compression, 2020, arXiv:2004.14340",
)
def obs(stats: Stats) -> Tensor:
    """The least increase of the loss when a weight goes and the others of its block answer.

    F is the empirical Fisher information in blocks of `block` consecutive weights of a row, over
    gradients of samples or of batches. WoodFisher inverts it by a recursion over samples and damps
    it by a constant; we keep the sums, which merge exactly, invert them once, and damp in units of
    the mean of the diagonal. `secateurs.statistics.blocks.obs_update` computes the answer of the
    weights that stay; without it the score promises more than the mask keeps. For whole rows
    nothing stays in their blocks that could answer: there is no such criterion for units.

    Use it for single weights of a trained network, in several steps, with `obs_update` after each.

    Avoid it for large layers when memory is short: it keeps `block` numbers for every weight.
    """
    return stats["blocks"]


@criterion(
    "grasp",
    needs={"weight", "gradient_flow"},
    family="curvature",
    members="removal",
    formula="sum over the unit of w (H g), g the mean gradient of the whole model",
    reference=_GRASP,
)
def grasp(stats: Stats) -> Tensor:
    """How much of the squared gradient norm would go with the unit: what training still needs.

    Removing w changes ||g||^2 / 2 by about -w'(Hg). The paper calls that S and removes the
    *largest* S; our score is -S, so that larger = keep. Units below zero slow training down. g is
    the gradient of all parameters over all batches, which takes a first pass over them; the paper
    uses one batch, the weights of linear and convolution layers, and divides the logits by 200:
    do that in `loss_fn` if you want it.

    Use it before training, on an untrained network.

    Avoid it after training: at a minimum g is noise, and the loss itself is not asked about.
    """
    return stats["weight"] * stats["gradient_flow"]


@criterion(
    "grasp_abs",
    needs={"weight", "gradient_flow"},
    family="curvature",
    finish="abs",
    members="removal",
    formula="|sum over the unit of w (H g)|",
    reference=f"{_GRASP}; the absolute value: de Jorge et al., Progressive Skeletonization, 2021, "
    "arXiv:2006.09081",
)
def grasp_abs(stats: Stats) -> Tensor:
    """As `grasp`, by size: what changes the gradient most, in either direction, is kept.

    `grasp` keeps the weights whose removal would lower the gradient norm, and first cuts those
    whose removal would raise it. Here both are kept: what goes is what the gradient does not see.

    Use it before training where `grasp` empties whole layers at high sparsity.

    Avoid it after training, as `grasp`.
    """
    return stats["weight"] * stats["gradient_flow"]
