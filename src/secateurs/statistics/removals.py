"""What removing a unit does, measured unit by unit: exact, and as slow as that sounds.

The learned members that alone remove a unit are scaled by (1 - t). At t = 1 they are zero, and so
is the unit wherever it is read, whatever the buffers hold: the outermost producer in series comes
last (for a convolution with a batch norm, scale and shift of the norm), or, where zero does not
survive an activation function, the columns of all readers are zero. For 0 < t < 1 every path
through the unit carries one factor (1 - t), so the quotient tends to <dL/dtheta, v>.

The model is never changed: it is called with substituted parameters.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateurs.batches import call_model, tensors
from secateurs.errors import ConfigError, DataError, ScoringError
from secateurs.statistics.units import Parameters, members_of
from secateurs.types import Batch, GroupTarget, Inputs, LossFn, Target, WeightTarget

__all__ = ["Removals"]

Measure = Literal["loss", "output", "jvp_output"]
TIMED = 3
"""Units that are timed before the guard judges."""


class Removals:
    """(L(theta + t v) - L(theta)) / t, or the same for outputs, or J v, for every unit.

    Args:
        model: in eval mode; never changed.
        params: its parameters by name.
        targets: whose units are measured.
        alive: target name -> units to measure (those not removed earlier).
        measure: "loss" (signed difference quotient), "output" (mean over samples of the norm of
            the difference quotient) or "jvp_output" (the same in the limit, by forward-mode AD).
        step: t of the quotient.
        members: which members are scaled (see `Criterion.members`).
        max_seconds: refuse when the estimated time is above that.
        n_batches: batches that will come.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Parameters,
        targets: Sequence[Target],
        alive: Mapping[str, Tensor],
        *,
        measure: Measure,
        step: float,
        members: str,
        max_seconds: float,
        n_batches: int,
    ) -> None:
        self._model, self._params, self._targets = model, params, targets
        self._alive, self._measure, self._step, self._members = alive, measure, step, members
        self._max_seconds, self._n_batches = max_seconds, n_batches
        self._sum = {t.name: torch.zeros(t.n_units, dtype=torch.float64) for t in targets}
        self._n = 0

    def batch(self, number: int, batch: Batch, n: int, loss_fn: LossFn | None) -> None:
        """Measure every unit on one batch of `n` samples.

        Raises:
            ConfigError: it would take longer than `max_seconds`.
            ScoringError: removing a unit makes the loss or output not finite.
        """
        change = self._prepare(batch, n, loss_fn)
        seconds: list[float] = []
        for target in self._targets:
            for unit in self._alive[target.name].tolist():
                started = time.perf_counter()
                value = change(target, unit)
                if not math.isfinite(value):
                    raise ScoringError(
                        f"batch {number}: removing unit {unit} of {target.name} changes the "
                        f"{self._measure} by {value}; check the data and the model"
                    )
                self._sum[target.name][unit] += n * value
                if number == 0 and len(seconds) < TIMED:
                    seconds.append(time.perf_counter() - started)
                    if len(seconds) == TIMED:
                        self._guard(min(seconds))  # the first call also loads kernels
        self._n += n

    def result(self, target: Target) -> Tensor:
        """(n_units,) float64, the mean over all samples seen; 0 for units not measured."""
        return self._sum[target.name] / max(self._n, 1)

    def _guard(self, seconds: float) -> None:
        units = sum(len(self._alive[t.name]) for t in self._targets)
        estimate = seconds * units * self._n_batches
        if estimate > self._max_seconds:
            raise ConfigError(
                f"measuring {units} units one by one on {self._n_batches} batches would take "
                f"about {estimate:.0f} s, more than max_seconds={self._max_seconds:g}. Use fewer "
                "batches (max_batches), a coarser granularity, or criterion 'directional' or "
                "'taylor', which need one backward pass for all units"
            )

    def _prepare(
        self, batch: Batch, n: int, loss_fn: LossFn | None
    ) -> Callable[[Target, int], float]:
        """The function (target, unit) -> change; what does not depend on the unit is done once."""
        inputs, labels = batch
        if self._measure == "jvp_output":
            return lambda target, unit: self._derivative(inputs, n, target, unit)
        with torch.no_grad():
            before = call_model(self._model, inputs)
            if self._measure == "output":
                start = sample_outputs(before, n)
                return lambda t, u: (
                    _mean_norm(_minus(sample_outputs(self._without(inputs, t, u), n), start))
                    / self._step
                )
            assert loss_fn is not None
            base = float(loss_fn(before, labels).detach())

        def by_loss(target: Target, unit: int) -> float:
            after = loss_fn(self._without(inputs, target, unit), labels)
            return (float(after.detach()) - base) / self._step

        return by_loss

    @torch.no_grad()
    def _without(self, inputs: Inputs, target: Target, unit: int) -> Any:
        """Outputs of the model with the members of the unit scaled by (1 - step)."""
        changed: dict[str, Tensor] = {}
        for name, place in self._places(target, unit):
            tensor = changed.setdefault(name, self._params[name].detach().clone())
            tensor[place] *= 1 - self._step
        return _call(self._model, changed, inputs)

    def _derivative(self, inputs: Inputs, n: int, target: Target, unit: int) -> float:
        """Mean over samples of ||J v||_2."""
        point: dict[str, Tensor] = {}
        direction: dict[str, Tensor] = {}
        for name, place in self._places(target, unit):
            weight = point.setdefault(name, self._params[name].detach())
            tangent = direction.setdefault(name, torch.zeros_like(weight))
            tangent[place] -= weight[place]

        def outputs(substituted: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return tuple(sample_outputs(_call(self._model, substituted, inputs), n))

        with forward_mode():
            tangents = jvp(outputs, (point,), (direction,))[1]
        return _mean_norm([t.detach() for t in tangents])

    def _places(self, target: Target, unit: int) -> Iterator[tuple[str, Any]]:
        """(parameter name, index expression) of everything that alone removes the unit."""
        if isinstance(target, WeightTarget):
            where = torch.unravel_index(torch.tensor(unit), target.shape)
            yield target.name, tuple(where)
            return
        assert isinstance(target, GroupTarget)
        for member in members_of(target, self._members, self._params):
            rows = torch.from_numpy(member.index[member.unit == unit])
            yield member.tensor, (*[slice(None)] * member.dim, rows)


@contextmanager
def forward_mode() -> Iterator[None]:
    """Kernels that know forward-mode AD: no fused recurrent, attention or encoder kernels."""
    mkldnn: Any = torch.backends.mkldnn  # its properties are set through descriptors
    mha = torch.backends.mha
    fused, fast = mkldnn.enabled, mha.get_fastpath_enabled()
    try:
        mkldnn.enabled = False
        mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # torch loads its forward-mode rules through an entry point it has deprecated itself
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            yield
    finally:
        mkldnn.enabled = fused
        mha.set_fastpath_enabled(fast)


def _call(model: nn.Module, substituted: Mapping[str, Tensor], inputs: Inputs) -> Any:
    if isinstance(inputs, dict):
        return functional_call(model, dict(substituted), (), inputs)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return functional_call(model, dict(substituted), args)


def sample_outputs(outputs: Any, n: int) -> list[Tensor]:
    """Floating-point outputs that begin with the `n` samples.

    Raises:
        DataError: there is none.
    """
    every = [t for t in tensors(outputs) if t.is_floating_point()]
    found = [t for t in every if t.dim() and t.shape[0] == n]
    if not found:
        shapes = ", ".join(str(tuple(t.shape)) for t in every) or "none"
        raise DataError(
            f"the change of the output needs a floating-point output whose first dimension is the "
            f"{n} samples of the batch; got {shapes}"
        )
    return found


def _minus(after: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(after, before, strict=True)]


def _mean_norm(changes: Sequence[Tensor]) -> float:
    """Mean over samples of the 2-norm over everything else."""
    squares = torch.stack(
        [
            c.double().square().flatten(1).sum(1) if c.dim() > 1 else c.double().square()
            for c in changes
        ]
    )  # (outputs, n)
    return float(squares.sum(0).sqrt().mean())
