"""What a study is: its plan, its place in a storage, and how far it is.

open_study(plan) -> Study      create it or join it: the same search, or an error
study.trials() -> [Trial]      the finished ones, each once
study.snapshot() -> Snapshot   for those who watch
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from secateurs.errors import ConfigError
from secateurs.searching.config import Candidate, Space
from secateurs.searching.results import FoldResult, Trial
from secateurs.searching.samplers import ADAPTIVE, Aim, fixed_candidates, make_sampler
from secateurs.searching.store import FrozenTrial, Store, TrialState, open_store, optuna

__all__ = [
    "Snapshot",
    "Study",
    "StudyPlan",
    "delete_study",
    "finished_folds",
    "open_study",
    "read_trial",
]

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
MADE_BY = "made_by"  # attribute of the study
VALUES, PROBLEM, WORKER, FOLD = "values", "problem", "worker", "fold "  # attributes of a trial


@dataclass(frozen=True)
class StudyPlan:
    """What makes a study, the same on every machine that works for it.

    Attributes:
        storage: URL of an SQLite file or a PostgreSQL database.
        name: of the study in the storage.
        space: what a candidate chooses.
        n_folds: each candidate is judged on.
        sampler: "grid", "random", "tpe" or "nsga2".
        n_trials: candidates; None for a grid, which knows.
        seed: of what is drawn.
        aim: what an adaptive sampler makes small.
        made_by: whatever else must be the same for results to belong together, as JSON.
        interval, grace: seconds between heartbeats, and without one until a worker counts as dead.
    """

    storage: str
    name: str
    space: Space
    n_folds: int
    sampler: str = "grid"
    n_trials: int | None = None
    seed: int = 0
    aim: Aim | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)
    interval: int = 5
    grace: int = 30

    @cached_property
    def candidates(self) -> list[Candidate] | None:
        """The fixed list, if the sampler has one."""
        return fixed_candidates(self.space, self.sampler, self.n_trials, self.seed)

    @property
    def total(self) -> int:
        """Candidates in all."""
        return self.n_trials or 0 if self.candidates is None else len(self.candidates)

    def fingerprint(self) -> dict[str, Any]:
        """What must not change, as JSON; the number of trials may."""
        own = {
            "space": self.space.to_dict(),
            "n_folds": self.n_folds,
            "sampler": self.sampler,
            "seed": self.seed,
        }
        plain: dict[str, Any] = json.loads(json.dumps({**self.made_by, "study": own}))
        return plain


@dataclass(frozen=True)
class Snapshot:
    """How far a study is.

    Attributes:
        total: candidates in all.
        done: of these, finished.
        problems: of these, found impossible.
        running: being judged now.
        folds, total_folds: finished, and in all without those of impossible candidates.
        trials: the finished ones.
    """

    total: int
    done: int
    problems: int
    running: int
    folds: int
    total_folds: int
    trials: tuple[Trial, ...]


@dataclass(frozen=True, eq=False)
class Study:
    """An open study: its plan, its storage, and Optuna's handle on it."""

    plan: StudyPlan
    store: Store
    handle: optuna.Study
    study_id: int

    def frozen(self) -> list[FrozenTrial]:
        """Optuna's trials that are wanted, by number."""
        found = self.handle.get_trials(deepcopy=False)
        return [trial for trial in found if trial.number < self.plan.total]

    def trials(self) -> list[Trial]:
        """The finished trials, by number.

        Raises:
            ConfigError: another list of candidates made them.
        """
        found = [read_trial(trial) for trial in self.frozen() if trial.state in FINISHED]
        for trial in found:
            self.check(trial.candidate)
        return found

    def check(self, candidate: Candidate) -> None:
        """Refuse a stored candidate that is not the one of the list.

        Raises:
            ConfigError: another list of candidates made it.
        """
        listed = self.plan.candidates
        if listed is not None and listed[candidate.number].values != candidate.values:
            raise ConfigError(
                f"candidate {candidate.number} of study {self.plan.name!r} was {candidate.text}, "
                f"is {listed[candidate.number].text}: another list made it. Choose another --name"
            )

    def snapshot(self) -> Snapshot:
        """How far it is."""
        frozen, n_folds = self.frozen(), self.plan.n_folds
        done = [trial for trial in frozen if trial.state in FINISHED]
        problems = [trial for trial in done if PROBLEM in trial.user_attrs]
        left_out = sum(n_folds - len(finished_folds(trial)) for trial in problems)
        return Snapshot(
            total=self.plan.total,
            done=len(done),
            problems=len(problems),
            running=sum(trial.state == TrialState.RUNNING for trial in frozen),
            folds=sum(len(finished_folds(trial)) for trial in frozen),
            total_folds=self.plan.total * n_folds - left_out,
            trials=tuple(read_trial(trial) for trial in done),
        )

    def release(self, worker: str) -> list[int]:
        """Put back what a worker held that is known to be dead; returns the numbers."""
        running = self.handle.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        held = [trial for trial in running if trial.user_attrs.get(WORKER) == worker]
        for trial in held:
            self.store.put_back(trial._trial_id)
        return [trial.number for trial in held]


