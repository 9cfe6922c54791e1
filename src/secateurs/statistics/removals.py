"""What removing each unit does: measured for every unit, and so as slow as that sounds.

The learned members that alone remove a unit are scaled by (1 - t). At t = 1 they are zero, and so
is the unit wherever it is read, whatever the buffers hold: the outermost producer in series comes
last (for a convolution with a batch norm, scale and shift of the norm), or, where zero does not
survive an activation function, the columns of all readers are zero. For 0 < t < 1 every path
through the unit carries one factor (1 - t), so the quotient tends to <dL/dtheta, v>.

    Removals     what all that measures unit by unit shares
    Ablation     (L(theta + t v) - L(theta)) / t, or the norm of the same for outputs

Many units share a run where their activations are seen exactly (`ablation.Replicated`); each target
is checked against the one-by-one way first. The model is never changed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateurs.batches import call_model, tensors
from secateurs.errors import ConfigError, DataError, ScoringError
from secateurs.statistics.ablation import (
    FEWEST,
    OneByOne,
    Replicated,
    agree,
    copies_for,
)
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    register_statistic,
)
from secateurs.statistics.gates import probe_gates
from secateurs.statistics.sums import View
from secateurs.statistics.tangents import StillWeights
from secateurs.types import Site, Target

__all__ = ["Ablation", "Removals", "forward_mode", "mean_norm", "sample_outputs"]

TIMED = 3
"""Runs that are timed before the guard judges."""


class Removals(Collector):
    """Something measured for each unit and batch, and averaged over the samples."""

    what = "loss"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self.one_by_one = OneByOne(setting, request.members)
        self._sites: dict[str, tuple[Site, ...]] = {}
        self._many: Replicated | None = None
        self._checked: set[str] = set()
        self._seconds: list[float] | None = []

    def measured(
        self, run: Run, way: OneByOne | Replicated, target: Target, units: Sequence[int]
    ) -> Tensor:
        """(k,) the value of each of these units on one batch."""
        raise AssertionError(f"{type(self).__name__} measures nothing")

    def together(self, run: Run) -> dict[str, Tensor]:
        """Target name -> (n_units,) of what can be had for all units at once."""
        return {}

    def begin(self, run: Run) -> None:
        """Find the targets whose units can share a run."""
        model, inputs = self.setting.model, run.inputs
        self._sites, why = probe_gates(
            model, run.batch, self.request.groups, self.request.members, self.setting.params
        )
        copies = copies_for(model, inputs) if self._sites else 1
        if copies >= FEWEST:
            self._many = Replicated(model, self._sites, copies)
        for target in self.request.groups:
            if target.name in why:
                self.slowly(target, why[target.name])

    def slowly(self, target: Target, why: str) -> None:
        """Measure the units of a target one by one from now on, and say so."""
        self._sites.pop(target.name, None)
        self.notes.append(f"{target.name}: units measured one by one ({why})")

    def alone(self, run: Run) -> None:
        """Measure every unit on one batch.

        Raises:
            ConfigError: it would take longer than `max_seconds`.
            ScoringError: removing a unit makes the loss or output not finite.
        """
        started = time.perf_counter()
        with torch.no_grad():
            self.plain = call_model(self.setting.model, run.inputs)
        known = self.together(run)
        for target in self.request.targets:
            alive = self.setting.alive[target.name].tolist()
            found = known.get(target.name)
            if found is None:
                found = self._every(run, target, alive)
            _check(found, alive, f"batch {run.number}", target.name, self.what)
            self.sums.add(target.name, found, run.n)
        if self._seconds is not None:
            units = sum(len(self.setting.alive[t.name]) for t in self.request.targets)
            self._guard((time.perf_counter() - started) / max(1, units))
            self._seconds = None

    def _every(self, run: Run, target: Target, alive: Sequence[int]) -> Tensor:
        """(n_units,) float64 of one target, run by run."""
        found = torch.zeros(target.n_units, dtype=torch.float64)
        way = self.way(run, target, alive)
        for i in range(0, len(alive), way.room):
            started = time.perf_counter()
            units = alive[i : i + way.room]
            found[units] = self.measured(run, way, target, units).detach().double().cpu()
            if self._seconds is not None:
                self._seconds.append((time.perf_counter() - started) / len(units))
                if len(self._seconds) == TIMED:
                    self._guard(min(self._seconds))  # the first run also loads kernels
        return found

    @property
    def sites(self) -> dict[str, tuple[Site, ...]]:
        """Sites of the targets whose gates are exact."""
        return self._sites

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64, the mean over all samples seen; 0 for units not measured."""
        return self.sums[target.name] / self.n_samples

    def way(self, run: Run, target: Target, alive: Sequence[int]) -> OneByOne | Replicated:
        """Many units in a run, once that is known to give the same on this batch."""
        if self._many is None or target.name not in self._sites or not alive:
            return self.one_by_one
        problem = self._problem(run, target, alive, self._many)
        if problem:
            self.slowly(target, problem)
            return self.one_by_one
        self._checked.add(target.name)
        return self._many

    @torch.no_grad()
    def _problem(self, run: Run, target: Target, alive: Sequence[int], many: Replicated) -> str:
        """Why copies of the batch do not give what single runs give, or an empty text.

        Every batch: with nothing removed, the outputs are the plain ones, while another unit is
        away. The first batch: so are those without the unit that changes them most.
        """
        first = target.name not in self._checked
        units = alive[: many.room] if first else alive[:1]
        t = torch.ones(len(units), dtype=torch.float64)
        try:
            base, outputs = many.removed(run.inputs, run.n, target, units, t)
        except Exception as error:  # a model may refuse another batch size in any way
            text = f"{error}".splitlines() or [type(error).__name__]
            return f"the model refuses copies of batch {run.number} side by side: {text[0]}"
        if not agree(self.plain, base):
            return f"copies of batch {run.number} side by side change the outputs"
        if first:
            most = max(range(len(units)), key=lambda i: _distance(outputs[i], base))
            _, (alone,) = self.one_by_one.removed(run.inputs, run.n, target, [units[most]], t[:1])
            if not agree(alone, outputs[most]):
                return f"unit {units[most]} has another effect at its activation"
        return ""

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


