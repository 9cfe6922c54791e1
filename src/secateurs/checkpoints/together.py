"""One checkpoint for several processes: what they hold alike once, and what each has of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from secateurs.checkpoints.keeping import Checkpoints, Keeper
from secateurs.checkpoints.marks import UNREPEATABLE, Marks, batch_mark
from secateurs.checkpoints.trees import flatten, restore
from secateurs.distributed import Ranks
from secateurs.tensorfiles import as_bytes
from secateurs.types import Batches

__all__ = ["Together", "keeper_of", "same_data"]

OF_EACH = ("data", "calibration")
"""Marks in which processes may differ."""
RANKS = "ranks"


def keeper_of(
    checkpoints: Checkpoints,
    marks: Callable[[], Marks],
    ranks: Ranks,
    *,
    resume: bool,
    own: Sequence[str],
) -> Keeper:
    """Where a run leaves its checkpoints, and what it goes on from; called by all ranks.

    Args:
        checkpoints: those of rank 0 count.
        marks: gives those of this process.
        ranks: that run together.
        resume: as in `Checkpoints.begin`.
        own: places in the state, "training.random", where every process has a value of its own.

    Raises:
        ConfigError, FileFormatError: as `Checkpoints.keeper`; on all ranks.
    """
    if ranks.size == 1:
        return checkpoints.keeper(marks(), resume=resume)
    with ranks.agreed("reading the data"):
        mine = marks()
    told = ranks.gather({name: mine[name] for name in OF_EACH if name in mine})
    every = {name: [one[name] for one in told] for name in told[0]}
    return Together(
        checkpoints, {**mine, **every, "processes": ranks.size}, ranks, resume=resume, own=own
    )


def same_data(batches: Batches, ranks: Ranks) -> bool:
    """Whether all of several ranks have the same batches, as far as the first one tells."""
    if ranks.size == 1:
        return False
    with ranks.agreed("reading the first batch"):
        mark = batch_mark(batches)
    return UNREPEATABLE not in mark and len(set(ranks.gather(mark))) == 1


class Together:
    """The checkpoints of several processes, written and read by rank 0.

    `due` says True on rank 0 alone; `save` is called by all.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        marks: Marks,
        ranks: Ranks,
        *,
        resume: bool,
        own: Sequence[str],
    ) -> None:
        self.ranks, self.own = ranks, own
        self._keeper: Keeper | None = None
        found: Any = None
        with ranks.agreed("reading the checkpoint"):
            if ranks.rank == 0:
                self._keeper = checkpoints.keeper(marks, resume=resume)
                found, self._keeper.saved = self._keeper.saved, None
        self.saved: Any = None
        if ranks.first(found is not None):
            self.saved = _told(found, ranks)
            for place, value in self.saved.pop(RANKS)[ranks.rank].items():
                inner, name = _inside(self.saved, place)
                inner[name] = value

    def due(self, step: int) -> bool:
        """Whether rank 0 is to write one."""
        return self._keeper is not None and self._keeper.due(step)

    def save(self, step: int, state: Any) -> object:
        """Write one: the state of rank 0, and what is each rank's own."""
        mine = {}
        for place in self.own:
            inner, name = _inside(state, place)
            if inner is not None:
                mine[place] = inner[name]
        every = self.ranks.gather(mine)
        with self.ranks.agreed("writing the checkpoint"):
            if self._keeper is not None:
                self._keeper.save(step, {**state, RANKS: every})
        return None


def _inside(state: Any, place: str) -> tuple[Any, str]:
    """The mapping that holds a place, None if it is not there, and the name in it."""
    *outer, name = place.split(".")
    for part in outer:
        state = None if state is None else state[part]
    return state, name


def _told(state: Any, ranks: Ranks) -> Any:
    """The state of rank 0 on every rank, tensor by tensor."""
    tree, tensors = flatten(state) if ranks.rank == 0 else (None, {})
    facts = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    tree, facts = ranks.first((tree, facts))
    for name, (shape, dtype) in facts.items():
        held = tensors.get(name)
        tensor = torch.empty(shape, dtype=dtype) if held is None else held.contiguous()
        flat = as_bytes(tensor)
        if flat.numel():
            ranks.copy_first_(flat)
        tensors[name] = flat.view(dtype).reshape(shape)
    return restore(tree, tensors)
