"""Derivatives along a path, or near a point, instead of at the point alone.

    UnitPath       each unit alone on its way out: the integral is the exact ablation
    SharedPath     all units of a target, or of the network, on their way out together
    NoisyGradient  the gradient averaged over points around the weights

Integrals over [0, 1] are Gauss-Legendre sums: `steps` points are exact for polynomials of degree
2 steps - 1. A relu makes the integrand jump, and the error then falls with 1 / steps only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics.ablation import OneByOne, Replicated, same_name
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    generator_for,
    loss_with,
    register_statistic,
)
from secateurs.statistics.gradients import finite_gradient
from secateurs.statistics.removals import Removals
from secateurs.statistics.slopes import losses_at
from secateurs.statistics.sums import View
from secateurs.statistics.units import into_units, members_of
from secateurs.types import GroupTarget, Member, Target, WeightTarget

__all__ = ["NoisyGradient", "SharedPath", "UnitPath", "nodes", "whole_number"]


def nodes(steps: int) -> list[tuple[float, float]]:
    """Points in (0, 1) and their weights, which add up to 1.

    Example:
        >>> [(round(x, 3), round(w, 3)) for x, w in nodes(2)]
        [(0.211, 0.5), (0.789, 0.5)]
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    return [(float(x + 1) / 2, float(w) / 2) for x, w in zip(points, weights, strict=True)]


def whole_number(request: Request, name: str) -> int:
    """An option that counts something.

    Raises:
        ConfigError: it is not a whole number.
    """
    value = float(request.options[name])
    if not value.is_integer():
        raise ConfigError(f"{name} must be a whole number, got {value:g}")
    return int(value)


class UnitPath(Removals):
    """The integral of dL/dt from t = 0 to 1 for each unit, alone on its way out."""

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._nodes = nodes(whole_number(request, "steps"))

    def measured(
        self, run: Run, way: OneByOne | Replicated, target: Target, units: Sequence[int]
    ) -> Tensor:
        """(k,) integrals."""
        found = torch.zeros(len(units), dtype=torch.float64)
        for point, weight in self._nodes:
            t = torch.full_like(found, point).requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(losses_at(self, run, way, target, units, t), t)
            found += weight * slope
        return found


