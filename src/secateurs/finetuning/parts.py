"""What can take part in a training beside its loss: a penalty, a rule that moves masks, a log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from secateurs.masks import HeldMasks

__all__ = ["Part", "Training"]


@dataclass(frozen=True, eq=False)
class Training:
    """What a part may look at and change.

    Attributes:
        model: that is trained.
        optimizer: that makes the steps.
        held: the masks that are held.
        n_steps: optimizer steps of the whole training; None when nobody knows.
    """

    model: nn.Module
    optimizer: Optimizer
    held: HeldMasks
    n_steps: int | None


class Part:
    """Base of everything that takes part: each method does nothing until it is overridden.

    For each optimizer step, with the number of steps done so far:

        begin(steps)      before the first forward pass of the step
        gradients(steps)  .grad holds the gradient of the whole step, masked, not clipped
        stepped(steps)    after the step, masked entries are zero; counts this step too

    A part with a memory gives it in `state` (tensors and plain values by name), and `load` takes
    it back, so that a training that was interrupted goes on as if nothing had happened.
    """

    def start(self, training: Training) -> None:
        """Before the first step, masks are held."""

    def begin(self, steps: int) -> None:
        """Before the first forward pass of a step."""

    def gradients(self, steps: int) -> None:
        """The gradient of the step is complete."""

    def stepped(self, steps: int) -> None:
        """The optimizer has made the step."""

    def state(self) -> dict[str, Any]:
        """What an interrupted training needs to go on."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; called after `start`."""
