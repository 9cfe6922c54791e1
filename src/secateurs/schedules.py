"""Schedules: how much of the final sparsity is reached at each step of gradual pruning.

Every curve has one signature: progress in [0, 1] -> fraction of the final sparsity in [0, 1], with
curve(0) = 0, curve(1) = 1, never falling. `CURVES` is the list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from secateurs.errors import ConfigError, choose

__all__ = ["CURVES", "Schedule", "cubic", "linear", "one_shot"]


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


CURVES: Mapping[str, Callable[[float], float]] = {
    "one_shot": one_shot,
    "linear": linear,
    "cubic": cubic,
}
"""Curve name -> pure function of progress."""


@dataclass(frozen=True)
class Schedule:
    """In how many steps to prune, and how much by each.

    Args:
        curve: one of `CURVES`.
        steps: pruning steps, at least 1; exactly 1 for "one_shot".

    Raises:
        ConfigError: unknown curve, or steps out of range.

    Example:
        >>> [round(fraction, 3) for fraction in Schedule("cubic", steps=4).fractions()]
        [0.578, 0.875, 0.984, 1.0]
        >>> Schedule("linear", steps=2).remaining(1, final_remaining=0.5)
        0.75
    """

    curve: str = "cubic"
    steps: int = 5

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.curve, CURVES, "schedule curve")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ConfigError(f"Schedule(steps={self.steps!r}): a whole number, at least 1")
        if self.curve == "one_shot" and self.steps != 1:
            raise ConfigError(
                f"Schedule('one_shot', steps={self.steps}): one_shot is a single step. "
                "Write steps=1, or take a gradual curve: cubic or linear"
            )

    def fractions(self) -> Iterator[float]:
        """Fraction of the final sparsity after step 1, 2, ... `steps`; the last one is 1."""
        for step in range(1, self.steps + 1):
            yield CURVES[self.curve](step / self.steps)

    def remaining(self, step: int, final_remaining: float) -> float:
        """Fraction of the dense model that may remain after a step.

        1 - curve(step / steps) x (1 - final_remaining); exactly `final_remaining` at the last.

        Args:
            step: 1 to `steps`.
            final_remaining: fraction in [0, 1] that may remain at the end.

        Raises:
            ConfigError: an argument is out of range.
        """
        if not 1 <= step <= self.steps:
            raise ConfigError(f"step must be from 1 to {self.steps}, got {step}")
        if not 0 <= final_remaining <= 1:
            raise ConfigError(
                f"final_remaining is a fraction in [0, 1], got {final_remaining:g}. "
                "It says what may remain, not what is removed"
            )
        fraction = CURVES[self.curve](step / self.steps)
        return final_remaining + (1 - final_remaining) * (1 - fraction)
