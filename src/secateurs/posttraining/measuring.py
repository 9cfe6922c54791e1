"""What a repair has won, and the model as it was if it fails: what all repairs share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.batches import (
    batch_size,
    call_model,
    check_batches,
    checked_loss,
    in_mode,
    iterate,
    model_device,
    named_outputs,
    preserve,
    tensors,
)
from secateurs.errors import ConfigError, DataError, PruningError, ScoringError
from secateurs.finetuning import restore_, snapshot
from secateurs.posttraining.won import Won
from secateurs.types import Batches, Evaluate, LossFn

__all__ = ["Judge", "restoring"]


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back if something fails inside."""
    held = snapshot(model)
    try:
        yield
    except BaseException:
        restore_(model, held)
        raise


class Judge:
    """Measures a model before and after a repair, on the batches of the repair.

    "outputs" is ||f - f_dense|| / ||f_dense|| over all samples and outputs that matter, "loss" the
    mean over samples, and the metrics are those of `evaluate`.
    """

    def __init__(
        self,
        dense: nn.Module | None,
        batches: Batches,
        loss_fn: LossFn | None,
        evaluate: Evaluate | None,
        max_batches: int | None,
        outputs: Sequence[str] = (),
    ) -> None:
        if max_batches is not None and max_batches < 1:
            raise ConfigError(f"max_batches must be at least 1, got {max_batches}")
        self._dense, self._batches, self._loss_fn = dense, batches, loss_fn
        self._evaluate, self._max_batches, self._names = evaluate, max_batches, tuple(outputs)
        self._start = time.perf_counter()
        self._before: Mapping[str, float] = {}
        self.samples = 0

    def start(self, model: nn.Module) -> None:
        """Check the batches, and measure before the repair."""
        check_batches(model, self._batches, self._loss_fn)
        self._before = self._measured(model)

    def won(
        self,
        model: nn.Module,
        what: str,
        changed: Sequence[str],
        notes: Sequence[str],
        errors: tuple[float, float] | None = None,
    ) -> Won:
        """Measure after the repair. `errors` are those of the repaired layers, before and after."""
        after = self._measured(model)
        before = dict(self._before)
        if errors is not None:
            before, after = {"error": errors[0], **before}, {"error": errors[1], **after}
        names = tuple(dict.fromkeys(changed))
        seconds = time.perf_counter() - self._start
        return Won(what, before, after, self.samples, seconds, names, tuple(notes))

    def _measured(self, model: nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        device = model_device(model)
        dense = self._dense
        if dense is model:
            raise ConfigError("model and dense are one object; repair a copy of the dense model")
        models = [model] if dense is None else [model, dense]
        error = size = loss = 0.0
        n = 0
        with _looking(*models):
            for i, batch in enumerate(iterate(self._batches, device, self._max_batches)):
                k = batch_size(batch[0])
                n += k
                if dense is not None:
                    e, s = self._difference(model, dense, batch[0])
                    error, size = error + e, size + s
                if self._loss_fn is not None:
                    loss += k * float(checked_loss(model, batch, self._loss_fn, f"batch {i}"))
        if not n:
            raise DataError("the batches hold no sample: give some hundred of them")
        if dense is not None:
            found["outputs"] = relative(error, size)
        if self._loss_fn is not None:
            found["loss"] = loss / n
        self.samples = n
        if self._evaluate is not None:
            found |= _metrics(model, self._evaluate)
        return found

    def _difference(self, model: nn.Module, dense: nn.Module, inputs: Any) -> tuple[float, float]:
        """Sums of squares of the difference and of the dense outputs."""
        mine, theirs = (
            [t.double() for t in tensors(named_outputs(call_model(m, inputs), self._names))
             if t.is_floating_point()]
            for m in (model, dense)
        )  # fmt: skip
        if [t.shape for t in mine] != [t.shape for t in theirs]:
            raise ConfigError(
                "the model and the dense one return different shapes: "
                f"{[tuple(t.shape) for t in mine]} and {[tuple(t.shape) for t in theirs]}. If only "
                "some outputs matter, name them in trace(outputs=...)"
            )
        pairs = zip(mine, theirs, strict=True)
        error = sum(float((a - b.to(a.device)).square().sum()) for a, b in pairs)
        return error, sum(float(b.square().sum()) for b in theirs)


@contextmanager
def _looking(*models: nn.Module) -> Iterator[None]:
    with torch.no_grad():
        if len(models) == 1:
            with preserve(models[0]), in_mode(models[0], training=False):
                yield
        else:
            with _looking(models[0]), _looking(*models[1:]):
                yield


def relative(error: float, size: float) -> float:
    """The square root of one sum of squares over another.

    Example:
        >>> relative(1.0, 4.0), relative(0.0, 0.0)
        (0.5, 0.0)
    """
    if not error:
        return 0.0
    return (error / size) ** 0.5 if size else float("inf")


def _metrics(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """What `evaluate` says, by name; "metric" for a bare number."""
    try:
        with preserve(model), in_mode(model, training=False), torch.no_grad():
            answer = evaluate(model)
        found = dict(answer) if isinstance(answer, Mapping) else {"metric": answer}
        return {str(name): float(value) for name, value in found.items()}
    except PruningError:
        raise
    except Exception as error:  # the user's function can raise anything
        raise ScoringError(f"evaluate fails: {type(error).__name__}: {error}") from error


def checked_finite(found: Tensor, name: str) -> None:
    """Raise unless all sums are finite.

    Raises:
        ScoringError: activations overflow, or there is a NaN among them.
    """
    if not torch.isfinite(found).all():
        raise ScoringError(f"{name}: activations are not finite; check the data and the model")
