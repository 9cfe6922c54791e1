"""The cut of every target: a threshold rule applied to its scores, or to those of all targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateurs.allocation.problem import FloatArray
from secateurs.allocation.thresholds import THRESHOLDS, Line
from secateurs.errors import BudgetError, ConfigError, ScoringError
from secateurs.types import Scores, Threshold

__all__ = ["Found", "find_cuts", "null_lines"]


@dataclass(frozen=True)
class Found:
    """The cut of a target.

    Attributes:
        cut: in the precision of the scores; inf when nothing reaches it.
        reach: how many units do.
        why: the reason of the rule when it lets none, with the name of the target.
    """

    cut: float
    reach: int
    why: str = ""


def find_cuts(
    lines: Mapping[str, FloatArray], asked: Threshold, nulls: Mapping[str, Line]
) -> dict[str, Found]:
    """The cut of each target.

    Args:
        lines: target -> scores of the units that are left, best first.
        asked: the rule.
        nulls: target -> null scores, ascending; empty for rules that need none.

    Raises:
        ConfigError: the rule cannot be applied to these scores; the target is named.
    """
    if asked.scope == "target":
        cuts = {
            name: _cut(line[::-1].astype(np.float64), asked, nulls.get(name, _NONE), name)
            for name, line in lines.items()
        }
    else:
        everything = np.sort(np.concatenate(list(lines.values())).astype(np.float64))
        null = np.sort(np.concatenate(list(nulls.values()))) if nulls else _NONE
        cuts = dict.fromkeys(lines, _cut(everything, asked, null, "all targets"))
    found = {}
    for name, line in lines.items():
        cut, why = cuts[name]
        found[name] = Found(float(cut), int((line >= cut).sum()), why)
    return found


_NONE: Line = np.zeros(0)


def _cut(scores: Line, asked: Threshold, null: Line, where: str) -> tuple[np.float32, str]:
    """The cut in the precision of the scores, and why it lets nothing stay if so."""
    rule = f"threshold {asked.rule!r} on {where}"
    try:
        cut = float(THRESHOLDS[asked.rule](scores, asked.parameters, null))
    except ConfigError as error:
        raise ConfigError(f"{rule}: {error}") from error
    except BudgetError as error:
        return np.float32(np.inf), f"{where}: {error}"
    if math.isnan(cut):
        raise ScoringError(
            f"{rule}: the rule gave nan; a rule gives a number for any finite scores"
        )
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.float32(cut)
    if narrow == 0 and cut > 0:  # zeros are below the smallest positive figure
        narrow = np.nextafter(np.float32(0), np.float32(1))
    return narrow, ""


def null_lines(scores: Scores, asked: Threshold, null: Sequence[Scores]) -> dict[str, Line]:
    """Target -> its scores on shuffled labels, ascending, over the units that are left.

    Raises:
        ConfigError: a rule that needs none got some, or one that needs them got none, or they are
            of another criterion, other targets or other units.
    """
    if asked.needs_null != bool(null):
        raise ConfigError(
            f"threshold {asked.rule!r} compares with scores on shuffled labels: give "
            "null=secateurs.controls.null_scores(model, batches, loss_fn, criterion=...)"
            if asked.needs_null
            else f"threshold {asked.rule!r} takes no null scores; leave null away"
        )
    lines = {}
    for name, values in scores.values.items() if null else ():
        left = (values > -math.inf).reshape(-1)
        parts = []
        for drawn in null:
            if drawn.criterion != scores.criterion:
                raise ConfigError(
                    f"null scores are of criterion {drawn.criterion!r}, the scores of "
                    f"{scores.criterion!r}; score both with the same"
                )
            other = drawn.values.get(name)
            if other is None or other.numel() != values.numel():
                raise ConfigError(f"null scores have no {name} of {values.numel()} units")
            part = other.reshape(-1)[left]
            if not bool(part.isfinite().all()):
                raise ConfigError(
                    f"{name}: null scores lack units that are left; score them with the same "
                    "previous= as the scores"
                )
            parts.append(part.double().numpy())
        lines[name] = np.sort(np.concatenate(parts))
    return lines
