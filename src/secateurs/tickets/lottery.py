"""Lottery tickets: train, cut, go back to an early step, and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from secateurs.bars import Progress, epoch_text
from secateurs.checkpoints import Keeper
from secateurs.criteria import CriterionLike
from secateurs.errors import ConfigError, choose
from secateurs.filters import Patterns
from secateurs.finetuning import (
    Clock,
    EpochRow,
    Finetune,
    FinetuneResult,
    Part,
    Training,
    clock_of,
    finetune,
    restore_,
    snapshot,
)
from secateurs.finetuning.clock import lr_factor
from secateurs.masks import apply_masks_
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.surgery.verification import copied
from secateurs.tickets.densities import counts_at, emptied
from secateurs.tickets.initial import graph_of
from secateurs.types import Batches, Budget, Counts, Evaluate, Graph, Inputs, LossFn, Plan, Scores

__all__ = [
    "Reset",
    "Ticket",
    "TicketRow",
    "check_search",
    "find_ticket",
    "rewind_step",
    "train_ticket",
]

Reset = Literal["weights", "lr"]


@dataclass(frozen=True)
class TicketRow:
    """One round: a training, and the cut after it.

    Attributes:
        round: from 1.
        trained: units that were left while it was trained; all of them in round 1.
        kept: units that are left after its cut.
        train_loss: of the last epoch.
        metric: main metric after the last epoch; None without `evaluate`.
        steps: optimizer steps from the rewinding point on.
    """

    round: int
    trained: int
    kept: int
    train_loss: float | None
    metric: float | None
    steps: int


@dataclass(frozen=True, eq=False)
class Ticket:
    """A sparse network to train from an early step on.

    Attributes:
        plan: what is removed, with masks and reasons.
        state: parameters and buffers by name, as of step `start`, removed entries zero.
        start: the optimizer step at which training goes on.
        reset: "weights" or "lr", as in `find_ticket`.
        history: one row for each round.
        scores, counts: of the last cut.
    """

    plan: Plan
    state: Mapping[str, Tensor]
    start: int
    reset: Reset
    history: tuple[TicketRow, ...]
    scores: Scores
    counts: Counts

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Tensor name -> bool tensor, True = keep."""
        return self.plan.masks


