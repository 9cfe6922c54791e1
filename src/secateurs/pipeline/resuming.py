"""Checkpoints of a pruning run: what is in them, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secateurs.checkpoints import (
    Keeper,
    Marks,
    data_marks,
    generator_states,
    plain,
    random_state,
    set_generator_states,
    set_random_state,
    tensor_mark,
    versions,
)
from secateurs.finetuning import restore_
from secateurs.finetuning.resuming import OWN as OWN_OF_TRAINING
from secateurs.masks import named_tensors
from secateurs.pipeline.packing import pack, unpack

if TYPE_CHECKING:
    from secateurs.pipeline.run import Run
    from secateurs.pipeline.walk import Walk

__all__ = ["OWN", "Memory", "run_marks"]

OWN = ("random", "samples", *(f"training.{name}" for name in OWN_OF_TRAINING))
"""What each of several processes has of its own in the state of a run."""

REMEMBERED = (
    "plan", "steps", "history", "notes", "last_scores", "last_counts", "met", "table", "least_ms",
    "dense_metrics", "stages_done", "started", "spent",
)  # fmt: skip
"""What a run is, beside its weights, its random state, and the walk through the present stage."""


def run_marks(run: Run, asked: Mapping[str, Any]) -> Marks:
    """What decides every step of a run, as far as it can be known at its start."""
    shared = run.samples is run.batches
    return {
        **{name: plain(value) for name, value in asked.items()},
        "weights": tensor_mark(named_tensors(run.model)),
        "data": data_marks(run.batches),
        "calibration": None if shared else data_marks(run.samples),
        **versions(),
    }


class Memory:
    """Where a run leaves its checkpoints, and what it finds there.

    A checkpoint holds the run, the walk through the present stage, and the training that is under
    way, if there is one. Going on, each of them takes back its part: the run here, the walk in
    `enter`, the training in `training`.

    Args:
        run: at its start.
        keeper: with the state to go on from.
    """

    def __init__(self, run: Run, keeper: Keeper) -> None:
        self.run, self.keeper = run, keeper
        self.walk: Walk | None = None
        self.random: dict[str, Any] | None = None
        saved, keeper.saved = keeper.saved, None
        self._found: dict[str, Any] = {}
        if saved is not None:
            self._found = {name: saved[name] for name in ("walk", "training", "random", "samples")}
            self._load(saved)

    @property
    def known(self) -> Mapping[str, Any]:
        """What a checkpoint names and does not hold."""
        return {"graph": self.run.graph, "detail": self.run.graph.detail}

    def state(self, training: Any = None) -> dict[str, Any]:
        """Everything; the random state of a run that trains is the one before the training."""
        run, walk = self.run, self.walk
        return {
            "run": pack({name: getattr(run, name) for name in REMEMBERED}, self.known),
            "weights": named_tensors(run.work) if training is None else None,
            "random": self.random if training is not None else self._random(),
            "walk": None if walk is None else pack(walk.state(), self.known),
            "training": training,
            "samples": generator_states(run.samples),
            "log": None if run.log is None else run.log.state(),
        }

    def _random(self) -> dict[str, Any]:
        return random_state(self.run.batches, self.run.samples)

    def _load(self, saved: dict[str, Any]) -> None:
        for name, value in unpack(saved["run"], self.known).items():
            setattr(self.run, name, value)
        if saved["weights"] is not None:
            restore_(self.run.work, saved["weights"])
        if self.run.log is not None:
            done = self.trained_steps  # the curves begin here if nobody logged before
            self.run.log.load(saved["log"] or {"before": done, "now": done})
        self._settle()

    @property
    def trained_steps(self) -> int:
        """Optimizer steps of the trainings that have ended."""
        return sum(result.steps for result in self.run.history)

    def _settle(self) -> None:
        """The random state of the checkpoint, as the last thing before going on."""
        set_random_state(self._found["random"], self.run.batches, self.run.samples)

    @property
    def within_stage(self) -> bool:
        """Whether the checkpoint was left in the middle of a stage that was not entered yet."""
        return self._found.get("walk") is not None

    def enter(self, walk: Walk | None) -> None:
        """A walk begins, goes on where it was left, or has ended (None)."""
        self.walk = walk
        if walk is not None and self.within_stage:
            walk.load(unpack(self._found.pop("walk"), self.known))
            self._settle()

    def training(self) -> Keeper:
        """For the training that begins now: its checkpoints are those of the run."""
        self.random = self._random()
        saved = self._found.pop("training", None)
        if saved is not None:  # cuts inside the training may have read them since it began
            set_generator_states(self._found["samples"], self.run.samples)
        return _Within(self, self.trained_steps, saved)

    def leave(self, *, must: bool) -> None:
        """Between two steps: write a checkpoint if it is time, or must be."""
        done = self.trained_steps
        if must or self.run.peers.ranks.either(self.keeper.due(done))[0]:
            self.keeper.save(done, self.state())


class _Within:
    """Checkpoints of a training inside a run."""

    def __init__(self, memory: Memory, done: int, saved: Any) -> None:
        self.memory, self.done, self.saved = memory, done, saved

    def due(self, step: int) -> bool:
        return self.memory.keeper.due(self.done + step)

    def save(self, step: int, state: Any) -> object:
        return self.memory.keeper.save(self.done + step, self.memory.state(state))
