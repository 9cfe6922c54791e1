"""`Budget(metric_drop=)`: as small as possible while the validation metric holds.

Coarse steps go down until one loses too much; finer ones then halve the gap between the last good
size and the first bad one. Every try starts from the last good model and is cut, healed and judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from secateurs.allocation import allocate
from secateurs.errors import BudgetError
from secateurs.pipeline.points import Point, Ranking
from secateurs.pipeline.request import given
from secateurs.pipeline.stage import FINER, Stage
from secateurs.pipeline.walk import End, Walk
from secateurs.types import Budget, Counts

__all__ = ["Descent", "unchanged"]

SHARE = 0.8
"""What a coarse step leaves of what was left."""
CLOSE = 0.02
"""Gap between the last good size and the first bad one that is small enough, relative."""
TRAIL = 6
"""Good states that a descent with a margin remembers: 0.8^4 is less than a half."""


def unchanged(stage: Stage, ranking: Ranking, point: Point) -> Counts:
    """Counts of a point from which a stage has removed nothing: all that is left."""
    scores = ranking.without(point.plan).scores
    return allocate(
        scores, Budget(units=1.0), min_keep=stage.min_keep, round_to=1, previous=point.plan
    )


@dataclass
class Descent(Walk):
    """To the smallest good model that is found; sizes are fractions of the whole cut.

    Attributes:
        margin: above 1, the end is the smallest good model that is at least that many times as
            large as the smallest that was tried, with no finer steps unless nothing was good.
        next: ranking of what the last good model has left, once it is known.
        start: the state before the stage.
        point: the last good state; `trail` holds those before it too.
        fraction: of the cut, that is being tried.
        good: of the last good state; `bad` of the first that lost too much, with its counts.
        told: why that was undone, in words.
        tries: coarse steps, and `finer` ones; `over` when the coarse ones have ended.
        remaining: what the last coarse step was to leave, at least `smallest`.
        ended: whether every target keeps its fewest units.
    """

    margin: float = 1.0
    next: Ranking | None = None
    start: Point | None = None
    point: Point | None = None
    trail: list[Point] = field(default_factory=list)
    fraction: float = 0.0
    good: float = 0.0
    bad: float | None = None
    bad_counts: Counts | None = None
    told: str = ""
    tries: int = 0
    finer: int = 0
    over: bool = False
    remaining: float = 1.0
    smallest: float = 0.0
    ended: bool = False

    def go(self) -> End:
        """The smallest good model that was found; ranking and counts of its last step.

        Raises:
            BudgetError: no step is good, or the sizes that are asked for cannot be reached.
        """
        if self.start is None:
            self.begin()
        self.coarse()
        if self.finer or self.margin <= 1 or not self.step_back():
            self.halve()
        self.conclude()
        point = self.last
        assert point.ranking is not None
        assert point.counts is not None
        return point.ranking, point.counts

    def begin(self) -> None:
        """Score, and remember where the descent starts."""
        run, stage = self.run, self.stage
        self.first = self.next = run.rank(stage, self.samples)
        now = run.point()
        left = unchanged(stage, self.first, now)
        self.start = self.point = Point(now.weights, now.plan, self.first, left, now.row)
        if stage.searches:
            self.smallest, self.remaining = self.least(), left.realised[stage.smallest_in]

    @property
    def last(self) -> Point:
        """The last good state."""
        assert self.point is not None
        return self.point

    @property
    def limit(self) -> float:
        """How much worse the metric may get."""
        assert isinstance(self.stage.budget, Budget)
        assert self.stage.budget.metric_drop is not None
        return self.stage.budget.metric_drop

    def coarse(self) -> None:
        """Steps along the path until one is too much, or the path ends."""
        while not self.over:
            if self.fresh is not None:
                good = self.judge()
            else:
                fraction = self.following()
                good = fraction is not None and self.attempt(fraction)
            self.over = not good
            self.run.leave(must=True)

    def halve(self) -> None:
        """Finer steps between the last good size and the first bad one."""
        while self.fresh is not None or (
            self.finer < FINER and self.bad is not None and not self.close()
        ):
            if self.fresh is not None:
                self.judge()
            else:
                assert self.bad is not None
                self.finer += 1
                self.attempt((self.good + self.bad) / 2)
            self.run.leave(must=True)

    def following(self) -> float | None:
        """The next fraction of the cut: by equal shares of what is left, or along the schedule."""
        if not self.stage.searches:
            fractions = self.path_to_sizes()
            self.tries += 1
            return fractions[self.tries - 1] if self.tries <= len(fractions) else None
        if self.ended or self.tries == self.stage.steps.steps:
            return None
        self.tries += 1
        self.remaining = max(self.smallest, self.remaining * SHARE)
        self.ended = self.remaining == self.smallest
        return 1 - self.remaining

    def path_to_sizes(self) -> list[float]:
        """Fractions of the cut that end at the sizes of the budget."""
        schedule = self.stage.steps
        if schedule.curve != "exponential":
            return list(schedule.fractions())
        run = self.run
        final = min(self.stage.final_fractions(run.graph, run.dense_ms).values())
        n = min(schedule.steps, max(1, math.ceil(math.log(final) / math.log(SHARE) - 1e-9)))
        return [*((1 - final ** (i / n)) / (1 - final) for i in range(1, n)), 1.0]

    def asked(self, fraction: float) -> Budget:
        """The sizes at a fraction of the cut."""
        if not self.stage.searches:
            return self.stage.asked_along(fraction, self.run.graph, self.run.dense_ms)
        share = math.ceil((1 - fraction) * 1e6 - 1e-3) / 1e6  # 0.64, not 0.6400000000000001
        return Budget(**{self.stage.smallest_in: max(share, self.least())})

    def least(self) -> float:
        """What remains when every target keeps its fewest units, by the present ranking."""
        return self.stage.fewest(self.ranking().scores, self.last.plan).realised[
            self.stage.smallest_in
        ]

    def ranking(self) -> Ranking:
        """Of what the last good model has left."""
        if self.next is None and self.stage.steps.rescore:
            self.next = self.run.rank(self.stage, self.samples)
        elif self.next is None:
            assert self.first is not None
            self.next = self.first.without(self.last.plan)
        return self.next

    def attempt(self, fraction: float) -> bool:
        """Cut to a size from the last good model, heal, judge; False: too much."""
        run, stage, known = self.run, self.stage, self.last.counts
        self.fraction = fraction
        run.tell(f"prune: cut {run.cut_text}")
        ranking = self.ranking()
        counts = run.count(stage, ranking, self.asked(fraction), self.samples)
        assert known is not None
        if counts.kept == known.kept:  # no unit between the two sizes
            self.good = fraction
            return True
        if self.bad_counts is not None and counts.kept == self.bad_counts.kept:
            self.bad = fraction
            return False
        self.take(ranking, counts, must=True)
        self.fresh, self.masked = (ranking, counts), run.metric()
        run.leave(must=stage.layerwise is not None)
        return self.judge()

    def judge(self) -> bool:
        """Heal what was cut and measure it; False: it lost too much and was rolled back."""
        run, stage = self.run, self.stage
        assert self.fresh is not None
        ranking, counts = self.fresh
        healed, loss = run.heal(stage, before=self.before)
        known = None if stage.searches else self.fraction
        run.note_step(counts, known, self.masked, healed=healed, loss=loss)
        self.fresh = None
        if run.exceeds(self.masked if healed is None else healed, self.limit):
            self.told = run.roll_back(self.last, self.limit)
            run.notes.append(self.told)
            self.bad, self.bad_counts = self.fraction, counts
            return False
        self.good, self.point, self.next = self.fraction, run.point(ranking, counts), None
        self.trail = [*self.trail, self.point][-(TRAIL if self.margin > 1 else 1) :]
        return True

    def step_back(self) -> bool:
        """Go back to the smallest good model with a margin above the smallest that was tried.

        That one lost too much, or nobody knows how far it is from one that does.

        Returns:
            Whether there is a good model.
        """
        if not self.trail:
            return False
        margin = self.margin
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
        if point.row != self.last.row:
            self.run.undo(point)
            self.point = point
        return True

    def close(self) -> bool:
        """Whether the last good and the first bad size hardly differ."""
        assert self.last.counts is not None
        assert self.bad_counts is not None
        good, bad = self.last.counts.realised, self.bad_counts.realised
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
        assert self.last.counts is not None
        assert self.start is not None
        if self.last.row == self.start.row:
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
        assert self.last.counts is not None
        row = self.run.steps[self.last.row - 1]
        metric = row.metric_masked if row.metric_healed is None else row.metric_healed
        sizes = ", ".join(f"{q}={self.last.counts.realised[q]:.4g}" for q in self.quantities())
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
