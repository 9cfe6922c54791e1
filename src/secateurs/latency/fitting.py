"""`fit_latency`: counts whose model really takes the time that was asked for.

A table predicts, and is wrong by some percent. Here a candidate is allocated, made (untrained: the
time does not depend on the values), and timed in turns with the dense model; then the figure that
the allocation is given is corrected, until the candidate itself is within the budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from statistics import quantiles
from typing import Any

import numpy as np
from torch import nn

from secateurs.allocation.problem import MissedBudget
from secateurs.batches import batch_size
from secateurs.errors import BudgetError, ConfigError
from secateurs.latency.measuring import rising, runtime_of
from secateurs.latency.probing import turns
from secateurs.latency.table import LatencyTable, Runtime
from secateurs.latency.timing import LatencyRow, row_of, timing
from secateurs.selection import select
from secateurs.surgery import shrink
from secateurs.types import Budget, Counts, Inputs, Plan, Scores

__all__ = ["LatencyFit", "Round", "fit_latency"]

AllocateFn = Callable[[Budget], Counts]
WITHIN = 0.10
ROUNDS = 8
REPEATS = 21
MOST = 8
MOST_SECONDS = 60.0
SURE = 0.02
"""Turns go on until the median ratio is known this well, as a share of itself; not for ever."""
MIN_MS = 5.0
NO_LIMIT_MS, LEAST_MS = 1e12, 1e-9


@dataclass(frozen=True)
class Round:
    """One candidate.

    Attributes:
        target_ms: what the allocation was given.
        predicted_ms: what the table says of the candidate.
        realised_ms: what it takes: dense time of the table x median ratio to the dense model, with
            one thread on a CPU by processor time.
        p25_ms, p75_ms: the same with the quartiles of the ratio.
        dense: the dense model by the wall, in turns with it.
        candidate: the candidate by the wall, in the same turns.
    """

    target_ms: float
    predicted_ms: float
    realised_ms: float
    p25_ms: float
    p75_ms: float
    dense: LatencyRow
    candidate: LatencyRow

    @property
    def ratio(self) -> float:
        """Median time of the candidate over that of the dense model, by the wall."""
        return self.candidate.median_ms / self.dense.median_ms


@dataclass(frozen=True, eq=False)
class LatencyFit:
    """Counts within a latency budget, and what they take.

    Attributes:
        counts: units kept; `realised["latency_ms"]` is measured.
        plan: the units of these counts, by their scores.
        asked_ms: the budget.
        dense_ms: the dense model, from the table.
        chosen: the candidate with these counts.
        rounds: all candidates, in order.
        close: whether it is within 10 % below the budget, or nothing larger is within the limits.
        note: why not, if it is not.
        seconds: that all of it took.
    """

    counts: Counts
    plan: Plan
    asked_ms: float
    dense_ms: float
    chosen: Round
    rounds: tuple[Round, ...]
    close: bool
    note: str
    seconds: float

    def text(self) -> str:
        """One sentence."""
        c = self.chosen
        note = f"; {self.note}" if self.note else ""
        return (
            f"asked for {self.asked_ms:.4g} ms of {self.dense_ms:.4g}: predicted "
            f"{c.predicted_ms:.4g}, measured {c.realised_ms:.4g} ({c.p25_ms:.4g} to "
            f"{c.p75_ms:.4g}) after {len(self.rounds)} candidates{note}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the plan."""
        return {
            "asked_ms": self.asked_ms,
            "dense_ms": self.dense_ms,
            "kept": dict(self.counts.kept),
            "chosen": asdict(self.chosen),
            "rounds": [asdict(r) for r in self.rounds],
            "close": self.close,
            "note": self.note,
            "seconds": self.seconds,
        }


