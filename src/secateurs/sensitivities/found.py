"""`MeasuredSensitivity`: the curves with what measuring them tells besides, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateurs.allocation.curves import Sensitivity
from secateurs.errors import ConfigError

__all__ = ["MeasuredSensitivity"]

NAMED = 8
"""Targets of one kind that a sentence names; it counts the others."""
SHARE_OF_LOSS, SHARE_OF_METRIC = 0.1, 0.01
"""Of the uncut model's value: the drop that is spoken of when none is given."""


@dataclass(frozen=True)
class MeasuredSensitivity(Sensitivity):
    """Sensitivity curves as `secateurs.sensitivity` measures them.

    `allocate(scores, budget, method="sensitivity", sensitivity=...)` takes it as it is.

    Args:
        dense: loss or metric of the uncut model.
        units: target -> its units.
        errors: target -> standard error of each drop over the samples, paired with the uncut model;
            empty where the losses of single samples are not at hand.
        n_samples: samples that each run saw; 0 for a metric, whose data the caller holds.
        left_out: target -> why it has no curve.
        notes: what a reader should know.

    Example:
        >>> from secateurs.allocation.curves import Curve
        >>> curves = {"a": Curve((0, 0.5, 0.9), (0, 0.0, 0.004)),
        ...           "b": Curve((0, 0.5, 0.9), (0, 0.02, 0.3))}
        >>> found = MeasuredSensitivity(curves, "drop of accuracy", "taylor", dense=0.97,
        ...                             units={"a": 10, "b": 10})
        >>> found.reach("a", 0.01), found.reach("b", 0.01)
        (0.9, 0.25)
        >>> print(found.recommendation(0.01).splitlines()[1])
        Nearly free: a (even 90 % removed costs 0.004).
    """

    dense: float = 0.0
    units: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    n_samples: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def of_loss(self) -> bool:
        """Whether drops are rises of the loss, and not of a metric that `evaluate` returned."""
        return self.measure == "rise of the loss"

    @property
    def tolerable(self) -> float:
        """A drop to speak of: a tenth of the uncut loss, or a hundredth of the uncut metric."""
        share = SHARE_OF_LOSS if self.of_loss else SHARE_OF_METRIC
        return share * abs(self.dense) or SHARE_OF_METRIC

    def reach(self, target: str, drop: float) -> float:
        """Largest fraction of a target that can be removed alone at a drop of at most `drop`.

        Read off the rising curve, linear between measured points, and never beyond the last one:
        what was not tried is not promised.
        """
        curve = self.curves[target]
        xs, ys = curve.removed, curve.rising
        for i in range(1, len(xs)):
            if ys[i] > drop:
                share = (drop - ys[i - 1]) / (ys[i] - ys[i - 1])
                return xs[i - 1] + share * (xs[i] - xs[i - 1])
        return xs[-1]

    def fragile(self, drop: float) -> list[str]:
        """Targets whose smallest measured cut already costs more, the costliest first."""
        found = [n for n, c in self.curves.items() if c.rising[1] > drop]
        return sorted(found, key=lambda n: -self.curves[n].rising[1])

    def nearly_free(self, drop: float) -> list[str]:
        """Targets whose largest measured cut does not cost more, the cheapest first."""
        found = [n for n, c in self.curves.items() if c.rising[-1] <= drop]
        return sorted(found, key=lambda n: self.curves[n].rising[-1])

    def recommendation(self, drop: float | None = None) -> str:
        """What follows from the curves, in a few lines of words.

        Args:
            drop: how much worse the model may get, at least 0; None takes `tolerable`.

        Raises:
            ConfigError: `drop` is not a finite number, or below 0.
        """
        if drop is not None and not (math.isfinite(drop) and drop >= 0):
            raise ConfigError(f"drop must be at least 0 and finite, got {drop!r}")
        at = self.tolerable if drop is None else drop
        fragile, free = self.fragile(at), self.nearly_free(at)
        between = [n for n in self.curves if n not in {*fragile, *free}]
        between.sort(key=lambda n: -self.reach(n, at))
        lines = [self._opening(at, given=drop is not None)]
        if free:
            lines.append(f"Nearly free: {_listed([self._free_words(n, at) for n in free])}.")
        if between:
            parts = [f"{n} (about {_percent(self.reach(n, at))})" for n in between]
            lines.append(f"Up to a point: {_listed(parts)}.")
        if fragile:
            parts = [self._cost_words(n, 1) for n in fragile]
            lines.append(f"Fragile: {_listed(parts)}. {self._exclude_words(fragile)}")
        lines.append(self._together_words(at))
        lines.append(self._allocation_words(free, fragile))
        if self.left_out:
            names = _listed([f"{n} ({why})" for n, why in self.left_out.items()])
            lines.append(f"Not measured: {names}.")
        return "\n".join(lines)

    def _opening(self, at: float, *, given: bool) -> str:
        n, whole = len(self.curves), "loss" if self.of_loss else "metric"
        usual = "a tenth of the loss" if self.of_loss else "a hundredth of the metric"
        basis = "" if given or not self.dense else f", {usual} of the uncut model"
        return (
            f"{n} target{'s' * (n != 1)}, each cut alone and not trained afterwards; uncut {whole} "
            f"{self.dense:.4g}. What can go at a {self.measure} of at most {at:.3g}{basis}:"
        )

    def _free_words(self, name: str, at: float) -> str:
        cost = self.curves[name].drop[-1]
        share = _percent(self.curves[name].removed[-1])
        if cost <= 0:
            return f"{name} (even {share} removed costs nothing)"
        return f"{name} (even {share} removed costs {cost:.2g}{self._error(name, -1)})"

    def _cost_words(self, name: str, i: int) -> str:
        share, cost = _percent(self.curves[name].removed[i]), self.curves[name].drop[i]
        return f"{name} ({share} removed costs {cost:.2g}{self._error(name, i)})"

    def _error(self, name: str, i: int) -> str:
        return f" ± {self.errors[name][i]:.1g}" if name in self.errors else ""

    def _exclude_words(self, fragile: Sequence[str]) -> str:
        if len(fragile) == len(self.curves):
            return (
                "All are: leave the smallest cuts to training afterwards, or ask for less "
                "(a larger drop, smaller fractions)."
            )
        names = ", ".join(f'"{name}"' for name in fragile[:NAMED])
        more = ", ..." if len(fragile) > NAMED else ""
        return f"To leave them whole: exclude=[{names}{more}]."

    def _together_words(self, at: float) -> str:
        known = [n for n in self.curves if n in self.units]
        total = sum(self.units[n] for n in known)
        if not total:
            return "Effects of several cuts together are not measured here."
        gone = sum(self.reach(n, at) * self.units[n] for n in known) / total
        return (
            f"Each target cut that far would remove about {_percent(gone)} of their "
            "units. Several cuts together cost more than the largest of them, often about the sum, "
            "and training heals a part: read the order of the targets here, not a promise."
        )

    def _allocation_words(self, free: Sequence[str], fragile: Sequence[str]) -> str:
        first = f": {_listed(free[:3])} first" if free else ""
        spared = f"; it spares {_listed(fragile[:3])} as long as it can" if fragile else ""
        return (
            'allocate(scores, budget, method="sensitivity", sensitivity=...) keeps the sum of '
            f"these drops smallest{first}{spared}."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `Sensitivity.from_dict` reads it too, without what was measured besides."""
        return {
            **super().to_dict(),
            "dense": self.dense,
            "units": dict(self.units),
            "errors": {name: list(line) for name, line in self.errors.items()},
            "n_samples": self.n_samples,
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Any) -> MeasuredSensitivity:
        """The object that `to_dict` wrote.

        Raises:
            ConfigError: something is missing or out of range.
        """
        plain = Sensitivity.from_dict(data)
        try:
            return cls(
                plain.curves,
                plain.measure,
                plain.criterion,
                dense=float(data["dense"]),
                units={str(k): int(v) for k, v in data["units"].items()},
                errors={str(k): tuple(map(float, v)) for k, v in data["errors"].items()},
                n_samples=int(data["n_samples"]),
                left_out={str(k): str(v) for k, v in data["left_out"].items()},
                notes=tuple(map(str, data["notes"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"a measured sensitivity needs dense, units, errors, n_samples, left_out and "
                f"notes: {type(error).__name__}: {error}"
            ) from error


def _listed(parts: Sequence[str]) -> str:
    """The first few, and how many more."""
    shown = ", ".join(parts[:NAMED])
    return shown if len(parts) <= NAMED else f"{shown} and {len(parts) - NAMED} more"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
