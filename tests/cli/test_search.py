"""`secateurs search`: progress, Ctrl-C, resuming, refusing, and what is written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateurs import cli
from secateurs.cli.search import lines
from secateurs.errors import ConfigError
from secateurs.recipe import read_recipe
from secateurs.searching.plan import Snapshot, StudyPlan, open_study
from secateurs.searching.results import Trial
from secateurs.searching.run import plan_of
from secateurs.searching.study import Evaluate, after, study_trials, work
from tests.cli.signals import hears_ctrl_c
from tests.search.studies import PATIENCE, until

Run = Callable[..., tuple[int, str, str]]

NETS = """
import time
from pathlib import Path
import torch
from torch import nn
from secateurs.tasks.base import accuracy as measured

def build():
    print("building")
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))

def some(n):
    x = torch.randn(n, 4)
    return [(x, (x[:, 0] > 0).long())]

def read():
    return {"train": some(64), "validation": some(60), "test": some(40)}

def accuracy(model, batches):
    with open(Path(__file__).with_name("log"), "a") as log:
        log.write(f"{sum(len(x) for x, _ in batches)}\\n")
    return measured(model, batches)

def slow(model, batches):
    time.sleep(0.2)
    return accuracy(model, batches)
"""
OWN = """model: nets.py:build
data: nets.py:read
metric: nets.py:accuracy
budget: {units: 0.5}
schedule: {curve: linear, steps: 1}
finetune: {steps: 5}
latency: [1]
search:
  space: {budget.units: [0.75, 0.5, 0.25]}
  max_drop: 0.9
  folds: {k: 3}
  mode: fixed
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command in a folder of its own; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own.yaml").write_text(OWN)
    (tmp_path / "nets.py").write_text(NETS)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateurs", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        code = end.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, err

    return call


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without processes."""

    def judge(
        plan: StudyPlan, prepare: Callable[[], Evaluate], *, timeout: float | None,
        progress: Callable[[Snapshot], None], **_: Any,
    ) -> list[Trial]:  # fmt: skip
        with open_study(plan) as study:
            work(study, prepare(), stop=after(timeout), progress=progress)
            return study.trials()

    monkeypatch.setattr("secateurs.searching.run.run_workers", judge)


def judged(folder: Path) -> int:
    """How often a model was evaluated on a part of the validation data."""
    return (folder / "log").read_text().split().count("20")


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(
    run: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With a real worker process; nothing that is finished is judged again."""
    call = ["search", "own.yaml", "--set", "metric=nets.py:slow"]
    url = f"sqlite:///{tmp_path}/runs/own-search/study.db"
    with subprocess.Popen(
        [sys.executable, "-c", "from secateurs.cli import main; main()", *call],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    ) as process:
        try:
            until(lambda: process.poll() is not None or len(finished(url)) == 1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, out) == (1, ""), err
    assert "folds are kept; the same command goes on from there\n" in err
    assert err.endswith("secateurs: interrupted\n")
    assert "Traceback" not in err
    before = finished(url)
    assert 1 <= len(before) <= 2

    request.getfixturevalue("inline")
    code, out, err = run(*call)
    assert code == 0, err
    assert finished(url)[: len(before)] == before
    assert "3 of 3 candidates, 9 of 9 folds" in err
    assert "Test split, touched once (40 samples): accuracy" in out


def finished(url: str) -> list[Trial]:
    """The finished trials, none while the study is being made."""
    try:
        return study_trials(url, "own")
    except ConfigError:
        return []


@pytest.mark.usefixtures("inline")
def test_what_is_printed_written_and_kept(run: Run, tmp_path: Path) -> None:
    code, out, err = run("search", "own.yaml")
    assert code == 0, err
    folder = tmp_path / "runs" / "own-search"
    found = json.loads((folder / "search.json").read_text())
    files = {"search.json", "study.db", "recipe.yaml", "model.safetensors", "plan.json"}
    assert files <= {p.name for p in folder.iterdir()}
    assert "written: runs/own-search: " in err
    chosen = found["choice"]["candidate"]
    assert chosen["values"] == {"budget.units": 0.25}
    assert read_recipe(folder / "recipe.yaml").budget.units == 0.25  # type: ignore[union-attr]
    (row,) = [line for line in out.splitlines() if "chosen" in line.split("  ")[-1]]
    assert row.startswith("budget.units=0.25")
    assert out.startswith("Chosen: budget.units=0.25: mean drop ")
    for why in found["choice"]["why"]:
        assert why in out
    assert "building" in err
    assert "building" not in out
    once = judged(tmp_path)

    code, out, err = run("search", "own.yaml")
    assert (code, out) == (2, "")
    assert "already holds" in err
    code, out, err = run("search", "own.yaml", "--resume", "--json")
    assert code == 0, err
    again = json.loads(out)
    assert {**again, "environment": 0} == {**found, "environment": 0}
    assert judged(tmp_path) == once

    code, out, err = run("search", "own.yaml", "--resume", "--set", "search.max_drop=0.0001")
    assert judged(tmp_path) == once
    assert code == 1
    assert out.startswith("Nothing was chosen: ")
    assert not (folder / "model.safetensors").exists()
    code, out, err = run("search", "own.yaml", "--resume", "--set", "finetune.steps=6")
    assert (code, out) == (2, "")
    assert "study 'own' was made by another search: recipe." in err
    assert "finetune.steps was 5, is 6" in err
    (tmp_path / "nets.py").write_text(NETS + "\n# changed\n")
    code, _, err = run("search", "own.yaml", "--resume")
    assert (code, "files.nets.py was" in err) == (2, True)
    code, _, err = run("search", "own.yaml", "--force", "--set", "finetune.steps=6")
    assert code == 0, err
    assert judged(tmp_path) > once