def fit_latency(
    model: nn.Module,
    scores: Scores,
    budget: Budget,
    table: LatencyTable,
    allocate_fn: AllocateFn,
    example_inputs: Inputs,
    *,
    previous: Plan | None = None,
    within: float = WITHIN,
    rounds: int = ROUNDS,
    repeats: int = REPEATS,
) -> LatencyFit:
    """Return counts whose model takes at most `budget.latency_ms`, and at least 90 % of it.

    The budget means the median of one forward call on the example inputs, in eval mode, with the
    threads of the table, at the speed that the machine had when the table was measured: candidates
    and the dense model take turns, and the median ratio of their times counts, with one thread on a
    CPU of their processor times (on a quiet machine they are those of the wall, on a busy one they
    leave out the waiting; the times by the wall are reported as well). Where no candidate that was
    tried is within 10 % below (large steps, a very busy machine), the largest that is below is
    returned, and `close` and `note` say so.

    Args:
        model: the dense model; it is not changed.
        scores: which units a candidate keeps.
        budget: with `latency_ms`; other limits hold as well.
        table: from `measure_table`, of this model, these inputs and this machine.
        allocate_fn: budget -> counts, for example
            `lambda b: allocate(scores, b, method="global", latency=table)`. It is called with other
            figures for `latency_ms`.
        example_inputs: the call that is timed.
        previous: what was removed earlier, as in `select`.
        within: how far below the budget is close enough, in (0, 1).
        rounds: candidates at most, at least 1.
        repeats: turns for each, at least 3; up to eight times as many on a busy machine.

    Raises:
        BudgetError: not even the smallest model is within the budget; its time is named.
        ConfigError: no `latency_ms`, an option out of range, or a table of another machine.
    """
    asked = budget.latency_ms
    if asked is None:
        raise ConfigError(f"fit_latency needs Budget(latency_ms=...), got {budget!r}")
    if not 0 < within < 1 or rounds < 1 or repeats < 3:
        raise ConfigError(
            f"within must be in (0, 1), rounds >= 1 and repeats >= 3, got {within}, {rounds}, "
            f"{repeats}"
        )
    _check_runtime(table.runtime, runtime_of(model, example_inputs, table.runtime.threads))
    started = time.monotonic()
    trial = _Trial(model, scores, table, example_inputs, previous, repeats)
    search = _Search(budget, asked, within, allocate_fn, trial)
    best, note = search.run(rounds)
    chosen = trial.round_of(best)
    realised = {**best.counts.realised, "latency_ms": chosen.realised_ms}
    final = replace(best.counts, asked=budget, realised=realised)
    tried = tuple(trial.round_of(c) for c in trial.known.values())
    seconds = time.monotonic() - started
    return LatencyFit(
        final, best.plan, asked, table.dense_ms, chosen, tried, not note, note, seconds
    )


def _check_runtime(table: Runtime, now: Runtime) -> None:
    differ = [
        f"{name} {getattr(table, name)!r}, now {getattr(now, name)!r}"
        for name in ("torch", "processor", "device", "dtype", "inputs")
        if getattr(table, name) != getattr(now, name)
    ]
    if differ:
        raise ConfigError(
            "the latency table was measured elsewhere: " + "; ".join(differ) + ". Measure it "
            "again here, with secateurs.latency.measure_table"
        )


