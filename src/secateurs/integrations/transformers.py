"""A callback for the `Trainer` of Hugging Face transformers."""

from __future__ import annotations

import math
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateurs.checkpoints import random_state, read_state, set_random_state, write_state
from secateurs.during import Cuts, prune_during
from secateurs.errors import ConfigError, DataError
from secateurs.types import Plan

__all__ = ["Pruning"]

FILE = "secateurs.state"


class Pruning(TrainerCallback):
    """Cuts by a schedule during `trainer.train`, and holds what was cut at zero.

    The trainer's checkpoints get a file `secateurs.state` with the cuts, and
    `train(resume_from_checkpoint=...)` reads it.

    Args:
        n_batches: how many batches of the training data are kept to score with, unless `batches`
            is given; criteria that see weights only need none.
        **options: of `secateurs.prune_during`: budget, criterion, granularity, schedule, ... Steps
            and epochs are those of the trainer. By default the loss is the model's own, and the
            model is traced on the first batch without its labels.

    Attributes:
        plan: what was removed, for `shrink` after the training; None before the first cut.

    Raises:
        ConfigError: `n_batches` is below 1; when the training starts, as `prune_during`; or a
            checkpoint that was written without this callback.
        DataError: when the training starts, and there is no batch.
    """

    def __init__(self, n_batches: int = 8, **options: Any) -> None:
        if isinstance(n_batches, bool) or not isinstance(n_batches, int) or n_batches < 1:
            raise ConfigError(f"n_batches must be a whole number, at least 1, got {n_batches!r}")
        self.n_batches, self.options = n_batches, options
        self.cuts: Cuts | None = None
        self._inside = ExitStack()

    @property
    def plan(self) -> Plan | None:
        """What was removed."""
        return None if self.cuts is None else self.cuts.plan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter `prune_during` with the trainer's model, optimizer and number of steps."""
        self._inside.close()  # of a training that an exception has ended
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        before = random_state(loader)
        kept = [(dict(batch), None) for batch in islice(loader, self.n_batches)]
        set_random_state(before, loader)  # the training reads what it would have read
        if not kept:
            raise DataError("the training data has no batch")
        inputs = {k: v for k, v in kept[0][0].items() if k not in ("labels", "label")}
        defaults: dict[str, Any] = {
            "batches": kept, "loss_fn": own_loss, "example_inputs": inputs,
            "steps_per_epoch": math.ceil(len(loader) / args.gradient_accumulation_steps),
            "group": "world" if args.world_size > 1 else None,
        }  # fmt: skip
        self.cuts = self._inside.enter_context(
            prune_during(
                model,
                kwargs["optimizer"],
                n_steps=state.max_steps,
                state=self._read(args, state),
                **{**defaults, **self.options},
            )
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the cuts beside the trainer's own files."""
        if self.cuts is not None and state.is_world_process_zero:
            write_state(_folder(args, state) / FILE, self.cuts.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave it: masks are applied once more."""
        self._inside.close()

    def _read(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        """The cuts of the checkpoint that the trainer goes on from."""
        if not state.global_step:
            return None
        given = args.resume_from_checkpoint
        folder = Path(given) if isinstance(given, str) else _folder(args, state)
        if not (folder / FILE).is_file():
            raise ConfigError(
                f"{folder} holds no {FILE}: that training was not pruned by this callback. Start "
                "anew, or resume without it"
            )
        found: dict[str, Any] = read_state(folder / FILE)
        return found


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def own_loss(outputs: Any, targets: object) -> Tensor:
    """The loss that a model of transformers computes when its inputs hold labels."""
    loss = outputs.get("loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError("the model returns no loss: its batches hold no labels. Give loss_fn=")
    return loss
