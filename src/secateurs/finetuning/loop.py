"""The training loop: one plain pass after another, checked at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.batches import (
    checked_loss,
    in_mode,
    model_device,
)
from secateurs.checkpoints import (
    Checkpoints,
    Interrupt,
    Keeper,
    flatten,
    interrupts_wait,
    keeper_of,
    plain,
    random_state,
    set_random_state,
)
from secateurs.distributed import Group, ranks_of
from secateurs.errors import ScoringError
from secateurs.finetuning.clock import Clock, clock_of, lr_factor
from secateurs.finetuning.config import EpochRow, Finetune, FinetuneResult
from secateurs.finetuning.distillation import Distillation, taught_by
from secateurs.finetuning.parts import Part, Training
from secateurs.finetuning.record import Best, Record
from secateurs.finetuning.resuming import OWN, Place, read_on, training_marks
from secateurs.finetuning.sharing import Sharing, counted
from secateurs.finetuning.starting import build_optimizer, check_arguments, seeded
from secateurs.finetuning.state import clear_gradients_, load_optimizer_, restore_, snapshot
from secateurs.masks import HeldMasks, hold_masks, named_tensors
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
    checkpoint: Checkpoints | Keeper | None = None,
    resume: bool = False,
    group: Group = None,
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
        checkpoint: where checkpoints go, and a last one at the end. The first Ctrl-C then ends
            the training after the step that is under way, with a checkpoint. Of several processes
            rank 0 writes them, for all; not for a sharded model.
        resume: go on from the newest checkpoint, with the arguments of the start (a new model with
            the weights from before the training, a new optimizer). On a CPU the result is bit for
            bit that of a training without interruption. What it needs of the data: read again
            from the same random state of torch, numpy and Python it gives the same batches, as
            lists and DataLoaders do. Several processes go on as many as they were.
        group: "world" or a process group: every rank gives its own batches, of any number, and the
            same model in DDP or sharded by `fully_shard`. Each step follows the mean over the
            samples of all ranks. `evaluate` is called on every rank, with the plain model and the
            buffers of rank 0; what it says on rank 0 counts. A seed is shifted by the rank.

    Raises:
        ConfigError: arguments that contradict each other, masks that do not fit, checkpoints of
            another training, or checkpoints that are there and `resume` is not set.
        FileFormatError: a checkpoint cannot be written (the disk is full), or none can be read.
        DataError, CaptureError: a batch does not fit the model or the loss.
        ScoringError: loss, weights or metric not finite; names epoch and batch.
        SoundnessError: a removed entry is not zero at the end.
        RankError: another rank failed or is gone, or begins with other weights, masks or settings.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> data = [(torch.ones(4, 2), torch.zeros(4, 1))]
        >>> config = Finetune(epochs=20, lr=0.1)
        >>> result = finetune(layer, data, nn.functional.mse_loss, config)
        >>> result.history[-1].train_loss < result.history[0].train_loss
        True
    """
    sharing = Sharing(model, ranks_of(group))
    sharing.start(
        masks,
        {
            "config": plain(config), "seed": seed, "maximize": maximize, "resume": resume,
            "parts": plain([type(part) for part in parts]), "evaluate": evaluate is not None,
            "teacher": teacher is not None, "recut": recut is not None,
            "checkpoint": checkpoint is not None,
        },
    )  # fmt: skip
    check_arguments(
        model, batches, config, teacher, evaluate, cuts=recut is not None,
        leaves=checkpoint is not None, n_processes=sharing.ranks.size,
    )  # fmt: skip
    clock = clock_of(config, counted(batches, sharing.ranks))
    optimizer = optimizer or build_optimizer(model, config)
    before = snapshot(model)
    taught = None if teacher is None else taught_by(teacher, model, config)
    keeper: Keeper | None
    if isinstance(checkpoint, Checkpoints):
        keeper = keeper_of(
            checkpoint,
            lambda: training_marks(
                model, batches, config, masks=masks,
                teacher=None if taught is None else taught.teacher, optimizer=optimizer, seed=seed,
                functions=[loss_fn, evaluate, *map(type, parts)],
            ),
            sharing.ranks, resume=resume, own=OWN,
        )  # fmt: skip
    else:
        keeper = checkpoint
    loop = _Loop(
        model, loss_fn, config, taught, evaluate, maximize, optimizer, clock, recut, tuple(parts),
        keeper, sharing,
    )  # fmt: skip
    try:
        with ExitStack() as stack:
            stack.enter_context(seeded(None if seed is None else seed + sharing.ranks.rank))
            stack.enter_context(sharing.named())
            if keeper is not None:
                loop.interrupt = stack.enter_context(interrupts_wait())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(in_mode(model, training=True))
            if taught is not None:
                stack.enter_context(taught)
            loop.held = stack.enter_context(
                hold_masks(model, optimizer, masks or {}, check_every=config.check_every)
            )
            if optimizer is not None:
                for part in loop.parts:
                    part.start(Training(model, optimizer, loop.held, clock.n_steps))
            if keeper is not None:
                saved, keeper.saved = keeper.saved, None
                loop.go_on(saved, batches)
            for row in loop.epochs(batches):
                if progress is not None:
                    progress(row)
                loop.leave(batches)
            if isinstance(checkpoint, Checkpoints):
                loop.leave(batches, must=True)
            loop.finish()
            sharing.settle()
            sharing.same_weights()
            loop.held.check()
    except ScoringError as error:
        restore_(model, before)
        raise ScoringError(
            f"fine-tuning, {error}. The model has its weights from before; "
            "a smaller lr or clip_norm=1.0 may help"
        ) from error
    finally:
        loop.set_lr(1.0)
        clear_gradients_(model)
    return loop.result(loop.seconds())


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
    keeper: Keeper | None
    sharing: Sharing
    held: HeldMasks | None = None
    interrupt: Interrupt = field(default_factory=Interrupt)
    resumed: bool = False
    place: Place = field(default_factory=Place)
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0

    def __post_init__(self) -> None:
        self.record = Record(self.config, self.maximize)
        self.base_lrs = [group["lr"] for group in self.groups]
        self.trained = [p for group in self.groups for p in group["params"]]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer: others after its state was loaded."""
        return self.optimizer.param_groups if self.optimizer else []

    def epochs(self, batches: Batches) -> Iterator[EpochRow]:
        """Train; yield a row after each pass."""
        config = self.config
        last, last_step = config.n_epochs, config.steps
        while not self.record.impatient and self.optimizer is not None:
            epoch = len(self.record.rows) + 1
            if (last is not None and epoch > last) or self.steps == last_step:
                return
            self.set_lr()
            if self.place.lr is None:
                self.place.lr = float(self.groups[0]["lr"])
            loss = self._pass(batches, epoch, self.optimizer)
            self.sharing.check_finite(self.trained, epoch)
            row = EpochRow(epoch, loss, self._metric(epoch), self.place.lr)
            self.record.note(row, self.model, self.held)
            self.place = Place()
            yield row

    def _pass(self, batches: Batches, epoch: int, optimizer: Optimizer) -> float:
        """One pass: a step after each group of batches; the last group may be smaller."""
        place, group, in_group = self.place, 0, 0.0
        device, keeps = model_device(self.model), self.keeper is not None
        clear_gradients_(self.model)
        sharing = self.sharing
        passed = sharing.keep if sharing.ranks.size > 1 else None
        reader = read_on(batches, device, place, keeps=keeps, passed=passed)
        for inputs, targets in sharing.in_step(reader):
            where = f"epoch {epoch}, batch {place.batches}"
            if self.resumed:
                self.resumed = False
                sharing.warm_up(partial(self._loss, inputs, targets, where), batches)
            if not group:
                self._cut()
                for part in self.parts:
                    part.begin(self.steps)
            loss, size = self._loss(inputs, targets, where), sharing.size
            place.total += loss.item() * size
            place.samples, place.batches = place.samples + size, place.batches + 1
            place.spare += sharing.spare
            if self.config.full_batch or self.config.accumulate > 1:
                torch.autograd.backward(loss * size)
                group, in_group = group + 1, in_group + sharing.samples
                if self.config.full_batch or group < self.config.accumulate:
                    continue
                self._mean_over(in_group)
            else:
                torch.autograd.backward(loss if sharing.weight == 1 else loss * sharing.weight)
            self._step(optimizer)
            group, in_group = 0, 0
            if self.steps == self.config.steps:
                break
            self.leave(batches)
        if group:
            self._mean_over(in_group)
            self._step(optimizer)
        return sharing.mean(place.total, place.samples)

    def _loss(self, inputs: Any, targets: Any, where: str) -> Tensor:
        """The loss of one batch, that of the teacher included."""
        objective = self.loss_fn
        with self.sharing.forward():
            if self.teacher is not None:
                objective = self.teacher.objective(self.loss_fn, inputs, where)
            return checked_loss(self.model, (inputs, targets), objective, where)

    # --- checkpoints -----------------------------------------------------------------------------

    def leave(self, batches: Batches, *, must: bool = False) -> None:
        """Between two steps: write a checkpoint if it is time, and stop if Ctrl-C was pressed."""
        if self.keeper is None:
            return
        asked = self.interrupt.asked, self.keeper.due(self.steps)
        stop, due = self.sharing.ranks.either(*asked)
        if must or stop or due:
            self.sharing.same_weights()  # that of rank 0 would hide that they are apart
            self.keeper.save(self.steps, self.state(batches))
        if stop:
            raise KeyboardInterrupt

    def state(self, batches: Batches) -> dict[str, Any]:
        """Everything that the rest of the training depends on."""
        return {
            "weights": named_tensors(self.model),
            "masks": self.held.masks if self.held else {},
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            "base_lrs": self.base_lrs,
            "steps": self.steps,
            "record": self.record.state(),
            "place": self.place.state(),
            "parts": [part.state() for part in self.parts],
            "random": random_state(batches),
            "seconds": self.seconds(),
        }

    def go_on(self, saved: Any, batches: Batches) -> None:
        """Take over a state; without one, see that there will be no surprise when one is saved."""
        if saved is None:
            flatten(self.state(batches))
            return
        if self.held is not None:  # first: what is loaded into an optimizer is masked at once
            self.held.replace(saved["masks"])
        restore_(self.model, saved["weights"])
        if self.optimizer is not None:
            load_optimizer_(self.optimizer, saved["optimizer"])
        self.base_lrs, self.steps = saved["base_lrs"], saved["steps"]
        self.record.load(saved["record"])
        self.place = Place(**saved["place"])
        for part, held in zip(self.parts, saved["parts"], strict=True):
            part.load(held)
        self.started -= saved["seconds"]
        self.resumed = self.sharing.ranks.size > 1
        set_random_state(saved["random"], batches)

    def seconds(self) -> float:
        """Since the start, without the time between an interruption and going on."""
        return time.perf_counter() - self.started

    # --- steps -----------------------------------------------------------------------------------

    def _mean_over(self, n: float) -> None:
        """From the gradient of a sum over samples to that of their mean."""
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad.div_(n)

    def _cut(self) -> None:
        """Ask whether more is to be removed before the next step."""
        larger = None if self.recut is None else self.recut(self.steps)
        if larger is not None:
            assert self.held is not None
            self.sharing.same(larger)
            self.held.grow(larger)
            self.record.best = None  # it belongs to a larger network

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
        clear_gradients_(self.model)

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
            metric = self.sharing.evaluated(self.evaluate)
        if not math.isfinite(metric):
            raise ScoringError(f"epoch {epoch}: evaluate returned {metric}")
        return metric

    def finish(self) -> None:
        """Load the best weights if asked; without any epoch, evaluate the model as it is."""
        record = self.record
        record.give_back(self.model, self.held)
        if not record.rows and self.evaluate is not None:
            record.best = Best(EpochRow(0, math.nan, self._metric(0), 0.0), None, {})

    def result(self, seconds: float) -> FinetuneResult:
        """What is told to the caller."""
        rows, best = self.record.rows, self.record.best
        last = rows[-1] if rows else best.row if best else None
        return FinetuneResult(
            history=tuple(rows),
            best_metric=best.row.metric if best else None,
            best_epoch=best.row.epoch if best else None,
            final_metric=last.metric if last else None,
            steps=self.steps,
            stopped_early=self.record.impatient,
            seconds=seconds,
            masks=self.held.masks if self.held else {},
        )
