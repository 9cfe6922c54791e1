"""Prune inside somebody else's training loop: the cuts happen by themselves after optimizer steps.

    with prune_during(model, optimizer, budget=Budget(params=0.1), ..., n_steps=1000) as cuts:
        ...                       # any loop that calls optimizer.step()
    small = shrink(model, cuts.plan, example_inputs)

The loop stays the user's: only gradients, weights and optimizer state of what was cut are held at
zero. The callbacks for other libraries are a few lines around this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from secateurs.allocation import RoundTo
from secateurs.checkpoints import random_state, set_random_state
from secateurs.distributed import Group, plain
from secateurs.errors import BudgetError, ConfigError
from secateurs.graph import trace
from secateurs.masks import HeldMasks, hold_masks
from secateurs.masks.states import skips, unwrapped
from secateurs.pipeline import Stage
from secateurs.pipeline.request import given
from secateurs.pipeline.run import Ranking
from secateurs.schedules import Schedule
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.types import Batches, Budget, Counts, Graph, Inputs, LossFn, Plan, Scores, Threshold

__all__ = ["Cuts", "prune_during"]


@contextmanager
def prune_during(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    n_steps: int,
    steps_per_epoch: int | None = None,
    budget: Budget | None = None,
    threshold: Threshold | None = None,
    criterion: str | Mapping[str, Any] = "taylor",
    granularity: str | tuple[str, ...] = "structured",
    allocation: str = "uniform",
    schedule: Schedule | None = None,
    min_keep: int = 1,
    round_to: RoundTo = "auto",
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    example_inputs: Inputs | None = None,
    graph: Graph | None = None,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    group: Group = None,
    told: Callable[[Cuts], object] | None = None,
) -> Iterator[Cuts]:
    """Cut a model step by step while it is trained by a loop of the user's own.

    After each optimizer step that the schedule names, what is left is scored, more is selected, and
    its weights, gradients and optimizer state are zero from then on. Steps that a gradient scaler
    or gradient accumulation leaves out do not count. The random state of the training is not
    touched.

    Args:
        model: trained in place.
        optimizer: its steps are followed; a wrapper (of Accelerate, Lightning) is looked into. Of
            several, the steps of the first count. None: the caller calls `cuts.step()` after each
            of its steps.
        n_steps: optimizer steps of the whole training.
        steps_per_epoch: needed when the schedule counts in epochs.
        budget, threshold, criterion, granularity, allocation, min_keep, round_to: as in `Stage`;
            `budget` in units, params, macs or bytes.
        schedule: with `every`; by default five cubic cuts over the first half of the training.
        batches: to score with; re-iterable, not the loader that is being read. Not needed by
            criteria that see weights only.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the samples.
        example_inputs: what to trace with; None: the inputs of the first of `batches`.
        graph: in place of `example_inputs`, from `trace`.
        seed: of criteria that draw random numbers.
        state: from `Cuts.state_dict`, to go on after an interruption.
        group: of torch.distributed, as in `score`: every rank scores its own `batches`, all cut
            the same.
        told: called with the cuts after each of them.

    Raises:
        ConfigError, BudgetError, ...: as `prune`, before the first step.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> x = torch.randn(8, 4)
        >>> with prune_during(net, sgd, n_steps=20, budget=Budget(units=0.25),
        ...                   criterion="l2_norm", example_inputs=x) as cuts:
        ...     for _ in range(20):
        ...         net(x).square().mean().backward()
        ...         sgd.step()
        ...         sgd.zero_grad()
        >>> len(cuts.plan.removed["0:neuron"])
        12
    """
    schedule = _clocked(schedule, n_steps)
    _check_measured(budget)
    stage = Stage(
        budget, threshold, criterion, granularity, allocation=allocation,
        schedule=replace(schedule, every=None, begin=None), min_keep=min_keep, round_to=round_to,
    )  # fmt: skip
    _check_passes(stage)
    if graph is None:
        if example_inputs is None and batches is not None:
            with _unseen(batches):
                example_inputs = next(iter(batches))[0]
        if example_inputs is None:
            raise ConfigError("give example_inputs, batches or a graph: the model is traced first")
        graph = trace(plain(model), example_inputs)
    several = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    inner = [unwrapped(one) for one in several if one is not None]
    with ExitStack() as stack:
        held = stack.enter_context(hold_masks(model, inner, {}))
        cuts = Cuts(
            model, stage, graph, held, batches, loss_fn, seed,
            list(schedule.cuts(n_steps, steps_per_epoch)), told, group,
        )  # fmt: skip
        if state is None:
            cuts.check()
        else:
            cuts.load_state_dict(state)
        if inner:
            hook = inner[0].register_step_post_hook(
                lambda first, *_: None if skips(first) else cuts.step()
            )
            stack.callback(hook.remove)
        cuts.begin()
        yield cuts
    if cuts.due:
        warnings.warn(
            f"the training ended after {cuts.steps} optimizer steps, before {len(cuts.due)} of "
            f"{schedule.steps} cuts (the next was due after {cuts.due[0]}): less was pruned than "
            f"asked for. n_steps={n_steps} was said",
            stacklevel=3,
        )


@contextmanager
def _unseen(batches: Batches | None) -> Iterator[None]:
    """The training goes on as if nobody had looked, or read these batches."""
    before = random_state(batches)
    try:
        yield
    finally:
        set_random_state(before, batches)


def _check_measured(budget: Any) -> None:
    """What is measured with models that can be undone."""
    if budget == "auto" or {"latency_ms", "metric_drop"} & set(getattr(budget, "given", ())):
        raise ConfigError(
            'metric_drop, latency_ms and "auto" are measured with models that can be undone: use '
            "prune(); here give units, params, macs or bytes"
        )


def _check_passes(stage: Stage) -> None:
    """What needs more than one pass over the data for each cut."""
    if stage.null_repeats or stage.allocation == "sensitivity":
        what = "this threshold" if stage.null_repeats else "allocation='sensitivity'"
        raise ConfigError(f"{what} needs many passes over the data for each cut: use prune()")


def _clocked(schedule: Schedule | None, n_steps: int) -> Schedule:
    """The schedule with its clock."""
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ConfigError(f"n_steps must be a whole number, at least 1, got {n_steps!r}")
    if schedule is None:
        steps = min(5, n_steps)
        return Schedule("cubic", steps, every=f"{max(1, n_steps // (2 * steps))} steps")
    if schedule.every is None:
        raise ConfigError(
            f"{schedule.curve!r} has no clock; say how long it is from cut to cut: "
            f'Schedule({schedule.curve!r}, steps={schedule.steps}, every="100 steps")'
        )
    return schedule


class Cuts:
    """What has been cut so far; `prune_during` makes it.

    Attributes:
        plan: what is removed; None before the first cut. Give it to `shrink` after the training.
        counts: units kept, of the last cut.
        steps: optimizer steps seen.
        due: after how many steps the cuts to come are made.
        held: the masks that are held now.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        graph: Graph,
        held: HeldMasks,
        batches: Batches | None,
        loss_fn: LossFn | None,
        seed: int,
        due: list[int],
        told: Callable[[Cuts], object] | None,
        group: Group,
    ) -> None:
        self.plan: Plan | None = None
        self.counts: Counts | None = None
        self.steps, self.due = 0, due
        self.held, self.graph = held, graph
        self._model, self._stage = model, stage
        self._batches, self._loss_fn, self._seed = batches, loss_fn, seed
        self._told, self._group = told, group
        self._first: Ranking | None = None

    def check(self) -> None:
        """Score once, so that what cannot work is said before the training."""
        stage = self._stage
        counts = stage.allocated(
            self._scores(), stage.threshold or stage.asked_along(1.0, self.graph)
        )
        targets = self.graph.targets
        if all(count == targets[name].n_units for name, count in counts.kept.items()):
            raise BudgetError(f"{given(counts.asked)} removes nothing of this model")

    def begin(self) -> None:
        """Make the cut that is due before the first step, if there is one."""
        if self.due and self.steps >= self.due[0]:
            self._cut()

    def step(self) -> None:
        """One optimizer step was made: cut if it is time."""
        self.steps += 1
        self.begin()

    def _scores(self) -> Scores:
        """Of what is left."""
        stage = self._stage
        with _unseen(self._batches):
            return score(
                self._model, self._batches, self._loss_fn, criterion=stage.criterion,
                graph=self.graph, granularity=stage.granularity, previous=self.plan,
                seed=self._seed + self.steps, group=self._group,
            )  # fmt: skip

    def _ranking(self) -> Scores:
        """Of what is left: new ones, or those of the first cut."""
        if self._first is None:
            scores = self._scores()
            self._first = None if self._stage.steps.rescore else Ranking(scores)
            return scores
        return self._first.without(self.plan).scores

    def _cut(self) -> None:
        """Score what is left, select what goes, hold it at zero."""
        stage, number = self._stage, self._stage.steps.steps - len(self.due) + 1
        self.due.pop(0)
        scores = self._ranking()
        try:
            self.counts = stage.allocated(
                scores, stage.asked_at(number, self.graph), previous=self.plan
            )
        except BudgetError as error:
            if stage.threshold is None or self.plan is None:
                raise
            self.due.clear()
            told = f"cut {number} and those after it are left out: {error}"
            warnings.warn(told, stacklevel=4)
            return
        self.plan = select(scores, self.counts, previous=self.plan)
        self.held.grow(self.plan.masks)
        if self._told is not None:
            self._told(self)

    # --- to go on after an interruption ----------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: for `torch.save`, or a checkpoint of another library."""
        plan = self.plan
        held = {} if plan is None else {f.name: getattr(plan, f.name) for f in fields(plan)}
        held.pop("detail", None)
        bare = {k: dict(v) if isinstance(v, Mapping) else v for k, v in held.items()}
        found: dict[str, Any] = {
            "steps": self.steps, "due": list(self.due), "cuts": self._stage.steps.steps,
            "plan": bare or None,
        }  # fmt: skip
        if self._first is not None:
            scores = self._first.scores
            found["first"] = {
                f.name: getattr(scores, f.name) for f in fields(scores) if f.name != "graph"
            }
            for name in ("values", "not_scored"):
                found["first"][name] = dict(found["first"][name])
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the masks are held at once.

        Raises:
            ConfigError: the plan is of another model, or the schedule has another number of cuts.
        """
        if missing := [name for name in ("steps", "due", "plan") if name not in state]:
            raise ConfigError(
                f"state must be what Cuts.state_dict() gave; {', '.join(missing)} are not in it"
            )
        asked = self._stage.steps.steps
        if (begun := state.get("cuts", asked)) != asked:
            raise ConfigError(
                f"the state is of a schedule with {begun} cuts, this one has {asked}: go on with "
                "the schedule that was begun"
            )
        self.steps, self.due = int(state["steps"]), list(state["due"])
        if state["plan"] is not None:
            self.plan = Plan(**state["plan"], detail=self.graph.detail)
            self.held.replace(self.plan.masks)
        first = state.get("first")
        self._first = None if first is None else Ranking(Scores(self.graph, **first))
