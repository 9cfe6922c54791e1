"""A Lightning callback that prunes while the `Trainer` trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from secateurs.during import Cuts, prune_during
from secateurs.errors import ConfigError
from secateurs.types import Plan

__all__ = ["Pruning"]


class Pruning(Callback):
    """Cuts by a schedule during `trainer.fit`, and holds what was cut at zero.

    Cuts, masks and the plan are part of Lightning's checkpoints.

    Args:
        network: path of the network inside the `LightningModule`, as in "net"; "" for the module
            itself, which then needs a `forward`.
        **options: of `secateurs.prune_during`: budget, criterion, granularity, schedule,
            example_inputs, batches, loss_fn, ... Steps and epochs are those of the trainer.

    Attributes:
        plan: what was removed, for `shrink` after the training; None before the first cut.

    Raises:
        ConfigError: when the training starts, as `prune_during`; or the trainer does not know how
            long it will train.
    """

    def __init__(self, network: str = "", **options: Any) -> None:
        self.network, self.options = network, options
        self.cuts: Cuts | None = None
        self._state: dict[str, Any] | None = None
        self._inside = ExitStack()

    @property
    def plan(self) -> Plan | None:
        """What was removed."""
        return None if self.cuts is None else self.cuts.plan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter `prune_during` with the trainer's optimizers and its number of steps."""
        n_steps = trainer.estimated_stepping_batches
        if not math.isfinite(n_steps):
            raise ConfigError(
                "the trainer has no end, so a schedule has none: give max_epochs or max_steps"
            )
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        net: nn.Module = pl_module.get_submodule(self.network)
        self.cuts = self._inside.enter_context(
            prune_during(
                net,
                trainer.optimizers,
                n_steps=int(n_steps),
                steps_per_epoch=per_epoch,
                state=self._state,
                group="world" if trainer.world_size > 1 else None,
                **self.options,
            )
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it: masks are applied once more."""
        self._inside.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave it, with hooks gone."""
        self._inside.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps in its checkpoints."""
        return {} if self.cuts is None else self.cuts.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What it gives back before the training starts."""
        self._state = dict(state_dict) or None
