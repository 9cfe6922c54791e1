"""The study: every candidate on every fold, kept as they finish, by workers that may die.

    work(study, evaluate)         one worker: until nothing is left
    run_study(...) -> [Trial]     open the study and work, in this process
    study_trials(storage, name)   what is finished, read only

One Optuna trial is one candidate, and their numbers are the same: Optuna counts trials in one
transaction, so each number is handed out once, however many machines ask. A finished fold is stored
in its trial at once. A trial whose worker died goes back to the queue with its number and its folds
and is never copied: nothing is lost, and nothing is counted twice.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

from secateurs.errors import ConfigError, PruningError
from secateurs.searching.config import Candidate, Space
from secateurs.searching.plan import (
    FINISHED,
    FOLD,
    PROBLEM,
    VALUES,
    WORKER,
    Snapshot,
    Study,
    StudyPlan,
    finished_folds,
    open_study,
    read_trial,
)
from secateurs.searching.results import FoldResult, Trial
from secateurs.searching.samplers import Aim, mean_metric, suggest, suggested
from secateurs.searching.store import (
    StorageInternalError,
    Store,
    TrialState,
    UpdateFinishedTrialError,
    open_store,
    optuna,
)

__all__ = ["Evaluate", "run_study", "study_trials", "work"]

Evaluate = Callable[[Candidate, int], FoldResult]
"""One fold of one candidate; raises PruningError where the candidate cannot be judged."""

Watch = Callable[[Snapshot], None]
POLL_SECONDS = 0.3


def run_study(
    storage: str,
    name: str,
    space: Space,
    n_folds: int,
    evaluate: Evaluate,
    *,
    sampler: str = "grid",
    n_trials: int | None = None,
    seed: int = 0,
    aim: Aim | None = None,
    made_by: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    progress: Watch | None = None,
) -> list[Trial]:
    """All candidates on all folds, judged in this process beside whoever else works for the study.

    Args:
        storage, name, space, n_folds, sampler, n_trials, seed, aim, made_by: see `StudyPlan`.
        evaluate: one fold of one candidate.
        timeout: seconds after which no fold is begun; what is finished then is returned.
        progress: called after each fold.

    Returns:
        the finished trials, by number.

    Raises:
        ConfigError: another search has this name, or the storage cannot be opened.
    """
    plan = StudyPlan(storage, name, space, n_folds, sampler, n_trials, seed, aim, made_by or {})
    with open_study(plan) as study:
        work(study, evaluate, stop=after(timeout), progress=progress)
        return study.trials()


def study_trials(storage: str, name: str) -> list[Trial]:
    """The finished trials of a study, by number, each once. Changes nothing.

    Raises:
        ConfigError: there is no such study.
    """
    store = open_store(storage, create=False)
    try:
        names = [study.study_name for study in store.get_all_studies()]
        if name not in names:
            known = ", ".join(names) or "none"
            raise ConfigError(f"there is no study {name!r} in the storage (studies: {known})")
        study_id = store.get_study_id_from_name(name)
        return [read_trial(trial) for trial in store.get_all_trials(study_id, states=FINISHED)]
    finally:
        store.close()


def after(seconds: float | None) -> Callable[[], bool]:
    """A function that says True when so many seconds have passed; None: never."""
    begin = time.monotonic()
    return lambda: seconds is not None and time.monotonic() - begin >= seconds


def work(
    study: Study,
    evaluate: Evaluate,
    *,
    worker: str = "",
    stop: Callable[[], bool] = lambda: False,
    progress: Watch | None = None,
) -> None:
    """Judge candidates until all are judged, also those that other workers leave behind.

    Args:
        study: from `open_study`.
        evaluate: one fold of one candidate.
        worker: what this worker is called in the storage; made up if empty.
        stop: asked between folds; True ends the work, and the begun candidate waits for the next.
        progress: called after each fold.

    Raises:
        Exception: whatever `evaluate` raises, but for PruningError; the candidate is put back.
    """
    worker = worker or uuid.uuid4().hex
    while not stop():
        study.store.revive(study.study_id)
        frozen = study.frozen()
        waiting = any(trial.state == TrialState.WAITING for trial in frozen)
        if waiting or len(frozen) < study.plan.total:
            trial = study.handle.ask()
            # Another one finishes it where this worker was silent for too long.
            lost = suppress(UpdateFinishedTrialError)
            with lost, _lease(study.store, trial._trial_id, worker):
                # Another one may have taken the last candidate first: what is too much waits.
                if trial.number < study.plan.total:
                    _judge(study, trial, evaluate, stop, progress)
        elif all(trial.state.is_finished() for trial in frozen):
            return
        else:
            time.sleep(POLL_SECONDS)  # the others are at the last ones, and may die


def _judge(
    study: Study,
    trial: optuna.Trial,
    evaluate: Evaluate,
    stop: Callable[[], bool],
    progress: Watch | None,
) -> None:
    """Finish the folds of one candidate that are not finished, unless it is time to stop."""
    suggest(trial, study.plan.space)
    stored = study.store.get_trial(trial._trial_id)  # what holds, should two have suggested
    candidate = Candidate(trial.number, suggested(stored.params, study.plan.space))
    study.check(candidate)
    trial.set_user_attr(VALUES, candidate.values)
    folds, problem = finished_folds(stored), stored.user_attrs.get(PROBLEM, "")
    n_folds = study.plan.n_folds
    # Each candidate begins at another fold: workers do not train the same dense network at once.
    for fold in ((candidate.number + i) % n_folds for i in range(n_folds)):
        if fold in folds or problem:
            continue
        if stop():
            return
        try:
            folds[fold] = evaluate(candidate, fold)
        except PruningError as error:
            problem = str(error) or type(error).__name__
        else:
            trial.set_user_attr(f"{FOLD}{fold}", folds[fold].to_dict())
            if progress is not None:
                progress(study.snapshot())
    _tell(study, trial, [folds[fold] for fold in sorted(folds)], problem)
    if progress is not None:
        progress(study.snapshot())


def _tell(study: Study, trial: optuna.Trial, folds: Sequence[FoldResult], problem: str) -> None:
    """Finish a trial: its values for the sampler, or why it has none."""
    aim = study.plan.aim
    values: Sequence[float] | None = None
    state = TrialState.PRUNED
    if problem:
        trial.set_user_attr(PROBLEM, problem)
    else:
        values, state = mean_metric(folds), TrialState.COMPLETE
    if values is not None and aim is not None:
        values = aim.values(folds)
        known = study.store.get_trial_system_attrs(trial._trial_id)
        limits = {} if aim.limits is None else aim.limits(folds)
        for name, value in limits.items():
            if not any(key.endswith(f":{name}") for key in known):  # by one who died right here
                trial.set_constraint(name, value)
    try:
        study.handle.tell(trial, values, state=state)
    except ValueError:
        # Put back meanwhile: all is stored, and whoever takes it has only to say so.
        if study.store.get_trial(trial._trial_id).state == TrialState.RUNNING:
            raise


@contextmanager
def _lease(store: Store, trial_id: int, worker: str) -> Iterator[None]:
    """Heartbeats while a trial is worked on; if it is not finished in the end, it is put back."""
    over = Event()

    def beat() -> None:
        while not over.wait(store.interval):
            with suppress(StorageInternalError):  # busy for long; the grace covers several beats
                store.record_heartbeat(trial_id)
        store.remove_session()

    thread = Thread(target=beat, daemon=True)
    try:
        store.record_heartbeat(trial_id)
        store.set_trial_user_attr(trial_id, WORKER, worker)
        thread.start()
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
        if store.get_trial(trial_id).user_attrs.get(WORKER) == worker:
            store.put_back(trial_id)
