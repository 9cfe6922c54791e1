"""What a training shows while it goes on: a bar, and a log for TensorBoard. It only looks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from secateurs.bars import epoch_text
from secateurs.boards import BoardLog
from secateurs.distributed import plain
from secateurs.finetuning import EpochRow, Finetune, Part, Training, clock_of
from secateurs.masks import model_sparsity
from secateurs.pipeline.stage import Stage
from secateurs.tickets.lottery import rewind_step
from secateurs.types import Batches

__all__ = ["Onlooker", "length", "work_of"]

SECONDS = 1.0
"""Between two looks at the bar inside an epoch."""


def length(config: Finetune | None, batches: Batches) -> int:
    """How long a training is on a bar: optimizer steps; epochs where batches have no length."""
    if config is None:
        return 0
    n_steps = clock_of(config, batches).n_steps
    return (config.n_epochs or 0) if n_steps is None else n_steps


def work_of(stage: Stage, batches: Batches) -> int:
    """How long a stage is on a bar: its cuts, at most, and the lengths of all its trainings."""
    cuts, heal = stage.most_steps, length(stage.finetune, batches)
    if stage.ticket is not None and stage.finetune is not None:
        start = rewind_step(stage.finetune, batches, stage.ticket.rewind)
        return cuts + start + (stage.ticket.rounds + 1) * (heal - start)
    inside = stage.steps.every is not None
    return cuts + length(stage.prepare, batches) + heal * (1 if inside else cuts)


class Onlooker(Part):
    """Takes part in every training of a run, and changes nothing about it.

    Args:
        say: called with (what, how far this training is, in the unit of `length`).
        what: the training is for.
        epochs: that it has, for the text; None = not known.
        log: for TensorBoard.
    """

    def __init__(
        self,
        say: Callable[[str, int], object],
        what: str,
        *,
        epochs: int | None = None,
        log: BoardLog | None = None,
    ) -> None:
        self.say, self.what, self.epochs, self.log = say, what, epochs, log
        self.text, self.done, self.before, self.told = what, 0, 0, time.monotonic()
        self.training: Training | None = None
        self.steps = 0

    def start(self, training: Training) -> None:
        """A training begins; there may have been others."""
        self.training, self.before, self.done = training, self.before + self.done, 0
        self.steps = 0
        if self.log is not None:
            self.log.start(replace(training, model=plain(training.model)))

    def gradients(self, steps: int) -> None:
        """For the log."""
        if self.log is not None:
            self.log.gradients(steps)

    def stepped(self, steps: int) -> None:
        """For the log; and the bar moves, but not all the time."""
        assert self.training is not None
        self.steps = steps
        if self.log is not None:
            self.log.stepped(steps)
        if self.training.n_steps is not None:
            self.done = steps
        if time.monotonic() - self.told >= SECONDS:
            self.tell(self.text)

    def epoch(self, row: EpochRow) -> None:
        """An epoch is done: what it came to."""
        assert self.training is not None
        if self.log is not None:
            self.log.epoch(row)
        if self.training.n_steps is None:
            self.done = row.epoch
        zeros = model_sparsity(self.training.model)
        self.tell(
            epoch_text(
                self.what, row.epoch, row.train_loss, row.metric, epochs=self.epochs, zeros=zeros
            )
        )

    def tell(self, text: str) -> None:
        """Show it."""
        self.text, self.told = text, time.monotonic()
        self.say(text, self.before + self.done)

    def state(self) -> dict[str, Any]:
        """Where the log is, if there is one: a run may go on with one or without."""
        return {"steps": self.steps, "log": None if self.log is None else self.log.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.steps = state["steps"]
        if self.log is not None:
            before = self.log.state()["before"]
            self.log.load(state["log"] or {"before": before, "now": before + self.steps})
