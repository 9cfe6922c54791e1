"""How a run goes through a stage: rounds of cut and heal, cuts inside one training, a descent, or
one cut that a single method decides.

Each of them is a `Walk`: it ends with the ranking and the counts of the last step that was
kept, and can be left and resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateurs.controls import reinitialise_
from secateurs.errors import BudgetError, DataError
from secateurs.finetuning import clock_of, restore_
from secateurs.pipeline.descent import Descent, unchanged
from secateurs.pipeline.fisher import cut_by_fisher
from secateurs.pipeline.onlooking import length, work_of
from secateurs.pipeline.points import Point, Ranking
from secateurs.pipeline.preparing import prepare
from secateurs.pipeline.request import given
from secateurs.pipeline.resolving import AUTO_MARGIN, resolve_budget
from secateurs.pipeline.run import Run
from secateurs.pipeline.stage import Stage
from secateurs.pipeline.walk import End, Walk
from secateurs.pipeline.widths import measure_widths
from secateurs.surgery import shrink
from secateurs.surgery.shrinking import info_of
from secateurs.tickets import FreshRow, Ticket, find_ticket, reinitialise_sparse_, train_ticket
from secateurs.tickets.densities import COLLAPSE
from secateurs.tickets.initial import cut_at_init
from secateurs.tickets.lottery import rewind_step
from secateurs.types import Budget, Counts, Graph, Inputs

__all__ = ["cut_all", "cut_stage"]


def cut_all(
    run: Run, stages: Sequence[Stage], example_inputs: Inputs, *, form: str, norm: str
) -> nn.Module:
    """All stages, then the smaller model, verified and in the mode of the dense one."""
    run.cuts = sum(stage.most_steps for stage in stages)
    run.total = sum(work_of(stage, run.counted) for stage in stages)
    for number, stage in enumerate(stages, start=1):
        if number > run.stages_done:
            cut_stage(run, number, stage)
            run.stages_done = number
            run.leave(must=True)
    assert run.plan is not None
    kept = "plain" if norm == "plain" else "exact"
    with run.peers.ranks.agreed("shrink"):
        small = shrink(run.work, run.plan, example_inputs, form=form, norm=kept)
    run.peers.same(small)
    if info_of(small).form == "graph":  # the module form has the mode of each module already
        small.train(run.model.training)
    return small


def cut_stage(run: Run, number: int, stage: Stage) -> None:
    """All steps of one stage, and what a reader should know of it."""
    margin = AUTO_MARGIN if stage.budget == "auto" else 1.0
    stage = resolve_budget(stage, run.dense_metric)
    samples = run.samples_of(stage)
    if not run.enters_again:
        run.started = 0 if run.plan is None else run.plan.n_removed, len(run.steps)
        measure_widths(run, stage)
    before, started = run.started
    if stage.wants_drop:
        walk: Walk = Descent(run, stage, samples, margin=margin)
    elif stage.at_init is not None:
        walk = FromInit(run, stage, samples)
    elif stage.ticket is not None:
        walk = Lottery(run, stage, samples)
    elif stage.fisher_masks is not None:
        walk = ByFisher(run, stage, samples)
    elif stage.steps.every is not None:
        walk = Within(run, stage, samples)
    else:
        walk = Rounds(run, stage, samples)
    run.enter(walk)
    prepare(walk, number)
    ranking, counts = walk.go()
    run.enter(None)
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


@dataclass
class Rounds(Walk):
    """Each step is healed by a fine-tuning of its own; the guard may end it early.

    Attributes:
        step: of the schedule, that is to be made.
        end: of the last step that was kept.
        good: the state before the step, to go back to.
    """

    step: int = 1
    end: End | None = None
    good: Point | None = None

    def go(self) -> End:
        last = self.stage.steps.steps
        while self.step <= last and (self.fresh is not None or self.remove()) and self.heal():
            self.step += 1
            if self.step <= last:
                self.run.leave(must=True)
        assert self.end is not None
        return self.end

    def remove(self) -> bool:
        """The cut of a step; False when there is nothing left to cut."""
        run, stage = self.run, self.stage
        run.tell(f"prune: cut {run.cut_text}")
        self.good = run.point(*(self.end or ())) if stage.max_drop is not None else None
        try:
            ranking, counts = self.cut(self.step)
        except BudgetError as error:
            if self.end is None or stage.control == "reinit":
                raise
            _stop_threshold(run, stage, self.step, error)
            return False
        self.masked = run.metric()
        if stage.control == "reinit" and self.step == stage.steps.steps:
            assert run.plan is not None
            reinitialise_(run.work, run.plan.masks, run.seed)
        self.fresh = ranking, counts
        run.leave(must=stage.layerwise is not None)
        return True

    def heal(self) -> bool:
        """The training after a cut; False when the guard has undone both."""
        run, stage = self.run, self.stage
        assert self.fresh is not None
        ranking, counts = self.fresh
        healed, loss = self.train()
        fraction = _fraction(stage, self.step)
        run.note_step(counts, fraction, self.masked, healed=healed, loss=loss)
        last, limit = self.masked if healed is None else healed, stage.max_drop
        if self.good is not None and limit is not None and run.exceeds(last, limit):
            told = run.roll_back(self.good, limit)
            self.end = self.end or (ranking, unchanged(stage, ranking, self.good))
            _stop_guarded(run, stage, self.step, told)
            return False
        self.end, self.fresh, self.before = self.fresh, None, None
        return True

    def train(self) -> tuple[float | None, float | None]:
        """The training itself; the metric and the loss after it."""
        return self.run.heal(self.stage, before=self.before)


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


@dataclass
class FromInit(Rounds):
    """One cut of the network as it came, by a method for untrained ones; then its training."""

    def cut(self, step: int) -> End:
        run, stage, how = self.run, self.stage, self.stage.at_init
        assert how is not None
        assert isinstance(stage.budget, Budget)
        self.look_back()
        budget = stage.budget
        plan, scores, counts = run.once(f"at_init: {how.method}", lambda: cut_at_init(
            run.work, self.samples, run.loss_fn, budget=budget, method=how.method,
            iterations=how.iterations, batches_per_iteration=how.batches_per_iteration,
            granularity=stage.granularity, graph=run.graph, min_keep=stage.min_keep, seed=run.seed,
            progress=lambda what, i, n: run.tell(what),
        ))  # fmt: skip
        run.adopt(plan)
        run.notes += [f"{name}: {text}" for name, text in plan.reasons.items() if COLLAPSE in text]
        if how.reinitialise:
            rows = reinitialise_sparse_(run.work, plan.masks, run.seed)
            run.notes += _drawn_anew(rows)
        return Ranking(scores), counts


def _drawn_anew(rows: Sequence[FreshRow]) -> list[str]:
    """What a reader should know of weights that were drawn again after the cut."""
    done = [sum(row.done == what for row in rows) for what in ("scaled", "drawn")]
    notes = [
        f"after the cut {done[0]} parameters were drawn anew and scaled by the inputs that are "
        f"left, {done[1]} drawn as their modules do it"
    ]
    return notes + [
        f"{row.tensor} was not drawn anew: {row.why}" for row in rows if row.done == "left"
    ]


@dataclass
class ByFisher(Rounds):
    """One cut of the trained network by `search_masks`; then the training, if there is one.

    A run that is interrupted within the search starts the search anew, with the same result; after
    it there is a checkpoint.
    """

    def remove(self) -> bool:
        done = super().remove()
        self.run.leave(must=True)
        return done

    def cut(self, step: int) -> End:
        return cut_by_fisher(self.run, self.stage, self.samples)


@dataclass
class Lottery(Rounds):
    """The search for a lottery ticket, and then its training.

    A run that is interrupted within the search starts the search anew, from its beginning and with
    the same result; the training of the ticket goes on from its last checkpoint.

    Attributes:
        ticket: once it is found.
    """

    ticket: Ticket | None = None

    def remove(self) -> bool:
        done = super().remove()
        self.run.leave(must=True)
        return done

    def cut(self, step: int) -> End:
        run, stage, how = self.run, self.stage, self.stage.ticket
        assert how is not None
        assert isinstance(stage.budget, Budget)
        assert stage.finetune is not None
        looker = run.onlooker("search for a ticket")
        self.ticket = ticket = find_ticket(
            run.work, run.batches, run.loss_fn, train=stage.finetune, rounds=how.rounds,
            budget=stage.budget, rewind=how.rewind, reset=how.reset, criterion=stage.criterion,
            granularity=stage.granularity, allocation=stage.allocation, min_keep=stage.min_keep,
            graph=run.graph, evaluate=run.evaluate, maximize=run.maximize, seed=run.seed,
            parts=[looker], each_epoch=looker.epoch,
        )  # fmt: skip
        run.trained(work_of(stage, run.batches) - 1 - self.last_training)
        restore_(run.work, ticket.state)
        run.adopt(ticket.plan)
        for row in ticket.history:
            metric = "" if row.metric is None else f", metric {row.metric:.4g}"
            run.notes.append(
                f"ticket, round {row.round} of {how.rounds}: {row.trained:,} units trained for "
                f"{row.steps} steps{metric}; {row.kept:,} left"
            )
        run.notes.append(f"the ticket is trained from step {ticket.start}; reset: {ticket.reset}")
        run.notes += [
            f"{name}: {text}" for name, text in ticket.plan.reasons.items() if COLLAPSE in text
        ]
        return Ranking(ticket.scores), ticket.counts

    @property
    def last_training(self) -> int:
        """How long the training of the ticket is, from the rewinding point on."""
        config, how = self.stage.finetune, self.stage.ticket
        assert config is not None
        assert how is not None
        batches = self.run.batches
        return length(config, batches) - rewind_step(config, batches, how.rewind)

    def train(self) -> tuple[float | None, float | None]:
        run, stage, ticket = self.run, self.stage, self.ticket
        assert ticket is not None
        assert stage.finetune is not None
        looker = run.onlooker("train the ticket")
        done = train_ticket(
            run.work, ticket, run.batches, run.loss_fn, train=stage.finetune,
            evaluate=run.evaluate, maximize=run.maximize, seed=run.seed, parts=[looker],
            each_epoch=looker.epoch, checkpoint=run.training(),
        )  # fmt: skip
        run.trained(self.last_training, done)
        return run.outcome(stage.finetune, done)


@dataclass
class Within(Walk):
    """All cuts inside one fine-tuning: one optimizer, one learning-rate schedule.

    Attributes:
        due: optimizer steps before which the cuts that are left are made; None at first.
        made: cuts that were made.
        end: of the last one.
    """

    due: list[int] | None = None
    made: int = 0
    end: End | None = None

    def go(self) -> End:
        run, schedule, config = self.run, self.stage.steps, self.stage.finetune
        assert config is not None
        if self.due is None:
            clock = clock_of(config, run.counted, needs=f"Schedule(every={schedule.every!r})")
            assert clock.n_steps is not None
            self.due = list(schedule.cuts(clock.n_steps, clock.per_epoch, clock.cycles))
        healed, loss = run.heal(self.stage, self.recut)
        if self.due:
            raise DataError(
                f"the fine-tuning ended after {run.history[-1].steps} optimizer steps, before the "
                f"cut at {self.due[0]}: there are fewer batches than their length says"
            )
        run.steps[-1] = replace(run.steps[-1], metric_healed=healed, loss=loss)
        assert self.end is not None
        return self.end

    def recut(self, done: int) -> Mapping[str, Tensor] | None:
        """Called before each optimizer step: larger masks where a cut is due."""
        run, stage = self.run, self.stage
        if not self.due or done < self.due[0]:
            return None
        run.tell(f"prune: cut {run.cut_text}")
        step = self.made + 1
        with torch.random.fork_rng():  # the training goes on as if nobody had looked
            torch.manual_seed(run.seed + len(run.steps))
            if self.made:
                run.steps[-1] = replace(run.steps[-1], metric_healed=run.metric())
            try:
                self.end = self.cut(step)
            except BudgetError as error:
                if not self.made:
                    raise
                _stop_threshold(run, stage, step, error)
                self.due.clear()
                return None
            counts = self.end[1]
            run.note_step(counts, _fraction(stage, step), run.metric(), optimizer_step=done)
        self.made = step
        self.due.pop(0)
        assert run.plan is not None
        return run.plan.masks


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
