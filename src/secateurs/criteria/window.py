"""Gradient criteria over a window of training steps, instead of at one point.

`score` trains a copy of the weights for `epochs` passes over the batches by plain gradient descent
with learning rate `lr`, one step for each batch, records what it sees, and throws the copy away.
The copy runs in the mode in which the model is scored (batch norm keeps its running statistics in
eval mode), all its weights are trained, and the model itself is untouched. The order and the cut of
the batches matter, as they do in training. `watch` records the same during the user's own training.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import STATISTICS, Statistic, Stats, criterion

STATISTICS["moved"] = Statistic(
    "element", "training", True, True, "sum over training steps of w_t dL/dw_t",
    options=("epochs", "lr"),
)  # fmt: skip
STATISTICS["window_grad"] = Statistic(
    "element", "training", True, True, "mean over training steps of |dL/dw_t|",
    options=("epochs", "lr"),
)  # fmt: skip
STATISTICS["moving_grad"] = Statistic(
    "element", "training", True, True,
    "moving average over training steps of |dL/dw_t| or -w_t dL/dw_t",
    options=("of", "decay", "epochs", "lr"),
)  # fmt: skip

_ALLOWED = {"epochs": (1, 1000), "lr": (0.0, 10.0)}


@criterion(
    "movement",
    needs={"moved"},
    family="gradient",
    options={"epochs": 1, "lr": 0.01},
    allowed=_ALLOWED,
    formula="-sum over the unit and over training steps t of w_t dL/dw_t",
    reference="Sanh, Wolf and Rush, Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020, "
    "arXiv:2005.07683",
)
def movement(stats: Stats) -> Tensor:
    """How far training moves the weights away from zero: those that shrink go first.

    Gradient descent with a small step changes w^2 / 2 by -lr w dL/dw, so the sum over the window is
    what the weights gain or lose in size, and signed. The paper learns the scores while a mask is
    on, with a straight-through gradient; here the window runs without a mask, or with the one that
    `hold_masks` holds while `watch` looks on.

    Use it while a pretrained network is fine-tuned on a new task: the weights then move a lot, and
    where they go says more than where they are.

    Avoid it on a network that is trained to the end: nothing moves but by noise.
    """
    return -stats["moved"]


@criterion(
    "gradient_window",
    needs={"window_grad"},
    family="gradient",
    options={"epochs": 1, "lr": 0.01},
    allowed=_ALLOWED,
    formula="sum over the unit of the mean over training steps t of |dL/dw_t|",
    reference="baseline: the sensitivity of the loss to the weight during training",
)
def gradient_window(stats: Stats) -> Tensor:
    """The mean size of the gradient over a window of training steps.

    As `gradient`, but each step counts by its size, so that gradients of opposite sign do not
    cancel, and at the weights of that step.

    Use it when a gradient threshold is wanted and the full-batch gradient is nearly zero.

    Avoid it as a lone criterion: it does not look at the size of the weight, and batch noise counts
    as much as signal.
    """
    return stats["window_grad"]


@criterion(
    "gradient_ema",
    needs={"moving_grad"},
    family="gradient",
    options={"of": "gradient", "decay": 0.9, "epochs": 1, "lr": 0.01},
    allowed={"of": ("gradient", "movement"), "decay": (0.0, 0.99999), **_ALLOWED},
    formula="sum over the unit of e_T / (1 - decay^T), e_t = decay e_(t-1) + (1 - decay) x_t, "
    'x_t = |dL/dw_t| or, of="movement", -w_t dL/dw_t',
    reference="the first moment of Kingma and Ba, Adam, 2015, arXiv:1412.6980, of sizes",
)
def gradient_ema(stats: Stats) -> Tensor:
    """An exponential moving average of the gradient's size, or of the movement, over training.

    The last 1 / (1 - decay) steps count most; the division undoes the start at zero, as in Adam.

    Use it while training goes on for long and scores are read now and then: old steps fade.

    Avoid it for short windows: with fewer steps than 1 / (1 - decay) it is nearly the mean.
    """
    return stats["moving_grad"]
