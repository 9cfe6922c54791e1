"""Retraining-free pruning of a trained network: Fisher masks, rearranged and tuned.

    search     which units go, for all targets together: the least importance that a budget allows
    rearrange  the same numbers of units, but those that make up for each other
    tune       what reads the units that stay, by least squares: its weights, or scales of the units

After Kwon, Kim, Mahoney, Hassoun, Keutzer and Gholami, A Fast Post-Training Pruning Framework for
Transformers, 2022, arXiv:2204.09656; for every kind of unit that the engine finds, not for heads
and neurons of one architecture. There, scales are tuned; all weights win more. Minutes and some
hundred samples, no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor, nn

from secateurs.allocation.problem import Latency
from secateurs.allocation.rounding import RoundTo
from secateurs.batches import check_batches, model_device
from secateurs.errors import ConfigError, choose
from secateurs.finetuning import restore_, snapshot
from secateurs.masks import apply_masks_, named_tensors
from secateurs.posttraining.fisher_costs import least_lost
from secateurs.posttraining.fisher_gates import (
    GateFisher,
    check_n_samples,
    first_samples,
    gate_fisher,
)
from secateurs.posttraining.measuring import Judge, restoring
from secateurs.posttraining.rearranging import check_shrink
from secateurs.posttraining.rearranging import rearrange as rearranged
from secateurs.posttraining.reconstruction import reconstruct
from secateurs.posttraining.scaling import DAMPING, check_damping, tune_scales_
from secateurs.posttraining.won import Won
from secateurs.selection import select
from secateurs.surgery.verification import copied
from secateurs.types import Batch, Batches, Budget, Counts, Evaluate, Graph, LossFn, Plan, Scores

__all__ = ["FisherMasks", "Tune", "check_fisher", "search_masks"]

Tune = Literal["weights", "scales"]
"""What is solved so that the units that stay answer for the others."""


@dataclass(frozen=True, eq=False)
class FisherMasks:
    """What was cut without training, and what each step has won.

    Attributes:
        plan: what goes; `shrink(model, plan, example_inputs)` removes it.
        counts: units kept, and what they leave of the dense model (`counts.realised`).
        fisher: what the choice rests on.
        scales: with tune="scales", weight -> factors that were multiplied into it along the
            dimension that reads.
        won: one for each step that was taken.
        notes: what a reader should know, steps that were tried and not taken included.
    """

    plan: Plan
    counts: Counts
    fisher: GateFisher
    scales: Mapping[str, Tensor]
    won: tuple[Won, ...]
    notes: tuple[str, ...] = field(default=())

    def text(self) -> str:
        """A line for each step."""
        return "\n".join(won.text() for won in self.won)


def search_masks(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    *,
    graph: Graph,
    budget: Budget,
    granularity: str | Iterable[str] = "structured",
    rearrange: bool = True,
    tune: Tune | None = "weights",
    importance: LossFn | None = None,
    shrink: float | None = None,
    damping: float = DAMPING,
    min_keep: int = 1,
    round_to: RoundTo = 1,
    latency: Latency | None = None,
    evaluate: Evaluate | None = None,
    n_samples: int = 512,
    seed: int = 0,
    progress: Callable[[Won], object] | None = None,
) -> FisherMasks:
    """Cut units of a trained model to a budget without training; some minutes on a processor.

    The model is changed IN PLACE: what goes is masked with zeros, what reads the rest is scaled. It
    keeps its shapes and names, and is put back if anything fails. Then
    `shrink(model, result.plan, example_inputs)` makes it smaller.

    A step (rearranging, tuning) after which the mean loss of the samples is higher than before is
    not taken, and a note says so.

    Args:
        model: trained.
        batches: re-iterable of `(inputs, targets)`, of the training data.
        loss_fn: mean over the samples.
        graph: from `trace`.
        budget: what may remain of the model; MACs of embeddings are none, so that `macs=0.5` is
            half of what the blocks and the head compute.
        granularity: kinds of units that may go, for example `("head", "neuron")`.
        rearrange: False leaves this step out.
        tune: "weights" solves all weights that read cut units (`reconstruct`), which wants more
            positions of samples than units of a layer; "scales" one factor for each unit
            (`tune_scales_`), as in the paper; None leaves this step out.
        importance: the loss whose derivatives say what matters; None for `loss_fn`. `any_output()`
            for a network that has learned nearly all of the samples.
        shrink: as in `rearrange`, and read by this step only.
        damping: as in `tune_scales_`, and read by tune="scales" only.
        min_keep, round_to, latency: as in `allocate`; the search is exact with `round_to=1` and a
            budget in one of units, params, MACs and bytes (see `least_lost`).
        evaluate: measures the model before and after each step as well.
        n_samples: the first so many samples are used, for everything.
        seed: of models that draw random numbers.
        progress: called after each step.

    Returns:
        `FisherMasks`.

    Raises:
        ConfigError: nothing to cut, or an option that is out of range or that no step reads.
        BudgetError: the budget cannot be reached.
        DataError, CaptureError, ScoringError: batches that do not fit, or losses without gradient.
    """
    check_fisher(rearrange, tune, shrink, damping, n_samples)
    check_batches(model, batches, loss_fn)
    held = first_samples(batches, n_samples, model_device(model))
    dense = copied(model)
    run = _Run(model, dense, held, loss_fn, evaluate, progress, graph.outputs)
    with restoring(model):
        judge = run.judge()
        targets = graph.groups(granularity)
        fisher = gate_fisher(
            model, held, importance or loss_fn, targets, n_samples=n_samples, seed=seed
        )
        every = {name: fisher.diagonal(name) for name in fisher.rows}
        counts = least_lost(
            every, graph, budget, min_keep=min_keep, round_to=round_to, latency=latency
        )
        plan = select(fisher.scores(graph), counts)
        apply_masks_(model, plan.masks)
        run.taken(judge.won(model, "units cut", list(plan.masks), fisher.notes))
        if rearrange:
            plan = _rearranged(run, graph, fisher, counts, plan, shrink)
        scales = {} if tune is None else _tuned(run, graph, plan, tune, damping)
    return FisherMasks(plan, counts, fisher, scales, tuple(run.won), (*counts.notes, *run.notes))


def check_fisher(
    rearrange: bool, tune: str | None, shrink: float | None, damping: float, n_samples: int
) -> None:
    """Raise unless the options of `search_masks` are in range, and each of them is read.

    Raises:
        ConfigError: what is wrong.
    """
    if not isinstance(rearrange, bool):
        raise ConfigError(f"rearrange must be True or False, got {rearrange!r}")
    if tune is not None:
        choose(tune, get_args(Tune), "tune")
    check_shrink(shrink)
    check_damping(damping)
    check_n_samples(n_samples)
    if shrink is not None and not rearrange:
        raise ConfigError("shrink= is of the rearranging, and rearrange=False: leave it away")
    if damping != DAMPING and tune != "scales":
        raise ConfigError(f"damping= is of tune='scales', and tune={tune!r}: leave it away")


class _Run:
    """What the steps share: the models, the samples, and what was won so far."""

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        held: list[Batch],
        loss_fn: LossFn,
        evaluate: Evaluate | None,
        progress: Callable[[Won], object] | None,
        outputs: tuple[str, ...],
    ) -> None:
        self.model, self.dense, self.held = model, dense, held
        self.loss_fn, self.evaluate, self.progress = loss_fn, evaluate, progress
        self.outputs = outputs
        self.won: list[Won] = []
        self.notes: list[str] = []

    def judge(self) -> Judge:
        """Measures the model as it is, and again when it is asked what was won."""
        judge = Judge(self.dense, self.held, self.loss_fn, self.evaluate, None, self.outputs)
        judge.start(self.model)
        return judge

    def taken(self, won: Won) -> None:
        """Remember a step and tell of it."""
        self.won.append(won)
        self.notes += won.notes
        if self.progress is not None:
            self.progress(won)

    def back(self, held: Mapping[str, Tensor], won: Won) -> None:
        """Put the model back as it was before a step that has lost."""
        restore_(self.model, held)
        self.notes.append(f"not taken, since the loss would be higher: {won.text()}")


def _rearranged(
    run: _Run, graph: Graph, fisher: GateFisher, counts: Counts, plan: Plan, shrink: float | None
) -> Plan:
    """The plan with other units of the same numbers, and the model masked by it, if that wins."""
    judge, before = run.judge(), snapshot(run.model)
    stays = rearranged(fisher, counts.kept, shrink=shrink)
    values = {name: keep.float() for name, keep in stays.items()}
    scores = Scores(graph, values, "fisher masks", n_samples=fisher.n_samples)
    other = select(scores, counts)
    restore_(run.model, named_tensors(run.dense))
    apply_masks_(run.model, other.masks)
    n = sum(int((keep & plan.gone(graph.targets[name])).sum()) for name, keep in stays.items())
    won = judge.won(run.model, "units rearranged", list(other.masks), (f"{n} units swapped",))
    if won.after["loss"] > won.before["loss"]:
        run.back(before, won)
        return plan
    run.taken(won)
    return other


def _tuned(run: _Run, graph: Graph, plan: Plan, tune: str, damping: float) -> dict[str, Tensor]:
    """Change what reads the kept units if that wins; the scales if it is scales that were tuned."""
    before, scales = snapshot(run.model), dict[str, Tensor]()
    if tune == "scales":
        won, scales = tune_scales_(
            run.model, run.dense, plan, run.held, graph=graph, damping=damping,
            loss_fn=run.loss_fn, evaluate=run.evaluate,
        )  # fmt: skip
    else:
        won = reconstruct(
            run.model, run.dense, plan, run.held, loss_fn=run.loss_fn, evaluate=run.evaluate
        )
    if won.after["loss"] > won.before["loss"]:
        run.back(before, won)
        return {}
    run.taken(won)
    return scales
