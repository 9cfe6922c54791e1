"""How to fine-tune, and what came of it: the nouns of this room."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.errors import ConfigError, choose

__all__ = ["LR_SCHEDULES", "OPTIMIZERS", "EpochRow", "Finetune", "FinetuneResult"]

OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter], Finetune], Optimizer]] = {
    "adam": lambda p, c: torch.optim.Adam(p, lr=c.lr, weight_decay=c.weight_decay),
    "adamw": lambda p, c: torch.optim.AdamW(p, lr=c.lr, weight_decay=c.weight_decay),
    "sgd": lambda p, c: torch.optim.SGD(
        p, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay
    ),
}
"""Optimizer name -> how it is built."""

LR_SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}
"""Learning-rate schedule -> factor at progress (steps done / all steps) in [0, 1)."""


@dataclass(frozen=True)
class Finetune:
    """How to fine-tune. Give `epochs` or `steps`, not both; neither means one epoch.

    Args:
        epochs: passes over the batches; 0 = no training.
        steps: optimizer steps, over as many passes as they need; 0 = no training.
        optimizer: one of `OPTIMIZERS`.
        lr: learning rate, above 0.
        momentum: in [0, 1), for "sgd" only.
        weight_decay: at least 0; decoupled in "adamw", added to the gradient in the others.
        lr_schedule: one of `LR_SCHEDULES`, followed step by step from `lr` towards 0.
        cycles: how often `lr_schedule` runs from start to end, at least 1: with 4 cycles the
            learning rate starts again after each quarter of the steps.
        clip_norm: largest norm of the whole gradient, above 0; None = no clipping.
        patience: stop after this many epochs without a better metric; None = never.
        restore_best: give back the weights of the best epoch instead of the last.
        full_batch: one optimizer step per epoch with the exact gradient of the mean loss over
            all samples, accumulated batch by batch (batch norm still sees single batches).
        accumulate: batches per optimizer step, at least 1; the gradient of a step is the mean over
            all samples of its batches. The last step of an epoch takes the batches that are left.
        distill: weight in [0, 1] of the distillation loss; the task loss has the rest.
        temperature: of the distillation between class probabilities, above 0.
        hidden: weight of the distillation of hidden states, at least 0, added to the rest; 1 weighs
            as much as a student whose hidden states are all zero. See `hidden_loss`.
        hidden_at: names or globs of the modules whose inputs are compared; None = all that read
            units, see `hidden_points`.
        check_every: look every so many steps whether something that was cut leaked, at least 1;
            None = at the end only. See `hold_masks`.

    Raises:
        ConfigError: lists every field that is out of range.

    References:
        Loshchilov and Hutter, SGDR, 2017, arXiv:1608.03983: cosine with several cycles.

    Example:
        >>> Finetune(epochs=3, lr=0.01).epochs
        3
        >>> Finetune(lr=-1, distill=50)
        Traceback (most recent call last):
        secateurs.errors.ConfigError: Finetune: distill must be in [0, 1], got 50; \
lr must be above 0, got -1
    """

    epochs: int | None = None
    steps: int | None = None
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    clip_norm: float | None = None
    patience: int | None = None
    restore_best: bool = False
    full_batch: bool = False
    distill: float = 0.0
    temperature: float = 2.0
    accumulate: int = 1
    cycles: int = 1
    hidden: float = 0.0
    hidden_at: tuple[str, ...] | None = None
    check_every: int | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.optimizer, OPTIMIZERS, "optimizer")
        choose(self.lr_schedule, LR_SCHEDULES, "lr_schedule")
        rules: list[tuple[str, str, Callable[[Any], bool]]] = [
            ("accumulate", "a whole number, at least 1", lambda v: isinstance(v, int) and v >= 1),
            ("check_every", "a whole number, at least 1", lambda v: isinstance(v, int) and v >= 1),
            ("clip_norm", "above 0", lambda v: v > 0),
            ("cycles", "a whole number, at least 1", lambda v: isinstance(v, int) and v >= 1),
            ("distill", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("epochs", "a whole number, at least 0", lambda v: isinstance(v, int) and v >= 0),
            ("hidden", "at least 0", lambda v: v >= 0),
            ("lr", "above 0", lambda v: v > 0),
            ("momentum", "in [0, 1)", lambda v: 0 <= v < 1),
            ("patience", "a whole number, at least 1", lambda v: isinstance(v, int) and v >= 1),
            ("steps", "a whole number, at least 0", lambda v: isinstance(v, int) and v >= 0),
            ("temperature", "above 0", lambda v: v > 0),
            ("weight_decay", "at least 0", lambda v: v >= 0),
        ]
        problems = [
            f"{name} must be {rule}, got {value!r}"
            for name, rule, holds in rules
            if (value := getattr(self, name)) is not None and not (_number(value) and holds(value))
        ]
        if self.epochs is not None and self.steps is not None:
            problems.append("give epochs or steps, not both")
        if self.momentum and self.optimizer != "sgd":
            problems.append(f"momentum belongs to optimizer='sgd', not {self.optimizer!r}")
        if self.full_batch and self.accumulate != 1:
            problems.append("full_batch accumulates all batches already: leave accumulate away")
        if self.cycles != 1 and self.lr_schedule == "constant":
            problems.append("cycles has no effect on lr_schedule='constant': give 'cosine'")
        if self.hidden_at is not None and not self.hidden:
            problems.append("hidden_at has no effect without hidden: give hidden=1.0")
        if problems:
            raise ConfigError("Finetune: " + "; ".join(problems))

    @property
    def distills(self) -> bool:
        """Whether there is something to learn from a teacher."""
        return self.distill > 0 or self.hidden > 0

    @property
    def n_epochs(self) -> int | None:
        """Passes to make; None when `steps` decides."""
        return None if self.steps is not None else 1 if self.epochs is None else self.epochs


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class EpochRow:
    """One pass over the batches.

    Attributes:
        epoch: from 1.
        train_loss: sample-weighted mean of the loss that was minimised, in training mode and
            before each step.
        metric: main metric after the epoch; None without `evaluate`.
        lr: learning rate of the epoch's first step (first parameter group).
    """

    epoch: int
    train_loss: float
    metric: float | None
    lr: float


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning did.

    Attributes:
        history: one row per epoch; the last may be a partial pass when `steps` ends it.
        best_metric: best metric of any epoch. It was chosen on this data: report another split.
        best_epoch: where it was first reached; 0 = no epoch was trained.
        final_metric: metric after the last epoch, also when the best weights were restored.
        steps: optimizer steps.
        stopped_early: whether patience ended the training.
        seconds: wall time, with evaluation.
        masks: what was held at the end; a `Part` may have moved them.
    """

    history: tuple[EpochRow, ...]
    best_metric: float | None
    best_epoch: int | None
    final_metric: float | None
    steps: int
    stopped_early: bool
    seconds: float
    masks: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
