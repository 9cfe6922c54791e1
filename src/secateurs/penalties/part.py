"""`UnitPenalty`: the penalty inside a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateurs.errors import ConfigError
from secateurs.finetuning import Part, Training
from secateurs.penalties.config import Penalty
from secateurs.penalties.places import Family, families_of
from secateurs.types import Graph

__all__ = ["UnitPenalty"]


class UnitPenalty(Part):
    """Adds the gradient of a penalty on units to that of the loss, before clipping and the step.

    Removed entries are zero, and the gradient of every rule is zero there: masks that are held stay
    as they are. Parameters that do not require a gradient are left alone. A weight that lies in a
    row and a column of the same unit (a recurrent one) counts in both.

    In a loop of your own:

        penalty.start(Training(model, optimizer, held, n_steps))
        ...
        loss.backward()            # with a GradScaler: scaler.unscale_(optimizer) next
        penalty.gradients(step)
        optimizer.step()

    Args:
        config: which penalty.
        graph: where the units are, from `trace` of this model.
        granularity: kinds of units, or "structured".
        units: target name -> units that are penalised; None = all. Needed by "growing".

    Attributes:
        notes: targets that this rule cannot act on, and why; known after `start`.

    Example:
        >>> import secateurs as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> x = torch.randn(8, 2)
        >>> penalty = UnitPenalty(Penalty("group_lasso", strength=0.1), sc.trace(net, x))
        >>> config = sc.Finetune(epochs=50, lr=0.05)
        >>> _ = sc.finetune(net, [(x, x[:, :1])], torch.nn.functional.mse_loss, config,
        ...                 parts=[penalty])
        >>> bool(net[0].weight.norm(dim=1).min() < 0.05)
        True
    """

    def __init__(
        self,
        config: Penalty,
        graph: Graph,
        *,
        granularity: str | Sequence[str] = "structured",
        units: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.graph = config, graph
        self.granularity, self.units = granularity, units
        self.notes: list[str] = []
        self._families: list[Family] | None = None
        self._n_steps: int | None = None
        self._steps = 0

    def start(self, training: Training) -> None:
        """Find the weights of the units in the model.

        Raises:
            ConfigError: the graph is not of this model, nothing can be penalised, or the length of
                the training is not known and needed.
        """
        self._families, self.notes = families_of(
            training.model, self.graph, self.config.rule, self.granularity, self.units
        )
        self._n_steps = training.n_steps
        self._steps = 0
        self.config.at(0, self._n_steps)  # an error comes before the training

    def gradients(self, steps: int) -> None:
        """Add the gradient of the penalty."""
        self._steps = steps
        strength = self.strength
        for family in self._started():
            if self.config.rule == "group_lasso":
                norms = _squares(family).sqrt()
                factor = torch.where(norms > 0, family.sizes.sqrt() / norms, 0.0)
            else:
                factor = torch.ones_like(family.chosen)
            factor = strength * family.chosen * factor
            for place in family.places:
                sign = self.config.rule == "norm_scale"
                place.add_(factor.to(place.weight.device), sign=sign)

    @property
    def strength(self) -> float:
        """The strength of the last step that was penalised."""
        return self.config.at(self._steps, self._n_steps)

    def value(self) -> float:
        """The penalty now, at the strength of the last step: a number for logs."""
        total = 0.0
        for family in self._started():
            if self.config.rule == "group_lasso":
                each = family.sizes.sqrt() * _squares(family).sqrt()
            elif self.config.rule == "growing":
                each = _squares(family) / 2
            else:
                each = torch.zeros_like(family.chosen)
                for place in family.places:
                    found = place.weight.detach().abs()[place.index].to(each)
                    each.index_add_(0, place.unit.to(each.device), found)
            total += float((each * family.chosen).sum())
        return self.strength * total

    def state(self) -> dict[str, Any]:
        """Steps done, for the strength."""
        return {"steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self._steps = int(state["steps"])

    def _started(self) -> list[Family]:
        if self._families is None:
            raise ConfigError("a penalty must be started: penalty.start(Training(model, ...))")
        return self._families


def _squares(family: Family) -> Tensor:
    """(n_units,) squared norm of each unit."""
    total = torch.zeros_like(family.sizes)
    for place in family.places:
        total += place.squares(family.n_units).to(total)
    return total
