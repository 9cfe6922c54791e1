"""A folder of checkpoints: when to write, which to keep, and which to go on from."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from secateurs.checkpoints.files import PART, OtherFormatError, read_state, write_state
from secateurs.checkpoints.marks import UNREPEATABLE, Marks, differences
from secateurs.errors import ConfigError, FileFormatError

__all__ = ["Checkpoints", "Keeper", "Saved"]

SECONDS = 60.0
"""Between two checkpoints where nothing else is said."""
LOCK = ".lock"
WAIT = 10.0
"""Seconds to wait for the lock: workers of a killed process may hold it a little longer."""
PATTERN = "checkpoint-" + 8 * "[0-9]" + ".safetensors"


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint that was read.

    Attributes:
        step: as it was given to `save`.
        state: as it was given to `save`; tensors are on the CPU.
        path: its file.
        marks: of the run that left it.
    """

    step: int
    state: Any
    path: Path
    marks: Marks


class Keeper(Protocol):
    """Where a training leaves its state, and finds it again."""

    saved: Any
    """State to go on from; None to start."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after so many optimizer steps.

        Of several processes all write one as soon as it is True on any of them.
        """

    def save(self, step: int, state: Any) -> object:
        """Write one."""


class Checkpoints:
    """Checkpoints in a folder, newest last; `save` writes one and removes those that are too many.

    Each is a file of its own that appears whole or not at all, also when process or machine stop
    at that instant. The older ones go only when the new one is on the disk. While this object
    lives, no other process can write to the folder or begin a run in it.

    Args:
        directory: created when the first one is written; it should hold nothing else.
        every: steps between two checkpoints.
        seconds: between two checkpoints; 60 where neither is given. With both, what comes first.
        keep: how many of the newest stay, at least 1.
        say: is told what a reader should know (a damaged file was passed over); a warning if None.

    Raises:
        ConfigError: a figure is out of range; from `save`, `begin` and `clear`: another process
            writes its checkpoints there.

    Example: a loop of your own.
        >>> import tempfile, torch
        >>> weight = torch.zeros(2)
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), every=2)
        >>> for step in range(1, 6):
        ...     weight += step
        ...     if checkpoints.due(step):
        ...         _ = checkpoints.save(step, {"weight": weight, "note": ("any", None, 1.5)})
        >>> saved = checkpoints.latest()
        >>> saved.step, saved.state
        (4, {'weight': tensor([10., 10.]), 'note': ('any', None, 1.5)})
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int | None = None,
        seconds: float | None = None,
        keep: int = 2,
        say: Callable[[str], object] | None = None,
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (value is not None or name == "keep"):
                raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}")
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds >= 0):
            raise ConfigError(f"seconds must be a number, at least 0, got {seconds!r}")
        self.directory, self.every, self.keep = Path(directory), every, keep
        self.seconds = seconds if seconds is not None else SECONDS if every is None else math.inf
        self._say = say
        self._bad: set[Path] = set()
        self._last = 0, time.monotonic()
        self._lock: FileLock | None = None

    @property
    def files(self) -> list[Path]:
        """Those that are there, newest last."""
        return sorted(self.directory.glob(PATTERN))

    def due(self, step: int) -> bool:
        """Whether the next one should be written now: enough steps or seconds since the last."""
        done, at = self._last
        enough = self.every is not None and step - done >= self.every
        return enough or time.monotonic() - at >= self.seconds

    def save(self, step: int, state: Any, marks: Marks | None = None) -> Path:
        """Write a checkpoint, then remove those that are too many.

        Args:
            step: how far the work is.
            state: None, numbers, texts, lists, tuples, dicts, tensors, numpy arrays, nested.
            marks: what has to be the same in a run that goes on from here, nested plain values.

        Returns:
            Its file.

        Raises:
            ConfigError: a value of another type, or the folder cannot be made.
            FileFormatError: it could not be written; those before are as they were.
        """
        self._reserve()
        there = self.files
        number = int(there[-1].stem.rpartition("-")[2]) + 1 if there else 1
        path = self.directory / f"checkpoint-{number:08d}.safetensors"
        write_state(path, {"step": step, "marks": dict(marks or {}), "state": state})
        self._last = step, time.monotonic()
        self._rotate()
        return path

    def _reserve(self) -> None:
        """Make the folder, and keep other processes out of it while this object lives."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.directory} cannot be made: {error}") from error
        if self._lock is not None:
            return
        lock = FileLock(self.directory / LOCK, is_singleton=True)
        try:
            lock.acquire(timeout=WAIT)
        except Timeout as error:
            raise ConfigError(
                f"another process writes its checkpoints to {self.directory}: wait until it ends, "
                "or name another folder"
            ) from error
        except (OSError, NotImplementedError) as error:
            self.tell(
                f"{self.directory} cannot be locked ({error}): nothing keeps another process from "
                "writing there"
            )
        self._lock = lock

    def _rotate(self) -> None:
        """Remove damaged ones, those beyond `keep`, and what a killed process was writing."""
        good = [path for path in self.files if path not in self._bad]
        for path in (*self._bad, *good[: -self.keep], *self.directory.glob(f"{PATTERN}{PART}")):
            path.unlink(missing_ok=True)
        self._bad.clear()

    def latest(self, marks: Marks | None = None) -> Saved | None:
        """The newest checkpoint that is whole; None when there is none at all.

        Args:
            marks: of the run that wants to go on; None takes whatever is there.

        Raises:
            ConfigError: it belongs to a run with other marks; the message names them.
            FileFormatError: there are checkpoints, and each of them is damaged; or the newest
                that is whole is of another version.
        """
        problems = []
        for path in reversed(self.files):
            try:
                held = read_state(path)
                saved = Saved(held["step"], held["state"], path, held["marks"])
            except OtherFormatError:  # nothing is wrong with it: it must not be passed over
                raise
            except (FileFormatError, KeyError, TypeError) as error:
                problems.append(str(error))
                if not isinstance(error.__cause__, OSError):  # else it may be whole
                    self._bad.add(path)
                continue
            if problems:
                self.tell(f"{'; '.join(problems)}. Going on from {path}, which is whole")
            if marks is not None:
                self._check_processes(saved.marks, marks)
            if marks is not None and (other := differences(saved.marks, marks)):
                raise ConfigError(
                    f"{self.directory} holds the checkpoints of another run: {'; '.join(other)}. "
                    "Resume with what it was started with, or name another folder"
                )
            self._last = saved.step, time.monotonic()
            return saved
        if problems:
            raise FileFormatError(
                f"no checkpoint in {self.directory} is whole: {'; '.join(problems)}. "
                "Delete them to start again"
            )
        return None

    def _check_processes(self, before: Marks, now: Marks) -> None:
        """Each process goes on with what it had itself: there must be as many."""
        old, new = (marks.get("processes", 1) for marks in (before, now))
        if old != new:
            raise ConfigError(
                f"{self.directory} holds the checkpoints of another run: processes was {old} and "
                f"is {new}. Resume with {old}. (Checkpoints for any number of processes: "
                "save_sharded, in a training loop of your own)"
            )

    def begin(self, marks: Marks, *, resume: bool) -> Saved | None:
        """What a run goes on from; None for a start from the beginning.

        Raises:
            ConfigError: the folder holds checkpoints and `resume` is not set; or as `latest`.
            FileFormatError: as `latest`.
        """
        if not resume:
            if self.files:
                raise ConfigError(
                    f"{self.directory} holds the checkpoints of a run that was not finished: go on "
                    "with resume=True, name another folder, or delete them by "
                    f"Checkpoints({str(self.directory)!r}).clear()"
                )
            return None
        if self.directory.is_dir():
            self._reserve()
        saved = self.latest(marks)
        if saved is None:
            self.tell(f"{self.directory} holds no checkpoint: starting from the beginning")
        return saved

    def keeper(self, marks: Marks, *, resume: bool) -> Keeper:
        """For a training: the state to go on from, and a place for those to come; see `begin`.

        Says so if the marks tell of data that cannot be read twice.
        """
        if UNREPEATABLE in str(marks):
            self.tell(
                "a batch differs each time that it is read: the data draws from a random source of "
                "its own, and a run that is resumed will not end bit for bit as it would have"
            )
        return _Marked(self, marks, resume)

    def clear(self) -> None:
        """Remove all checkpoints, and the folder if nothing else is in it."""
        where = self.directory
        if where.is_dir():
            self._reserve()
        for path in (*self.files, *where.glob(f"{PATTERN}{PART}")):
            path.unlink(missing_ok=True)
        self._bad.clear()
        if self._lock is not None:
            self._lock.release(force=True)
            self._lock = None
            (where / LOCK).unlink(missing_ok=True)
        if where.is_dir() and not where.is_symlink() and not any(where.iterdir()):
            where.rmdir()

    def tell(self, text: str) -> None:
        """Say what a reader should know."""
        if self._say is None:
            warnings.warn(text, stacklevel=3)
        else:
            self._say(text)


class _Marked:
    """Checkpoints of one run, by its marks."""

    def __init__(self, checkpoints: Checkpoints, marks: Marks, resume: bool) -> None:
        self.checkpoints, self.marks = checkpoints, marks
        found = checkpoints.begin(marks, resume=resume)
        self.saved: Any = None if found is None else found.state

    def due(self, step: int) -> bool:
        return self.checkpoints.due(step)

    def save(self, step: int, state: Any) -> object:
        return self.checkpoints.save(step, state, self.marks)
