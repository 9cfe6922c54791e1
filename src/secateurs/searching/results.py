"""What a search finds, as values: for the study, the report and JSON.

evaluate(candidate, fold) -> FoldResult;  all folds of a candidate -> Trial
choose(trials) -> SearchResult: statistics of every candidate, and the choice in words
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateurs.errors import BudgetError
from secateurs.searching.config import Candidate

__all__ = ["Candidate", "Choice", "Final", "FoldResult", "SearchResult", "Standing", "Trial"]


@dataclass(frozen=True)
class FoldResult:
    """One candidate on one fold.

    Attributes:
        fold: from 0.
        dense: main metric of the fold's dense network on the held-out part.
        metric: the same of the smaller network.
        remaining: what remains of the dense network, fractions by "macs", "params", "bytes".
        latency_ms: of the smaller network, one call on the example inputs; None: not measured.
        seconds: that it took.
        samples: in the held-out part.
        share: whether the metric is a share of samples (accuracy): then counts bound its spread.
    """

    fold: int
    dense: float
    metric: float
    remaining: Mapping[str, float]
    latency_ms: float | None
    seconds: float
    samples: int = 0
    share: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "remaining": dict(self.remaining)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FoldResult:
        """The inverse of `to_dict`."""
        return cls(**{**data, "remaining": dict(data["remaining"])})


@dataclass(frozen=True)
class Trial:
    """One candidate on its folds.

    Attributes:
        candidate: what was tried.
        folds: by number of the fold; fewer than all where it failed or was not finished.
        problem: why it could not be judged (a budget out of reach, ...); empty where it could.
    """

    candidate: Candidate
    folds: tuple[FoldResult, ...]
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        folds = [f.to_dict() for f in self.folds]
        return {"candidate": self.candidate.to_dict(), "folds": folds, "problem": self.problem}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """The inverse of `to_dict`."""
        folds = tuple(FoldResult.from_dict(f) for f in data["folds"])
        return cls(Candidate.from_dict(data["candidate"]), folds, str(data["problem"]))


@dataclass(frozen=True)
class Standing:
    """The statistics of one candidate over its folds; drops are positive when it is worse.

    Attributes:
        candidate: which.
        family: its choices that do not decide the size; families are judged apart.
        n_folds: folds that were finished.
        dense, metric: mean main metric of the dense and of the smaller networks.
        metric_se: standard error of `metric` over the folds.
        drop: mean of the paired drops.
        spread: standard deviation of the drops from fold to fold, at least `floor`.
        floor: least spread that is believed, because samples are few; 0 where all is believed.
        se: standard error of `drop` (corrected where training parts overlap).
        upper_mean: upper bound on the expected drop, at the level of the family.
        upper: upper bound on the drop of the one network that is handed over.
        p: of the hypothesis that this drop is above `max_drop`; None without a limit.
        remaining: mean fractions of the dense network.
        latency_ms: median over the folds.
        within: `upper` is within `max_drop`.
        tested: the sequence of its family reached it.
        passed: tested and within.
        one_se: within one standard error of the best candidate.
        front: no other candidate is better in the metric and at most as large, or as good and
            smaller (in MACs, bytes and latency, as far as known).
        problem: why it was not judged.
    """

    candidate: Candidate
    family: Mapping[str, Any] = field(default_factory=dict)
    n_folds: int = 0
    dense: float | None = None
    metric: float | None = None
    metric_se: float | None = None
    drop: float | None = None
    spread: float | None = None
    floor: float = 0.0
    se: float | None = None
    upper_mean: float | None = None
    upper: float | None = None
    p: float | None = None
    remaining: Mapping[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    within: bool = False
    tested: bool = False
    passed: bool = False
    one_se: bool = False
    front: bool = False
    problem: str = ""

    @property
    def judged(self) -> bool:
        """Whether it has figures for all folds."""
        return not self.problem

    def to_dict(self) -> dict[str, Any]:
        """As JSON (an infinite bound becomes null)."""
        plain = {k: _finite(v) for k, v in vars(self).items()}
        return {**plain, "candidate": self.candidate.to_dict(), "family": dict(self.family),
                "remaining": dict(self.remaining)}  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Standing:
        """The inverse of `to_dict`."""
        return cls(**{**data, "candidate": Candidate.from_dict(data["candidate"])})


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        candidate: the chosen one; None for the goal "pareto", which leaves the choice to people,
            and where nothing could be chosen.
        why: sentences: what was compared, the bounds, and why nothing smaller.
        level: error level of each family's tests; None where nothing is promised.
        problem: why nothing could be chosen.
    """

    candidate: Candidate | None
    why: tuple[str, ...]
    level: float | None = None
    problem: str = ""

    def require(self) -> Candidate:
        """The chosen candidate.

        Raises:
            BudgetError: there is none; names the nearest, with its figures.
        """
        if self.candidate is None:
            raise BudgetError(self.problem or "; ".join(self.why))
        return self.candidate

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        chosen = None if self.candidate is None else self.candidate.to_dict()
        return {"candidate": chosen, "why": list(self.why), "level": self.level,
                "problem": self.problem}  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Choice:
        """The inverse of `to_dict`."""
        chosen = None if data["candidate"] is None else Candidate.from_dict(data["candidate"])
        return cls(chosen, tuple(data["why"]), data["level"], data["problem"])


