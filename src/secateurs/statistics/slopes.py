"""Derivatives towards the removal of each unit that one backward pass does not give.

OutputSlope  the mean norm of J v
Quadratic    D_v L + 1/2 v'Hv
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor

from secateurs.batches import call_model
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics.ablation import (
    OneByOne,
    Replicated,
    agree,
    places,
    same_name,
    tolerance,
)
from secateurs.statistics.collector import Request, Run, Setting, call_with, register_statistic
from secateurs.statistics.gates import Gates
from secateurs.statistics.removals import Removals, forward_mode, mean_norm, sample_outputs
from secateurs.statistics.sums import View
from secateurs.statistics.units import one_sample
from secateurs.types import Inputs, Target

__all__ = ["OutputSlope", "Quadratic", "losses_at"]

forward_ad: Any = torch.autograd.forward_ad  # it has no types of its own
PRODUCT_COST = 2
"""Backward passes to activations that cost as much as one forward-mode product."""


class OutputSlope(Removals):
    """Mean over samples of ||J v||_2.

    Where gates are exact there are two ways, and the cheaper one is taken: a backward pass for each
    of the C output entries of a sample serves all units; a forward-mode product serves the units of
    one run. Elsewhere it is one forward-mode product for each unit.
    """

    what = "output"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._apart = False
        self._compared: set[str] = set()

    def together(self, run: Run) -> dict[str, Tensor]:
        """All units of gated targets from C backward passes, where that is cheaper."""
        gated = [t for t in self.request.groups if t.name in self.sites]
        n_units = sum(len(self.setting.alive[t.name]) for t in gated)
        entries = sum(t[0].numel() for t in sample_outputs(self.plain, run.n))
        if entries > PRODUCT_COST * n_units:
            return {}
        if run.n > 1 and not self._apart:
            if not self._alike(run):
                for target in gated:
                    self.slowly(target, "the samples of a batch act on each other")
                return {}
            self._apart = True
        found = self._backward(run)
        for target in [t for t in gated if t.name not in self._compared]:
            unit = int(found[target.name].argmax())
            truth = self.derivative(run.inputs, run.n, target, unit)
            dtype = sample_outputs(self.plain, run.n)[0].dtype
            if abs(float(found[target.name][unit]) - truth) > 10 * tolerance(dtype) * (1 + truth):
                self.slowly(target, f"unit {unit} has another slope at its activation")
            self._compared.add(target.name)
        return {name: value for name, value in found.items() if name in self.sites}

    @torch.no_grad()
    def _alike(self, run: Run) -> bool:
        """Whether the first sample has the same outputs alone: a gate then moves its own only."""
        inputs, _ = one_sample((run.inputs, None), 0, run.n)
        alone = sample_outputs(call_model(self.setting.model, inputs), 1)
        return agree(alone, [o[:1] for o in sample_outputs(self.plain, run.n)])

    def _backward(self, run: Run) -> dict[str, Tensor]:
        """(n_units,) of each gated target: squares of dy_c/dgate summed over c, for each sample."""
        targets = [t for t in self.request.groups if t.name in self.sites]
        gates = Gates(self.setting.model, self.sites)
        squares = {t.name: torch.zeros(run.n, t.n_units, dtype=torch.float64) for t in targets}
        with torch.enable_grad(), gates.running(run.n):
            outputs = sample_outputs(call_model(self.setting.model, run.inputs), run.n)
            columns = [c for o in outputs if o.requires_grad for c in o.reshape(run.n, -1).sum(0)]
            for column in columns:
                grads = torch.autograd.grad(
                    column, gates.leaves, retain_graph=True, allow_unused=True
                )
                for target in targets:  # `per_sample` undoes the mean of a loss
                    squares[target.name] += (gates.per_sample(target, grads) / run.n).square()
        return {name: value.sqrt().mean(0) for name, value in squares.items()}

    def measured(
        self, run: Run, way: OneByOne | Replicated, target: Target, units: Sequence[int]
    ) -> Tensor:
        """(k,) mean norms, by forward-mode products."""
        if isinstance(way, OneByOne):
            slopes = [self.derivative(run.inputs, run.n, target, unit) for unit in units]
            return torch.tensor(slopes, dtype=torch.float64)

        zero = torch.zeros((), dtype=torch.float64)
        with forward_mode(self.setting.model), torch.no_grad(), forward_ad.dual_level():
            t = forward_ad.make_dual(zero, torch.ones_like(zero)).expand(len(units))
            outputs = way.removed(run.inputs, run.n, target, units, t)[1]
            norms = [mean_norm(_tangents(o, run.n)) for o in outputs]
        return torch.tensor(norms, dtype=torch.float64)

    def derivative(self, inputs: Inputs, n: int, target: Target, unit: int) -> float:
        """Mean over samples of ||J v||_2 for one unit, from the parameters."""
        params = self.setting.params
        point: dict[str, Tensor] = {}
        direction: dict[str, Tensor] = {}
        first = same_name(params)
        for name, place in places(target, unit, self.request.members, params):
            weight = point.setdefault(first[name], params[name].detach())
            tangent = direction.setdefault(first[name], torch.zeros_like(weight))
            tangent[place] -= weight[place]

        with forward_mode(self.setting.model), torch.no_grad(), forward_ad.dual_level():
            dual = {k: forward_ad.make_dual(p, direction[k]) for k, p in point.items()}
            return mean_norm(_tangents(call_with(self.setting.model, dual, inputs), n))


class Quadratic(Removals):
    """D_v L + 1/2 v'Hv: the loss after the removal, expanded to second order."""

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        if request.options.get("of") == "output":
            raise ConfigError("order=2 is of the loss, got of='output'; leave out order, or of")

    def measured(
        self, run: Run, way: OneByOne | Replicated, target: Target, units: Sequence[int]
    ) -> Tensor:
        """(k,) sums of first and second order: copies do not mix, so one sum serves all."""
        t = torch.zeros(len(units), dtype=torch.float64, requires_grad=True)
        with forward_mode(self.setting.model), torch.enable_grad():
            losses = losses_at(self, run, way, target, units, t)
            (slope,) = torch.autograd.grad(losses, t, create_graph=True)
            curve = torch.zeros_like(slope)
            if slope.requires_grad:
                (curve,) = torch.autograd.grad(slope.sum(), t, materialize_grads=True)
        return slope.detach() + curve / 2


def losses_at(
    collector: Removals,
    run: Run,
    way: OneByOne | Replicated,
    target: Target,
    units: Sequence[int],
    t: Tensor,
) -> Tensor:
    """The sum over units of the loss with unit j scaled by (1 - t_j), differentiable.

    Raises:
        ScoringError: the loss does not depend on the weights.
    """
    loss_fn = collector.setting.loss_fn
    assert loss_fn is not None
    outputs = way.removed(run.inputs, run.n, target, units, t)[1]
    total = torch.stack([loss_fn(o, run.batch[1]).reshape(()) for o in outputs]).sum()
    if not total.requires_grad:
        raise ScoringError(
            f"batch {run.number}: the loss does not depend on the weights through differentiable "
            "operations; remove torch.no_grad and detach from the model and the loss"
        )
    return total


def _tangents(outputs: Any, n: int) -> list[Tensor]:
    """The tangents of the outputs that begin with the samples; zeros where they carry none."""
    every = [(o, forward_ad.unpack_dual(o).tangent) for o in sample_outputs(outputs, n)]
    return [torch.zeros_like(o) if tangent is None else tangent for o, tangent in every]


register_statistic("jvp_output", OutputSlope)
register_statistic("quadratic", Quadratic)
