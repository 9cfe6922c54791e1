"""What is measured at each cut of a target: the loss over batches, or a metric.

runs.drops(cuts) -> [(drop, standard error or None)]     one for each cut, in their order
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateurs.batches import batch_size, call_model, checked_loss, iterate, model_device, tensors
from secateurs.errors import ScoringError
from secateurs.masks import apply_masks_, named_tensors
from secateurs.sensitivities.losses import sample_losses
from secateurs.sensitivities.replay import Recording, Replay
from secateurs.types import Batch, Batches, Evaluate, Inputs, LossFn

__all__ = ["Cuts", "LossRuns", "MetricRuns", "Point", "PutBack", "Runs"]

HELD = 2**30
"""Bytes of batches that are kept in memory; more are read again for every target."""
WORTH = 0.9
"""Time of replays over that of full runs, below which the rest of a target is replayed."""
RECORDED = 2**30
"""Bytes of activations that are kept for replays: of the first batches, as many as fit."""

Point = tuple[float, float | None]
"""A drop and its standard error."""
PutBack = Callable[[], None]


class Runs(Protocol):
    """What measures the drops of one target after the other, on one model."""

    @property
    def measure(self) -> str:
        """What a drop is."""

    @property
    def dense(self) -> float:
        """Value of the uncut model."""

    @property
    def n_batches(self) -> int:
        """That each run sees; 0 where the caller holds the data."""

    @property
    def n_samples(self) -> int:
        """That each run sees; 0 where the caller holds the data."""

    @property
    def notes(self) -> Sequence[str]:
        """What a reader should know."""

    def drops(self, cuts: Cuts) -> list[Point]:
        """One for each cut, in their order; the model is uncut before and after."""


@dataclass(frozen=True, eq=False)
class Cuts:
    """The cuts of one target.

    Attributes:
        masks: of each cut; every cut contains the one before.
        put_back: makes the model uncut again.
    """

    masks: tuple[Mapping[str, Tensor], ...]
    put_back: PutBack


class MetricRuns:
    """The drop of what `evaluate` returns; its data are the caller's.

    Raises:
        ScoringError: the metric of the uncut model is not finite.
    """

    n_samples = n_batches = 0
    notes: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, evaluate: Evaluate, maximize: bool) -> None:
        self._model, self._evaluate = model, evaluate
        self._sign = 1.0 if maximize else -1.0
        name, self.dense = self._metric()
        self.measure = f"{'drop' if maximize else 'rise'} of {name}"
        if not math.isfinite(self.dense):
            raise ScoringError(f"{name} of the uncut model is {self.dense}; check evaluate")

    def _metric(self) -> tuple[str, float]:
        found = self._evaluate(self._model)
        if isinstance(found, Mapping):
            name, value = next(iter(found.items()))
            return str(name), float(value)
        return "the metric", float(found)

    def drops(self, cuts: Cuts) -> list[Point]:
        points: list[Point] = []
        for masks in cuts.masks:
            apply_masks_(self._model, masks)
            points.append((self._sign * (self.dense - self._metric()[1]), None))
        cuts.put_back()
        return points


@dataclass(frozen=True, eq=False)
class _Loss:
    """The loss of one batch: its mean, and that of each sample where there is such a thing."""

    mean: float
    samples: Tensor | None


@dataclass(frozen=True, eq=False)
class _Held:
    """A batch of `n` samples, its uncut loss, and a recording of that run if there is one."""

    batch: Batch
    n: int
    loss: _Loss
    recording: Recording | None


class LossRuns:
    """The rise of the mean loss over batches, paired sample by sample with the uncut model.

    Raises:
        DataError, CaptureError, ScoringError: a batch does not fit, or its loss is not finite.
    """

    measure = "rise of the loss"

    def __init__(
        self, model: nn.Module, batches: Batches, loss_fn: LossFn, max_batches: int | None
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._batches, self._max = batches, max_batches
        self.n_batches = self.n_samples = 0
        total, recorded = 0.0, 0
        held, size = list[_Held](), 0
        for batch in iterate(batches, model_device(model), max_batches):
            n = batch_size(batch[0])
            outputs, loss = self._uncut(batch, n)
            total += n * loss.mean
            self.n_batches, self.n_samples = self.n_batches + 1, self.n_samples + n
            size += sum(t.nbytes for t in tensors(batch))
            if size <= HELD:
                recording = _recorded(model, batch[0], outputs, RECORDED - recorded)
                recorded += recording.n_bytes if recording is not None else 0
                held.append(_Held(batch, n, loss, recording))
        self.dense = total / self.n_samples
        # Batches that are read again may come in another order: then nothing is kept of them.
        self._held = held if size <= HELD else None
        self._by_sample = all(h.loss.samples is not None for h in held)
        self.notes = () if self._by_sample else (
            "no standard errors: the loss is not a mean over samples that can be taken one by one",
        )  # fmt: skip

    def _uncut(self, batch: Batch, n: int) -> tuple[Any, _Loss]:
        where = f"batch {self.n_batches}"
        try:
            outputs = call_model(self._model, batch[0])
            loss = self._loss(outputs, batch, n)
        except Exception:
            checked_loss(self._model, batch, self._loss_fn, where)  # says what is wrong
            raise
        if not math.isfinite(loss.mean):
            raise ScoringError(f"{where}: the loss is {loss.mean}; check the data and the model")
        return outputs, loss

    def _loss(self, outputs: Any, batch: Batch, n: int) -> _Loss:
        mean = float(self._loss_fn(outputs, batch[1]))
        return _Loss(mean, sample_losses(self._loss_fn, outputs, batch[1], n))

    def _data(self) -> Iterator[_Held]:
        """Every batch with its uncut loss."""
        if self._held is not None:
            yield from self._held
            return
        for batch in iterate(self._batches, model_device(self._model), self._max):
            n = batch_size(batch[0])
            yield _Held(batch, n, self._loss(call_model(self._model, batch[0]), batch, n), None)

    def drops(self, cuts: Cuts) -> list[Point]:
        """All cuts of a batch are run before the next batch is read."""
        sums = [0.0] * len(cuts.masks)
        rises: list[list[Tensor]] = [[] for _ in cuts.masks]
        runner = _Runner(self._model, cuts)
        seen = 0
        for held in self._data():
            for i, outputs in enumerate(runner.outputs(held.batch[0], held.recording)):
                loss = self._loss(outputs, held.batch, held.n)
                sums[i] += held.n * (loss.mean - held.loss.mean)
                if loss.samples is not None and held.loss.samples is not None:
                    rises[i].append(loss.samples - held.loss.samples)
            seen += held.n
        pairs = zip(sums, rises, strict=True)
        return [(total / seen, self._error(parts)) for total, parts in pairs]

    def _error(self, parts: Sequence[Tensor]) -> float | None:
        """Standard error of the mean of the rises."""
        rises = torch.cat(list(parts)) if parts else torch.empty(0)
        if len(rises) < max(2, self.n_samples):
            return None
        return float(rises.std(correction=1)) / math.sqrt(len(rises))


class _Runner:
    """The outputs at every cut of a batch: in full, or by replaying what a cut does not reach.

    On the first batch the last cut is run both ways: replays are used from then on if they give the
    same bits, and are faster.
    """

    def __init__(self, model: nn.Module, cuts: Cuts) -> None:
        self._model, self._cuts = model, cuts
        held = named_tensors(model)
        self._changed = [held[name] for name in cuts.masks[-1]]
        self._replays: bool | None = None

    def outputs(self, inputs: Inputs, recording: Recording | None) -> Iterator[Any]:
        """One for each cut; the model is uncut at the end."""
        replay = None
        if recording is not None and self._replays is not False:
            replay = self._replay(inputs, recording)
        for masks in self._cuts.masks:
            apply_masks_(self._model, masks)
            try:
                outputs = self._run(inputs, replay)
            except Exception:  # if it is the model that fails, it fails in a full run as well
                if replay is None:
                    raise
                replay, self._replays = None, False
                outputs = self._run(inputs, None)
            yield outputs
        self._cuts.put_back()

    def _replay(self, inputs: Inputs, recording: Recording) -> Replay | None:
        """A replay of this batch; None where full runs are as good, once and for all."""
        try:
            replay = Replay(recording, self._changed)
            if self._replays is None:
                self._replays = self._pays(inputs, replay)
        except Exception:  # a model may object to being watched in any way; full runs do not
            self._replays = False
        return replay if self._replays else None

    def _pays(self, inputs: Inputs, replay: Replay) -> bool:
        """Whether replays give the same bits, and are faster."""
        apply_masks_(self._model, self._cuts.masks[-1])
        try:
            start = time.perf_counter()
            full = self._run(inputs, None)
            middle = time.perf_counter()
            again = self._run(inputs, replay)
            end = time.perf_counter()
        finally:
            self._cuts.put_back()
        return _same(full, again) and end - middle < WORTH * (middle - start)

    def _run(self, inputs: Inputs, replay: Replay | None) -> Any:
        if replay is None:
            return call_model(self._model, inputs)
        with replay:
            outputs = call_model(self._model, inputs)
        replay.check_end()
        return outputs


def _recorded(model: nn.Module, inputs: Inputs, outputs: Any, limit: int) -> Recording | None:
    """A recording of the run that gave these outputs, if it fits and gives the same bits."""
    if limit <= 0:
        return None
    try:
        with Recording(limit) as recording:
            again = call_model(model, inputs)
    except Exception:  # a model may object to being watched in any way
        return None
    return recording if recording.complete and _same(outputs, again) else None


def _same(a: Any, b: Any) -> bool:
    """Whether two structures of outputs are equal bit by bit."""
    left, right = tensors(a), tensors(b)
    return len(left) == len(right) and all(map(torch.equal, left, right))
