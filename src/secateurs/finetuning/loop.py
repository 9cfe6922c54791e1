"""The training loop: one plain pass after another, checked at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.batches import (
    batch_size,
    checked_loss,
    in_mode,
    iterate,
    model_device,
)
from secateurs.errors import ConfigError, DataError, ScoringError
from secateurs.finetuning.clock import Clock, clock_of, lr_factor
from secateurs.finetuning.config import OPTIMIZERS, EpochRow, Finetune, FinetuneResult
from secateurs.finetuning.distillation import Distillation, taught_by
from secateurs.finetuning.parts import Part, Training
from secateurs.finetuning.state import restore_, snapshot
from secateurs.masks import HeldMasks, hold_masks
from secateurs.types import Batches, Evaluate, LossFn

__all__ = ["finetune"]


def finetune(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    config: Finetune,
    *,
    masks: Mapping[str, Tensor] | None = None,
    teacher: nn.Module | Distillation | None = None,
    evaluate: Evaluate | None = None,
    maximize: bool = True,
    optimizer: Optimizer | None = None,
    seed: int | None = None,
    recut: Callable[[int], Mapping[str, Tensor] | None] | None = None,
    parts: Sequence[Part] = (),
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
        teacher: the model to distill from when `config.distill` or `config.hidden` is above 0, on
            the same device; run in eval mode and never changed. Hidden states need its graph too:
            give `distillation(teacher, config, graph=..., plan=...)`.
        evaluate: called after each epoch, model in eval mode, without gradients; returns a float
            or a dict whose first entry is the main metric.
        maximize: whether a larger metric is better.
        optimizer: replaces the one that `config` describes (its `optimizer`, `lr`, `momentum` and
            `weight_decay` are then not read). Its learning rates are restored at the end, its
            state stays, also after a failure.
        seed: run under this random state (dropout, loaders without a generator) and leave the
            caller's as it was; None = use and advance the caller's.
        recut: called before each optimizer step with the number of steps done so far, 0 at first,
            model in training mode; may return larger masks, which are held from then on, or None.
            Masks only grow: see `HeldMasks`. The best epoch is then the best after the last cut.
        parts: what takes part in each step beside the loss, in this order: see `Part`.
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
    if recut is not None and config.patience is not None:
        raise ConfigError("finetune: patience could stop before the last recut; leave it away")
    clock = clock_of(config, batches)
    optimizer = optimizer or _build_optimizer(model, config)
    before = snapshot(model)
    taught = None if teacher is None else taught_by(teacher, model, config)
    loop = _Loop(
        model, loss_fn, config, taught, evaluate, maximize, optimizer, clock, recut, tuple(parts)
    )
    try:
        with ExitStack() as stack:
            stack.enter_context(_random_state(seed))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(in_mode(model, training=True))
            if taught is not None:
                stack.enter_context(taught)
            loop.held = stack.enter_context(hold_masks(model, optimizer, masks or {}))
            if optimizer is not None:
                for part in loop.parts:
                    part.start(Training(model, optimizer, loop.held, clock.n_steps))
            for row in loop.epochs(batches):
                if progress is not None:
                    progress(row)
            loop.finish()
            loop.held.check()
    except ScoringError as error:
        restore_(model, before)
        raise ScoringError(
            f"fine-tuning, {error}. The model has its weights from before; "
            "a smaller lr or clip_norm=1.0 may help"
        ) from error
    finally:
        loop.set_lr(1.0)
        _clear_gradients(model)
    return loop.result(time.perf_counter() - started)


@dataclass
class _Loop:
    """One run: the only mutable state beside the model and its optimizer."""

    model: nn.Module
    loss_fn: LossFn
    config: Finetune
    teacher: Distillation | None
    evaluate: Evaluate | None
    maximize: bool
    optimizer: Optimizer | None
    clock: Clock
    recut: Callable[[int], Mapping[str, Tensor] | None] | None
    parts: tuple[Part, ...]
    held: HeldMasks | None = None
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
        """One pass: a step after each group of batches; the last group may be smaller."""
        total, n, group, in_group = 0.0, 0, 0, 0
        _clear_gradients(self.model)
        for i, (inputs, targets) in enumerate(iterate(batches, model_device(self.model))):
            if not group:
                self._cut()
                for part in self.parts:
                    part.begin(self.steps)
            where = f"epoch {epoch}, batch {i}"
            objective = self.loss_fn
            if self.teacher is not None:
                objective = self.teacher.objective(self.loss_fn, inputs, where)
            loss = checked_loss(self.model, (inputs, targets), objective, where)
            size = batch_size(inputs)
            total, n = total + loss.item() * size, n + size
            if self.config.full_batch or self.config.accumulate > 1:
                torch.autograd.backward(loss * size)
                group, in_group = group + 1, in_group + size
                if self.config.full_batch or group < self.config.accumulate:
                    continue
                self._mean_over(in_group)
            else:
                torch.autograd.backward(loss)
            self._step(optimizer)
            group, in_group = 0, 0
            if self.steps == self.config.steps:
                break
        if group:
            self._mean_over(in_group)
            self._step(optimizer)
        return total / n

    def _mean_over(self, n: int) -> None:
        """From the gradient of a sum over samples to that of their mean."""
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad.div_(n)

    def _cut(self) -> None:
        """Ask whether more is to be removed before the next step."""
        larger = None if self.recut is None else self.recut(self.steps)
        if larger is not None:
            assert self.held is not None
            self.held.grow(larger)
            self.best, self.best_state = None, None  # they belong to a larger network

    def _step(self, optimizer: Optimizer) -> None:
        self.set_lr()
        for part in self.parts:
            part.gradients(self.steps)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.config.clip_norm)
        optimizer.step()
        self.steps += 1
        for part in self.parts:
            part.stepped(self.steps)
        _clear_gradients(self.model)

    def set_lr(self, factor: float | None = None) -> None:
        """Set the learning rates for the next step, or to a factor of the given ones."""
        if factor is None:
            factor = lr_factor(self.config, self.clock, self.steps)
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
            self.best_state = snapshot(self.model) if self.config.restore_best else None
        patience = self.config.patience
        self.stopped_early = patience is not None and row.epoch - self.best.epoch >= patience

    def finish(self) -> None:
        """Load the best weights if asked; without any epoch, evaluate the model as it is."""
        if self.best_state is not None:
            restore_(self.model, self.best_state)
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
    teacher: nn.Module | Distillation | None,
    evaluate: Evaluate | None,
) -> None:
    """Raise one error for all arguments that contradict each other."""
    problems = []
    if config.distills and teacher is None:
        given = f"distill={config.distill:g}" if config.distill else f"hidden={config.hidden:g}"
        problems.append(f"{given} needs teacher=, the model to distill from")
    if teacher is not None and not config.distills:
        problems.append("a teacher without effect: set Finetune(distill=) or (hidden=) above 0")
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
