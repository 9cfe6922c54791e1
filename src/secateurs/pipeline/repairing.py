"""Between a cut and its healing: repairs without training, by the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.posttraining import Won, compensate_bias, recalibrate_norms, reconstruct

__all__ = ["repair"]

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


def repair(run: Run, stage: Stage, whole: nn.Module) -> None:
    """Mend what the last cut of a stage broke, in the order that was given; say what it won.

    `whole` is what the model shall be like: itself before the cut if it was trained since it came,
    so that no training is undone; else the dense model, so that errors do not add up.
    """
    for name in stage.repair:
        run.tell(f"repair: {name}")
        before = run.metrics() if run.peers.many else {}
        won = run.once(f"repair: {name}", partial(DO[name], run, whole), changes=True)
        if run.peers.many:
            after = {**won.after, **run.metrics()}
            won = replace(won, before={**won.before, **before}, after=after)
        run.notes += [f"after cut {len(run.steps) + 1}: {won.text()}", *won.notes]
