"""`Budget(metric_drop=)`: as small as possible while the validation metric holds.

Coarse steps go down until one loses too much; finer ones then halve the gap between the last good
size and the first bad one. Every try starts from the last good model and is cut, healed and judged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from secateurs.allocation import allocate
from secateurs.errors import BudgetError
from secateurs.pipeline.request import given
from secateurs.pipeline.run import Point, Ranking, Run
from secateurs.pipeline.stage import FINER, Stage
from secateurs.types import Batches, Budget, Counts

__all__ = ["descend", "unchanged"]

SHARE = 0.8
"""What a coarse step leaves of what was left."""
CLOSE = 0.02
"""Gap between the last good size and the first bad one that is small enough, relative."""
TRAIL = 6
"""Good states that a descent with a margin remembers: 0.8^4 is less than a half."""


def descend(
    run: Run, stage: Stage, samples: Batches, *, margin: float = 1.0
) -> tuple[Ranking, Counts]:
    """The smallest good model that was found; ranking and counts of its last step.

    Args:
        margin: above 1, the smallest good model that is at least that many times as large as the
            smallest that was tried, and no finer steps unless nothing was good.

    Raises:
        BudgetError: no step is good, or the sizes that are asked for as well cannot be reached.
    """
    search = _Descent(run, stage, samples, trail=TRAIL if margin > 1 else 1)
    for fraction in search.path():
        if not search.attempt(fraction):
            break
    stepped = margin > 1 and search.step_back(margin)
    for _ in range(0 if stepped else FINER):
        if search.bad is None or search.close():
            break
        search.attempt((search.good + search.bad) / 2)
    search.conclude()
    assert search.point.ranking is not None
    assert search.point.counts is not None
    return search.point.ranking, search.point.counts


def unchanged(stage: Stage, ranking: Ranking, point: Point) -> Counts:
    """Counts of a point from which a stage has removed nothing: all that is left."""
    scores = ranking.without(point.plan).scores
    return allocate(
        scores, Budget(units=1.0), min_keep=stage.min_keep, round_to=1, previous=point.plan
    )


class _Descent:
    """Between what is good and what is too much; sizes as fractions of the whole cut."""

    def __init__(self, run: Run, stage: Stage, samples: Batches, *, trail: int) -> None:
        assert isinstance(stage.budget, Budget)
        assert stage.budget.metric_drop is not None
        self.run, self.stage, self.samples = run, stage, samples
        self.limit = stage.budget.metric_drop
        self.first = run.rank(stage, samples)
        self.next: Ranking | None = self.first
        start = run.point()
        self.left = unchanged(stage, self.first, start)
        self.point = Point(start.weights, start.plan, self.first, self.left, start.row)
        self.trail: deque[Point] = deque(maxlen=trail)
        self.good, self.told = 0.0, ""
        self.bad: float | None = None
        self.bad_counts: Counts | None = None
        self.ended = False

    def path(self) -> Iterator[float]:
        """Fractions of the cut, coarse: by equal shares of what is left, or along the schedule."""
        if not self.stage.searches:
            yield from self.path_to_sizes()
            return
        least, remaining = self.least(), self.left.realised[self.stage.smallest_in]
        for _ in range(self.stage.steps.steps):
            remaining = max(least, remaining * SHARE)
            self.ended = remaining == least
            yield 1 - remaining
            if self.ended:
                return

    def path_to_sizes(self) -> Iterator[float]:
        """Fractions of the cut that end at the sizes of the budget."""
        schedule = self.stage.steps
        if schedule.curve != "exponential":
            yield from schedule.fractions()
            return
        run = self.run
        final = min(self.stage.final_fractions(run.graph, run.dense_ms).values())
        n = min(schedule.steps, max(1, math.ceil(math.log(final) / math.log(SHARE) - 1e-9)))
        for i in range(1, n):
            yield (1 - final ** (i / n)) / (1 - final)
        yield 1.0

    def asked(self, fraction: float) -> Budget:
        """The sizes at a fraction of the cut."""
        if not self.stage.searches:
            return self.stage.asked_along(fraction, self.run.graph, self.run.dense_ms)
        share = math.ceil((1 - fraction) * 1e6 - 1e-3) / 1e6  # 0.64, not 0.6400000000000001
        return Budget(**{self.stage.smallest_in: max(share, self.least())})

    def least(self) -> float:
        """What remains when every target keeps its fewest units, by the present ranking."""
        return self.stage.fewest(self.ranking().scores, self.point.plan).realised[
            self.stage.smallest_in
        ]

    def ranking(self) -> Ranking:
        """Of what the last good model has left."""
        if self.next is None and self.stage.steps.rescore:
            self.next = self.run.rank(self.stage, self.samples)
        elif self.next is None:
            self.next = self.first.without(self.point.plan)
        return self.next

    def attempt(self, fraction: float) -> bool:
        """Cut to a size from the last good model, heal, judge; False: rolled back."""
        run, stage = self.run, self.stage
        run.tell("prune", len(run.steps))
        ranking = self.ranking()
        counts = run.count(stage, ranking, self.asked(fraction), self.samples)
        assert self.point.counts is not None
        if counts.kept == self.point.counts.kept:  # no unit between the two sizes
            self.good = fraction
            return True
        if self.bad_counts is not None and counts.kept == self.bad_counts.kept:
            self.bad = fraction
            return False
        run.take(ranking, counts, must=True)
        masked = run.metric()
        healed, loss = run.heal(stage)
        known = None if stage.searches else fraction
        run.note_step(counts, known, masked, healed=healed, loss=loss)
        if run.exceeds(masked if healed is None else healed, self.limit):
            self.told = run.roll_back(self.point, self.limit)
            run.notes.append(self.told)
            self.bad, self.bad_counts = fraction, counts
            return False
        self.good, self.point, self.next = fraction, run.point(ranking, counts), None
        self.trail.append(self.point)
        return True

    def step_back(self, margin: float) -> bool:
        """Go back to the smallest good model with a margin above the smallest that was tried.

        That one lost too much, or nobody knows how far it is from one that does.

        Returns:
            Whether there is a good model.
        """
        if not self.trail:
            return False
        quantity = self.stage.smallest_in
        sizes = [point.counts.realised[quantity] for point in self.trail if point.counts]
        tried = sizes[-1] if self.bad_counts is None else self.bad_counts.realised[quantity]
        far = [p for p, size in zip(self.trail, sizes, strict=True) if size >= margin * tried]
        point = far[-1] if far else self.trail[0]
        self.run.notes.append(
            f"a margin for noise: the model is the smallest good one with at least {margin:g} times"
            f" the {quantity} of the smallest that was tried ({quantity}={tried:.4g})"
            if far
            else f"no room for a margin: {quantity}={tried:.4g} lost too much, and no good model is"
            f" {margin:g} times as large; it is the largest that was cut"
        )
        if point is not self.point:
            self.run.undo(point)
            self.point = point
        return True

    def close(self) -> bool:
        """Whether the last good and the first bad size hardly differ."""
        assert self.point.counts is not None
        assert self.bad_counts is not None
        good, bad = self.point.counts.realised, self.bad_counts.realised
        return all(good[q] - bad[q] <= CLOSE * good[q] for q in self.quantities())

    def quantities(self) -> tuple[str, ...]:
        """What the sizes are measured in."""
        assert isinstance(self.stage.budget, Budget)
        return tuple(self.stage.budget.sizes) or (self.stage.smallest_in,)

    def conclude(self) -> None:
        """Say what was found and why it ended there.

        Raises:
            BudgetError: nothing good was found, or the sizes were not reached and had to be.
        """
        run, stage = self.run, self.stage
        assert self.point.counts is not None
        if self.point.counts is self.left:
            if self.bad is None:
                raise BudgetError(f"{given(stage.budget)} removes nothing: it is met already")
            raise BudgetError(
                f"nothing can be cut: {self.told}. Take a longer fine-tuning, metric_drop above "
                f"{self.limit:g}" + (", or smaller first steps" if not stage.searches else "")
            )
        if stage.searches:
            run.notes.append(f"{self.reached()}: {self.why()}")
        elif self.bad is not None:
            nearest = f"{given(stage.budget)}: the nearest that was reached is {self.reached()}"
            if not stage.allow_missed:
                raise BudgetError(
                    f"{nearest}. Beyond it: {self.told}. Ask for that, take a longer fine-tuning "
                    f"or metric_drop above {self.limit:g}, or take it with allow_missed=True"
                )
            run.met = False
            run.notes.append(f"the budget was missed, which was allowed. {nearest}")

    def reached(self) -> str:
        """The last good size and its metric in words."""
        assert self.point.counts is not None
        row = self.run.steps[self.point.row - 1]
        metric = row.metric_masked if row.metric_healed is None else row.metric_healed
        sizes = ", ".join(f"{q}={self.point.counts.realised[q]:.4g}" for q in self.quantities())
        name = next(iter(self.run.dense_metrics))
        drop = self.run.drop(metric)
        return (
            f"{sizes} with {name} {metric:.4g}, {abs(drop):.4g} {'worse' if drop > 0 else 'better'}"
            f" than dense (at most {self.limit:.4g} worse is allowed)"
        )

    def why(self) -> str:
        """Why a search for the smallest ended there."""
        if self.bad_counts is not None:
            quantity = self.stage.smallest_in
            size = self.bad_counts.realised[quantity]
            return f"{quantity}={size:.4g} was too small. Each is one measurement, with its noise"
        if self.ended:
            return "every target keeps its fewest units, nothing more can go"
        most = self.stage.steps.steps
        return (
            f"the limit of {most} steps was reached and more may go: "
            f'Schedule("exponential", steps={2 * most})'
        )
