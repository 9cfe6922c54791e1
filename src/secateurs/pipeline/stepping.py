"""How a run goes through a stage: rounds of cut and heal, cuts inside one training, or a descent.

Each of the three ends with the ranking and the counts of the last step that was kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateurs.controls import reinitialise_
from secateurs.errors import BudgetError, DataError
from secateurs.finetuning import clock_of
from secateurs.pipeline.descent import descend, unchanged
from secateurs.pipeline.request import given
from secateurs.pipeline.resolving import AUTO_MARGIN, resolve_budget
from secateurs.pipeline.run import Ranking, Run
from secateurs.pipeline.stage import Stage
from secateurs.surgery import shrink
from secateurs.surgery.shrinking import info_of
from secateurs.types import Batches, Counts, Graph, Inputs

__all__ = ["cut_all", "cut_stage"]

End = tuple[Ranking, Counts]


def cut_all(
    run: Run, stages: Sequence[Stage], example_inputs: Inputs, *, form: str, norm: str
) -> nn.Module:
    """All stages, then the smaller model, verified and in the mode of the dense one."""
    run.total = sum(stage.most_steps for stage in stages)
    for number, stage in enumerate(stages, start=1):
        cut_stage(run, number, stage)
    assert run.plan is not None
    kept = "plain" if norm == "plain" else "exact"
    small = shrink(run.work, run.plan, example_inputs, form=form, norm=kept)
    if info_of(small).form == "graph":  # the module form has the mode of each module already
        small.train(run.model.training)
    return small


def cut_stage(run: Run, number: int, stage: Stage) -> None:
    """All steps of one stage, and what a reader should know of it."""
    margin = AUTO_MARGIN if stage.budget == "auto" else 1.0
    stage = resolve_budget(stage, run.dense_metric)
    samples = run.samples_of(stage)
    before = 0 if run.plan is None else run.plan.n_removed
    started = len(run.steps)
    run.measure_widths(stage)
    if stage.wants_drop:
        ranking, counts = descend(run, stage, samples, margin=margin)
    elif stage.steps.every is not None:
        ranking, counts = _within(run, stage, samples)
    else:
        ranking, counts = _rounds(run, stage, samples)
    if why := stage.missed(ranking.scores, run.plan) if stage.allow_missed else "":
        run.met = False
        run.notes.append(f"stage {number}: the budget was missed, which was allowed: {why}")
    counts = replace(counts, asked=stage.asked)
    run.last_scores.append(ranking.scores)
    run.last_counts.append(counts)
    undone = any(step.rolled_back for step in run.steps[started:])
    if run.plan is not None and run.plan.n_removed == before and not undone:
        run.notes.append(f"stage {number} removed nothing: {given(counts.asked)} was met before it")
    found = [
        *ranking.scores.notes,
        *_rounded(stage, counts, run.graph),
        *(f"{n}: not scored: {w}" for n, w in ranking.scores.not_scored.items()),
    ]
    run.notes += [note for note in found if note not in run.notes]


def _rounds(run: Run, stage: Stage, samples: Batches) -> End:
    """Each step is healed by a fine-tuning of its own; the guard may end it early."""
    schedule = stage.steps
    first: list[Ranking] = []
    end: End | None = None
    for step in range(1, schedule.steps + 1):
        run.tell("prune", len(run.steps))
        good = run.point(*(end or ())) if stage.max_drop is not None else None
        try:
            ranking, counts = _cut(run, stage, step, samples, first)
        except BudgetError as error:
            if end is None or stage.control == "reinit":
                raise
            _stop_threshold(run, stage, step, error)
            break
        masked = run.metric()
        if stage.control == "reinit" and step == schedule.steps:
            assert run.plan is not None
            reinitialise_(run.work, run.plan.masks, run.seed)
        healed, loss = run.heal(stage)
        run.note_step(counts, _fraction(stage, step), masked, healed=healed, loss=loss)
        last, limit = masked if healed is None else healed, stage.max_drop
        if good is not None and limit is not None and run.exceeds(last, limit):
            told = run.roll_back(good, limit)
            end = end or (ranking, unchanged(stage, ranking, good))
            _stop_guarded(run, stage, step, told)
            break
        end = ranking, counts
    assert end is not None
    return end


def _cut(run: Run, stage: Stage, step: int, samples: Batches, first: list[Ranking]) -> End:
    """Score, allocate, select and zero what goes; `first` keeps the ranking of a single scoring."""
    ranking = first[0].without(run.plan) if first else run.rank(stage, samples)
    if not stage.steps.rescore and not first:
        first.append(ranking)
    asked = stage.asked_at(step, run.graph, run.dense_ms)
    counts = run.count(stage, ranking, asked, samples)
    run.take(ranking, counts, must=step == stage.steps.steps)
    return ranking, counts


def _fraction(stage: Stage, step: int) -> float | None:
    """How far along the schedule a step is; a threshold has no such figure."""
    return stage.steps.fraction(step) if stage.threshold is None else None


def _stop_threshold(run: Run, stage: Stage, step: int, error: BudgetError) -> None:
    """A threshold has become too high for what is left: keep what there is, and say so."""
    if stage.threshold is None:
        raise error
    run.met = False
    run.notes.append(f"stopped after step {step - 1} of {stage.steps.steps}: {error}")


def _stop_guarded(run: Run, stage: Stage, step: int, told: str) -> None:
    """The guard has ended a stage: an error if nothing was cut, else a note."""
    if run.plan is None or not run.plan.n_removed:
        raise BudgetError(
            f"nothing can be cut: {told}. Take a smaller first step (more steps, or a larger "
            f"budget), a longer fine-tuning, or max_drop above {stage.max_drop:g}"
        )
    run.met = False
    run.notes.append(f"stopped at step {step} of {stage.steps.steps} by max_drop: {told}")


def _within(run: Run, stage: Stage, samples: Batches) -> End:
    """All cuts inside one fine-tuning: one optimizer, one learning-rate schedule."""
    schedule, config = stage.steps, stage.finetune
    assert config is not None
    clock = clock_of(config, run.batches, needs=f"Schedule(every={schedule.every!r})")
    assert clock.n_steps is not None
    due = list(schedule.cuts(clock.n_steps, clock.per_epoch, clock.cycles))
    ends: list[End] = []
    first: list[Ranking] = []

    def recut(done: int) -> Mapping[str, Tensor] | None:
        if not due or done < due[0]:
            return None
        run.tell("prune", len(run.steps))
        step = len(ends) + 1
        with torch.random.fork_rng():  # the training goes on as if nobody had looked
            torch.manual_seed(run.seed + len(run.steps))
            if ends:
                run.steps[-1] = replace(run.steps[-1], metric_healed=run.metric())
            try:
                ends.append(_cut(run, stage, step, samples, first))
            except BudgetError as error:
                if not ends:
                    raise
                _stop_threshold(run, stage, step, error)
                due.clear()
                return None
            counts = ends[-1][1]
            run.note_step(counts, _fraction(stage, step), run.metric(), optimizer_step=done)
        due.pop(0)
        assert run.plan is not None
        return run.plan.masks

    healed, loss = run.heal(stage, recut)
    if due:
        raise DataError(
            f"the fine-tuning ended after {run.history[-1].steps} optimizer steps, before the cut "
            f"at {due[0]}: there are fewer batches than their length says"
        )
    run.steps[-1] = replace(run.steps[-1], metric_healed=healed, loss=loss)
    return ends[-1]


def _rounded(stage: Stage, counts: Counts, graph: Graph) -> list[str]:
    """A note about the targets whose counts were rounded."""
    multiples: dict[int, int] = {}
    for name, multiple in counts.round_to.items():
        if counts.kept[name] < graph.targets[name].n_units:
            multiples[multiple] = multiples.get(multiple, 0) + 1
    return [
        f"counts rounded: {n} of {len(counts.kept)} targets keep multiples of {multiple} units "
        f"(round_to={stage.round_to!r}"
        + ("; round_to=1 turns it off)" if stage.round_to == "auto" else ")")
        for multiple, n in multiples.items()
    ]
