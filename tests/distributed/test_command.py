"""`secateurs run` and `secateurs finetune` by torchrun: one speaks and writes for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateurs.runner import RESULTS
from tests.distributed.test_distributed import FRESH

NETS = """
import os, signal
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2))

def batches():
    x = torch.randn(60, 4)
    return list(zip(x.split(8), (x[:, 0] > 0).long().split(8)))

def read():
    print("reading")
    every = batches()
    mine = every[dist.get_rank() :: dist.get_world_size()]
    return {"train": mine, "validation": every, "test": every}

def read_all():
    every = batches()
    return {"train": every, "validation": every, "test": every}

CALLS = [0]

def dies(model, batches):
    # at the fourth call, the first time
    CALLS[0] += 1
    flag = Path("died")
    if CALLS[0] == 4 and dist.get_rank() == 1 and os.environ.get("DIE") and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(sum((model(x).argmax(1) == y).sum() for x, y in batches)) / 60

def fails(model, batches):
    if dist.get_rank() == 1:
        raise ValueError("the lamp is out")
    return 0.5
"""
RECIPE = """model: nets.py:build
data: nets.py:read
metric: nets.py:dies
budget: {units: 0.5}
schedule: {curve: linear, steps: 2}
finetune: {epochs: 2, lr: 0.01}
latency: []
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def torchrun(
    here: Path, *arguments: str, restarts: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}", "-m", "secateurs", *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=here, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **FRESH, **environment},
    )  # fmt: skip


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command has to say, without torchrun's own words."""
    return [line for line in done.stderr.splitlines() if line.startswith("secateurs:")]


def test_a_run_that_torchrun_starts_again_ends_as_one_without_interruption(here: Path) -> None:
    done = torchrun(here, "run", "r.yaml", "--resume", "--out", "a", restarts=1, DIE="yes")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (here / "died").exists()
    assert done.stderr.count("written:") == done.stdout.count("Asked:") == 1
    assert {p.name for p in (here / "a").iterdir()} == {*RESULTS} - {"graph.json"}
    notes = json.loads((here / "a" / "report.json").read_text())["notes"]
    assert "made by 2 processes" in notes[1]
    assert "samples: 60 train, 60 validation, 60 test" in notes
    done = torchrun(here, "run", "r.yaml", "--out", "b", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["notes"] == notes
    assert done.stderr.count("reading") == 2
    a, b = ((here / out / "model.safetensors").read_bytes() for out in "ab")
    assert a == b
    done = torchrun(here, "finetune", "a", "--set", "finetune.epochs=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("written:") == done.stdout.count("test metric") == 1
    assert (here / "a-finetuned" / "finetune.json").exists()


@pytest.mark.parametrize(
    ("change", "text", "code"),
    [
        ("metric=nets.py:fails", "the lamp is out", 1),
        ("data=nets.py:read_all", "the same training data", 2),
    ],
)
def test_a_run_that_fails_has_one_message(here: Path, change: str, text: str, code: int) -> None:
    done = torchrun(here, "run", "r.yaml", "--set", change)
    (line,) = said(done)
    assert text in line
    assert done.stdout == ""
    assert done.stderr.count(f"exitcode  : {code} ") == 2, done.stderr[-3000:]
    assert "site-packages/secateurs" not in done.stderr
    assert "in run_recipe" not in done.stderr
    assert not any((here / "runs").rglob("*.*"))
