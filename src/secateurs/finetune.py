"""Fine-tuning: train a model, masked or not, while the cut heals.

    finetune(model, batches, loss_fn, Finetune(epochs=3), masks=plan.masks) -> FinetuneResult

The reference loop: plain, checked, in place. `Finetune` says how to train and is a recipe block;
everything that is an object (masks, teacher, evaluation) is an argument. A user with a loop of
their own needs only `hold_masks` from the room before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from secateurs.batches import (
    batch_size,
    call_model,
    checked_loss,
    in_mode,
    iterate,
    model_device,
    tensors,
)
from secateurs.errors import CaptureError, ConfigError, DataError, ScoringError, choose
from secateurs.masks import check_masks, hold_masks, named_tensors
from secateurs.types import Batches, Evaluate, Inputs, LossFn

__all__ = [
    "LR_SCHEDULES",
    "OPTIMIZERS",
    "EpochRow",
    "Finetune",
    "FinetuneResult",
    "distillation_loss",
    "finetune",
]

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
        clip_norm: largest norm of the whole gradient, above 0; None = no clipping.
        patience: stop after this many epochs without a better metric; None = never.
        restore_best: give back the weights of the best epoch instead of the last.
        full_batch: one optimizer step per epoch with the exact gradient of the mean loss over
            all samples, accumulated batch by batch (batch norm still sees single batches).
        distill: weight in [0, 1] of the distillation loss; the task loss has the rest.
        temperature: of the distillation between class probabilities, above 0.

    Raises:
        ConfigError: lists every field that is out of range.

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

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.optimizer, OPTIMIZERS, "optimizer")
        choose(self.lr_schedule, LR_SCHEDULES, "lr_schedule")
        rules: list[tuple[str, str, Callable[[Any], bool]]] = [
            ("clip_norm", "above 0", lambda v: v > 0),
            ("distill", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("epochs", "a whole number, at least 0", lambda v: isinstance(v, int) and v >= 0),
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
        if problems:
            raise ConfigError("Finetune: " + "; ".join(problems))

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
    """

    history: tuple[EpochRow, ...]
    best_metric: float | None
    best_epoch: int | None
    final_metric: float | None
    steps: int
    stopped_early: bool
    seconds: float


def finetune(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    config: Finetune,
    *,
    masks: Mapping[str, Tensor] | None = None,
    teacher: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    maximize: bool = True,
    optimizer: Optimizer | None = None,
    seed: int | None = None,
    progress: Callable[[EpochRow], object] | None = None,
) -> FinetuneResult:
    """Train `model` IN PLACE and say what happened.

    Only parameters that require gradients are trained. Modules are in training mode meanwhile, each
    gets its own mode back, and gradients are None at the end. Shuffling is the loader's business.

    When the loss, the weights or the metric stop being finite, the model gets back the weights and
    buffers it came with. After any other exception, KeyboardInterrupt included, it keeps what was
    learned so far: masked entries are zero, hooks are gone, modes are restored.

    Args:
        model: trained in place.
        batches: re-iterable of `(inputs, targets)`.
        loss_fn: `loss_fn(outputs, targets)`, mean over the samples of the batch.
        config: how to train.
        masks: as in `hold_masks`: removed entries stay zero, checked at the end.
        teacher: the model to distill from when `config.distill` is above 0, on the same device;
            run in eval mode and never changed. See `distillation_loss`.
        evaluate: called after each epoch, model in eval mode, without gradients; returns a float
            or a dict whose first entry is the main metric.
        maximize: whether a larger metric is better.
        optimizer: replaces the one that `config` describes (its `optimizer`, `lr`, `momentum` and
            `weight_decay` are then not read). Its learning rates are restored at the end, its
            state stays, also after a failure.
        seed: run under this random state (dropout, loaders without a generator) and leave the
            caller's as it was; None = use and advance the caller's.
        progress: called with each finished `EpochRow`; None = silent.

    Raises:
        ConfigError: arguments that contradict each other, or masks that do not fit.
        DataError, CaptureError: a batch does not fit the model or the loss.
        ScoringError: loss, weights or metric not finite; names epoch and batch.
        SoundnessError: a removed entry is not zero at the end.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> data = [(torch.ones(4, 2), torch.zeros(4, 1))]
        >>> config = Finetune(epochs=20, lr=0.1)
        >>> result = finetune(layer, data, nn.functional.mse_loss, config)
        >>> result.history[-1].train_loss < result.history[0].train_loss
        True
    """
    started = time.perf_counter()
    _check_arguments(model, batches, config, teacher, evaluate)
    optimizer = optimizer or _build_optimizer(model, config)
    before = _snapshot(model)
    loop = _Loop(model, loss_fn, config, teacher, evaluate, maximize, optimizer)
    loop.n_steps = _n_steps(config, batches)
    try:
        with ExitStack() as stack:
            stack.enter_context(_random_state(seed))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(in_mode(model, training=True))
            if teacher is not None:
                stack.enter_context(in_mode(teacher, training=False))
            stack.enter_context(hold_masks(model, optimizer, masks or {}))
            for row in loop.epochs(batches):
                if progress is not None:
                    progress(row)
            loop.finish()
            check_masks(model, masks or {})
    except ScoringError as error:
        _restore(model, before)
        raise ScoringError(
            f"fine-tuning, {error}. The model has its weights from before; "
            "a smaller lr or clip_norm=1.0 may help"
        ) from error
    finally:
        loop.set_lr(1.0)
        _clear_gradients(model)
    return loop.result(time.perf_counter() - started)


