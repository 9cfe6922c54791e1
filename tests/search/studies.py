"""A made-up search for tests of the study, and processes that work for it and can be killed.

What a process judges is written to the file `log`, and the fold `held`, counted in the order in
which a candidate is judged, waits for the file `go`. So a test kills a process where it wants,
without sleeping.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secateurs.errors import BudgetError
from secateurs.searching.config import Candidate, Space
from secateurs.searching.plan import Snapshot, StudyPlan, open_study
from secateurs.searching.results import FoldResult, Trial
from secateurs.searching.study import Evaluate, work

SPACE = Space({"budget.macs": [0.5, 0.25, 0.125], "criterion": ["taylor", "magnitude"]})
FOLDS = 3
IMPOSSIBLE = 3  # candidate that no budget reaches, found out at its second fold
PATIENCE = 300.0  # what takes a second takes longer on a machine with much to do


def judged(candidate: Candidate, fold: int) -> FoldResult:
    """What a fold comes to, by hand: 0.9 - 0.1 x macs left out - 0.01 x fold (+ 0.02 taylor)."""
    macs = float(candidate.values["budget.macs"])
    good = 0.02 * (candidate.values["criterion"] == "taylor")
    metric = 0.9 - 0.1 * (1 - macs) - 0.01 * fold + good
    return FoldResult(fold, 0.9, metric, {"macs": macs}, None, 0.0)


def expected(plan: StudyPlan) -> list[Trial]:
    """The trials of a grid, without any study."""
    return [
        Trial(candidate, tuple(judged(candidate, fold) for fold in range(FOLDS)))
        if candidate.number != IMPOSSIBLE
        else Trial(candidate, (judged(candidate, 0),), "budget.macs: cannot be reached")
        for candidate in plan.space.grid()
    ]


def evaluate(folder: Path, held: int | None, candidate: Candidate, fold: int) -> FoldResult:
    """Writes down what is judged; at its fold number `held` it waits for the file `go`."""
    turn = (fold - candidate.number) % FOLDS
    with (folder / "log").open("a") as log:
        log.write(f"{candidate.number} {turn}\n")
    if turn == held:
        until(lambda: (folder / "go").exists())
    if candidate.number == IMPOSSIBLE and turn == 1:
        raise BudgetError("budget.macs: cannot be reached")
    return judged(candidate, fold)


def prepare(folder: Path, held: int | None = None) -> Evaluate:
    """`evaluate` for a worker process."""
    return partial(evaluate, folder, held)


def calls(folder: Path) -> Counter[tuple[int, int]]:
    """How often each candidate was judged on its first, second and third fold."""
    lines = (folder / "log").read_text().splitlines()
    return Counter((int(a), int(b)) for a, b in (line.split() for line in lines))


def until(true: Callable[[], bool]) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(0.02)


def make_plan(storage: str, **changes: Any) -> StudyPlan:
    """A grid of six candidates, three folds; a worker counts as dead after two seconds."""
    given = {"storage": storage, "name": "made-up", "space": SPACE, "n_folds": FOLDS, "interval": 1,
             "grace": 2}  # fmt: skip
    return StudyPlan(**{**given, **changes})


def watch(plan: StudyPlan) -> Snapshot:
    """How far the study is."""
    with open_study(plan) as study:
        return study.snapshot()


def finished(plan: StudyPlan) -> list[Trial]:
    """The finished trials."""
    with open_study(plan) as study:
        return study.trials()


def begin_worker(plan: StudyPlan, folder: Path, held: int | None = None) -> subprocess.Popen[str]:
    """A process that works for the study, as one on another machine would."""
    asked = [plan.storage, str(folder), json.dumps(held), json.dumps(dict(plan.made_by))]
    code = "import sys; from tests.search.studies import main; main(sys.argv[1:])"
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *asked],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        stderr=subprocess.PIPE,
        text=True,
    )


def main(asked: Sequence[str]) -> None:
    """What `begin_worker` starts."""
    storage, folder, held, made_by = asked
    plan = make_plan(storage, made_by=json.loads(made_by))
    (Path(folder) / f"ready-{os.getpid()}").touch()
    with open_study(plan) as study:
        work(study, prepare(Path(folder), json.loads(held)), worker=str(os.getpid()))
