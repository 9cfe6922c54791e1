"""Between a cut and its healing: repairs without training, by the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.posttraining import Won, compensate_bias, recalibrate_norms, reconstruct

__all__ = ["repair"]

DO: Mapping[str, Callable[[Run], Won]] = {
    "bias": lambda run: compensate_bias(
        run.work, run.model, run.cut_plan, run.samples, graph=run.graph, evaluate=run.evaluate
    ),
    "reconstruct": lambda run: reconstruct(
        run.work, run.model, run.cut_plan, run.samples, evaluate=run.evaluate
    ),
    "norms": lambda run: recalibrate_norms(
        run.work, run.samples, masks=run.cut_plan, evaluate=run.evaluate
    ),
}
"""One of `REPAIRS` -> what it does to the model that was cut."""


def repair(run: Run, stage: Stage) -> None:
    """Mend what the last cut of a stage broke, in the order that was given; say what it won."""
    for name in stage.repair:
        run.tell(f"repair: {name}")
        won = DO[name](run)
        run.notes += [f"after cut {len(run.steps) + 1}: {won.text()}", *won.notes]
