"""What a window of training tells about single weights: w_t and g_t at every optimizer step.

    fold(sums, name, weight, grad)     one parameter at one step
    read(sums, name, steps)            the statistic after so many steps

The same folds serve `score`, which trains a copy by plain gradient descent (`Window`), and `watch`,
which looks at the training of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.criteria.registry import Option
from secateurs.errors import ScoringError
from secateurs.statistics.ablation import same_name
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    loss_with,
    register_statistic,
)
from secateurs.statistics.gradients import finite_gradient
from secateurs.statistics.paths import whole_number
from secateurs.statistics.sums import Sums, View

__all__ = ["FOLDS", "Fold", "Window", "full_precision"]


@dataclass(frozen=True)
class Fold:
    """How one statistic of a window grows with a step, and how it is read at the end."""

    fold: Callable[[Sums | View, str, Tensor, Tensor, Mapping[str, Option]], None]
    read: Callable[[Tensor, int, Mapping[str, Option]], Tensor]


def full_precision(value: Tensor) -> Tensor:
    """The tensor without its history, half precision as float32."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _moved(sums: Sums | View, name: str, w: Tensor, g: Tensor, _: Mapping[str, Option]) -> None:
    sums.add_product(name, w, g)


def _mean(sums: Sums | View, name: str, w: Tensor, g: Tensor, _: Mapping[str, Option]) -> None:
    sums.add(name, g.abs())


def _moving(
    sums: Sums | View, name: str, w: Tensor, g: Tensor, options: Mapping[str, Option]
) -> None:
    now = g.abs() if options["of"] == "gradient" else -w * g
    share = 1 - float(options["decay"])
    sums.add(name, now - sums[name] if name in sums else now, share)


def _unbiased(value: Tensor, steps: int, options: Mapping[str, Option]) -> Tensor:
    return value / (1 - float(options["decay"]) ** steps)


FOLDS: Mapping[str, Fold] = {
    "moved": Fold(_moved, lambda value, steps, options: value),
    "window_grad": Fold(_mean, lambda value, steps, options: value / steps),
    "moving_grad": Fold(_moving, _unbiased),
}
"""Statistic of a window -> how it is made."""


class Window(Collector):
    """Trains a copy of the weights by plain gradient descent, one step for each batch.

    The model itself never changes: what the copy has moved is a sum of steps, so that an
    interrupted window goes on where it stopped. Options: `lr`, `epochs`.
    """

    not_shared = "each step of its training begins where the one before has ended"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self.repeats = whole_number(request, "epochs")
        self._lr = float(request.options["lr"])
        self._names = same_name(setting.params)
        self._how = FOLDS[request.statistic]

    def alone(self, run: Run) -> None:
        """One training step.

        Raises:
            ScoringError: training diverges.
        """
        params = self.setting.params
        trained = {
            name: self._now(name).requires_grad_()
            for name in dict.fromkeys(self._names.values())
            if params[name].is_floating_point()
        }
        wanted = {self._names[name] for name in self.parameters()}
        where = f"batch {run.number} of the training window"
        with torch.enable_grad():
            try:
                loss = loss_with(self.setting, run, trained)
            except ScoringError as error:
                if "steps" not in self.sums:
                    raise
                raise ScoringError(
                    f"{error}; or training diverges: choose a smaller lr (now {self._lr:g})"
                ) from error
            if not loss.requires_grad:
                raise ScoringError(
                    f"{where}: the loss does not depend on the weights through differentiable "
                    "operations; remove torch.no_grad and detach from the model and the loss"
                )
            every = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for (name, value), grad in zip(trained.items(), every, strict=True):
            known = torch.zeros_like(value) if grad is None else finite_gradient(grad, name, where)
            g = full_precision(known)
            if name in wanted:
                w = full_precision(value)
                self._how.fold(self.sums, name, w, g, self.request.options)
            if grad is not None:
                self.sums.add(f"{name} moved", g, -self._lr)
        self.sums.add("steps", torch.ones((), dtype=torch.float64))

    def _now(self, name: str) -> Tensor:
        """A parameter of the copy."""
        p, key = self.setting.params[name].detach(), f"{name} moved"
        if key not in self.sums:
            return p.clone()
        return (full_precision(p) + self.sums[key]).to(p.dtype)

    def count(self, run: Run) -> None:
        """Samples of the first epoch only: later ones bring no others."""
        last = int(self.sums["last"]) if "last" in self.sums else -1
        if "later" not in self.sums and run.number > last:
            super().count(run)
            self.sums.add("last", torch.tensor(float(run.number - max(last, 0))))
        elif "later" not in self.sums:
            self.sums.add("later", torch.ones(()))

    def element(self, name: str) -> Tensor:
        """The statistic of one parameter after the whole window."""
        steps = int(self.sums["steps"])
        return self._how.read(self.sums[self._names[name]], steps, self.request.options)


for _name in FOLDS:
    register_statistic(_name, Window)