@dataclass(eq=False)
class _Candidate:
    """A model with these counts, and how often which time was seen."""

    counts: Counts
    plan: Plan
    small: nn.Module
    target: float
    predicted: float
    each: list[float] = field(default_factory=list)
    dense_ms: list[float] = field(default_factory=list)
    own_ms: list[float] = field(default_factory=list)
    runs: dict[str, int] = field(default_factory=lambda: {"dense": 0, "candidate": 0})

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Quartiles of the time over that of the dense model in the same turn."""
        p25, p50, p75 = quantiles(self.each, n=4, method="inclusive")
        return p25, p50, p75

    @property
    def sure(self) -> bool:
        """Whether more turns would hardly move the median."""
        p25, p50, p75 = self.ratios
        return 1.57 * (p75 - p25) / math.sqrt(len(self.each)) <= SURE * p50  # about 95 %


class _Trial:
    """Makes and times candidates; equal counts once, and again only while they are not sure."""

    def __init__(
        self,
        model: nn.Module,
        scores: Scores,
        table: LatencyTable,
        inputs: Inputs,
        previous: Plan | None,
        repeats: int,
    ) -> None:
        self.model, self.scores, self.table = model, scores, table
        self.inputs, self.previous, self.repeats = inputs, previous, repeats
        self.known: dict[tuple[tuple[str, int], ...], _Candidate] = {}

    def is_known(self, counts: Counts) -> bool:
        """Whether these counts were timed, and well enough."""
        found = self.known.get(tuple(counts.kept.items()))
        return found is not None and found.sure

    def __call__(self, counts: Counts, target: float) -> _Candidate:
        key = tuple(counts.kept.items())
        if key not in self.known:
            plan = select(self.scores, counts, previous=self.previous)
            small = shrink(self.model, plan, self.inputs) if plan.structural else self.model
            predicted = counts.realised.get("latency_ms")
            predicted = self.table.ms(counts.kept) if predicted is None else predicted
            self.known[key] = _Candidate(counts, plan, small, target, predicted)
        candidate = self.known[key]
        self.time(candidate)
        return candidate

    def time(self, candidate: _Candidate) -> None:
        """Add turns until the median is sure, or enough is enough."""
        models = {"dense": self.model, "candidate": candidate.small}
        started, most = time.monotonic(), len(candidate.own_ms) + MOST * self.repeats
        with timing(models, self.table.runtime.threads):
            while not candidate.own_ms or not candidate.sure:
                late = time.monotonic() - started > MOST_SECONDS
                if candidate.own_ms and (late or len(candidate.own_ms) >= most):
                    break
                found = turns(models, self.inputs, self.repeats, MIN_MS)
                pairs = zip(found.clock["candidate"], found.clock["dense"], strict=True)
                candidate.each += [own / dense for own, dense in pairs]
                candidate.dense_ms += found.wall["dense"]
                candidate.own_ms += found.wall["candidate"]
                for name in models:
                    candidate.runs[name] += self.repeats * found.calls[name]

    def realised(self, candidate: _Candidate) -> float:
        """Milliseconds, at the speed that the machine had when the table was measured."""
        return candidate.ratios[1] * self.table.dense_ms

    def round_of(self, candidate: _Candidate) -> Round:
        """What is reported of a candidate."""
        size, runs = batch_size(self.inputs), candidate.runs
        p25, p50, p75 = (ratio * self.table.dense_ms for ratio in candidate.ratios)
        return Round(
            candidate.target, candidate.predicted, p50, p25, p75,
            row_of(candidate.dense_ms, size, runs["dense"]),
            row_of(candidate.own_ms, size, runs["candidate"]),
        )  # fmt: skip


class _Search:
    """Looks for the target that gives a candidate just below the budget."""

    def __init__(
        self, budget: Budget, asked: float, within: float, allocate_fn: AllocateFn, trial: _Trial
    ) -> None:
        self.budget, self.asked, self.allocate_fn, self.trial = budget, asked, allocate_fn, trial
        self.least, self.aim = asked * (1 - within), asked * (1 - within / 2)

    def run(self, rounds: int) -> tuple[_Candidate, str]:
        """The best candidate, and what is wrong with it ("" if nothing)."""
        most = self.allocated(NO_LIMIT_MS)
        smallest = self.allocated(LEAST_MS)
        low, high = 0.0, most.realised.get("latency_ms", self.trial.table.dense_ms)
        target, sides = self.aim, list[bool]()
        for _ in range(rounds):
            counts = self.allocated(target)
            if self.trial.is_known(counts):  # what lies beyond it?
                target = (low + high) / 2
                counts = self.allocated(target)
                if self.trial.is_known(counts):
                    break
            found = self.trial(counts, target)
            realised = self.trial.realised(found)
            if realised > self.asked:
                high = min(high, target)
                if counts.kept == smallest.kept:
                    self.missed(found)
            elif realised >= self.least or counts.kept == most.kept:
                return found, ""
            else:
                low = max(low, target)
            sides.append(realised > self.asked)
            # Twice on the same side: the line is too bent to be followed.
            target = self.next_target(halve=len(sides) > 1 and sides[-1] == sides[-2])
        return self.last(smallest)

    def allocated(self, target: float) -> Counts:
        """Counts for a target, the smallest model where the table says that it is missed."""
        try:
            return self.allocate_fn(replace(self.budget, latency_ms=target))
        except MissedBudget as error:
            if set(error.nearest) != {"latency_ms"}:
                raise
            least = error.nearest["latency_ms"] * (1 + 1e-9)
            return self.allocate_fn(replace(self.budget, latency_ms=least))

    def next_target(self, *, halve: bool) -> float:
        """Where the line through the candidates beside the aim, or the nearest two, meets it.

        Args:
            halve: halfway between the two, if there is one on either side.
        """
        known = self.trial.known.values()
        p, r = rising(
            np.array([c.predicted for c in known]),
            np.array([self.trial.realised(c) for c in known]),
        )
        above = next((i for i, x in enumerate(r) if x > self.aim), len(r))
        i = min(max(above, 1), len(r) - 1)
        if halve and 0 < above < len(r):
            guess = (p[i - 1] + p[i]) / 2
        elif len(r) == 1 or r[i] == r[i - 1]:
            nearest = min(above, len(r) - 1)
            guess = p[nearest] * self.aim / r[nearest]  # as if all of the time were in proportion
        else:
            guess = p[i - 1] + (p[i] - p[i - 1]) * (self.aim - r[i - 1]) / (r[i] - r[i - 1])
        return min(max(guess, LEAST_MS), 2 * p[-1])

    def last(self, smallest: Counts) -> tuple[_Candidate, str]:
        """What is left when no round was close enough."""
        below = [c for c in self.trial.known.values() if self.trial.realised(c) <= self.asked]
        if not below:
            found = self.trial(smallest, LEAST_MS)
            if self.trial.realised(found) > self.asked:
                self.missed(found)
            below = [found]
        best = max(below, key=self.trial.realised)
        off = 1 - self.trial.realised(best) / self.asked
        if self.trial.realised(best) >= self.least:
            return best, ""
        return best, f"{off:.0%} below what was asked for: no candidate that was tried is closer"

    def missed(self, candidate: _Candidate) -> None:
        """Raise: the smallest model takes too long."""
        r = self.trial.round_of(candidate)
        raise BudgetError(
            f"Budget(latency_ms={self.asked!r}): every target keeps its fewest units, and a call "
            f"still takes {r.realised_ms:.4g} ms ({r.p25_ms:.4g} to {r.p75_ms:.4g}), the dense "
            f"model {self.trial.table.dense_ms:.4g}; ask for at least "
            f"latency_ms={math.ceil(r.realised_ms * 1.02e4) / 1e4}, or prune more kinds of units"
        )