def distillation_loss(
    outputs: Any, teacher_outputs: Any, targets: Any, temperature: float = 2.0
) -> Tensor:
    """How far a model is from its teacher: a scalar, 0 when the outputs are equal.

    Class labels (an integer tensor of the shape of the outputs without their class dimension, at
    least two classes): KL(softmax(teacher/T) || softmax(student/T)) x T^2, mean over the labelled
    positions; those with a negative label (padding) do not count. Classes are dimension 1 as in
    `cross_entropy`, or the last one. Everything else, single-logit binary outputs included: mean
    squared error between the outputs. Outputs that are not a tensor count by their `logits`, or
    else by their first tensor.

    Args:
        outputs: of the student.
        teacher_outputs: of the teacher, same shape.
        targets: decide only which rule applies, and which positions count.
        temperature: above 0.

    Raises:
        DataError: student and teacher outputs differ in shape, or the class dimension is
            ambiguous because both candidates have the same size.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> distillation_loss(logits, logits, torch.tensor([0])).item()
        0.0

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
        arXiv:1503.02531.
    """
    student, reference = _main_output(outputs), _main_output(teacher_outputs)
    if student.shape != reference.shape:
        raise DataError(
            f"student outputs {tuple(student.shape)} and teacher outputs "
            f"{tuple(reference.shape)} must have one shape to distill"
        )
    dim = _class_dim(student, targets)
    if dim is None:
        return functional.mse_loss(student, reference)
    pointwise = functional.kl_div(
        (student / temperature).log_softmax(dim),
        (reference / temperature).log_softmax(dim),
        reduction="none",
        log_target=True,
    ).sum(dim)  # classes summed -> shape of targets
    labelled = targets >= 0
    mean: Tensor = pointwise[labelled].sum() / labelled.sum().clamp(min=1)
    return mean * temperature**2


def _main_output(outputs: Any) -> Tensor:
    """The tensor to compare: the output itself, its logits, or its first tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else tensors(outputs)[0]


def _class_dim(outputs: Tensor, targets: Any) -> int | None:
    """The dimension of `outputs` that holds classes for integer labels; None when there is none."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or outputs.dim() < 2:
        return None
    shape = outputs.shape
    fits = [
        dim
        for dim in sorted({1, outputs.dim() - 1})
        if shape[dim] >= 2 and shape[:dim] + shape[dim + 1 :] == targets.shape
    ]
    if len(fits) > 1:
        raise DataError(
            f"outputs {tuple(shape)} with labels {tuple(targets.shape)}: classes may be dimension "
            f"1 or {fits[1]}. Flatten both, so that outputs are (positions, classes)"
        )
    return fits[0] if fits else None


