"""`Schedule`: a curve on a clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from secateurs.errors import ConfigError, choose
from secateurs.imports import import_function
from secateurs.schedules.curves import CURVES, Curve, check_curve
from secateurs.schedules.spans import Span, span

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """In how many steps to prune, how much by each, and when.

    Two clocks. Without `every`, each step is followed by a fine-tuning of its own: new optimizer,
    learning rate from its start, as long as `Finetune` says. With `every`, all cuts fall inside
    ONE fine-tuning with one optimizer and one learning-rate schedule: the first at `begin`, the
    last at begin + (steps - 1) x every, and the rest of the training heals. Gradual magnitude
    pruning in the literature is the second kind. Time is counted in optimizer steps, whatever the
    gradient accumulation.

    Args:
        curve: one of `CURVES`, a function of progress (curve(0) = 0, curve(1) = 1, never falling),
            or the import path of one, `package.module:function`.
        steps: how many cuts, at least 1; exactly 1 for "one_shot". Step i of n goes to
            curve(i / n) of the final cut.
        every: time between cuts inside one fine-tuning: "100 steps", "2 epochs", or "restart":
            cuts fall where the learning rate of `Finetune(cycles=)` starts again, so that the
            network heals at a high rate. None: each step has its own fine-tuning.
        begin: with `every`, when the first cut is made: "200 steps" or "1 epoch" after the start;
            None = at once.
        rescore: score again before every step; False scores once, before the first, and keeps
            that ranking.

    Raises:
        ConfigError: unknown curve, a function that is none, or an option out of range.

    Example:
        >>> [round(fraction, 3) for fraction in Schedule("cubic", steps=4).fractions()]
        [0.578, 0.875, 0.984, 1.0]
        >>> Schedule("linear", steps=2).remaining(1, final_remaining=0.5)
        0.75
        >>> Schedule("cubic", steps=3, every="2 epochs", begin="1 epoch").cuts(60, per_epoch=10)
        (10, 30, 50)

    References:
        Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878: cuts inside one training.
        There nothing is cut at `begin` itself; here the first cut is, and has 1/steps of the way.
        Le and Hua, Network Pruning That Matters, 2021, arXiv:2105.03193: healing at a high
        learning rate that starts again.
    """

    curve: str | Curve = "cubic"
    steps: int = 5
    every: str | None = None
    begin: str | None = None
    rescore: bool = True

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ConfigError(f"Schedule(steps={self.steps!r}): a whole number, at least 1")
        if not isinstance(self.rescore, bool):
            raise ConfigError(f"Schedule(rescore={self.rescore!r}): True or False")
        function = self.function
        if self.curve == "one_shot" and self.steps != 1:
            raise ConfigError(
                f"Schedule('one_shot', steps={self.steps}): one_shot is a single step. "
                "Write steps=1, or take a gradual curve: cubic or linear"
            )
        if self.curve not in CURVES:
            at_steps = (step / self.steps for step in range(1, self.steps))
            check_curve(function, self.name, [*at_steps, *(i / 100 for i in range(1, 100))])
        self._check_clock()

    def _check_clock(self) -> None:
        """`every` and `begin` are spans that go together."""
        if self.begin is not None and self.every is None:
            raise ConfigError(
                f"Schedule(begin={self.begin!r}) is the first cut inside one fine-tuning and needs "
                'every=, for example every="100 steps"'
            )
        if self.every is not None and span(self.every, "Schedule: every").amount < 1:
            raise ConfigError(f"Schedule(every={self.every!r}): at least 1")
        if self.begin is not None:
            span(self.begin, "Schedule: begin")

    @property
    def function(self) -> Curve:
        """The curve itself.

        Raises:
            ConfigError: the name is unknown, or the function cannot be imported.
        """
        if callable(self.curve):
            return self.curve
        if isinstance(self.curve, str) and ":" in self.curve:
            return import_function(self.curve, "schedule curve")
        return CURVES[choose(self.curve, CURVES, "schedule curve")]

    @property
    def name(self) -> str:
        """Of the curve, for messages."""
        return self.curve if isinstance(self.curve, str) else getattr(
            self.curve, "__name__", repr(self.curve)
        )  # fmt: skip

    def fraction(self, step: int) -> float:
        """Fraction of the final cut after a step, in [0, 1]; exactly 1 after the last.

        Raises:
            ConfigError: step is not from 1 to `steps`.
        """
        if not 1 <= step <= self.steps:
            raise ConfigError(f"step must be from 1 to {self.steps}, got {step}")
        if step == self.steps:
            return 1.0
        return min(1.0, max(0.0, float(self.function(step / self.steps))))

    def fractions(self) -> Iterator[float]:
        """Fraction of the final cut after step 1, 2, ... `steps`; the last one is 1."""
        for step in range(1, self.steps + 1):
            yield self.fraction(step)

    def remaining(self, step: int, final_remaining: float) -> float:
        """Fraction of the dense model that may remain after a step.

        1 - curve(step / steps) x (1 - final_remaining); exactly `final_remaining` at the last.

        Args:
            step: 1 to `steps`.
            final_remaining: fraction in [0, 1] that may remain at the end.

        Raises:
            ConfigError: an argument is out of range.
        """
        fraction = self.fraction(step)
        if not 0 <= final_remaining <= 1:
            raise ConfigError(
                f"final_remaining is a fraction in [0, 1], got {final_remaining:g}. "
                "It says what may remain, not what is removed"
            )
        return final_remaining + (1 - final_remaining) * (1 - fraction)

    def cuts(self, n_steps: int, per_epoch: int | None = None, cycles: int = 1) -> tuple[int, ...]:
        """After how many optimizer steps each cut is made: ascending, the last before the end.

        Args:
            n_steps: optimizer steps of the fine-tuning.
            per_epoch: those of one epoch; None when batches have no length.
            cycles: how often its learning rate starts.

        Raises:
            ConfigError: there is no `every`, two cuts fall together, or no step is left after the
                last cut.
        """
        if self.every is None:
            raise ConfigError("Schedule.cuts: each step has its own fine-tuning; give every=")
        every = span(self.every, "Schedule: every")
        begin = Span(0, every.unit) if self.begin is None else span(self.begin, "Schedule: begin")
        if every.unit == "restarts" and cycles < 2:
            raise ConfigError(
                f"Schedule(every={self.every!r}): the learning rate never starts again; give "
                'Finetune(lr_schedule="cosine", cycles=) with at least as many cycles as cuts'
            )

        def at(index: int) -> int:
            if begin.unit == every.unit:
                both = Span(begin.amount + index * every.amount, every.unit)
                return both.in_steps(n_steps, per_epoch, cycles)
            step = Span(index * every.amount, every.unit).in_steps(n_steps, per_epoch, cycles)
            return begin.in_steps(n_steps, per_epoch, cycles) + step

        found = tuple(at(index) for index in range(self.steps))
        if len(set(found)) < len(found):
            raise ConfigError(
                f"Schedule(steps={self.steps}, every={self.every!r}): cuts fall together within "
                f"{n_steps} optimizer steps; give fewer cycles or a longer fine-tuning"
            )
        if found[-1] >= n_steps:
            raise ConfigError(
                f"Schedule: the last of {self.steps} cuts would be made after {found[-1]} "
                f"optimizer steps, and the fine-tuning has {n_steps}: nothing is left to heal it. "
                "Give fewer steps, a smaller every, or a longer fine-tuning"
            )
        return found
