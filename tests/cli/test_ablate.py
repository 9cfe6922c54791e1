"""`secateurs run --controls`: table, verdict, JSON, faults, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from secateurs import cli
from secateurs.report.words import signed
from tests.cli.signals import hears_ctrl_c
from tests.pools import inline_pool

Run = Callable[..., tuple[int, str, str]]

NETS = """
import torch
from torch import nn

def build():
    print("building")
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))

def read():
    x = torch.randn(64, 4)
    return {name: [(x, (x[:, 0] > 0).long())] for name in ("train", "validation", "test")}

def slow(model, batches):
    import time
    from secateurs.tasks.base import accuracy
    time.sleep(0.3)
    return accuracy(model, batches)
"""
OWN = """model: nets.py:build
data: nets.py:read
budget: {units: 0.5}
schedule: {curve: linear, steps: 1}
finetune: {steps: 20}
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


@pytest.mark.slow
def test_a_comparison_from_end_to_end(run: Run, tmp_path: Path) -> None:
    """In real worker processes; what is printed is what was measured."""
    call = ("run", "own.yaml", "--controls", "shuffle,invert,random-labels", "--set",
            "criterion=magnitude")  # fmt: skip
    code, out, err = run(*call)
    assert code == 0, err
    folder = tmp_path / "runs" / "own-controls"
    assert {p.name for p in folder.iterdir()} == {"ablation.json", "recipe.yaml", "rows"}
    assert len(list((folder / "rows").iterdir())) == 9
    found = json.loads((folder / "ablation.json").read_text())
    assert found["seeds"] == [0, 1, 2]
    assert "magnitude and its controls, seeds 0, 1, 2" in out
    for row in found["comparisons"]:
        line = next(text for text in out.splitlines() if text.startswith(row["control"]))
        assert signed(row["test"]["mean"]) in line
        assert signed(row["after_cut"]["mean"]) in line
        assert row["text"][1:] in out
    assert f"{found['verdict'][1:]}." in out
    assert found["rule"] in out
    (reason,) = found["skipped"].values()
    assert f"random-labels: not run: {reason}." in out
    assert "written: runs/own-controls/ablation.json" in err

    begin = (folder / "rows" / "shuffle-seed1.json").stat().st_mtime_ns
    code, again, err = run(*call, "--json")
    assert code == 0, err
    assert (folder / "rows" / "shuffle-seed1.json").stat().st_mtime_ns == begin
    assert json.loads(again) == found
    code, out, err = run("run", str(folder / "recipe.yaml"), "--out", str(folder), "--dry-run")
    assert code == 0, err
    assert "9 runs, 9 of them finished: the criterion itself, shuffle, invert; seeds 0, 1, 2" in out
    assert "cannot be run: random-labels: control=" in out

    code, out, err = run(*call, "--set", "budget.units=0.25")
    assert (code, out) == (2, "")
    assert "budget.units was 0.5, is 0.25. Add --force" in " ".join(err.split())


