"""How long a training is, counted in optimizer steps, and where its learning rate is."""

from __future__ import annotations

from dataclasses import dataclass

from secateurs.errors import ConfigError
from secateurs.finetuning.config import LR_SCHEDULES, Finetune
from secateurs.types import Batches

__all__ = ["Clock", "clock_of"]


@dataclass(frozen=True)
class Clock:
    """Time in optimizer steps.

    Attributes:
        n_steps: of the whole training; None when batches have no length and epochs decide.
        per_epoch: of one pass over the batches; None when batches have no length.
        cycles: how often the learning rate starts.
    """

    n_steps: int | None
    per_epoch: int | None
    cycles: int = 1

    def progress(self, done: int) -> float:
        """Within the cycle of the learning rate, in [0, 1), after so many steps; 1 past the end.

        Example:
            >>> [Clock(8, None, cycles=2).progress(done) for done in (0, 2, 3, 4, 7)]
            [0.0, 0.5, 0.75, 0.0, 0.75]
        """
        if not self.n_steps:
            return 0.0
        if done >= self.n_steps:  # there were more batches than their length says
            return 1.0
        return done * self.cycles % self.n_steps / self.n_steps


def clock_of(config: Finetune, batches: Batches, needs: str = "") -> Clock:
    """The clock of a training.

    Args:
        config: how to train.
        batches: re-iterable.
        needs: what needs the number of steps, for the error; by default a learning rate that
            changes.

    Raises:
        ConfigError: the number of steps is needed and batches have no length.
    """
    try:
        n_batches = len(batches)  # type: ignore[arg-type]
    except TypeError:
        n_batches = None
    per_epoch = None if n_batches is None else -(-n_batches // config.accumulate)
    if config.full_batch:
        per_epoch = 1
    n_steps = config.steps
    if config.n_epochs is not None and per_epoch is not None:
        n_steps = config.n_epochs * per_epoch
    if not needs and config.lr_schedule != "constant":
        needs = f"lr_schedule={config.lr_schedule!r}"
    if needs and n_steps is None:
        raise ConfigError(
            f"{needs} needs the number of steps, and these batches have no length: give steps= "
            "instead of epochs="
        )
    if n_steps and config.cycles > n_steps:
        raise ConfigError(
            f"Finetune(cycles={config.cycles}): the training has {n_steps} optimizer steps, fewer "
            "than cycles; give fewer"
        )
    return Clock(n_steps, per_epoch, config.cycles)


def lr_factor(config: Finetune, clock: Clock, done: int) -> float:
    """Learning rate after so many steps, as a factor of the configured one."""
    return LR_SCHEDULES[config.lr_schedule](clock.progress(done))
