"""A Keras callback, for models on the torch backend."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import keras
import torch

from secateurs.during import Cuts, prune_during
from secateurs.errors import ConfigError
from secateurs.masks import apply_masks_
from secateurs.types import Plan

__all__ = ["Pruning"]


class Pruning(keras.callbacks.Callback):  # type: ignore[misc]
    """Cuts by a schedule during `model.fit`, and holds what was cut at zero.

    Optimizers of Keras are not those of torch: after each batch the weights and the optimizer's
    variables of their shape are zeroed where something was removed.

    Args:
        **options: of `secateurs.prune_during`: budget, criterion, granularity, schedule,
            example_inputs, batches, loss_fn, ... Steps and epochs are those of `fit`.

    Attributes:
        plan: what was removed, for `shrink` after the training; None before the first cut.

    Raises:
        ConfigError: another backend, `fit` does not know its number of batches, or as
            `prune_during`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if keras.backend.backend() != "torch":
            raise ConfigError(
                f"Keras runs on {keras.backend.backend()!r}; set the environment variable "
                "KERAS_BACKEND=torch before Keras is imported"
            )
        self.options = options
        self.cuts: Cuts | None = None
        self._inside = ExitStack()

    @property
    def plan(self) -> Plan | None:
        """What was removed."""
        return None if self.cuts is None else self.cuts.plan

    def on_train_begin(self, logs: Any = None) -> None:
        """Enter `prune_during` with the steps of `fit`."""
        self._inside.close()  # of a training that an exception has ended
        per_epoch, epochs = self.params.get("steps"), self.params["epochs"]
        if per_epoch is None:
            raise ConfigError("fit does not know its number of batches: give steps_per_epoch=")
        self.cuts = self._inside.enter_context(
            prune_during(
                self.model,
                None,
                n_steps=per_epoch * epochs,
                steps_per_epoch=per_epoch,
                **self.options,
            )
        )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """A step was made."""
        assert self.cuts is not None
        self.cuts.step()
        masks = self.cuts.held.masks
        apply_masks_(self.model, masks)
        self._erase_state(masks)

    def on_train_end(self, logs: Any = None) -> None:
        """Leave it: masks are applied once more."""
        self._inside.close()

    @torch.no_grad()
    def _erase_state(self, masks: dict[str, torch.Tensor]) -> None:
        """Zero momentum and moments where something was removed."""
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scaler
        removed = {
            id(self.model.get_parameter(name)): ~mask
            for name, mask in masks.items()
            if not mask.all()
        }
        trained = optimizer._trainable_variables
        for held in vars(optimizer).values():
            if not isinstance(held, list) or len(held) != len(trained) or held is trained:
                continue
            for state, variable in zip(held, trained, strict=True):
                gone = removed.get(id(variable.value))
                if gone is not None and state is not None and tuple(state.shape) == gone.shape:
                    state.value.masked_fill_(gone.to(state.value.device), 0)