def test_the_shape_of_the_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateurs.ablation.run.worker_pool", inline_pool)
    code, out, err = run("run", "own.yaml", "--controls", "invert", "--seeds", "4", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found.keys() == {
        "format", "title", "method", "metric", "better", "seeds", "rows", "comparisons", "skipped",
        "failed", "knows_more", "verdict", "notes", "recipe", "rule", "made_with",
    }  # fmt: skip
    assert (found["title"], found["method"], found["metric"]) == (
        "nets.py:build",
        "taylor",
        "accuracy",
    )
    assert [(r["control"], r["seed"]) for r in found["rows"]] == [(None, 4), ("invert", 4)]
    (row,) = found["comparisons"]
    assert row.keys() == {"control", "seeds", "test", "after_cut", "shown", "text"}
    assert row["test"].keys() == {"values", "mean", "error", "outcome"}
    assert (row["test"]["error"], row["test"]["outcome"]) == (None, "too few")
    assert found["knows_more"] is None
    assert "needs the control shuffle (it was not asked for)" in found["verdict"]
    code, out, err = run("run", "own.yaml", "--controls", "invert", "--seeds", "4")
    assert code == 0, err
    assert "Verdict" not in out
    assert "No verdict on per-layer density" in out
    assert "invert: no verdict: it needs at least three seeds, and there is 1." in out
    assert "Mean over 1 seed " in out


FAULTS = [
    (["--controls", "shufle"], "unknown control 'shufle'. Did you mean 'shuffle'?"),
    (["--controls", "shuffle,"], "unknown control ''."),
    (["--controls", "shuffle,shuffle"], "control: shuffle is listed twice"),
    (["--controls", "all", "--seeds", "0,x"], "--seeds '0,x': write whole numbers with commas"),
    (["--controls", "all", "--seeds", "0 1"], "--seeds '0 1': write whole numbers with commas"),
    (["--controls", "all", "--seeds", "-1"], "write whole numbers with commas"),
    (["--controls", "all", "--seeds", "1,1"], "seeds: 1 is listed twice"),
    (["--controls", "all", "--seeds", f"{2**32}"], "seeds.0: got 4294967296"),
    (["--controls", "all", "--seeds", "1", "--seed", "2"], "give --seed for a single run or"),
    (["--seeds", "0,1,2"], "seeds: is for a comparison; add control: all"),
    (["--controls", "all", "--out", "full"], "full holds the results of a single run (plan.json)"),
    (["--controls", "random-labels", "--set", "criterion=magnitude"], "none of the controls can"),
]


@pytest.mark.parametrize(("arguments", "text"), FAULTS)
def test_a_fault_is_one_message(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something expensive has begun")

    monkeypatch.setattr("secateurs.ablation.run.worker_pool", refuse)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "plan.json").write_text("{}")
    code, out, err = run("run", "own.yaml", *arguments)
    assert (code, out) == (2, "")
    assert text in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_the_runs(run: Run, tmp_path: Path) -> None:
    code, out, err = run("run", "own.yaml", "--controls", "all", "--seed", "5", "--dry-run")
    assert code == 0, err
    names = "the criterion itself, random, shuffle, invert, random-labels, reinit"
    assert f"18 runs: {names}; seeds 5, 6, 7\n" in out
    assert out.endswith("would write to runs/own-controls\n")
    code, out, err = run("run", "own.yaml", "--controls", "all", "--dry-run", "--json")
    found = json.loads(out)["comparison"]
    assert found == {"seeds": [0, 1, 2], "runs": 18, "finished": 0, "skipped": {}}
    assert not (tmp_path / "runs").exists()


def test_a_single_control_is_still_a_single_run(run: Run, tmp_path: Path) -> None:
    code, _, err = run("run", "own.yaml", "--set", "control=shuffle", "--set", "latency=[]")
    assert code == 0, err
    assert (tmp_path / "runs" / "own" / "model.safetensors").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_what_is_finished(run: Run, tmp_path: Path) -> None:
    code = "from secateurs.cli import main; main()"
    call = ["run", "own.yaml", "--controls", "all", "--set", "metric=nets.py:slow", "--out", "o"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *call], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hears_ctrl_c,
    ) as process:  # fmt: skip
        while not list((tmp_path / "o").glob("rows/*.json")):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    assert "finished runs are kept in o/rows" in " ".join(err.split())
    assert err.endswith("secateurs: interrupted\n")
    kept = list((tmp_path / "o" / "rows").glob("*.json"))
    assert 0 < len(kept) < 18
    assert all(json.loads(file.read_text())["row"]["metric"] == "accuracy" for file in kept)
    assert not (tmp_path / "o" / "ablation.json").exists()
    code_, out, err = run(*call, "--dry-run")
    assert code_ == 0, err
    assert f"18 runs, {len(kept)} of them finished" in out
