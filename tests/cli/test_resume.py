"""`secateurs run --resume`: killed, interrupted, finished, refused; the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from secateurs import cli
from secateurs.checkpoints import Checkpoints
from secateurs.report.data import Report
from tests.checkpoints.scenarios import report_marks
from tests.cli.signals import hears_ctrl_c

NETS = """
import os, time
import torch
from torch import nn
from torch.nn import functional as F

def build():
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 2))

def read():
    x = torch.randn(32, 4)
    y = (x[:, 0] > 0).long()
    train = list(zip(x.split(8), y.split(8)))
    return {"train": train, "validation": [(x, y)], "test": [(x, y)]}

def size(model, batches):
    return float(sum(p.count_nonzero() for p in model.parameters()))

def slow(outputs, targets):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return F.cross_entropy(outputs, targets)
"""
RECIPE = """model: nets.py:build
data: nets.py:read
loss: nets.py:slow
budget: {units: 0.5}
schedule: {curve: linear, steps: 2}
finetune: {epochs: 2}
latency: []
"""
MAIN = "import torch; torch.set_num_threads(1); from secateurs.cli import main; main()"
RESULTS = {"model.safetensors", "plan.json", "recipe.yaml", "report.json", "report.html"}


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


@contextmanager
def begun(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, slow, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "run", "r.yaml", "--out", "o"], cwd=folder,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hears_ctrl_c,
        env={**os.environ, "SLOW": "0.2"},
    ) as process:  # fmt: skip
        yield process


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """The command in this process; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> tuple[int, str, str]:
        line = ["secateurs", "run", "r.yaml", "--out", "o", *arguments]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, " ".join(err.split())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(threads)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def when_there_is_a_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not Checkpoints(folder / "o" / "checkpoints").files:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_killed_refused_resumed_complete(folder: Path, run: Run) -> None:
    with begun(folder) as process:
        when_there_is_a_checkpoint(folder, process)
        process.kill()
    code, _, err = run()
    assert code == 2
    assert "Go on with it by --resume, start again by --force" in err
    code, _, err = run("--resume", "--set", "budget.units=0.4")
    assert code == 2
    assert "stages.0.budget.units was 0.5 and is 0.4" in err
    code, out, err = run("--resume")
    assert code == 0, err
    assert "written: " in err
    resumed = files(folder / "o")
    assert {p.name for p in (folder / "o").iterdir()} == RESULTS  # no checkpoints are left

    code, again, err = run("--resume")
    assert code == 0, err
    assert "o is complete: nothing is left to do" in err
    assert again == out
    assert files(folder / "o") == resumed
    code, _, err = run("--resume", "--set", "budget.units=0.4")
    assert code == 2
    assert "the results of another recipe: budget.units was 0.5 and is 0.4" in err

    (folder / "o").rename(folder / "first")
    code, _, err = run("--resume")  # nothing is there: from the beginning
    assert code == 0, err
    assert "holds no checkpoint: starting from the beginning" in err
    whole = files(folder / "o")
    for name in ("model.safetensors", "plan.json", "recipe.yaml"):
        assert whole[name] == resumed[name]
    one, other = (Report.from_dict(json.loads(f["report.json"])) for f in (whole, resumed))
    assert report_marks(one) == report_marks(other)


def test_ctrl_c_says_how_to_go_on(folder: Path, run: Run) -> None:
    with begun(folder) as process:
        when_there_is_a_checkpoint(folder, process)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "the same command with --resume goes on" in err
    assert err.strip().endswith("secateurs: interrupted")
    code, _, err = run("--force")  # or from the beginning
    assert code == 0, err
    assert {p.name for p in (folder / "o").iterdir()} == RESULTS


def test_a_budget_that_cannot_be_met_leaves_nothing_to_resume(folder: Path, run: Run) -> None:
    code, _, err = run("--set", "metric=nets.py:size", "--set", "budget={metric_drop: 0.0}",
                       "--set", "schedule=null")  # fmt: skip
    assert code == 1
    assert "nothing can be cut" in err
    assert not (folder / "o" / "checkpoints").exists()


def test_a_comparison_needs_no_resume(run: Run) -> None:
    code, _, err = run("--resume", "--controls", "random")
    assert code == 2
    assert "goes on by itself" in err