def find_ticket(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    *,
    train: Finetune,
    rounds: int,
    budget: Budget,
    rewind: float = 0,
    reset: Reset = "weights",
    criterion: CriterionLike = "magnitude",
    granularity: str | tuple[str, ...] = "weight",
    allocation: str = "global",
    min_keep: int = 1,
    graph: Graph | None = None,
    example_inputs: Inputs | None = None,
    exclude: Patterns | None = None,
    evaluate: Evaluate | None = None,
    maximize: bool = True,
    seed: int = 0,
    parts: Sequence[Part] = (),
    each_epoch: Callable[[EpochRow], object] | None = None,
    progress: Progress | None = None,
) -> Ticket:
    """A lottery ticket by iterative pruning with rewinding; `model` itself is not changed.

    The network is trained for k steps, and its state there is kept. Then, `rounds` times: train
    from step k to the end, score, cut, and put what is left back to step k. Each cut removes the
    same share of what is left, the last one meets the budget. The ticket has not been trained since
    the last cut: `train_ticket` does that, and a fair comparison is one with the same training.

    A round goes on at step k with the weights and buffers of step k, the learning rate that the
    schedule of the whole training has there, a new optimizer (no momentum) and a new pass over the
    batches. Round 1 is no exception, so all rounds are alike. With `rewind=0` that is the training
    from the start.

    Args:
        model: untrained (or pretrained: then the ticket is found in that start).
        batches: re-iterable of `(inputs, targets)`; also what is scored on.
        loss_fn: `loss_fn(outputs, targets)`, mean over the samples.
        train: the whole training of one round, from step 0.
        rounds: how many cuts, at least 1; the cost is that of so many trainings.
        budget: what may remain in the end.
        rewind: an int is the step k; a float in [0, 1) the fraction of all steps. Networks that are
            deeper than a few layers need a little: 0.05 to 0.1.
        reset: "weights" puts weights and learning rate back to step k; "lr" keeps the trained
            weights and only starts the learning rate again from there.
        criterion, granularity: as in `score`; the trained network is scored in eval mode.
        allocation: as `method` in `allocate`: "global", or "uniform" for layer by layer.
        min_keep: units that each target keeps at least; see `prune_at_init` for what is said then.
        graph, example_inputs, exclude: as in `prune_at_init`.
        evaluate, maximize: as in `finetune`.
        seed: round r trains under seed + r; the steps before k under `seed`.
        parts: of every training, as in `finetune`.
        each_epoch: called with each finished `EpochRow`.
        progress: called with (what, trainings done, all).

    Raises:
        ConfigError: an option out of range; rewinding with batches of unknown length and no steps.
        BudgetError: the budget cannot be reached.
        Others as `finetune` and `score`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> x = torch.randn(16, 4)
        >>> data = [(x, x[:, :1])]
        >>> ticket = find_ticket(net, data, nn.functional.mse_loss, train=Finetune(epochs=4),
        ...                      rounds=2, budget=Budget(units=10), rewind=1)
        >>> [(row.trained, row.kept) for row in ticket.history], ticket.start
        ([(40, 20), (20, 10)], 1)

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, arXiv:1803.03635. Frankle et al.,
        Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020, arXiv:1912.05671 (late
        rewinding). Renda, Frankle and Carbin, Comparing Rewinding and Fine-tuning, 2020,
        arXiv:2003.02389 (the learning rate alone).
    """
    check_search(rounds, rewind, reset)
    start = rewind_step(train, batches, rewind)
    graph = graph_of(model, batches, graph, example_inputs, exclude)
    work = copied(model)
    runner = _Rounds(
        work, batches, loss_fn, train, evaluate, maximize, rounds, progress, parts, each_epoch
    )
    if start:
        runner.train(0, start, None, seed, 0)
    origin = snapshot(work)
    plan: Plan | None = None
    rows: list[TicketRow] = []
    for number in range(1, rounds + 1):
        done = runner.train(start, None, plan, seed + number, number)
        scores = score(
            work, batches, loss_fn, criterion=criterion, graph=graph, granularity=granularity,
            previous=plan, seed=seed + number,
        )  # fmt: skip
        counts = counts_at(
            scores, budget, number, rounds, method=allocation, min_keep=min_keep, previous=plan
        )
        plan = select(scores, counts, previous=plan)
        notes = emptied(scores, counts, min_keep) if number == rounds else {}
        said = {name: f"{plan.reasons.get(name, name)}; {note}" for name, note in notes.items()}
        plan = replace(plan, reasons={**plan.reasons, **said})
        total = sum(line.numel() for line in scores.values.values())
        trained = rows[-1].kept if rows else total
        last = done.history[-1] if done.history else None
        rows.append(
            TicketRow(
                number, trained, sum(counts.kept.values()), last.train_loss if last else None,
                done.final_metric, done.steps,
            )
        )  # fmt: skip
        if reset == "weights":
            restore_(work, origin)
        apply_masks_(work, plan.masks)
    assert plan is not None
    return Ticket(plan, snapshot(work), start, reset, tuple(rows), scores, counts)


def train_ticket(
    model: nn.Module,
    ticket: Ticket,
    batches: Batches,
    loss_fn: LossFn,
    *,
    train: Finetune,
    evaluate: Evaluate | None = None,
    maximize: bool = True,
    seed: int = 0,
    parts: Sequence[Part] = (),
    each_epoch: Callable[[EpochRow], object] | None = None,
    progress: Progress | None = None,
    checkpoint: Keeper | None = None,
) -> FinetuneResult:
    """Give `model` the weights of a ticket IN PLACE and train it as a round of `find_ticket` does.

    Args:
        model: of the architecture in which the ticket was found.
        ticket: from `find_ticket`.
        train: as there.

    Other arguments, and errors, as `finetune`.
    """
    known = set(snapshot(model))
    if known != set(ticket.state):
        odd = ", ".join(sorted(known ^ set(ticket.state))[:5])
        raise ConfigError(f"the ticket is not of this model: {odd} are in only one of them")
    restore_(model, ticket.state)
    runner = _Rounds(
        model, batches, loss_fn, train, evaluate, maximize, 1, progress, parts, each_epoch
    )
    return runner.train(ticket.start, None, ticket.plan, seed, 1, checkpoint)