@dataclass(frozen=True)
class Final:
    """The chosen network at the end, pruned once more on all data that it may see.

    Attributes:
        metric: name of the main metric.
        validation_dense, validation: before and after; None where validation data trained it.
        test_dense, test: before and after, on the test split, which is read here and nowhere else.
        remaining: fractions of the dense network.
        samples: samples in each split.
        within: whether the drop on the test split is within the limit; None without a limit.
    """

    metric: str
    validation_dense: float | None
    validation: float | None
    test_dense: float
    test: float
    remaining: Mapping[str, float]
    samples: Mapping[str, int] = field(default_factory=dict)
    within: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "remaining": dict(self.remaining), "samples": dict(self.samples)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Final:
        """The inverse of `to_dict`."""
        return cls(**data)


@dataclass(frozen=True)
class SearchResult:
    """Everything that a search found.

    Attributes:
        title: of the task or model.
        metric: name of the main metric.
        maximize: whether a larger metric is better.
        settings: the block `search:` with its defaults, and the settled `mode`.
        recipe: the resolved recipe.
        trials: as judged, by candidate number.
        standings: statistics of every candidate, in the same order.
        front: numbers of the non-dominated candidates, from the largest to the smallest.
        choice: with its reasons.
        final: None until the chosen network was made (and for "pareto").
        notes: what a reader should know.
        environment: versions and machine.
    """

    title: str
    metric: str
    maximize: bool
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any]
    trials: tuple[Trial, ...]
    standings: tuple[Standing, ...]
    front: tuple[int, ...]
    choice: Choice
    final: Final | None = None
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def standing(self, number: int) -> Standing:
        """The statistics of a candidate by its number."""
        return next(s for s in self.standings if s.candidate.number == number)

    @property
    def chosen(self) -> Standing | None:
        """The statistics of the chosen candidate."""
        candidate = self.choice.candidate
        return None if candidate is None else self.standing(candidate.number)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "title": self.title,
            "metric": self.metric,
            "maximize": self.maximize,
            "settings": dict(self.settings),
            "recipe": dict(self.recipe),
            "trials": [t.to_dict() for t in self.trials],
            "standings": [s.to_dict() for s in self.standings],
            "front": list(self.front),
            "choice": self.choice.to_dict(),
            "final": None if self.final is None else self.final.to_dict(),
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchResult:
        """The inverse of `to_dict`."""
        return cls(
            title=data["title"],
            metric=data["metric"],
            maximize=data["maximize"],
            settings=dict(data["settings"]),
            recipe=dict(data["recipe"]),
            trials=tuple(Trial.from_dict(t) for t in data["trials"]),
            standings=tuple(Standing.from_dict(s) for s in data["standings"]),
            front=tuple(data["front"]),
            choice=Choice.from_dict(data["choice"]),
            final=None if data["final"] is None else Final.from_dict(data["final"]),
            notes=tuple(data["notes"]),
            environment=dict(data["environment"]),
        )