class SharedPath(Collector):
    """The integral of -sum w dL/dw over each unit, while all of them shrink from 1 to 0 together.

    Option `path`: "target" takes one target at a time, "all" every target of the request. A weight
    that belongs to m units on the way carries the factor a^m.
    """

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._nodes = nodes(whole_number(request, "steps"))
        targets = list(request.targets)
        together = request.options["path"] == "all"
        self._families = [targets] if together else [[target] for target in targets]
        self._seconds: list[float] | None = []
        self._names = same_name(setting.params)

    def alone(self, run: Run) -> None:
        """Walk every path on one batch.

        Raises:
            ConfigError: it would take longer than `max_seconds`.
        """
        for family in self._families:
            places = self._places(family)
            units = {t.name: torch.zeros(t.n_units, dtype=torch.float64) for t in family}
            for a, weight in self._nodes:
                started = time.perf_counter()
                self._step(run, places, units, a, weight)
                if self._seconds is not None:
                    self._seconds.append(time.perf_counter() - started)
                    self._guard(self._seconds)
            for name, value in units.items():
                self.sums.add(name, value, run.n)
        self._seconds = None

    def _step(
        self,
        run: Run,
        places: Mapping[str, Sequence[tuple[str, Member | None]]],
        units: Mapping[str, Tensor],
        a: float,
        weight: float,
    ) -> None:
        """Add one point of the path to the units, in place."""
        point = {name: self._scaled(name, here, a) for name, here in places.items()}
        with torch.enable_grad():
            loss = loss_with(self.setting, run, point)
            grads = torch.autograd.grad(loss, list(point.values()), materialize_grads=True)
        for (name, value), grad in zip(point.items(), grads, strict=True):
            finite_gradient(grad, name, f"batch {run.number}, at {a:.3g} of the path")
            change = value.detach() * grad * (-weight / a)
            for target, member in places[name]:
                if member is None:
                    units[target] += change.reshape(-1).double().cpu()
                else:
                    into_units(change, member, units[target])

    def _places(self, family: Sequence[Target]) -> dict[str, list[tuple[str, Member | None]]]:
        """Parameter -> (target, where its units live in it), tied parameters under one name."""
        found: dict[str, list[tuple[str, Member | None]]] = {}
        for target in family:
            if isinstance(target, WeightTarget):
                found.setdefault(self._names[target.name], []).append((target.name, None))
                continue
            assert isinstance(target, GroupTarget)
            for m in members_of(target, self.request.members, self.setting.params):
                found.setdefault(self._names[m.tensor], []).append((target.name, m))
        return found

    def _scaled(self, name: str, here: Sequence[tuple[str, Member | None]], a: float) -> Tensor:
        """The parameter with every unit that lives in it scaled by `a`, as a leaf."""
        value = self.setting.params[name].detach().clone()
        for target, member in here:
            if member is None:
                value *= a
                continue
            alive = np.isin(member.unit, self.setting.alive[target].numpy())
            line = torch.ones(value.shape[member.dim], dtype=value.dtype)
            line[torch.from_numpy(member.index[alive])] = a
            shape = [1] * value.dim()
            shape[member.dim] = -1
            value *= line.to(value.device).reshape(shape)
        return value.requires_grad_()

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64, the mean over all samples."""
        return self.sums[target.name].cpu() / self.n_samples

    def _guard(self, seconds: Sequence[float]) -> None:
        setting = self.setting
        steps = len(self._families) * len(self._nodes) * setting.n_batches
        estimate = min(seconds) * steps
        if estimate > setting.max_seconds and (len(seconds) > 1 or steps == 1):
            raise ConfigError(
                f"{len(self._families)} paths of {len(self._nodes)} steps on {setting.n_batches} "
                f"batches would take about {estimate:.0f} s, more than max_seconds="
                f"{setting.max_seconds:g}. Use fewer steps, fewer batches (max_batches), or "
                'path="all", one path for all targets'
            )


class NoisyGradient(Collector):
    """The gradient averaged over `samples` points theta (1 + sigma z), z standard normal.

    The points depend on the seed only, not on batches or targets: sums over batches merge.
    """

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._samples = whole_number(request, "samples")
        self._sigma = float(request.options["sigma"])
        self._names = same_name(setting.params)

    def alone(self, run: Run) -> None:
        """Every point on one batch."""
        wanted = list(dict.fromkeys(self._names[name] for name in self.parameters()))
        for i in range(self._samples):
            point = self._point(i)
            leaves = [point[name].requires_grad_() for name in wanted]
            with torch.enable_grad():
                loss = loss_with(self.setting, run, point)
                if not loss.requires_grad:
                    raise ScoringError(
                        f"batch {run.number}: the loss does not depend on the weights through "
                        "differentiable operations; remove torch.no_grad and detach from the model "
                        "and the loss"
                    )
                grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
            for name, grad in zip(wanted, grads, strict=True):
                finite_gradient(grad, name, f"batch {run.number}, noisy point {i}")
                self.sums.add(name, grad, run.n / self._samples)

    def _point(self, i: int) -> dict[str, Tensor]:
        """All floating-point parameters with noise; the same whatever their precision."""
        point = {}
        for name in dict.fromkeys(self._names.values()):
            p = self.setting.params[name].detach()
            if p.is_floating_point():
                z = torch.randn(p.shape, generator=generator_for(self.setting, "noisy", i, name))
                point[name] = p * (1 + self._sigma * z.to(p))
        return point

    def element(self, name: str) -> Tensor:
        """The mean gradient at the noisy points of one parameter."""
        return self.sums[self._names[name]] / self.n_samples


register_statistic("unit_path", UnitPath)
register_statistic("shared_path", SharedPath)
register_statistic("noisy_grad", NoisyGradient)
