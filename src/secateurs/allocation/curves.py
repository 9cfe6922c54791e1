"""`Sensitivity`: what it costs to cut each target alone, as measured. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from secateurs.errors import ConfigError

__all__ = ["Curve", "Sensitivity", "isotonic"]

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest values, in squared error, that never fall.

    Neighbours that fall are replaced by their mean until none do (pool adjacent violators).

    Reference: Barlow et al., Statistical Inference under Order Restrictions, 1972.

    Example:
        >>> isotonic([0.0, 3.0, 1.0, 5.0])
        (0.0, 2.0, 2.0, 5.0)
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, size = (before * n + mean * size) / (n + size), n + size
        blocks.append((mean, size))
    return tuple(mean for mean, size in blocks for _ in range(size))


@dataclass(frozen=True)
class Curve:
    """How much worse a model gets when a target loses its worst units, all others left whole.

    Args:
        removed: fractions of the target's dense units, ascending, from 0; below or equal to 1.
        drop: at each of them, as measured: positive = worse, 0 at the start. Noise may make it
            fall or go below 0; `rising` is what is used.

    Raises:
        ConfigError: too few points, different lengths, or values out of order or range.

    Example:
        >>> curve = Curve((0.0, 0.25, 0.5, 0.75), (0.0, 0.03, 0.01, 0.20))
        >>> curve.rising
        (0.0, 0.02, 0.02, 0.2)
        >>> round(curve.at(0.6), 3), round(curve.at(1.0), 3)
        (0.092, 0.38)
    """

    removed: tuple[float, ...]
    drop: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("removed", "drop"):
            object.__setattr__(self, name, _figures(name, getattr(self, name)))
        problem = self._problem()
        if problem:
            raise ConfigError(f"a sensitivity curve {problem}")

    def _problem(self) -> str:
        n = len(self.removed)
        if n != len(self.drop):
            return f"needs one drop for each removed fraction, got {len(self.drop)} for {n}"
        if n < 2:
            return f"needs the start and at least one cut, got {n} points"
        if self.removed[0] != 0 or self.drop[0] != 0:
            return (
                "starts with drop 0 at removed 0 (the uncut model), got drop "
                f"{self.drop[0]:g} at removed {self.removed[0]:g}"
            )
        if self.removed[-1] > 1:
            return f"takes removed fractions up to 1, got {self.removed[-1]:g}"
        fall = next((i for i in range(1, n) if self.removed[i] <= self.removed[i - 1]), None)
        if fall is not None:
            return (
                f"needs ascending removed fractions, got {self.removed[fall - 1]:g} and then "
                f"{self.removed[fall]:g}"
            )
        return ""

    @cached_property
    def rising(self) -> tuple[float, ...]:
        """The drops that are nearest to the measured ones, never fall and start at 0."""
        return (0.0, *(max(0.0, value) for value in isotonic(self.drop[1:])))

    def at(self, removed: float) -> float:
        """The drop at a removed fraction in [0, 1], never falling.

        Between measured points it is linear. Beyond the last one it goes on with the steepest
        slope that was measured: what was not tried is not assumed to be cheap.
        """
        return float(self.all_at(np.array([removed], dtype=np.float64))[0])

    def all_at(self, removed: Floats) -> Floats:
        """`at` for many fractions at once.

        Raises:
            ConfigError: a fraction outside [0, 1].
        """
        if len(removed) and not (removed.min() >= 0 and removed.max() <= 1):
            raise ConfigError(f"a removed fraction lies in [0, 1], got {removed.tolist()}")
        xs, ys = np.array(self.removed), np.array(self.rising)
        steepest = float((np.diff(ys) / np.diff(xs)).max())
        drop: Floats = np.interp(removed, xs, ys) + steepest * np.maximum(0.0, removed - xs[-1])
        return drop


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to cut each target alone: made by `secateurs.sensitivity`.

    Args:
        curves: target -> its curve.
        measure: what a drop is, with its unit, for example "drop of accuracy" or "rise of the
            loss"; the same for all curves.
        criterion: which units went first.

    Raises:
        ConfigError: no curve at all.

    Example:
        >>> found = Sensitivity({"fc:neuron": Curve((0, 0.5), (0, 0.1))}, "drop of accuracy")
        >>> Sensitivity.from_dict(found.to_dict()) == found
        True
    """

    curves: Mapping[str, Curve]
    measure: str
    criterion: str = ""

    def __post_init__(self) -> None:
        if not self.curves:
            raise ConfigError("Sensitivity needs the curve of at least one target, got none")

    def check_covers(self, targets: Iterable[str]) -> None:
        """Raise unless there is a curve for every target.

        Raises:
            ConfigError: naming those that have none.
        """
        missing = [name for name in targets if name not in self.curves]
        if missing:
            raise ConfigError(
                f"no sensitivity curve for {', '.join(missing)} (curves: "
                f"{', '.join(self.curves)}); measure all targets that are pruned with "
                "secateurs.sensitivity(model, ...), at the same granularity"
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: measured figures, from which `from_dict` makes the same object."""
        return {
            "measure": self.measure,
            "criterion": self.criterion,
            "curves": {
                name: {"removed": list(c.removed), "drop": list(c.drop)}
                for name, c in self.curves.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Any) -> Sensitivity:
        """The object that `to_dict` wrote.

        Raises:
            ConfigError: something is missing or out of range; the target is named.
        """
        curves = data.get("curves") if isinstance(data, Mapping) else None
        if not isinstance(curves, Mapping) or not isinstance(data.get("measure"), str):
            raise ConfigError(
                "sensitivity: write {'measure': text, 'curves': {target: {'removed': [...], "
                f"'drop': [...]}}}}, got {data!r:.200}"
            )
        found = {}
        for name, points in curves.items():
            if not isinstance(points, Mapping) or set(points) != {"removed", "drop"}:
                raise ConfigError(f"{name}: a curve has removed and drop, got {points!r:.200}")
            try:
                found[str(name)] = Curve(points["removed"], points["drop"])
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
        return cls(found, data["measure"], str(data.get("criterion", "")))


def _figures(name: str, given: Any) -> tuple[float, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"{name} of a sensitivity curve must be numbers, got {given!r:.200}")
    figures = list(given)
    for value in figures:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and math.isfinite(value)):
            raise ConfigError(f"{name} of a sensitivity curve must be finite, got {value!r}")
    return tuple(float(value) for value in figures)
