"""The state of one pruning run, and what a step can do with it: score, cut, heal, go back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from secateurs.bars import Progress
from secateurs.boards import BoardLog
from secateurs.checkpoints import Keeper
from secateurs.controls import controlled_scores, null_scores, shuffled_targets
from secateurs.errors import BudgetError
from secateurs.finetuning import (
    Distillation,
    Finetune,
    FinetuneResult,
    counted,
    distillation,
    finetune,
    restore_,
    snapshot,
)
from secateurs.latency import LatencyTable, fit_latency
from secateurs.masks import apply_masks_
from secateurs.pipeline.onlooking import Onlooker, length
from secateurs.pipeline.peers import ALONE, Peers
from secateurs.pipeline.points import Point, Ranking, unscored
from secateurs.pipeline.regrowing import moved, told
from secateurs.pipeline.request import given
from secateurs.pipeline.resuming import Memory
from secateurs.pipeline.stage import Stage
from secateurs.regrowth import Regrowth
from secateurs.report.assemble import remaining_of
from secateurs.report.data import StepRow
from secateurs.report.words import remaining_words
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.sensitivities import sensitivity
from secateurs.surgery.verification import copied
from secateurs.types import (
    Batches,
    Budget,
    Counts,
    Evaluate,
    Graph,
    Inputs,
    LossFn,
    Plan,
    Scores,
    Threshold,
)

if TYPE_CHECKING:
    from secateurs.pipeline.walk import Walk

__all__ = ["Point", "Ranking", "Run"]

T = TypeVar("T")
Recut = Callable[[int], Mapping[str, Tensor] | None]


class Run:
    """One pruning run: a masked copy of the model and the plan so far."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        samples: Batches,
        loss_fn: LossFn,
        graph: Graph,
        evaluate: Evaluate | None,
        maximize: bool,
        seed: int,
        progress: Progress | None,
        example_inputs: Inputs,
        log: BoardLog | None = None,
        peers: Peers = ALONE,
    ) -> None:
        self.model, self.work, self.peers = model, copied(model), peers
        self.counted = counted(batches, peers.ranks)  # as many as the rank with most has
        self.batches, self.samples, self.loss_fn = batches, samples, loss_fn
        self.graph, self.evaluate, self.maximize = graph, evaluate, maximize
        self.seed, self.progress = seed, progress
        self.example_inputs, self.log = example_inputs, log
        self.table: LatencyTable | None = None
        self.taught: Distillation | None = None
        self.least_ms = 0.0
        self.plan: Plan | None = None
        self.steps: list[StepRow] = []
        self.history: list[FinetuneResult] = []
        self.notes: list[str] = []
        self.last_scores: list[Scores] = []
        self.last_counts: list[Counts] = []
        self.stages_done = 0
        self.started = 0, 0
        self.memory: Memory | None = None
        self.cuts, self.total = 0, 0  # cuts, and all work in steps: see work_of
        self.spent, self.within = 0, 0  # work before the present training, and in it
        self.met = True
        self.dense_metrics = peers.metrics(model, evaluate)

    # --- what is known ---------------------------------------------------------------------------

    @property
    def dense_metric(self) -> float | None:
        """Main validation metric of the dense model."""
        return next(iter(self.dense_metrics.values()), None)

    def metric(self) -> float | None:
        """Main validation metric now."""
        return next(iter(self.metrics().values()), None)

    def metrics(self) -> dict[str, float]:
        """All validation metrics now."""
        return self.peers.metrics(self.work, self.evaluate)

    @property
    def evaluate_alone(self) -> Evaluate | None:
        """For what rank 0 does alone: there it could wait for others for ever."""
        return None if self.peers.many else self.evaluate

    def drop(self, metric: float | None) -> float:
        """How much worse than dense a metric is; negative when it is better."""
        assert metric is not None
        assert self.dense_metric is not None
        return (self.dense_metric - metric) * (1 if self.maximize else -1)

    def exceeds(self, metric: float | None, limit: float) -> bool:
        """Whether a metric is worse than dense by more than the limit, but for rounding."""
        assert self.dense_metric is not None
        return self.drop(metric) > limit + 1e-9 * max(1.0, abs(self.dense_metric))

    def tell(self, what: str) -> None:
        """Show progress: cuts and optimizer steps that are done, of all that there will be."""
        if self.progress is not None:
            self.progress(what, min(self.spent + self.within, self.total), self.total)

    @property
    def cut_text(self) -> str:
        """Which cut is being made, of how many at most."""
        return f"{len(self.steps) + 1} of {self.cuts}"

    def onlooker(self, what: str, config: Finetune | None = None) -> Onlooker:
        """What shows a training that begins now."""

        def say(text: str, within: int) -> None:
            self.within = within
            self.tell(text)

        return Onlooker(say, what, epochs=config.n_epochs if config else None, log=self.log)

    def trained(self, work: int, *results: FinetuneResult) -> None:
        """A training has ended; `work` is what it was to take."""
        self.spent, self.within = self.spent + work, 0
        self.history += [replace(done, masks={}) for done in results]

    def once(
        self, what: str, work: Callable[[], T], *, changes: bool = False, from_data: bool = True
    ) -> T:
        """What rank 0 finds for all; one process alone just does it.

        Args:
            what: is done.
            work: what does it.
            changes: whether it changes the weights of the masked copy.
            from_data: whether it looks at calibration data, which a reader should know.
        """
        if self.peers.many and from_data:
            note = f"{what}: by the calibration data of process 0 of {self.peers.ranks.size}"
            self.notes += [note] if note not in self.notes else []
        return self.peers.once(what, work, self.graph, self.work if changes else None)

    # --- checkpoints -----------------------------------------------------------------------------

    def remember(self, keeper: Keeper) -> None:
        """Leave checkpoints from now on; go on from the one that was found."""
        self.memory = Memory(self, keeper)

    @property
    def enters_again(self) -> bool:
        """Whether the run was left in the middle of the stage that comes now."""
        return self.memory is not None and self.memory.within_stage

    def enter(self, walk: Walk | None) -> None:
        """The walk through a stage begins, goes on where it was left, or has ended (None)."""
        if self.memory is not None:
            self.memory.enter(walk)

    def training(self) -> Keeper | None:
        """Where the training that begins now leaves its checkpoints."""
        return None if self.memory is None else self.memory.training()

    def leave(self, *, must: bool = False) -> None:
        """Here the run can be left: write a checkpoint if it is time, or must be."""
        if self.memory is not None:
            self.memory.leave(must=must)

    # --- what a step does ------------------------------------------------------------------------

    def samples_of(self, stage: Stage) -> Batches:
        """The batches that a stage scores on."""
        if stage.control == "random-labels":
            with self.peers.ranks.agreed("shuffling labels"):
                return shuffled_targets(
                    self.samples, self.model, self.seed, may_be_empty=self.peers.many
                )
        return self.samples

    def rank(self, stage: Stage, samples: Batches) -> Ranking:
        """Score what is left, if anything reads that."""
        if stage.unscored:
            return unscored(self.graph, stage.granularity, self.plan)
        seed = self.seed + len(self.steps)
        scores = score(
            self.work, samples, self.loss_fn, criterion=stage.criterion, graph=self.graph,
            granularity=stage.granularity, previous=self.plan, seed=seed, group=self.peers.group,
            progress=lambda i, n: self.tell(f"score: batch {i} of {n or '?'}"),
        )  # fmt: skip
        scores = controlled_scores(scores, stage.control, seed)
        return Ranking(scores, self._null(stage, samples, seed))

    def _null(self, stage: Stage, samples: Batches, seed: int) -> list[Scores]:
        """Scores on shuffled labels, for a threshold that compares with them."""
        if not stage.null_repeats:
            return []
        drawn = null_scores(
            self.work, samples, self.loss_fn, criterion=stage.criterion, graph=self.graph,
            granularity=stage.granularity, previous=self.plan, seed=seed,
            repeats=stage.null_repeats, group=self.peers.group,
            progress=lambda i, n: self.tell(
                f"score shuffled labels: batch {i} of {n or '?'}"
            ),
        )  # fmt: skip
        return [controlled_scores(scores, stage.control, seed) for scores in drawn]

    def count(
        self, stage: Stage, ranking: Ranking, asked: Budget | Threshold, samples: Batches
    ) -> Counts:
        """Units to keep; those of the whole latency budget are fitted to what is measured."""
        curves = None
        if stage.allocation == "sensitivity":
            curves = self.once("sensitivity", lambda: sensitivity(
                self.work, samples, self.loss_fn, scores=ranking.scores,
                progress=lambda name, i, n: self.tell(
                    f"sensitivity: {name}, {i} of {n}"
                ),
            ))  # fmt: skip

        def counts(asked: Budget | Threshold, stage: Stage = stage) -> Counts:
            return stage.allocated(
                ranking.scores,
                asked,
                ranking.null,
                sensitivity=curves,
                latency=self.table,
                previous=self.plan,
            )

        whole = stage.budget.latency_ms if isinstance(stage.budget, Budget) else None
        if self.table is None or not isinstance(asked, Budget) or asked.latency_ms is None:
            return counts(asked)
        if asked.latency_ms != whole:  # a step on the way: what the table predicts will do
            return counts(replace(asked, latency_ms=max(asked.latency_ms, self.least_ms * 1.001)))
        strict = replace(stage, allow_missed=False)
        self.tell("fit the latency")
        try:
            table = self.table
            fit = self.once("fit the latency", lambda: fit_latency(
                self.model, ranking.scores, asked, table, lambda b: counts(b, strict),
                self.example_inputs, previous=self.plan,
            ), from_data=False)  # fmt: skip
        except BudgetError as error:
            if not stage.allow_missed:
                raise
            self.met = False
            self.notes.append(f"the budget was missed, which was allowed: {error}")
            return replace(stage.fewest(ranking.scores, self.plan), asked=asked)
        self.notes.append(f"latency: {fit.text()}")
        return fit.counts

    @property
    def dense_ms(self) -> float:
        """Time of a call of the dense model where latency is limited, else 0."""
        return 0.0 if self.table is None else self.table.dense_ms

    def take(self, ranking: Ranking, counts: Counts, *, must: bool) -> None:
        """Select what goes by the counts, and zero it; `must`: something has to go."""
        self.plan = select(ranking.scores, counts, previous=self.plan)
        if not self.plan.n_removed and (must or isinstance(counts.asked, Threshold)):
            raise BudgetError(f"{given(counts.asked)} removes nothing: all scores reach it")
        self.adopt(self.plan)

    def adopt(self, plan: Plan) -> None:
        """Zero what a plan removes."""
        self.plan = plan
        self.peers.same(plan)
        apply_masks_(self.work, plan.masks)
        if self.taught is not None:
            self.taught.plan = plan
        if self.log is not None:
            self.log.cut(self.graph, plan)

    @property
    def cut_plan(self) -> Plan:
        """What is removed, after the first cut."""
        assert self.plan is not None
        return self.plan

    def heal(
        self,
        stage: Stage,
        recut: Recut | None = None,
        before: Mapping[str, Tensor] | None = None,
    ) -> tuple[float | None, float | None]:
        """Fine-tune with the cut held; the metric and the training loss afterwards.

        Args:
            stage: says how.
            recut: makes cuts on the way.
            before: weights from before the cut, for masks that move back.
        """
        config = stage.finetune
        if config is None or (self.plan is None and recut is None):
            return None, None
        if config.distills:
            self.taught = distillation(self.model, config, graph=self.graph, plan=self.plan)
        moves = []
        if stage.regrow is not None:
            moves = [Regrowth(stage.regrow, self.seed + len(self.steps), dense=before)]
        what = "train, with cuts" if recut else f"heal after cut {self.cut_text}"
        looker = self.onlooker(what, config)
        done = finetune(
            self.peers.trained(self.work), self.batches, self.loss_fn, config,
            masks=None if self.plan is None else self.plan.masks,
            teacher=self.taught, evaluate=self.evaluate, group=self.peers.group,
            maximize=self.maximize, seed=self.seed + len(self.steps), recut=recut,
            parts=[*moves, looker], checkpoint=self.training(), progress=looker.epoch,
        )  # fmt: skip
        self.taught = None
        if moves:
            self.plan = moved(self.cut_plan, done.masks)
            self.notes += told(moves[0])
        self.trained(length(config, self.counted), done)
        return self.outcome(config, done)

    def outcome(self, config: Finetune, done: FinetuneResult) -> tuple[float | None, float | None]:
        """The metric of the model that a training left, and its last training loss."""
        healed = self.metric() if config.restore_best else done.final_metric
        return healed, done.history[-1].train_loss if done.history else None

    def note_step(
        self,
        counts: Counts,
        fraction: float | None,
        masked: float | None,
        *,
        healed: float | None = None,
        loss: float | None = None,
        optimizer_step: int | None = None,
    ) -> None:
        """Add a row for the step that was made."""
        self.spent += 1
        self.steps.append(
            StepRow(
                step=len(self.steps) + 1,
                fraction=fraction,
                remaining=remaining_of(self.graph, counts),
                metric_masked=masked,
                metric_healed=healed,
                loss=loss,
                optimizer_step=optimizer_step,
            )
        )

    # --- going back ------------------------------------------------------------------------------

    def point(self, ranking: Ranking | None = None, counts: Counts | None = None) -> Point:
        """The state now, to come back to."""
        good = (row.step for row in reversed(self.steps) if not row.rolled_back)
        return Point(snapshot(self.work), self.plan, ranking, counts, next(good, 0))

    def go_back(self, point: Point) -> None:
        """Restore a state, bit for bit."""
        restore_(self.work, point.weights)
        self.plan = point.plan

    def undo(self, point: Point) -> None:
        """Go back to a state and mark the steps since then as undone."""
        self.go_back(point)
        self.steps = [
            replace(row, rolled_back=True) if row.step > point.row else row for row in self.steps
        ]

    def roll_back(self, point: Point, limit: float) -> str:
        """Undo the last step: restore the state before it, mark its row, and say it in words."""
        self.go_back(point)
        row = self.steps[-1] = replace(self.steps[-1], rolled_back=True)
        metric = row.metric_healed if row.metric_healed is not None else row.metric_masked
        name, dense = next(iter(self.dense_metrics)), self.dense_metric
        assert metric is not None
        assert dense is not None
        left = {remaining_words(k): v for k, v in row.remaining.items() if v is not None}
        size = ", ".join(f"{v:.1%} of the {k}" for k, v in left.items())
        back = f"that of step {point.row}" if point.row else "the dense one"
        return (
            f"step {row.step} was rolled back: {name} {metric:.4g} is {self.drop(metric):.4g} "
            f"worse than the dense {dense:.4g}, at most {limit:.4g} is allowed ({size}); the model "
            f"is {back} again"
        )
