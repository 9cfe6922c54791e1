"""Which candidates a study tries.

Fixed lists ("grid", "random") know every candidate before the first is judged: number `k` of the
study is candidate `k` of the list, so the results depend neither on how many workers there are nor
on their order. Adaptive samplers ("tpe", "nsga2") look at what is finished: with one worker they
repeat themselves, with several the candidates depend on who finishes first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from optuna import Study
from optuna import Trial as OptunaTrial
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial

from secateurs.searching.config import Candidate, Range, Space
from secateurs.searching.results import FoldResult

__all__ = [
    "ADAPTIVE",
    "Aim",
    "fixed_candidates",
    "make_sampler",
    "mean_metric",
    "suggest",
    "suggested",
]

ADAPTIVE = ("tpe", "nsga2")
STARTUP = 10  # random candidates before TPE looks at results; Optuna's own figure
GENERATIONS = 5  # of NSGA-II at least, where Optuna's population of 50 would leave fewer


@dataclass(frozen=True)
class Aim:
    """What an adaptive sampler makes small, from the finished folds of a candidate.

    Attributes:
        names: of the values.
        values: folds -> one finite number per name; smaller is better.
        limits: folds -> number by name; a candidate is allowed where all are at most 0.
    """

    names: tuple[str, ...]
    values: Callable[[Sequence[FoldResult]], Sequence[float]]
    limits: Callable[[Sequence[FoldResult]], Mapping[str, float]] | None = None


def mean_metric(folds: Sequence[FoldResult]) -> tuple[float]:
    """What a fixed list stores as its value: nothing is decided by it."""
    return (fmean(fold.metric for fold in folds),)


def fixed_candidates(
    space: Space, sampler: str, n_trials: int | None, seed: int
) -> list[Candidate] | None:
    """The whole list of "grid" and "random"; None for an adaptive sampler."""
    if sampler in ADAPTIVE:
        return None
    return space.grid() if sampler == "grid" else space.sampled(n_trials or 0, seed)


def make_sampler(
    sampler: str, candidates: Sequence[Candidate] | None, n_trials: int, seed: int
) -> BaseSampler:
    """Optuna's sampler, or one that reads from the list."""
    if candidates is not None:
        return _Listed(candidates)
    if sampler == "tpe":
        startup = max(1, min(STARTUP, n_trials // 3))
        return _Numbered(seed, lambda s: TPESampler(n_startup_trials=startup, seed=s))
    population = max(4, min(50, n_trials // GENERATIONS))
    return _Numbered(seed, lambda s: NSGAIISampler(population_size=population, seed=s))


def suggest(trial: OptunaTrial, space: Space) -> None:
    """Ask the sampler for the values of a candidate, key by key; they are kept in the trial.

    Lists are categories, written as JSON: Optuna stores only plain values.
    """
    for key, choice in space.items():
        if not isinstance(choice, Range):
            trial.suggest_categorical(key, [json.dumps(value) for value in choice])
        elif choice.whole:
            step = int(choice.step or 1)
            trial.suggest_int(key, int(choice.low), int(_last(choice)), step=step, log=choice.log)
        else:
            trial.suggest_float(key, choice.low, _last(choice), step=choice.step, log=choice.log)


def suggested(params: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """The values of a candidate from what a trial has stored of it."""
    found = {}
    for key, choice in space.items():
        value = params[key]
        if not isinstance(choice, Range):
            value = json.loads(value)
        elif not choice.whole:
            value = min(max(float(f"{value:.12g}"), choice.low), choice.high)
        found[key] = value
    return found


def _last(choice: Range) -> float:
    """The largest value that the steps reach."""
    return choice.high if choice.step is None else choice.grid()[-1]


class _Listed(BaseSampler):
    """Candidate `k` of a list for trial `k`: Optuna stores them, and chooses nothing."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = candidates

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        value = self.candidates[trial.number].values[param_name]
        if isinstance(param_distribution, CategoricalDistribution):
            return json.dumps(value)
        assert isinstance(param_distribution, (FloatDistribution, IntDistribution))
        return value


class _Numbered(BaseSampler):
    """A sampler whose random numbers follow from the number of the trial.

    So a search with one worker that is stopped and resumed tries the same candidates as one that
    is not, and workers on several machines never draw the same numbers.
    """

    def __init__(self, seed: int, make: Callable[[int], BaseSampler]) -> None:
        self.seed, self.make = seed, make
        self.inner = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        state = np.random.SeedSequence([self.seed, trial.number]).generate_state(1)
        self.inner = self.make(int(state[0]))
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: Any, values: Sequence[float] | None
    ) -> None:
        self.inner.after_trial(study, trial, state, values)