@dataclass
class _Loop:
    """One run: the only mutable state beside the model and its optimizer."""

    model: nn.Module
    loss_fn: LossFn
    config: Finetune
    teacher: nn.Module | None
    evaluate: Evaluate | None
    maximize: bool
    optimizer: Optimizer | None
    n_steps: int | None = None
    steps: int = 0
    stopped_early: bool = False
    best: EpochRow | None = None
    best_state: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.history: list[EpochRow] = []
        self.groups = self.optimizer.param_groups if self.optimizer else []
        self.base_lrs = [group["lr"] for group in self.groups]
        self.trained = [p for group in self.groups for p in group["params"]]

    def epochs(self, batches: Batches) -> Iterator[EpochRow]:
        """Train; yield a row after each pass."""
        config = self.config
        last, last_step = config.n_epochs, config.steps
        while not self.stopped_early and self.optimizer is not None:
            epoch = len(self.history) + 1
            if (last is not None and epoch > last) or self.steps == last_step:
                return
            self.set_lr()
            lr = float(self.groups[0]["lr"])
            loss = self._pass(batches, epoch, self.optimizer)
            if not all(torch.isfinite(p).all() for p in self.trained):
                raise ScoringError(f"epoch {epoch}: weights are not finite after its last step")
            row = EpochRow(epoch, loss, self._metric(epoch), lr)
            self._note(row)
            yield row

    def _pass(self, batches: Batches, epoch: int, optimizer: Optimizer) -> float:
        total, n = 0.0, 0
        _clear_gradients(self.model)
        for i, (inputs, targets) in enumerate(iterate(batches, model_device(self.model))):
            where = f"epoch {epoch}, batch {i}"
            loss = checked_loss(
                self.model, (inputs, targets), self._objective(inputs, where), where
            )
            size = batch_size(inputs)
            total, n = total + loss.item() * size, n + size
            if self.config.full_batch:
                torch.autograd.backward(loss * size)
                continue
            torch.autograd.backward(loss)
            self._step(optimizer)
            if self.steps == self.config.steps:
                break
        if self.config.full_batch:
            for parameter in self.trained:
                if parameter.grad is not None:
                    parameter.grad.div_(n)
            self._step(optimizer)
        return total / n

    def _objective(self, inputs: Inputs, where: str) -> LossFn:
        """The loss to minimise for these inputs: task loss and distillation, weighted."""
        if self.teacher is None:
            return self.loss_fn
        weight, temperature = self.config.distill, self.config.temperature
        try:
            with torch.no_grad():
                reference = call_model(self.teacher, inputs)
        except Exception as error:
            raise CaptureError(f"{where}: the teacher refuses the inputs: {error}") from error

        def objective(outputs: Any, targets: Any) -> Tensor:
            task = self.loss_fn(outputs, targets)
            away = distillation_loss(outputs, reference, targets, temperature)
            return (1 - weight) * task + weight * away

        return objective

    def _step(self, optimizer: Optimizer) -> None:
        self.set_lr()
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.config.clip_norm)
        optimizer.step()
        self.steps += 1
        _clear_gradients(self.model)

    def set_lr(self, factor: float | None = None) -> None:
        """Set the learning rates for the next step, or to a factor of the given ones."""
        if factor is None:
            progress = min(self.steps / self.n_steps, 1.0) if self.n_steps else 0.0
            factor = LR_SCHEDULES[self.config.lr_schedule](progress)
        for group, base in zip(self.groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def _metric(self, epoch: int) -> float | None:
        """The main metric now, checked to be finite."""
        if self.evaluate is None:
            return None
        with in_mode(self.model, training=False), torch.no_grad():
            answer = self.evaluate(self.model)
        if isinstance(answer, Mapping):
            if not answer:
                raise ConfigError("evaluate returned an empty dict; its first entry is the metric")
            answer = next(iter(answer.values()))
        if not math.isfinite(answer):
            raise ScoringError(f"epoch {epoch}: evaluate returned {answer}")
        return float(answer)

    def _note(self, row: EpochRow) -> None:
        """Record an epoch; keep the best one; see whether patience has run out."""
        self.history.append(row)
        if row.metric is None:
            return
        sign = 1 if self.maximize else -1
        best = -math.inf if self.best is None else sign * (self.best.metric or 0.0)
        if self.best is None or sign * row.metric > best:
            self.best = row
            self.best_state = _snapshot(self.model) if self.config.restore_best else None
        patience = self.config.patience
        self.stopped_early = patience is not None and row.epoch - self.best.epoch >= patience

    def finish(self) -> None:
        """Load the best weights if asked; without any epoch, evaluate the model as it is."""
        if self.best_state is not None:
            _restore(self.model, self.best_state)
        if not self.history and self.evaluate is not None:
            self.best = EpochRow(0, math.nan, self._metric(0), 0.0)

    def result(self, seconds: float) -> FinetuneResult:
        """What is told to the caller."""
        best, last = self.best, self.history[-1] if self.history else self.best
        return FinetuneResult(
            history=tuple(self.history),
            best_metric=best.metric if best else None,
            best_epoch=best.epoch if best else None,
            final_metric=last.metric if last else None,
            steps=self.steps,
            stopped_early=self.stopped_early,
            seconds=seconds,
        )


def _check_arguments(
    model: nn.Module,
    batches: Batches,
    config: Finetune,
    teacher: nn.Module | None,
    evaluate: Evaluate | None,
) -> None:
    """Raise one error for all arguments that contradict each other."""
    problems = []
    if config.distill > 0 and teacher is None:
        problems.append(f"distill={config.distill:g} needs teacher=, the model to distill from")
    if teacher is not None and config.distill == 0:
        problems.append("a teacher without effect: set Finetune(distill=) above 0")
    if teacher is model:
        problems.append("teacher is the model itself: give copy.deepcopy of the dense model")
    if evaluate is None and (config.patience is not None or config.restore_best):
        problems.append("patience and restore_best need evaluate=")
    if problems:
        raise ConfigError("finetune: " + "; ".join(problems))
    if isinstance(batches, Iterator):
        raise DataError("batches can be read only once (a generator): pass a list or a DataLoader")


def _build_optimizer(model: nn.Module, config: Finetune) -> Optimizer | None:
    """The configured optimizer; None when there is no step to take."""
    if config.steps == 0 or config.n_epochs == 0:
        return None
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter of the model requires a gradient: nothing to train")
    return OPTIMIZERS[config.optimizer](trainable, config)


def _n_steps(config: Finetune, batches: Batches) -> int | None:
    """Optimizer steps of the whole run, for the learning rate; None when it needs no number."""
    if config.lr_schedule == "constant" or config.n_epochs is None:
        return config.steps
    if config.full_batch:
        return config.n_epochs
    try:
        return config.n_epochs * len(batches)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(
            f"lr_schedule={config.lr_schedule!r} needs the number of steps, and these batches have "
            "no length: give steps= instead of epochs="
        ) from None


@contextmanager
def _random_state(seed: int | None) -> Iterator[None]:
    """Run under a seed and restore the caller's random state; None = the caller's own."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers by name."""
    return {name: t.detach().clone() for name, t in named_tensors(model).items()}


@torch.no_grad()
def _restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write a snapshot back in place."""
    for name, tensor in named_tensors(model).items():
        tensor.copy_(state[name])