@pytest.mark.usefixtures("inline")
def test_the_machine_that_is_second_leaves_the_test_split_alone(run: Run, tmp_path: Path) -> None:
    storage = ("--storage", f"sqlite:///{tmp_path}/both.db")
    code, first, err = run("search", "own.yaml", "--out", "one", *storage, "--json")
    assert code == 0, err
    read = (tmp_path / "log").read_text().split().count("40")
    assert read == 2  # before and after
    assert (tmp_path / "one" / "sensitivity.json").is_file()
    assert "Where the dense network is sensitive" in (tmp_path / "one" / "search.html").read_text()
    code, second, err = run("search", "own.yaml", "--out", "two", *storage, "--json")
    assert code == 0, err
    a, b = json.loads(first), json.loads(second)
    assert (a["trials"], a["choice"]) == (b["trials"], b["choice"])
    assert a["final"] is not None
    assert b["final"] is None
    assert b["notes"][-1].startswith("the chosen network is made by ")
    assert b["notes"][-1].endswith("/one, which reads the test split")
    assert (tmp_path / "log").read_text().split().count("40") == read
    assert {p.name for p in (tmp_path / "two").iterdir()} == {
        "search.json", "search.html", "search.md",
    }  # fmt: skip


@pytest.mark.usefixtures("inline")
def test_a_second_choice_says_that_the_test_split_was_read_before(run: Run) -> None:
    own = ("search", "own.yaml", "--set", "search.sampler=random", "--json")
    code, out, err = run(*own, "--trials", "1")
    assert code == 0, err
    assert "read before" not in out
    code, out, err = run(*own, "--trials", "3", "--resume")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["trials"]) == 3
    assert (
        "the test split was read before in this search (after 1 candidates for"
        in (found["notes"][-1])
    )


def test_a_dry_run_trains_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run("search", "own.yaml", "--dry-run")
    assert code == 0, err
    assert "3 candidates on 3 folds" in out
    assert "  2: budget.units=0.25" in out
    assert not (tmp_path / "runs").exists()
    code, out, err = run("search", "own.yaml", "--dry-run", "--json", "--set", "search.sampler=tpe",
                         "--trials", "7")  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert (found["candidates"], found["folds"], found["listed"]) == (7, 3, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", "0"), "greater than or equal to 1"),
        (("--timeout", "0"), "--timeout must be above 0 seconds, got 0"),
        (("--storage", "mysql://x/y"), "storage must be sqlite:///FILE or postgresql"),
        (("--resume", "--force"), "give one of them"),
        (("--set", "search=null"), "this recipe has no search"),
    ],
)
@pytest.mark.usefixtures("inline")
def test_calls_that_do_not_fit(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("search", "own.yaml", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_the_fingerprint_is_the_same_on_every_machine(run: Run, tmp_path: Path) -> None:
    """Paths stay as they are written; the number of trials may change."""
    from secateurs.runner import load_problem
    from secateurs.searching.evaluation import prepare

    def fingerprint(*changes: str) -> dict[str, Any]:
        recipe = read_recipe(tmp_path / "own.yaml", changes)
        anchored = recipe.anchored(tmp_path)
        judge = prepare(anchored, load_problem(anchored, tmp_path), tmp_path)
        return plan_of(judge, recipe, "sqlite:///x.db", "own").fingerprint()

    random = "search.sampler=random"
    assert str(tmp_path) not in json.dumps(fingerprint())
    assert fingerprint(random, "search.trials=3") == fingerprint(random, "search.trials=4")
    assert fingerprint() == fingerprint("search.max_drop=0.1")
    assert fingerprint() != fingerprint("search.folds.k=4")
    tpe = ("search.sampler=tpe", "search.trials=4")
    assert fingerprint(*tpe) != fingerprint(*tpe, "search.max_drop=0.1")


def test_progress_as_lines() -> None:
    said: list[str] = []
    now = iter([0.0, 30.0, 60.0, 600.0])
    watch = lines(said.append, lambda: next(now))

    def at(done: int, folds: int, problems: int = 0) -> Snapshot:
        return Snapshot(40, done, problems, 2, folds, 200 - 3 * problems, ())

    watch(at(10, 50), "a=1")  # goes on from here
    watch(at(11, 55), "a=1")  # 11 of 40 is still the fifth part of twenty
    watch(at(12, 60), "a=2")
    watch(at(12, 61), "a=2")
    watch(at(20, 99, 1), "")
    assert said == [
        "search: 10 of 40 candidates, 50 of 200 folds, best so far a=1",
        "search: 12 of 40 candidates, 60 of 200 folds, best so far a=2, about 7 min left",
        "search: 20 of 40 candidates, 99 of 197 folds, 1 impossible, about 2 min left",
    ]
