"""`Penalty`: which penalty, and how strong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from secateurs.errors import ConfigError, choose

__all__ = ["RULES", "Penalty"]

RULES: Mapping[str, float] = {"growing": 1.0, "group_lasso": 1e-3, "norm_scale": 1e-2}
"""Rule -> its strength when none is given."""


@dataclass(frozen=True)
class Penalty:
    """A penalty on structural units, added to the loss.

        growing       lambda / 2 x sum over the units that will be cut of ||w||^2
        group_lasso   strength x sum over units of sqrt(size) ||w||
        norm_scale    strength x sum over units of |scale of their norms|

    w are all weights of a unit, producers and consumers, and size is their number. Both, because a
    network of ReLU or norms can shrink the weights that make a unit and enlarge those that read it
    without computing anything else; and a weight in front of a norm has no size of its own at all.

    `growing` is told which units will go, and takes them away slowly instead of at once: lambda
    grows by `delta` after every `every` steps up to `strength`. Use it first: on digits-cnn a
    hundred steps of it left little to lose at the cut. `group_lasso` lets units compete: all
    shrink, and those that the loss does not defend end near zero. `norm_scale` does the same by one
    number for each unit, where there are norms. A hundred steps of either did not help there; they
    are meant for long trainings.

    The gradient of the penalty is added to that of the loss before the step, so clipping sees the
    whole. Adam and its kin divide it by the size of the gradient, as they do with the loss. Soft
    thresholding after each step is not offered: units of neighbouring layers share weights, so it
    is no proximal step, and it was no better.

    Args:
        rule: one of `RULES`.
        strength: above 0; None = that of `RULES`. For "growing", where lambda ends. With SGD keep
            lr x strength below 1.
        every: for "growing": optimizer steps between two steps of lambda; None = 10.
        delta: for "growing": by how much lambda grows; None = so much that `strength` is reached
            after three quarters of the training.

    Raises:
        ConfigError: lists every field that is out of range.

    Example:
        >>> Penalty("growing", strength=0.3, every=5, delta=0.1).at(9, None)
        0.2

    References:
        Group lasso: Wen et al., Learning Structured Sparsity in Deep Neural Networks, 2016,
        arXiv:1608.03665; over producers and consumers: Fang et al., DepGraph, 2023,
        arXiv:2301.12900. norm_scale: Liu et al., Network Slimming, 2017, arXiv:1708.06519. growing:
        Wang et al., Neural Pruning via Growing Regularization, 2021, arXiv:2012.09243 (GReg-1;
        there on the filters alone, delta 1e-4 after every 5 or 10 steps up to 1).
    """

    rule: str = "growing"
    strength: float | None = None
    every: int | None = None
    delta: float | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.rule, RULES, "penalty")
        problems = []
        for name, value in (("delta", self.delta), ("strength", self.strength)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                problems.append(f"{name} must be above 0, got {value!r}")
        every = self.every
        if every is not None and (
            isinstance(every, bool) or not isinstance(every, int) or every < 1
        ):
            problems.append(f"every must be a whole number, at least 1, got {every!r}")
        if self.rule != "growing" and (self.every is not None or self.delta is not None):
            problems.append(f"every and delta belong to rule='growing', not {self.rule!r}")
        if problems:
            raise ConfigError("Penalty: " + "; ".join(problems))

    @property
    def full(self) -> float:
        """The strength, or where lambda ends."""
        return RULES[self.rule] if self.strength is None else float(self.strength)

    def at(self, steps: int, n_steps: int | None) -> float:
        """The strength after so many steps.

        Args:
            steps: done so far.
            n_steps: of the whole training; needed by "growing" without `delta`.

        Raises:
            ConfigError: it is needed and not known.
        """
        if self.rule != "growing":
            return self.full
        every, delta = self.every or 10, self.delta
        if delta is None:
            if not n_steps:
                raise ConfigError(
                    "Penalty('growing') without delta needs the number of steps: give delta, or "
                    "steps= instead of epochs= where batches have no length"
                )
            delta = self.full / max(1, int(0.75 * n_steps) // every)
        return min(self.full, delta * (1 + steps // every))
