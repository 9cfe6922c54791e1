"""Schedules: how much of the final cut is made at each step, and when the steps are.

Every curve has one signature: progress in [0, 1] -> fraction of the final cut in [0, 1], with
curve(0) = 0, curve(1) = 1, never falling. `CURVES` is the list of them. A `Schedule` puts a curve
on one of two clocks: steps with a fine-tuning of their own, or cuts inside one long fine-tuning.
"""

from secateurs.schedules.curves import (
    CURVES,
    Curve,
    cosine,
    cubic,
    exponential,
    linear,
    one_shot,
    stepwise,
)
from secateurs.schedules.schedule import Schedule
from secateurs.schedules.spans import UNITS, Span, span

__all__ = [
    "CURVES",
    "UNITS",
    "Curve",
    "Schedule",
    "Span",
    "cosine",
    "cubic",
    "exponential",
    "linear",
    "one_shot",
    "span",
    "stepwise",
]
