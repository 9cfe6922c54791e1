"""Errors that a user can meet. Each names the rule, what was got, and the fix.

Every error is a [`PruningError`][secateurs.errors.PruningError] and also the builtin that fits,
so `except ValueError` keeps working. This room stands before all others and imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BudgetError",
    "CaptureError",
    "ConfigError",
    "DataError",
    "FileFormatError",
    "MissingDependencyError",
    "PruningError",
    "RankError",
    "ScoringError",
    "SoundnessError",
    "choose",
]


class PruningError(Exception):
    """Something that secateurs was asked to do cannot be done as asked."""


class ConfigError(PruningError, ValueError):
    """An option, recipe key or argument is outside its range or unknown."""


class BudgetError(PruningError, ValueError):
    """A budget or threshold cannot be met, or would leave nothing."""


class DataError(PruningError, ValueError):
    """Batches, labels or example inputs do not fit the model."""


class MissingDependencyError(PruningError, ImportError):
    """A package or data set that this task needs is not installed."""


class CaptureError(PruningError, RuntimeError):
    """The model cannot be run or captured with these example inputs."""


class ScoringError(PruningError, ArithmeticError):
    """A score or loss is not a finite scalar."""


class SoundnessError(PruningError, RuntimeError):
    """The smaller model does not compute what the masked model computes."""


class FileFormatError(PruningError, OSError):
    """A saved file is truncated, of another version, or not what it claims to be."""


class RankError(PruningError, RuntimeError):
    """Another process of the group failed, is gone, or holds something else.

    Attributes:
        lost: whether it is gone, so that nothing can be told to it any more.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


def choose(name: str, choices: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `choices`; else raise with the nearest match.

    Example:
        >>> choose("tailor", ["taylor", "magnitude"], "criterion")
        Traceback (most recent call last):
        secateurs.errors.ConfigError: unknown criterion 'tailor'. Did you mean 'taylor'? \
(choices: magnitude, taylor)
    """
    options = sorted(choices)
    if name in options:
        return name
    near = get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown {what} {name!r}.{hint} (choices: {', '.join(options)})")
