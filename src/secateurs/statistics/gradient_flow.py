"""Gradient flow: how the squared norm of the mean gradient changes with each weight.

WholeGradient   g, the mean gradient of every parameter of the model
GradientFlow    H g, in a second pass over the batches: half the derivative of ||g||^2
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import Tensor

from secateurs.statistics.collector import Collector, Run, register_statistic, requiring_grad
from secateurs.statistics.curvature import (
    differentiable_twice,
    finite_product,
    gradients_of,
    product,
)
from secateurs.statistics.gradients import Gradient

__all__ = ["GradientFlow", "WholeGradient"]


class WholeGradient(Gradient):
    """The mean gradient of every floating-point parameter of the model, scored or not."""

    def wants(self) -> Iterable[str]:
        """Each parameter once, under its first name."""
        return list(self._first().values())

    def element(self, name: str) -> Tensor:
        """dL/dw of one parameter, under any of its names."""
        return super().element(self._first()[id(self.setting.params[name])])

    def _first(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for name, p in self.setting.params.items():
            if p.is_floating_point():
                names.setdefault(id(p), name)
        return names


class GradientFlow(Collector):
    """H g: how the squared norm of the mean gradient g of the model changes with each weight."""

    turn = 1
    depends: ClassVar[tuple[str, ...]] = ("whole_gradient",)

    def alone(self, run: Run) -> None:
        """The Hessian of one batch times the gradient of all."""
        setting, whole, where = self.setting, self.others["whole_gradient"], f"batch {run.number}"
        names = list(whole.wants())
        every: list[Tensor] = [setting.params[n] for n in names]
        wanted = self.parameters()
        with ExitStack() as stack:
            stack.enter_context(requiring_grad(setting.params[n] for n in names))
            stack.enter_context(differentiable_twice(setting.model))
            stack.enter_context(torch.enable_grad())
            torch.clear_autocast_cache()
            grads = gradients_of(setting, run, every)
            direction = [whole.element(n).to(p) for n, p in zip(names, every, strict=True)]
            found = product(grads, direction, [setting.params[n] for n in wanted], where=where)
        for name, values in zip(wanted, found, strict=True):
            self.sums.add(name, finite_product(values, name, where), run.n)

    def element(self, name: str) -> Tensor:
        """(H g) of one parameter."""
        return self.sums[name] / self.n_samples


register_statistic("whole_gradient", WholeGradient)
register_statistic("gradient_flow", GradientFlow)
