"""What widths cost on this machine, and whether a limit on the time of a call can be met."""

from __future__ import annotations

import torch

from secateurs.errors import BudgetError
from secateurs.latency import measure_table
from secateurs.pipeline.request import given
from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.types import Budget, Scores

__all__ = ["measure_widths"]

DOUBT = 0.1
"""How wrong a table may be about the smallest model before a latency is called out of reach."""


def measure_widths(run: Run, stage: Stage) -> None:
    """Measure what widths cost here, if the stage limits the time of a call."""
    run.table = None
    if not stage.wants_latency:
        return
    run.tell("measure the latency of widths")
    run.table = table = run.once("measure the latency of widths", lambda: measure_table(
        run.model, run.graph, run.example_inputs, granularity=stage.granularity,
        round_to=stage.round_to,
    ), from_data=False)  # fmt: skip
    assert isinstance(stage.budget, Budget)
    asked = stage.budget.latency_ms
    assert asked is not None
    if asked >= table.dense_ms:
        raise BudgetError(
            f"{given(stage.budget)}: a call of the dense model takes {table.dense_ms:.4g} ms "
            "here (1 thread, the example inputs): it is within the budget already"
        )
    targets = run.graph.select(stage.granularity)
    blank = Scores(run.graph, {t.name: torch.zeros(t.n_units) for t in targets}, "")
    run.least_ms = table.ms(stage.fewest(blank, run.plan).kept)
    if run.least_ms > asked * (1 + DOUBT) and not stage.allow_missed:
        raise BudgetError(
            f"{given(stage.budget)}: a call of the dense model takes {table.dense_ms:.4g} ms "
            f"here, and about {run.least_ms:.4g} ms remain when every target keeps its fewest "
            "units: the rest does not depend on widths. Ask for more, prune more kinds of "
            "units, or take the nearest with allow_missed=True"
        )
