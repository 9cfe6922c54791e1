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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateurs.batches import call_model, tensors
from secateurs.errors import ConfigError, DataError, ScoringError
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    call_with,
    register_statistic,
)
from secateurs.statistics.sums import View
from secateurs.statistics.units import members_of
from secateurs.types import Batch, GroupTarget, Inputs, LossFn, Target, WeightTarget

__all__ = ["Removals", "forward_mode", "sample_outputs"]

Measure = Literal["loss", "output", "jvp_output"]
TIMED = 3
"""Units that are timed before the guard judges."""


class Removals(Collector):
    """(L(theta + t v) - L(theta)) / t, or the same for outputs, or J v, for every unit.

    Options: `of` is "loss" (signed difference quotient) or "output" (mean over samples of the norm
    of the difference quotient), `step` is t. As "jvp_output" the latter in the limit, by
    forward-mode AD.
    """

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        of = request.options.get("of", "loss")
        self._measure: Measure = (
            "jvp_output"
            if request.statistic == "jvp_output"
            else ("output" if of == "output" else "loss")
        )
        self._step = float(request.options.get("step", 1.0))

    def alone(self, run: Run) -> None:
        """Measure every unit on one batch.

        Raises:
            ConfigError: it would take longer than `max_seconds`.
            ScoringError: removing a unit makes the loss or output not finite.
        """
        change = self._prepare(run.batch, run.n, self.setting.loss_fn)
        seconds: list[float] = []
        for target in self.request.targets:
            found = torch.zeros(target.n_units, dtype=torch.float64)
            for unit in self.setting.alive[target.name].tolist():
                started = time.perf_counter()
                value = change(target, unit)
                if not math.isfinite(value):
                    raise ScoringError(
                        f"batch {run.number}: removing unit {unit} of {target.name} changes the "
                        f"{self._measure} by {value}; check the data and the model"
                    )
                found[unit] = value
                if run.number == 0 and len(seconds) < TIMED:
                    seconds.append(time.perf_counter() - started)
                    if len(seconds) == TIMED:
                        self._guard(min(seconds))  # the first call also loads kernels
            self.sums.add(target.name, found, run.n)

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64, the mean over all samples seen; 0 for units not measured."""
        return self.sums[target.name] / self.n_samples

    def _guard(self, seconds: float) -> None:
        setting = self.setting
        units = sum(len(setting.alive[t.name]) for t in self.request.targets)
        estimate = seconds * units * setting.n_batches
        if estimate > setting.max_seconds:
            raise ConfigError(
                f"measuring {units} units one by one on {setting.n_batches} batches would take "
                f"about {estimate:.0f} s, more than max_seconds={setting.max_seconds:g}. Use fewer "
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
            before = call_model(self.setting.model, inputs)
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
            tensor = changed.setdefault(name, self.setting.params[name].detach().clone())
            tensor[place] *= 1 - self._step
        return call_with(self.setting.model, changed, inputs)

    def _derivative(self, inputs: Inputs, n: int, target: Target, unit: int) -> float:
        """Mean over samples of ||J v||_2."""
        point: dict[str, Tensor] = {}
        direction: dict[str, Tensor] = {}
        for name, place in self._places(target, unit):
            weight = point.setdefault(name, self.setting.params[name].detach())
            tangent = direction.setdefault(name, torch.zeros_like(weight))
            tangent[place] -= weight[place]

        def outputs(substituted: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return tuple(sample_outputs(call_with(self.setting.model, substituted, inputs), n))

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
        for member in members_of(target, self.request.members, self.setting.params):
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


register_statistic("ablation", Removals)
register_statistic("jvp_output", Removals)
