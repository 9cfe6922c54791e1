"""Before the first cut of a stage: training that makes what is going to be removed small."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from secateurs.finetuning import distillation, finetune
from secateurs.penalties import Penalty, UnitPenalty
from secateurs.pipeline.onlooking import length
from secateurs.pipeline.points import Ranking
from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.pipeline.walk import Walk
from secateurs.selection import select
from secateurs.types import Batches, GroupTarget, expand_granularity

__all__ = ["prepare"]

FRESH = 500_000
"""Added to the seed, so that the shuffling is not that of the first step's fine-tuning."""


def prepare(walk: Walk, number: int) -> None:
    """Train what an earlier stage has left, with the penalty of the stage if it has one.

    "growing" has chosen the units before, by the final budget; they are those that go, since all
    cuts of the stage then follow that ranking.
    """
    run, stage = walk.run, walk.stage
    config = stage.prepare
    if config is None or walk.prepared:
        return
    run.tell("prepare")
    looker = run.onlooker("prepare", config)
    parts = [] if stage.penalty is None else [_penalty(walk, stage.penalty)]
    teacher = None
    if config.distills:
        teacher = distillation(run.model, config, graph=run.graph, plan=run.plan)
    done = finetune(
        run.peers.trained(run.work), run.batches, run.loss_fn, config, group=run.peers.group,
        masks=None if run.plan is None else run.plan.masks, teacher=teacher,
        evaluate=run.evaluate, maximize=run.maximize, seed=run.seed + len(run.steps) + FRESH,
        parts=[*parts, looker], checkpoint=run.training(), progress=looker.epoch,
    )  # fmt: skip
    run.trained(length(config, run.counted), done)
    under = ""
    if stage.penalty is not None:
        given = {k: v for k, v in asdict(stage.penalty).items() if v is not None}
        under = " under the penalty " + ", ".join(f"{k}={v}" for k, v in given.items())
    run.notes.append(f"stage {number}: {done.steps} optimizer steps before its first cut{under}")
    run.notes += [note for part in parts for note in part.notes]
    walk.prepared = True
    run.leave(must=True)


def _penalty(walk: Walk, penalty: Penalty) -> UnitPenalty:
    """What makes units small; "growing" ranks them first."""
    run, stage = walk.run, walk.stage
    units = None
    if penalty.rule == "growing":
        if walk.first is None:
            walk.first = run.rank(stage, walk.samples)
        units = _units(run, stage, walk.first, walk.samples)
    kinds = tuple(sorted(expand_granularity(stage.granularity) - {"weight"}))
    return UnitPenalty(penalty, run.graph, granularity=kinds, units=units)


def _units(run: Run, stage: Stage, ranking: Ranking, samples: Batches) -> dict[str, Tensor]:
    """The structural units that the stage is going to remove, by target."""
    counts = run.count(stage, ranking, stage.asked_along(1.0, run.graph), samples)
    plan = select(ranking.scores, counts, previous=run.plan)
    units = {}
    for name in plan.removed:
        target = run.graph.targets.get(name)
        if isinstance(target, GroupTarget):
            gone = plan.gone(target)
            if run.plan is not None:
                gone &= ~run.plan.gone(target)
            units[name] = gone.nonzero().reshape(-1)
    return units
