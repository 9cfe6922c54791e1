"""The study: each candidate once, whatever dies, and never under another search."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from secateurs.errors import BudgetError, ConfigError
from secateurs.searching import plan as plans
from secateurs.searching.config import Candidate, Range, Space
from secateurs.searching.plan import Snapshot, Study, StudyPlan, open_study
from secateurs.searching.results import FoldResult
from secateurs.searching.samplers import Aim
from secateurs.searching.store import Store, open_store, optuna, storage_url
from secateurs.searching.study import after, run_study, study_trials, work
from tests.search.studies import (
    FOLDS,
    PATIENCE,
    SPACE,
    begin_worker,
    calls,
    expected,
    finished,
    judged,
    make_plan,
    prepare,
    until,
    watch,
)


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    return make_plan(f"sqlite:///{tmp_path}/study.db")


def finished_numbers(plan: StudyPlan) -> list[int]:
    """Of all trials in the storage, also of those that are too much (they wait, see below)."""
    with open_study(plan) as study:
        return [t.number for t in study.handle.get_trials() if t.state.is_finished()]


# --- one worker -----------------------------------------------------------------------------------


def test_a_grid_is_judged_fold_by_fold(plan: StudyPlan, tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    with open_study(plan) as study:
        work(study, prepare(tmp_path), progress=seen.append)
        assert study.trials() == expected(plan)
    assert study_trials(plan.storage, plan.name) == expected(plan)
    assert set(calls(tmp_path).values()) == {1}
    assert [(s.folds, s.done) for s in seen[:4]] == [(1, 0), (2, 0), (3, 0), (3, 1)]
    last = seen[-1]
    assert (last.total, last.done, last.problems, last.running) == (6, 6, 1, 0)
    assert (last.folds, last.total_folds) == (16, 16)  # 6 x 3, less two of the impossible one
    assert last.trials == tuple(expected(plan))


def test_a_candidate_that_cannot_be_judged_does_not_end_the_study(plan: StudyPlan) -> None:
    def never(candidate: Candidate, fold: int) -> FoldResult:
        raise BudgetError(f"candidate {candidate.number} is out of reach")

    found = run_study(plan.storage, "never", SPACE, FOLDS, never)
    assert [t.problem for t in found] == [f"candidate {n} is out of reach" for n in range(6)]
    assert all(t.folds == () for t in found)


def test_any_other_error_ends_the_work_and_keeps_what_is_finished(
    plan: StudyPlan, tmp_path: Path
) -> None:
    def broken(candidate: Candidate, fold: int) -> FoldResult:
        if (candidate.number, fold) == (1, 0):  # its last: it begins at fold 1
            raise ZeroDivisionError("a bug")
        return judged(candidate, fold)

    with pytest.raises(ZeroDivisionError, match="a bug"), open_study(plan) as study:
        work(study, broken)
    assert (watch(plan).folds, watch(plan).running) == (5, 0)
    with open_study(plan) as study:
        work(study, prepare(tmp_path))
    assert calls(tmp_path)[1, 2] == 1
    assert (1, 1) not in calls(tmp_path)
    assert finished(plan) == expected(plan)
    assert finished_numbers(plan) == list(range(6))


def test_a_time_limit_stops_between_folds(plan: StudyPlan, tmp_path: Path) -> None:
    assert run_study(plan.storage, "short", SPACE, FOLDS, prepare(tmp_path), timeout=0.0) == []
    left = iter([False] * 6 + [True] * 9)  # asked before each candidate and each fold
    with open_study(plan) as study:
        work(study, prepare(tmp_path), stop=lambda: next(left))
        assert (study.snapshot().done, study.snapshot().folds) == (1, 4)
        assert study.snapshot().running == 0


def test_more_random_candidates_may_be_asked_for_later(plan: StudyPlan, tmp_path: Path) -> None:
    space = Space({"budget.macs": Range(0.1, 0.9), "criterion": ["taylor", "magnitude"]})
    run = partial(run_study, plan.storage, "r", space, 2, prepare(tmp_path), sampler="random")
    few = run(n_trials=2, seed=4)
    more = run(n_trials=5, seed=4)
    assert [t.candidate for t in more] == space.sampled(5, seed=4)
    assert more[:2] == few
    assert max(calls(tmp_path).values()) == 1
    assert run(n_trials=2, seed=4) == few


# --- adaptive samplers ----------------------------------------------------------------------------

WIDE = Space({
    "budget.macs": {"low": 0.1, "high": 1.0}, "criterion": ["taylor", "magnitude"],
    "keep": {"low": 1, "high": 7, "step": 2}, "rate": {"low": 0.0, "high": 1.0, "step": 0.3},
})  # fmt: skip
SMALLEST = Aim(
    ("macs",),
    lambda folds: [folds[0].remaining["macs"]],
    lambda folds: {"drop": folds[0].dense - folds[0].metric - 0.05},
)
FRONT = Aim(("macs", "metric"), lambda folds: [folds[0].remaining["macs"], -folds[0].metric])


@pytest.mark.parametrize(("sampler", "aim"), [("tpe", SMALLEST), ("nsga2", FRONT)])
def test_an_adaptive_sampler_repeats_itself_also_when_it_is_stopped(
    plan: StudyPlan, sampler: str, aim: Aim
) -> None:
    run = partial(run_study, plan.storage, space=WIDE, n_folds=1, evaluate=judged, sampler=sampler,
                  aim=aim, seed=3)  # fmt: skip
    whole = run("whole", n_trials=14)
    assert [t.candidate.number for t in whole] == list(range(14))
    assert {t.candidate.values["keep"] for t in whole} <= {1, 3, 5, 7}
    assert {t.candidate.values["rate"] for t in whole} <= {0.0, 0.3, 0.6, 0.9}
    run("parts", n_trials=14, timeout=0.0)
    with open_study(StudyPlan(plan.storage, "parts", WIDE, 1, sampler, 14, 3, aim)) as study:
        left = iter([False] * 12 + [True] * 2)
        work(study, judged, stop=lambda: next(left))
        assert len(study.trials()) == 6
    assert run("parts", n_trials=14) == whole


def test_tpe_looks_for_the_smallest_within_the_limit(plan: StudyPlan) -> None:
    """0.9 - metric = 0.1 (1 - macs) - 0.02 taylor <= 0.05 down to macs 0.3 with taylor.

    Of 20 draws by chance, 3 fall into the part that is looked at; 8 or more in 4 of 1,000 cases.
    """
    space = Space({k: WIDE[k] for k in ("budget.macs", "criterion")})
    found = run_study(plan.storage, "t", space, 1, judged, sampler="tpe", n_trials=40, aim=SMALLEST)
    late = [t.candidate.values for t in found[20:]]
    near = [v for v in late if v["criterion"] == "taylor" and 0.2 < v["budget.macs"] < 0.45]
    assert len(near) >= 8
    within = [t.folds[0].remaining["macs"] for t in found if t.folds[0].metric >= 0.85]
    assert min(within) == pytest.approx(0.3, abs=0.02)


def test_an_adaptive_sampler_needs_an_aim(plan: StudyPlan) -> None:
    with pytest.raises(ConfigError, match="'tpe' needs an aim"):
        run_study(plan.storage, "t", WIDE, 1, judged, sampler="tpe", n_trials=4)


# --- another search -------------------------------------------------------------------------------


def test_another_search_of_the_same_name_is_refused(plan: StudyPlan) -> None:
    with open_study(make_plan(plan.storage, made_by={"recipe": {"criterion": "taylor"}})):
        pass
    others: list[tuple[dict[str, Any], str]] = [
        ({"made_by": {"recipe": {"criterion": "magnitude"}}},
         "recipe.criterion was taylor, is magnitude"),
        ({"made_by": {"recipe": {"criterion": "taylor"}}, "n_folds": 5},
         "study.n_folds was 3, is 5"),
    ]  # fmt: skip
    for other, difference in others:
        with pytest.raises(ConfigError) as error, open_study(make_plan(plan.storage, **other)):
            pass
        assert difference in str(error.value)
        assert "another --name" in str(error.value)


def test_another_list_of_candidates_is_refused(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another version of the program, which the settings do not show."""
    with open_study(plan) as study:
        work(study, prepare(tmp_path))
    backwards = [Candidate(n, c.values) for n, c in enumerate(SPACE.grid()[::-1])]
    monkeypatch.setattr(plans, "fixed_candidates", lambda *asked: backwards)
    other = make_plan(plan.storage)
    with pytest.raises(ConfigError, match=r"candidate 0 .* was budget.macs=0.5.*, is .*0.125"):
        finished(other)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", "storage must be sqlite:///FILE or postgresql"),
        ("sqlite://", "storage must be sqlite:///FILE"),
        ("mysql://ann:secret@host/x", "storage must be"),
        ("postgresql://ann:secret@/x?host=/nowhere", "cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        open_store(url)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database at all, but long enough to be read")
    with pytest.raises(ConfigError, match="file is not a database"):
        open_store(f"sqlite:///{tmp_path}/study.db")