def finished_folds(trial: FrozenTrial) -> dict[int, FoldResult]:
    """Finished folds of a trial, by number."""
    found = [FoldResult.from_dict(v) for k, v in trial.user_attrs.items() if k.startswith(FOLD)]
    return {result.fold: result for result in sorted(found, key=lambda result: result.fold)}


def read_trial(trial: FrozenTrial) -> Trial:
    """A finished trial in our words."""
    candidate = Candidate(trial.number, trial.user_attrs[VALUES])
    folds = tuple(finished_folds(trial).values())
    return Trial(candidate, folds, trial.user_attrs.get(PROBLEM, ""))


@contextmanager
def open_study(plan: StudyPlan) -> Iterator[Study]:
    """Create the study, or join it.

    Raises:
        ConfigError: another search has this name, or the storage cannot be opened.
    """
    if plan.sampler in ADAPTIVE and (plan.aim is None or not plan.n_trials):
        raise ConfigError(f"sampler {plan.sampler!r} needs an aim and a number of trials")
    store = open_store(plan.storage, interval=plan.interval, grace=plan.grace)
    try:
        n_values = 1 if plan.aim is None else len(plan.aim.names)
        handle = optuna.create_study(
            storage=store,
            study_name=plan.name,
            directions=["minimize"] * n_values,
            sampler=make_sampler(plan.sampler, plan.candidates, plan.total, plan.seed),
            load_if_exists=True,
        )
        study = Study(plan, store, handle, store.get_study_id_from_name(plan.name))
        now = plan.fingerprint()
        before = store.settle(study.study_id, MADE_BY, now)
        if before != now:
            raise ConfigError(
                f"study {plan.name!r} was made by another search: {_differences(before, now)}. "
                "Choose another --name, or add --force to throw its results away and start over"
            )
        study.trials()  # of the same list
        yield study
    finally:
        store.close()


def delete_study(plan: StudyPlan) -> None:
    """Throw a study and its trials away, if there is one."""
    store = open_store(plan.storage)
    try:
        for study in store.get_all_studies():
            if study.study_name == plan.name:
                store.delete_study(study._study_id)
    finally:
        store.close()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two nested mappings, in words."""
    was, is_ = _flat(before), _flat(now)
    return "; ".join(
        f"{key} was {was.get(key, 'nothing')}, is {is_.get(key, 'nothing')}"
        for key in sorted({*was, *is_})
        if was.get(key, KeyError) != is_.get(key, KeyError)
    )


def _flat(data: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything that is no mapping, or an empty one."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        inner = _flat(value, f"{place}{key}.") if isinstance(value, Mapping) else {}
        found |= inner or {f"{place}{key}": value}
    return found
