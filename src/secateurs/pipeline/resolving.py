"""From what a user asks to a budget that steps can work on: the one place where that happens."""

from __future__ import annotations

from dataclasses import replace

from secateurs.errors import ConfigError
from secateurs.pipeline.stage import Stage
from secateurs.types import Budget, expand_granularity

__all__ = ["AUTO_DROP", "AUTO_MARGIN", "check_budget", "resolve_budget"]

AUTO_DROP = 0.01
"""Of `budget="auto"`: how much of its dense value the main metric may lose."""
AUTO_MARGIN = 2.0
"""Of `budget="auto"`: how many times the size of the smallest model that was tried is kept."""


def check_budget(stage: Stage, has_metric: bool) -> None:
    """Find what a budget needs and does not have, before anything expensive.

    Raises:
        ConfigError: a limit on the metric without `evaluate`, or on latency for weights.
    """
    if (stage.wants_drop or stage.max_drop is not None) and not has_metric:
        what = "max_drop" if stage.max_drop is not None else (
            'budget="auto"' if stage.budget == "auto" else "Budget(metric_drop=)"
        )  # fmt: skip
        raise ConfigError(
            f"{what} limits how much worse the validation metric gets and needs evaluate="
        )
    if stage.wants_latency and "weight" in expand_granularity(stage.granularity):
        raise ConfigError(
            "zeros among single weights save no time: Budget(latency_ms=) cannot be met at weight "
            "granularity. Use params= or bytes=, or prune structure"
        )


def resolve_budget(stage: Stage, dense_metric: float | None) -> Stage:
    """The stage with a budget in figures.

    "auto" goes down until the main metric has lost more than 1 % of its dense value (or nothing is
    left to remove), and back to the smallest good model of at least twice that size: the metric is
    one noisy measurement, and the smallest model that happens to pass is the one that noise
    favours most.

    Args:
        stage: checked by `check_budget`.
        dense_metric: main validation metric of the dense model.
    """
    if stage.budget != "auto":
        return stage
    assert dense_metric is not None
    return replace(stage, budget=Budget(metric_drop=AUTO_DROP * abs(dense_metric)))
