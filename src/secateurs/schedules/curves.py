"""Curves: progress in [0, 1] -> fraction of the final cut in [0, 1]. Pure functions.

Each has curve(0) = 0 and curve(1) = 1 and never falls. They differ in when most of the cut happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from secateurs.errors import ConfigError

__all__ = [
    "CURVES",
    "JUMPS",
    "Curve",
    "check_curve",
    "cosine",
    "cubic",
    "exponential",
    "linear",
    "one_shot",
    "stepwise",
]

Curve = Callable[[float], float]
"""`curve(progress) -> fraction`, both in [0, 1]."""

JUMPS = 4
"""Jumps of `stepwise`."""


def one_shot(progress: float) -> float:
    """Everything at once: 0 at progress 0, else 1."""
    return 1.0 if progress > 0 else 0.0


def linear(progress: float) -> float:
    """Equal amounts at every step: t."""
    return progress


def cubic(progress: float) -> float:
    """Much early, little late: 1 - (1 - t)^3.

    References:
        Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878. Equation 1, from zero
        initial sparsity.
    """
    return float(1 - (1 - progress) ** 3)


def exponential(progress: float) -> float:
    """Nearly the same share of what is left at every step: (1 - 10^-t) / (1 - 10^-1).

    For a budget of a tenth the shares are exactly equal: remaining = 0.1^t. A curve does not know
    the budget, so for other budgets the shares grow or shrink a little from step to step.

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, arXiv:1803.03635: rounds that each
        remove the same share of what is left.
    """
    return float((1 - 0.1**progress) / (1 - 0.1))


def cosine(progress: float) -> float:
    """Slow at both ends, fast in the middle: (1 - cos(pi t)) / 2.

    References:
        Half a period of the cosine of Loshchilov and Hutter, SGDR, 2017, arXiv:1608.03983, there
        for learning rates.
    """
    return (1 - math.cos(math.pi * progress)) / 2


def stepwise(progress: float) -> float:
    """Four equal jumps, with rests between them in which nothing is cut: ceil(4 t) / 4.

    With 8 steps, for example, steps 1, 3, 5 and 7 cut and the others only heal.

    References:
        Han et al., Learning both Weights and Connections, 2015, arXiv:1506.02626: few large cuts,
        each followed by long training.
    """
    return min(1.0, math.ceil(JUMPS * progress - 1e-9) / JUMPS)


CURVES: Mapping[str, Curve] = {
    "one_shot": one_shot,
    "linear": linear,
    "cubic": cubic,
    "exponential": exponential,
    "cosine": cosine,
    "stepwise": stepwise,
}
"""Curve name -> pure function of progress."""


def check_curve(curve: Curve, name: str, points: Iterable[float]) -> None:
    """Raise unless a function is a curve at 0, 1 and the given points.

    Raises:
        ConfigError: it fails, returns no number in [0, 1], does not go from 0 to 1, or falls.

    Example:
        >>> check_curve(lambda t: t * t, "square", [0.5])
        >>> check_curve(lambda t: 1 - t, "down", [0.5])
        Traceback (most recent call last):
        secateurs.errors.ConfigError: curve down: must be 0 at progress 0, got 1
    """
    before = 0.0
    for progress in sorted({0.0, 1.0, *points}):
        value = _value(curve, name, progress)
        for end in (0.0, 1.0):
            if progress == end and abs(value - end) > 1e-9:
                raise ConfigError(
                    f"curve {name}: must be {end:g} at progress {end:g}, got {value:g}"
                )
        if value < before - 1e-9:
            raise ConfigError(
                f"curve {name}: must never fall, got {value:g} at progress {progress:g} after "
                f"{before:g}: what was removed does not come back"
            )
        before = max(before, value)


def _value(curve: Curve, name: str, progress: float) -> float:
    try:
        found: Any = curve(progress)
        value = float(found)
    except Exception as error:  # the user's function can raise anything
        raise ConfigError(
            f"curve {name}: fails at progress {progress:g}: {type(error).__name__}: {error}"
        ) from error
    if not -1e-9 <= value <= 1 + 1e-9:  # also false for nan
        raise ConfigError(
            f"curve {name}: must return a fraction in [0, 1], got {value:g} at progress "
            f"{progress:g}"
        )
    return value