class LateRate(Part):
    """The learning rate of a whole training, in a part of it that begins at a later step."""

    def __init__(self, config: Finetune, clock: Clock, start: int) -> None:
        self.config, self.clock, self.begun = config, clock, start
        self.groups: list[dict[str, Any]] = []

    def start(self, training: Training) -> None:
        """Take hold of the optimizer."""
        self.groups = training.optimizer.param_groups

    def gradients(self, steps: int) -> None:
        """Set the learning rate of the step that follows."""
        for group in self.groups:
            factor = lr_factor(self.config, self.clock, self.begun + steps)
            group["lr"] = self.config.lr * factor


@dataclass(frozen=True, eq=False)
class _Rounds:
    """What the trainings of all rounds have in common."""

    model: nn.Module
    batches: Batches
    loss_fn: LossFn
    config: Finetune
    evaluate: Evaluate | None
    maximize: bool
    rounds: int
    progress: Progress | None
    parts: Sequence[Part]
    each_epoch: Callable[[EpochRow], object] | None

    def train(
        self,
        start: int,
        stop: int | None,
        plan: Plan | None,
        seed: int,
        number: int,
        checkpoint: Keeper | None = None,
    ) -> FinetuneResult:
        """From one step of the whole training to another, None = its end."""
        config, parts, evaluate = self.config, [*self.parts], self.evaluate
        if start or stop is not None:
            clock = clock_of(config, self.batches, needs="rewinding")
            assert clock.n_steps is not None
            until = clock.n_steps if stop is None else stop
            config = replace(
                config, epochs=None, steps=until - start, lr_schedule="constant", cycles=1
            )
            parts.insert(0, LateRate(self.config, clock, start))
        if stop is not None:  # the way to the rewinding point: nobody judges it
            config, evaluate = replace(config, patience=None, restore_best=False), None
        return finetune(
            self.model, self.batches, self.loss_fn, config, parts=parts, evaluate=evaluate,
            masks=None if plan is None else plan.masks, maximize=self.maximize, seed=seed,
            progress=lambda row: self.tell(number, row), checkpoint=checkpoint,
        )  # fmt: skip

    def tell(self, number: int, row: EpochRow) -> None:
        """Show progress."""
        if self.each_epoch is not None:
            self.each_epoch(row)
        if self.progress is not None:
            what = epoch_text(f"round {number}", row.epoch, row.train_loss, row.metric)
            self.progress(what, max(0, number - 1), self.rounds)


def check_search(rounds: int, rewind: float, reset: str) -> None:
    """Find what is out of range.

    Raises:
        ConfigError: it is.
    """
    choose(reset, ["weights", "lr"], "reset")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"rounds must be a whole number, at least 1, got {rounds!r}")
    number = isinstance(rewind, (int, float)) and not isinstance(rewind, bool)
    if not number or rewind < 0 or (isinstance(rewind, float) and rewind >= 1):
        raise ConfigError(
            f"rewind must be a step (an int, at least 0) or a fraction of the training (a float in "
            f"[0, 1)), got {rewind!r}"
        )


def rewind_step(config: Finetune, batches: Batches, rewind: float) -> int:
    """The rewinding point in optimizer steps."""
    if not rewind:
        return 0
    n = clock_of(config, batches, needs=f"rewind={rewind!r}").n_steps
    assert n is not None
    start = rewind if isinstance(rewind, int) else round(rewind * n)
    if start >= n:
        raise ConfigError(
            f"rewind={rewind!r} is step {start}, and the training has {n}: nothing would be "
            "trained after it"
        )
    return start
