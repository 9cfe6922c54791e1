"""First derivatives at single weights, taken one by one as the backward pass makes them.

    Gradient   the mean over all samples
    ByBatch    scores finished for each batch, then averaged by batch size
    BySample   scores finished for each sample, then averaged

No second set of gradients is ever held: each is folded into the sums as it arrives, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateurs.batches import checked_loss
from secateurs.criteria import FINISH
from secateurs.errors import ScoringError
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    register_statistic,
    requiring_grad,
)
from secateurs.statistics.jobs import Job, element_scores, member_tensors
from secateurs.statistics.sums import View
from secateurs.statistics.units import into_units, members_of, one_sample
from secateurs.types import GroupTarget, Member, Target, WeightTarget

__all__ = ["ByBatch", "BySample", "Gradient", "Scorer", "finite_gradient"]


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


class Scorer(Collector):
    """Collects finished scores of one criterion: what cannot wait until the end of the pass."""

    def __init__(self, setting: Setting, job: Job, targets: Sequence[Target], sums: View) -> None:
        super().__init__(setting, Request("", {}, job.criterion.members, list(targets)), sums)
        self.job, self.criterion = job, job.criterion

    def score(self, target: Target) -> Tensor:
        """(n_units,) finished scores, the mean over all samples."""
        return self.sums[target.name].reshape(-1) / self.n_samples


class ByBatch(Scorer):
    """Scores finished for each batch, from its mean gradient."""

    shares = "backward"

    def __init__(self, setting: Setting, job: Job, targets: Sequence[Target], sums: View) -> None:
        super().__init__(setting, job, targets, sums)
        self._places: dict[str, list[tuple[Target, Member | None]]] = {}
        for target in targets:
            for name, member in _places(job, target, setting):
                self._places.setdefault(name, []).append((target, member))
        self._open: dict[str, Tensor] = {}

    def wants(self) -> Iterable[str]:
        """Every parameter that a target needs."""
        return self._places

    @torch.no_grad()
    def gradient(self, run: Run, name: str, grad: Tensor) -> None:
        """Fold one gradient into the units that it belongs to."""
        c, finish = self.criterion, FINISH[self.criterion.finish]
        values = c.fn(_stats(self.criterion.needs, self.setting.params[name].detach(), grad))
        early = finish(values) if c.finish_on == "element" else values
        for target, member in self._places[name]:
            if isinstance(target, WeightTarget):
                if c.finish == "square":
                    self.sums.add_product(target.name, values, values, run.n)
                else:
                    self.sums.add(target.name, finish(values), run.n)
            else:
                assert member is not None
                empty = torch.zeros(target.n_units, dtype=torch.float64)
                into_units(early, member, self._open.setdefault(target.name, empty))

    def arrived(self, run: Run) -> None:
        """Finish the units whose elements have all come."""
        finish = FINISH[self.criterion.finish]
        for name, values in self._open.items():
            done = finish(values) if self.criterion.finish_on == "unit" else values
            self.sums.add(name, done, run.n)
        self._open = {}


class BySample(Scorer):
    """Scores finished for each sample, one backward pass for each."""

    def alone(self, run: Run) -> None:
        """Run the model on every sample of the batch by itself."""
        params, c = self.setting.params, self.criterion
        names = self.parameters()
        for i in range(run.n):
            where = f"batch {run.number}, sample {i}"
            single = one_sample(run.batch, i, run.n)
            with requiring_grad(params[n] for n in names), torch.enable_grad():
                assert self.setting.loss_fn is not None
                loss = checked_loss(self.setting.model, single, self.setting.loss_fn, where)
                every = torch.autograd.grad(loss, [params[n] for n in names], allow_unused=True)
            grads = {
                n: torch.zeros_like(params[n]) if g is None else finite_gradient(g, n, where)
                for n, g in zip(names, every, strict=True)
            }
            for target in self.request.targets:
                self.sums.add(
                    target.name,
                    element_scores(
                        c, target, params,
                        lambda n: _stats(c.needs, params[n].detach(), grads[n]),  # noqa: B023
                    ),
                )  # fmt: skip


def _places(job: Job, target: Target, setting: Setting) -> list[tuple[str, Member | None]]:
    """(parameter, where the units live in it) of one target."""
    if isinstance(target, GroupTarget):
        members = members_of(target, job.criterion.members, setting.params)
        return [(m.tensor, m) for m in members]
    return [(name, None) for name in member_tensors(job.criterion, target, setting.params)]


def _stats(needs: Iterable[str], weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
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
