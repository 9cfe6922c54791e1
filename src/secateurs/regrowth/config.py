"""`Regrow`: which rule moves masks, how often and how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from secateurs.errors import ConfigError, choose
from secateurs.regrowth.rules import RULES

__all__ = ["FADES", "Regrow"]

FADES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
}
"""Curve name -> factor of `fraction` at progress in [0, 1) of the time in which masks move."""

SCOPES = ("tensor", "global")


@dataclass(frozen=True)
class Regrow:
    """How masks change while training. Which fields count depends on the rule.

    Args:
        rule: one of `RULES`:
            "rigl": drop the smallest weights, grow where the gradient is largest.
            "set": drop the smallest weights, grow at random.
            "dns": all weights keep learning; one goes below a lower threshold on |w| and comes
                back above an upper one.
            "dpf": all weights keep learning; the largest stay.
        every: optimizer steps between updates of the masks, at least 1; at least 2 for "rigl",
            whose updates take the place of a step.
        until: masks move in this first part of the training, in (0, 1]; then they are frozen.
        fraction: of the kept entries that an update drops, in (0, 1]; "rigl" and "set".
        curve: how `fraction` fades while masks move, one of `FADES`; "rigl" and "set".
        margin: half the relative distance of the two thresholds, in [0, 1); "dns".
        spread: None: the number kept in each tensor stays, and the thresholds follow from it. A
            number: the thresholds lie around mean + spread x standard deviation of |w| at the
            start, and the density follows from them; "dns".
        scope: what the number kept belongs to: each "tensor", or "global": the largest weights
            stay wherever they are, as in the paper; "dpf".

    Raises:
        ConfigError: lists every field that is out of range or that the rule does not use.

    References:
        rigl: Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134. set: Mocanu et al., Scalable
        Training of Artificial Neural Networks with Adaptive Sparse Connectivity, 2018,
        arXiv:1707.04780. dns: Guo et al., Dynamic Network Surgery for Efficient DNNs, 2016,
        arXiv:1608.04493. dpf: Lin et al., Dynamic Model Pruning with Feedback, 2020,
        arXiv:2006.07253.

    Example:
        >>> Regrow("set", every=50).fraction
        0.3
        >>> Regrow("dpf", every=0, fraction=0.5)
        Traceback (most recent call last):
        secateurs.errors.ConfigError: Regrow: every must be a whole number, at least 1, got 0; \
fraction has no effect on rule='dpf', leave it away
    """

    rule: str = "rigl"
    every: int = 100
    fraction: float = 0.3
    until: float = 0.75
    curve: str = "cosine"
    margin: float = 0.1
    spread: float | None = None
    scope: str = "tensor"

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.rule, RULES, "rule")
        choose(self.curve, FADES, "curve")
        choose(self.scope, SCOPES, "scope")
        ranges: list[tuple[str, str, Callable[[Any], bool]]] = [
            ("every", "a whole number, at least 1", lambda v: isinstance(v, int) and v >= 1),
            ("fraction", "in (0, 1]", lambda v: 0 < v <= 1),
            ("margin", "in [0, 1)", lambda v: 0 <= v < 1),
            ("spread", "a number", lambda v: True),
            ("until", "in (0, 1]", lambda v: 0 < v <= 1),
        ]
        problems = [
            f"{name} must be {wanted}, got {value!r}"
            for name, wanted, holds in ranges
            if not (name == "spread" and self.spread is None)
            and not (_number(value := getattr(self, name)) and holds(value))
        ]
        problems += [
            f"{f.name} has no effect on rule={self.rule!r}, leave it away"
            for f in fields(self)
            if f.name not in ("rule", "every", "until", *RULES[self.rule].uses)
            and getattr(self, f.name) != f.default
        ]
        if self.rule == "rigl" and self.every == 1:
            problems.append("every must be at least 2 for rule='rigl', or no step would train")
        if problems:
            raise ConfigError("Regrow: " + "; ".join(problems))

    def share(self, progress: float) -> float:
        """Fraction of the kept entries that an update drops, at progress in [0, 1) until the end.

        Example:
            >>> [Regrow(fraction=0.4).share(progress) for progress in (0, 0.5)]
            [0.4, 0.2]
        """
        return self.fraction * FADES[self.curve](progress)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
