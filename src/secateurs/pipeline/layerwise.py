"""The cut of a step by `prune_layerwise`: counts as allocated, weights chosen on the samples."""

from __future__ import annotations

from dataclasses import asdict, replace

from secateurs.errors import BudgetError
from secateurs.pipeline.points import Ranking
from secateurs.pipeline.repairing import metrics_of_all, with_metrics
from secateurs.pipeline.request import given
from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.posttraining import Won
from secateurs.posttraining.layerwise import prune_to_counts
from secateurs.selection import select
from secateurs.types import Budget, Counts, Plan

__all__ = ["cut_layerwise"]


def cut_layerwise(run: Run, stage: Stage, ranking: Ranking, counts: Counts, *, must: bool) -> None:
    """Prune what the counts take from each layer, in place; what it cost is noted.

    Args:
        run, stage: the model is that of the run.
        ranking: whose scores are -inf for weights that are gone.
        counts: weights that each tensor keeps.
        must: something has to be gone in the end.
    """
    how = stage.layerwise
    assert how is not None
    assert isinstance(counts.asked, Budget)
    plan = select(ranking.scores, replace(counts, kept={}), previous=run.plan)
    left = {n: int(line.isfinite().sum()) for n, line in ranking.scores.values.items()}
    fewer = {name: n for name, n in counts.kept.items() if n < left[name]}
    if not fewer:
        if must and not plan.n_removed:
            raise BudgetError(f"{given(counts.asked)} removes nothing: all layers stay whole")
        run.adopt(plan)
        return
    cut = run.cut_text

    def tell(done: int, n: int) -> None:
        run.tell(f"prune: cut {cut}, {how.method}: layer {done} of {n}")

    asked = "budget " + ", ".join(f"{k}={v}" for k, v in counts.asked.given.items())

    def work() -> tuple[Plan, Won]:
        return prune_to_counts(
            run.work, run.samples, fewer, previous=plan, evaluate=run.evaluate_alone, why=asked,
            progress=tell, **asdict(how),
        )  # fmt: skip

    before = metrics_of_all(run)
    made, won = run.once(f"layerwise: {how.method}", work, changes=True)
    won = with_metrics(run, won, before)
    run.adopt(made)
    run.notes += [f"after cut {len(run.steps) + 1}: {won.text()}", *won.notes]