class Ablation(Removals):
    """(L(theta + t v) - L(theta)) / t, or the mean norm of the same for outputs.

    Options: `of` is "loss" (signed) or "output", `step` is t.
    """

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self.what = "output" if request.options.get("of") == "output" else "loss"
        self._step = float(request.options.get("step", 1.0))

    @torch.no_grad()
    def measured(
        self, run: Run, way: OneByOne | Replicated, target: Target, units: Sequence[int]
    ) -> Tensor:
        """(k,) difference quotients."""
        t = torch.full((len(units),), self._step, dtype=torch.float64)
        base, outputs = way.removed(run.inputs, run.n, target, units, t)
        base = self.plain if base is None else base
        if self.what == "output":
            start = sample_outputs(base, run.n)
            every = [sample_outputs(o, run.n) for o in outputs]
            change = [mean_norm([a - b for a, b in zip(e, start, strict=True)]) for e in every]
            return torch.tensor(change, dtype=torch.float64) / self._step
        before = float(self.loss(base, run))
        if not math.isfinite(before):
            raise ScoringError(
                f"batch {run.number}: the loss is {before}; check the data and the model"
            )
        after = torch.tensor([float(self.loss(o, run)) for o in outputs], dtype=torch.float64)
        return (after - before) / self._step

    def loss(self, outputs: Any, run: Run) -> Tensor:
        """The scalar loss of one copy of the batch."""
        assert self.setting.loss_fn is not None
        return self.setting.loss_fn(outputs, run.batch[1]).reshape(())


@contextmanager
def forward_mode(model: nn.Module | None = None) -> Iterator[None]:
    """Kernels that know forward-mode and second derivatives: no fused recurrent or attention ones.

    Args:
        model: if it is given and holds no recurrent layer and no captured graph, convolutions keep
            their fast kernels.
    """
    recurrent = (nn.RNNBase, nn.RNNCellBase, torch.fx.GraphModule, torch.jit.ScriptModule)
    slow = model is None or any(isinstance(m, recurrent) for m in model.modules())
    mkldnn: Any = torch.backends.mkldnn  # its properties are set through descriptors
    mha = torch.backends.mha
    fused, fast = mkldnn.enabled, mha.get_fastpath_enabled()
    try:
        mkldnn.enabled = fused and not slow
        mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), StillWeights(), warnings.catch_warnings():
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


def _check(found: Tensor, alive: Sequence[int], where: str, name: str, what: str) -> None:
    """Refuse values that are not finite."""
    broken = [unit for unit in (~torch.isfinite(found)).nonzero()[:, 0].tolist() if unit in alive]
    if broken:
        raise ScoringError(
            f"{where}: removing unit {broken[0]} of {name} changes the {what} by "
            f"{found[broken[0]].item()}; check the data and the model"
        )


def _distance(a: Any, b: Any) -> float:
    """Largest difference between floating-point outputs."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return max(
        (float((x - y).abs().max()) for x, y in pairs if x.is_floating_point() and x.numel()),
        default=0.0,
    )


def mean_norm(changes: Sequence[Tensor]) -> float:
    """Mean over samples of the 2-norm over everything else."""
    squares = torch.stack([c.double().square().reshape(len(c), -1).sum(1) for c in changes])
    return float(squares.sum(0).sqrt().mean())  # (outputs, n) -> ()


register_statistic("ablation", Ablation)
