"""Between a cut and its healing: repairs without training, by the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.posttraining import Won, compensate_bias, recalibrate_norms, reconstruct

__all__ = ["metrics_of_all", "repair", "with_metrics"]

DO: Mapping[str, Callable[[Run, nn.Module], Won]] = {
    "bias": lambda run, whole: compensate_bias(
        run.work, whole, run.cut_plan, run.samples, graph=run.graph, evaluate=run.evaluate_alone
    ),
    "reconstruct": lambda run, whole: reconstruct(
        run.work, whole, run.cut_plan, run.samples, evaluate=run.evaluate_alone
    ),
    "norms": lambda run, whole: recalibrate_norms(
        run.work, run.samples, masks=run.cut_plan, evaluate=run.evaluate_alone
    ),
}
"""One of `REPAIRS` -> what it does to the model that was cut."""


def metrics_of_all(run: Run) -> dict[str, float]:
    """Before what rank 0 does alone: the metrics, which all ranks measure; one alone does not."""
    return run.metrics() if run.peers.many else {}


def with_metrics(run: Run, won: Won, before: Mapping[str, float]) -> Won:
    """What rank 0 won, with the metrics before it and now; one process alone has them."""
    if not run.peers.many:
        return won
    after = {**won.after, **run.metrics()}
    return replace(won, before={**won.before, **before}, after=after)


def repair(run: Run, stage: Stage, whole: nn.Module) -> None:
    """Mend what the last cut of a stage broke, in the order that was given; say what it won.

    `whole` is what the model shall be like: itself before the cut if it was trained since it came,
    so that no training is undone; else the dense model, so that errors do not add up.
    """
    for name in stage.repair:
        run.tell(f"repair: {name}")
        before = metrics_of_all(run)
        won = run.once(f"repair: {name}", partial(DO[name], run, whole), changes=True)
        won = with_metrics(run, won, before)
        run.notes += [f"after cut {len(run.steps) + 1}: {won.text()}", *won.notes]