def test_reading_makes_no_file_and_names_the_studies(plan: StudyPlan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no study yet"):
        study_trials(plan.storage, "x")
    assert list(tmp_path.iterdir()) == []
    watch(plan)
    with pytest.raises(ConfigError, match=r"no study 'x' in the storage \(studies: made-up\)"):
        study_trials(plan.storage, "x")


def test_postgresql_is_read_with_its_third_driver() -> None:
    for word in ("postgresql", "postgres", "postgresql+psycopg2"):
        assert storage_url(f"{word}://ann@db/x").drivername == "postgresql+psycopg"


# --- workers that die at the worst moment ---------------------------------------------------------


def abandoned(study: Study) -> optuna.Trial:
    """Taken by a worker that died before its first heartbeat."""
    return study.handle.ask()


def test_dead_between_two_steps(plan: StudyPlan, tmp_path: Path) -> None:
    """Before its first heartbeat, and after its last fold but before it said so."""
    with open_study(replace(plan, grace=1)) as study:
        _, late = abandoned(study), abandoned(study)
        for fold in range(FOLDS):
            late.set_user_attr(f"fold {fold}", judged(SPACE.grid()[1], fold).to_dict())
        study.store.record_heartbeat(late._trial_id)
        work(study, prepare(tmp_path), stop=after(PATIENCE))
        assert study.trials() == expected(plan)
        assert len(study.handle.get_trials()) == 6
    assert not [fold for number, fold in calls(tmp_path) if number == 1]


def test_dead_while_it_revives_another(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's own retry would lose this one: failed by a process that adds no copy any more."""

    class Killed(BaseException):
        pass

    def die(store: Store, trial_id: int) -> None:
        raise Killed

    with open_study(replace(plan, grace=1)) as study:
        study.store.record_heartbeat(abandoned(study)._trial_id)
        with monkeypatch.context() as patched:
            patched.setattr(Store, "put_back", die)
            with pytest.raises(Killed):
                until(lambda: bool(study.store.revive(study.study_id)))
        work(study, prepare(tmp_path), stop=after(PATIENCE))
        assert study.trials() == expected(plan)


def test_a_worker_that_was_silent_and_comes_back(plan: StudyPlan, tmp_path: Path) -> None:
    """Its candidate was put back and finished by another one: its own end is dropped."""
    with open_study(plan) as ours, open_study(plan) as theirs:

        def slow(candidate: Candidate, fold: int) -> FoldResult:
            if (candidate.number, fold) == (0, 1):
                ours.store.put_back(ours.handle.get_trials()[0]._trial_id)
                work(theirs, prepare(tmp_path))
            return judged(candidate, fold)

        work(ours, slow)
        assert ours.trials() == expected(plan)
        assert len(ours.handle.get_trials()) == 6
    assert set(calls(tmp_path).values()) == {1}


def test_what_is_too_much_waits_and_is_not_lost(plan: StudyPlan, tmp_path: Path) -> None:
    """Two workers asked for the last candidate at once: one got a number beyond the list."""
    space = Space({"budget.macs": Range(0.1, 0.9), "criterion": ["taylor"]})
    few = make_plan(plan.storage, space=space, sampler="random", n_trials=2)
    with open_study(few) as study:
        for _ in range(3):
            study.store.put_back(abandoned(study)._trial_id)
        work(study, prepare(tmp_path))
        assert len(study.trials()) == 2
    more = make_plan(plan.storage, space=space, sampler="random", n_trials=4)
    with open_study(more) as study:
        work(study, prepare(tmp_path))
        assert [t.candidate for t in study.trials()][:3] == space.sampled(3, 0)
        assert len(study.handle.get_trials()) == 4


def test_a_number_beyond_the_list_is_not_judged(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker took the last candidate between the look and the question."""
    with open_study(plan) as study:
        work(study, prepare(tmp_path))
        looks = iter([[], study.frozen()])
        monkeypatch.setattr(Study, "frozen", lambda self: next(looks))
        work(study, prepare(tmp_path))
    monkeypatch.undo()
    with open_study(plan) as study:
        assert [t.state.name for t in study.handle.get_trials()][6:] == ["WAITING"]
        assert study.trials() == expected(plan)
    assert set(calls(tmp_path).values()) == {1}


def test_who_takes_a_revived_trial_is_not_silent_yet(plan: StudyPlan) -> None:
    with open_study(replace(plan, grace=1)) as study:
        study.store.record_heartbeat(abandoned(study)._trial_id)
        until(lambda: bool(study.store.revive(study.study_id)))
        assert abandoned(study).number == 0
        assert study.store.revive(study.study_id) == []


# --- kill -9 --------------------------------------------------------------------------------------


def kill_two_of_three(plan: StudyPlan, folder: Path) -> None:
    """All three are in the second fold of a candidate when two are killed; the third goes on."""
    workers = [begin_worker(plan, folder, held=1) for _ in range(3)]
    try:
        until(lambda: watch(plan).folds == 3)
        until(lambda: sum(fold == 1 for _, fold in calls(folder).elements()) == 3)
        held = [number for number, fold in calls(folder) if fold == 1]
        for worker in workers[:2]:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        (folder / "go").touch()
        assert workers[2].wait(timeout=PATIENCE) == 0, (
            workers[2].stderr and workers[2].stderr.read()
        )
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert finished(plan) == expected(plan)
    assert finished_numbers(plan) == list(range(6))
    again = {fold: n for fold, n in calls(folder).items() if n > 1}
    assert len(again) == 2
    assert set(again) <= {(number, 1) for number in held}
    assert set(again.values()) == {2}


def test_kill_two_of_three_on_sqlite(plan: StudyPlan, tmp_path: Path) -> None:
    kill_two_of_three(plan, tmp_path)


def race(storage: str, folder: Path) -> None:
    """Two pairs of processes find an empty storage at once, each pair with another search.

    One pair gets the name and judges everything once; the other is told what differs.
    """
    both = [make_plan(storage, made_by={"seed": seed}) for seed in (1, 2)]
    workers = [begin_worker(plan, folder) for plan in both * 2]
    words = [worker.communicate(timeout=PATIENCE)[1] for worker in workers]
    ends = [worker.returncode for worker in workers]
    assert ends in ([0, 1, 0, 1], [1, 0, 1, 0]), words
    winner = ends.index(0)
    for refused in (words[1 - winner], words[3 - winner]):
        assert f"ConfigError: study 'made-up' was made by another search: seed was {1 + winner}, " \
            f"is {2 - winner}." in refused  # fmt: skip
    assert finished(both[winner]) == expected(both[winner])
    assert finished_numbers(both[winner]) == list(range(6))
    assert set(calls(folder).values()) == {1}


def test_a_race_on_sqlite(plan: StudyPlan, tmp_path: Path) -> None:
    race(plan.storage, tmp_path)
