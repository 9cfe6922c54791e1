"""The lead and its workers: replaced when killed, stopped with the lead, loud when wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from secateurs.errors import ConfigError, PruningError
from secateurs.searching import workers
from secateurs.searching.config import Candidate
from secateurs.searching.plan import Snapshot, StudyPlan, open_study
from secateurs.searching.results import FoldResult
from secateurs.searching.study import Evaluate, work
from secateurs.searching.workers import run_workers
from tests.cli.signals import hears_ctrl_c
from tests.search.studies import (
    PATIENCE,
    calls,
    evaluate,
    expected,
    finished,
    make_plan,
    prepare,
    until,
    watch,
)


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    return make_plan(f"sqlite:///{tmp_path}/study.db", grace=600)


def killed_once(folder: Path, candidate: Candidate, fold: int) -> FoldResult:
    """The first worker that comes to the second fold of candidate 1 is killed there."""
    found = evaluate(folder, None, candidate, fold)
    if (candidate.number, fold) == (1, 2) and calls(folder)[1, 1] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def prepare_killed(folder: Path) -> Evaluate:
    return partial(killed_once, folder)


def test_a_killed_worker_is_replaced_at_once(plan: StudyPlan, tmp_path: Path) -> None:
    """The lead knows what it held: nobody waits for the ten minutes of grace."""
    said: list[str] = []
    seen: list[Snapshot] = []
    found = run_workers(plan, partial(prepare_killed, tmp_path), workers=2, say=said.append,
                        progress=seen.append)  # fmt: skip
    assert found == expected(plan)
    assert calls(tmp_path)[1, 1] == 2
    assert calls(tmp_path)[1, 0] == 1
    (words,) = said
    assert "was ended from outside (by signal 9), at candidate 1; another one takes" in words
    assert seen[-1].done == 6


def dies(candidate: Candidate, fold: int) -> FoldResult:
    os._exit(3)


def prepare_dying() -> Evaluate:
    return dies


def test_workers_that_keep_dying_are_not_replaced_for_ever(
    plan: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "REPLACED", 1)
    said: list[str] = []
    with pytest.raises(PruningError, match="ended from outside 2 times, perhaps because memory"):
        run_workers(plan, prepare_dying, workers=1, say=said.append)
    assert [words.rpartition("; ")[2] for words in said] == [
        "another one takes its place", "it is not replaced",
    ]  # fmt: skip
    assert "exit code 3" in said[0]


def prepare_wrong() -> Evaluate:
    raise ConfigError("metric: no such function")


class Own(Exception):
    """Cannot be made again from its text."""

    def __init__(self, place: str, line: int) -> None:
        super().__init__(f"{place}:{line}")


def prepare_own() -> Evaluate:
    raise Own("nets.py", 7)


def test_an_error_of_a_worker_ends_the_search_as_itself(plan: StudyPlan) -> None:
    with pytest.raises(ConfigError, match="metric: no such function") as error:
        run_workers(plan, prepare_wrong, workers=1)
    assert str(error.value) == "metric: no such function"
    assert "in prepare_wrong" in error.value.__notes__[0]
    with pytest.raises(PruningError, match=r"^a worker failed: Own: nets\.py:7"):
        run_workers(plan, prepare_own, workers=1)


def test_a_time_limit_is_no_error(plan: StudyPlan, tmp_path: Path) -> None:
    assert run_workers(plan, partial(prepare, tmp_path), workers=1, timeout=0.0) == []


LEAD = """
import sys
from functools import partial
from pathlib import Path
from tests.search.studies import make_plan, prepare
from secateurs.searching.workers import run_workers

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plan = make_plan(f"sqlite:///{folder}/study.db", grace=int(sys.argv[2]))
    run_workers(plan, partial(prepare, folder, 1), workers=2)
"""


def begin_lead(folder: Path, grace: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    (folder / "lead.py").write_text(LEAD)
    return subprocess.Popen(
        [sys.executable, str(folder / "lead.py"), str(folder), str(grace)],
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_lead_that_is_ended_takes_its_workers_along(tmp_path: Path, how: signal.Signals) -> None:
    """In the middle of a fold; what they held waits at once, and the next search goes on."""
    plan = make_plan(f"sqlite:///{tmp_path}/study.db", grace=600)
    lead = begin_lead(tmp_path, plan.grace)
    try:
        until(lambda: (tmp_path / "log").exists() and watch(plan).folds == 2)
        until(lambda: sum(fold == 1 for _, fold in calls(tmp_path).elements()) == 2)
        lead.send_signal(how)
        lead.wait(timeout=PATIENCE)
        until(lambda: watch(plan).running == 0)
    finally:
        lead.kill()
        _, words = lead.communicate()
    assert watch(plan).folds == 2
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in words
    (tmp_path / "go").touch()
    with open_study(plan) as study:
        work(study, prepare(tmp_path))
    assert finished(plan) == expected(plan)
    assert [calls(tmp_path)[number, fold] for number in (0, 1) for fold in (0, 1)] == [1, 2, 1, 2]
