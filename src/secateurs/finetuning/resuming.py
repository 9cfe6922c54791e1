"""How far a training is, how it gets there again, and what two runs must have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.batches import iterate
from secateurs.checkpoints import (
    Marks,
    data_marks,
    plain,
    random_state,
    set_random_state,
    tensor_mark,
    versions,
)
from secateurs.errors import ConfigError
from secateurs.masks import named_tensors
from secateurs.types import Batch, Batches

__all__ = ["OWN", "Place", "read_on", "training_marks"]

OWN = ("random", "place")
"""What each of several processes has of its own in the state of a training."""


@dataclass
class Place:
    """How far an epoch is.

    Attributes:
        batches: that are done, those included for which this process only kept step with others.
        total: sum of their losses over samples.
        samples: of these batches.
        spare: batches for which this process only kept step.
        lr: learning rate of the first step; None before it.
        random: random states before the first batch was read; None until then.
    """

    batches: int = 0
    total: float = 0.0
    samples: int = 0
    spare: int = 0
    lr: float | None = None
    random: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return vars(self).copy()


def read_on(
    batches: Batches,
    device: torch.device,
    place: Place,
    *,
    keeps: bool,
    passed: Callable[[Batch], object] | None = None,
) -> Iterator[Batch]:
    """The batches of an epoch that are not done yet.

    Those that are done are read once more, from the random state that the epoch began with, and
    passed over: so a shuffled loader goes on in the same order.

    Args:
        keeps: whether checkpoints are written, which have to know that random state.
        passed: called with each batch that is passed over. Given where this is the part of one
            process of a group: there need not be any then.
    """
    may_be_empty = passed is not None
    if place.random is None:
        place.random = random_state(batches) if keeps else None
        yield from iterate(batches, device, may_be_empty=may_be_empty)
        return
    now = random_state(batches)
    set_random_state(place.random, batches)
    stream = iterate(batches, device, may_be_empty=may_be_empty)
    done, n = place.batches - place.spare, 0
    for batch in islice(stream, done):
        n += 1
        if passed is not None:
            passed(batch)
    more = bool(place.spare) and next(stream, None) is not None
    if n < done or more:
        raise ConfigError(
            f"{done} batches of this epoch were done, and there are "
            f"{'more' if more else f'only {n}'}: these are other batches"
        )
    set_random_state(now, batches)
    yield from stream


def training_marks(
    model: nn.Module,
    batches: Batches,
    config: Any,
    *,
    masks: Mapping[str, Tensor] | None,
    teacher: nn.Module | None,
    optimizer: Optimizer | None,
    seed: int | None,
    functions: Sequence[Any],
) -> Marks:
    """What decides every step of a training, as far as it can be known at its start."""
    return {
        "finetune": plain(config),
        "weights": tensor_mark(named_tensors(model)),
        "masks": tensor_mark(masks or {}),
        "teacher": None if teacher is None else tensor_mark(named_tensors(teacher)),
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "seed": seed,
        "functions": plain(functions),
        "data": data_marks(batches),
        **versions(),
    }
