"""The cut of a stage by `search_masks`: masks by Fisher information, on the calibration data."""

from __future__ import annotations

from secateurs.pipeline.points import Ranking
from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.pipeline.walk import End
from secateurs.posttraining import any_output, search_masks
from secateurs.types import Batches, Budget, Counts, Plan, Scores

__all__ = ["cut_by_fisher"]


def cut_by_fisher(run: Run, stage: Stage, samples: Batches) -> End:
    """Search, rearrange and tune; what each step won is noted. The scores are the diagonal."""
    how = stage.fisher_masks
    assert how is not None
    assert isinstance(stage.budget, Budget)
    importance = None
    if how.importance == "any_output":
        importance = any_output(run.seed, outputs=run.graph.outputs)
    budget = stage.budget

    def search() -> tuple[Plan, Scores, Counts, list[str]]:
        found = search_masks(
            run.work, samples, run.loss_fn, graph=run.graph, budget=budget,
            granularity=stage.granularity, rearrange=how.rearrange, tune=how.tune,
            importance=importance, shrink=how.shrink, damping=how.damping, min_keep=stage.min_keep,
            round_to=stage.multiples, evaluate=run.evaluate_alone, n_samples=how.n_samples,
            seed=run.seed, progress=lambda won: run.tell(f"fisher masks: {won.text()}"),
        )  # fmt: skip
        told = [f"fisher masks: {won.text()}" for won in found.won]
        return found.plan, found.fisher.scores(run.graph), found.counts, [*told, *found.notes]

    plan, scores, counts, notes = run.once("fisher masks", search, changes=True)
    run.adopt(plan)
    run.notes += [note for note in notes if note not in run.notes]
    return Ranking(scores), counts
