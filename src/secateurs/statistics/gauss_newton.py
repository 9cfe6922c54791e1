"""The Gauss-Newton curvature of every unit, from one extra backward pass.

With the outputs f and the loss l(f) of a sample, the second derivative along the removal of a unit
is j' H_i j + (a part with second derivatives of f): j is the derivative of the outputs along the
removal, H_i that of the loss with respect to them. In a network of relu or other piecewise linear
functions the second part is zero for the gate of a unit.

    GaussNewton   mean over samples of j' H_i j, and the slope, for every unit
    OutputSlope   the slope alone, from the same run

j itself is never known: a vector r with E[r r'] = H_i (see `output_roots`) is sent backwards, and
the gradient of the gate of the unit is j' r. Samples stay apart, so that nothing of one unit or
sample enters another, and the estimate is far steadier than one with the Hessian of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateurs.batches import call_model
from secateurs.errors import ScoringError
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    generator_for,
    register_statistic,
    requiring_grad,
)
from secateurs.statistics.gates import Gates, probe_gates
from secateurs.statistics.output_roots import Outputs, roots, seen_outputs
from secateurs.statistics.sums import View
from secateurs.statistics.units import into_units, members_of, one_sample
from secateurs.types import GroupTarget, Target

__all__ = ["GaussNewton", "OutputSlope"]


class GaussNewton(Collector):
    """j' H_i j of every unit, the mean over samples, and its slope.

    Options: `probes`, how many vectors r are averaged.
    """

    not_shared = "its random signs depend on the place of each sample in all of the data"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._probes = int(request.options["probes"])
        self._gated: list[GroupTarget] = []
        self._single: list[GroupTarget] = []
        self._gates = Gates(setting.model, {})

    def begin(self, run: Run) -> None:
        """Find out which units can be gated; the others are seen one sample at a time."""
        setting, request = self.setting, self.request
        sites, why = probe_gates(
            setting.model, run.batch, request.groups, request.members, setting.params
        )
        self._gated = [t for t in request.groups if t.name in sites]
        self._single = [t for t in request.groups if t.name not in sites]
        self._gates = Gates(setting.model, sites)
        self.notes += [
            f"{t.name}: scored one sample at a time ({why[t.name]})" for t in self._single
        ]

    def alone(self, run: Run) -> None:
        """One forward pass, one backward pass for the slope and one for each probe."""
        before = self.n_samples
        if self._gated:
            self._together(run, before)
        for i in range(run.n if self._single else 0):
            single = one_sample(run.batch, i, run.n)
            self._sample(Run(run.number, single), before + i, f"batch {run.number}, sample {i}")

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64 mean over samples of j' H_i j."""
        return self.sums[f"{target.name}/curvature"] / self.n_samples / self._probes

    def slope(self, target: Target) -> Tensor:
        """(n_units,) float64 derivative of the mean loss to scaling the unit."""
        return self.sums[f"{target.name}/slope"] / self.n_samples

    # -- runs ----------------------------------------------------------------------------------

    def _outputs(self, run: Run, where: str) -> Outputs:
        """Run the model; where its outputs bend the loss."""
        loss_fn, (inputs, labels) = self.setting.loss_fn, run.batch
        assert loss_fn is not None
        torch.clear_autocast_cache()
        outputs = call_model(self.setting.model, inputs)
        return seen_outputs(outputs, lambda y: loss_fn(y, labels), run.n, where)

    def _roots(self, outputs: Outputs, first: int) -> list[tuple[list[Tensor], float]]:
        """For all probes; the signs depend on the place of the sample in the data."""

        def signs(probe: int) -> Any:
            def of(sample: int, count: int) -> Tensor:
                g = generator_for(self.setting, "gauss_newton", first + sample, probe)
                return 2 * torch.randint(0, 2, (count,), generator=g, dtype=torch.int8) - 1

            return of

        return [root for k in range(self._probes) for root in roots(outputs, signs(k))]

    def _together(self, run: Run, before: int) -> None:
        with torch.enable_grad(), self._gates.running(run.n):
            outputs = self._outputs(run, f"batch {run.number}")
            leaves = self._gates.leaves
            slope = outputs.slope(leaves)
            found = [(outputs.pulled(r, leaves), sign) for r, sign in self._roots(outputs, before)]
        for target in self._gated:
            each = self._gates.per_sample(target, slope)  # (n, n_units)
            self._add(run, target, "slope", each.sum(0))
            for grads, sign in found:
                # `per_sample` undoes the mean of the loss; r r' holds one such mean, not two
                each = self._gates.per_sample(target, grads)
                self._add(run, target, "curvature", each.square().sum(0) * (sign / run.n))

    def _sample(self, run: Run, number: int, where: str) -> None:
        """One sample, differentiated at the weights of the units."""
        params = self.setting.params
        members = {t.name: members_of(t, self.request.members, params) for t in self._single}
        names = list(dict.fromkeys(m.tensor for held in members.values() for m in held))
        at: list[Tensor] = [params[n] for n in names]

        def fold(target: GroupTarget, grads: Sequence[Tensor | None]) -> Tensor:
            by_name = dict(zip(names, grads, strict=True))
            out = torch.zeros(target.n_units, dtype=torch.float64)
            for m in members[target.name]:
                grad = by_name[m.tensor]
                if grad is not None:
                    into_units(params[m.tensor].detach() * grad, m, out)
            return out

        with ExitStack() as stack:
            stack.enter_context(requiring_grad(params[n] for n in names))
            stack.enter_context(torch.enable_grad())
            outputs = self._outputs(run, where)
            slope = outputs.slope(at)
            found = [(outputs.pulled(r, at), sign) for r, sign in self._roots(outputs, number)]
        for target in self._single:
            self._add(run, target, "slope", fold(target, slope))
            for grads, sign in found:
                self._add(run, target, "curvature", fold(target, grads).square() * sign)

    def _add(self, run: Run, target: Target, what: str, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            raise ScoringError(
                f"batch {run.number}: the {what} at {target.name} is not finite; check the data, "
                "and the loss where its gradient is undefined"
            )
        self.sums.add(f"{target.name}/{what}", values)


class OutputSlope(Collector):
    """The slope of every unit, which `GaussNewton` has met on its way."""

    depends: ClassVar[tuple[str, ...]] = ("gauss_newton",)

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64."""
        newton = self.others["gauss_newton"]
        assert isinstance(newton, GaussNewton)
        return newton.slope(target)


register_statistic("gauss_newton", GaussNewton)
register_statistic("output_slope", OutputSlope)
