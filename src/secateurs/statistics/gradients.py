"""First derivatives at single weights, taken one by one as the backward pass makes them.

    Gradient   the mean over all samples
    ByBatch    scores finished for each batch, then averaged by batch size

No second set of gradients is ever held: each is folded into the sums as it arrives, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateurs.criteria import FINISH
from secateurs.errors import ScoringError
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    register_statistic,
)
from secateurs.statistics.jobs import Job, member_places
from secateurs.statistics.sums import View
from secateurs.statistics.units import into_units
from secateurs.types import Member, Target

__all__ = ["ByBatch", "Gradient", "finite_gradient", "gradient_stats"]

PART = 2**15
"""Elements that are worked on at once: they stay in the cache of the processor."""


class Gradient(Collector):
    """The gradient of the loss, the mean over all samples."""

    shares = "backward"

    def wants(self) -> Iterable[str]:
        """Every parameter that a target needs."""
        return self.parameters()

    def gradient(self, run: Run, name: str, grad: Tensor) -> None:
        """Add up, weighted by samples."""
        self.sums.add(name, grad, run.n)

    def element(self, name: str) -> Tensor:
        """dL/dw of one parameter."""
        return self.sums[name] / self.n_samples


class Gate(Gradient):
    """w dL/dw."""

    def element(self, name: str) -> Tensor:
        """w dL/dw of one parameter."""
        return self.setting.params[name].detach() * super().element(name)


class ByBatch(Collector):
    """Scores of one criterion finished for each batch, from its mean gradient."""

    shares = "backward"

    def __init__(self, setting: Setting, job: Job, targets: Sequence[Target], sums: View) -> None:
        super().__init__(setting, Request("", {}, job.criterion.members, list(targets)), sums)
        self.criterion = job.criterion
        self._places: dict[str, list[tuple[Target, Member | None]]] = {}
        for target in targets:
            for name, member in member_places(job.criterion, target, setting.params):
                self._places.setdefault(name, []).append((target, member))
        self._open: dict[str, Tensor] = {}

    def wants(self) -> Iterable[str]:
        """Every parameter that a target needs."""
        return self._places

    @torch.no_grad()
    def gradient(self, run: Run, name: str, grad: Tensor) -> None:
        """Fold one gradient into the units that it belongs to."""
        weight = self.setting.params[name].detach()
        groups = []
        for target, member in self._places[name]:
            if member is None:
                self._fold_weights(run, target.name, weight, grad)
            else:
                groups.append((target, member))
        if groups:
            c, finish = self.criterion, FINISH[self.criterion.finish]
            values = c.fn(gradient_stats(c.needs, weight, grad))
            values = finish(values) if c.finish_on == "element" else values
            for target, member in groups:
                empty = torch.zeros(target.n_units, dtype=torch.float64)
                into_units(values, member, self._open.setdefault(target.name, empty))

    def _fold_weights(self, run: Run, name: str, weight: Tensor, grad: Tensor) -> None:
        """Add the finished scores of all elements, part by part: no large tensor is made."""
        c, finish = self.criterion, FINISH[self.criterion.finish]
        if name not in self.sums:
            half = weight.dtype in (torch.float16, torch.bfloat16)
            wide = torch.float32 if half else weight.dtype
            self.sums.add(name, torch.zeros(weight.shape, dtype=wide, device=weight.device))
        total = self.sums[name].view(-1)
        lines = weight.reshape(-1), grad.reshape(-1)
        for w, g, have in zip(*(torch.split(x, PART) for x in (*lines, total)), strict=True):
            values = c.fn(gradient_stats(c.needs, w, g))
            if c.finish == "square" and values.dtype == have.dtype:
                have.addcmul_(values, values, value=run.n)
            else:
                have.add_(finish(values), alpha=run.n)

    def arrived(self, run: Run) -> None:
        """Finish the units whose elements have all come."""
        finish = FINISH[self.criterion.finish]
        for name, values in self._open.items():
            done = finish(values) if self.criterion.finish_on == "unit" else values
            self.sums.add(name, done, run.n)
        self._open = {}

    def score(self, job: Job, target: Target) -> Tensor:
        """(n_units,) finished scores, the mean over all samples."""
        return self.sums[target.name].reshape(-1).double().cpu() / self.n_samples


def gradient_stats(needs: Iterable[str], weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What a criterion sees of one parameter and one gradient of it."""
    known: dict[str, Any] = {
        "weight": lambda: weight,
        "grad": lambda: grad,
        "gate": lambda: weight * grad,
    }
    return {need: known[need]() for need in needs}


def finite_gradient(grad: Tensor, name: str, where: str) -> Tensor:
    """The gradient, checked.

    Raises:
        ScoringError: it holds values that are not finite.
    """
    # A sum of finite values may overflow, so that it only tells where to look closer.
    if not torch.isfinite(grad.sum()) and not torch.isfinite(grad).all():
        raise ScoringError(
            f"{where}: the gradient of {name} is not finite; check the data, and the loss where "
            "its gradient is undefined"
        )
    return grad


register_statistic("grad", Gradient)
register_statistic("gate", Gate)
