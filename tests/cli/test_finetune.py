"""`secateurs finetune`: a saved smaller model, trained further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from secateurs.checkpoints import Checkpoints
from secateurs.cli import app
from secateurs.surgery import load, slice_masks
from secateurs.surgery.files import load_plan
from secateurs.tasks import get_task

WEIGHTS = """task: cancer-mlp
granularity: weight
budget: {params: 0.2}
schedule: {curve: linear, steps: 1}
latency: []
"""
STAGES = """task: cancer-mlp
stages:
- {budget: {params: 0.5}, granularity: weight, schedule: {curve: one_shot, steps: 1}}
- {budget: {macs: 0.4}, schedule: {curve: one_shot, steps: 1}, finetune: {steps: 1, lr: 0.01}}
latency: []
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved runs: `weights` without any fine-tuning, `stages` of two rounds."""
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe in (("weights", WEIGHTS), ("stages", STAGES)):
        (folder / f"{name}.yaml").write_text(recipe)
        done = call("run", folder / f"{name}.yaml", "--out", folder / name)
        assert done.exit_code == 0, done.output
    return folder


def test_a_sparse_model_is_trained_and_stays_sparse(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer"
    done = call(
        "finetune", runs / "weights", "--set", "finetune.epochs=2", "--set", "finetune.lr=0.01",
        "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "validation auc" in done.stdout
    assert "test auc" in done.stdout
    build = get_task("cancer-mlp").build
    before, after = load(runs / "weights", build), load(out, build)
    masks = slice_masks(load_plan(out))
    changed = 0
    for name, weight in after.named_parameters():
        kept = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert not weight[~kept].any()
        changed += int((weight != before.get_parameter(name)).sum())
    assert changed > 100
    told = json.loads((out / "finetune.json").read_text())
    assert [row["epoch"] for row in told["epochs"]] == [1, 2]
    assert told["finetune"]["lr"] == 0.01
    # and once more, from there
    again = call("finetune", out, "--set", "finetune.steps=1", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output


def test_the_dense_model_teaches_its_hidden_states(runs: Path, tmp_path: Path) -> None:
    changes = ["--set", "finetune.hidden=1.0", "--set", "finetune.distill=0.5"]
    board = tmp_path / "board"
    done = call(
        "finetune", runs / "stages", *changes, "--set", "finetune.steps=3",
        "--out", tmp_path / "out", "--tensorboard", board, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["finetune"]["lr"] == 0.01  # of the last stage
    assert told["steps"] == 3
    assert list(board.glob("events.*"))


class Crash(BaseException):
    """In place of kill -9."""


def test_a_training_that_was_interrupted_goes_on(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str | Path] = [
        "finetune",
        runs / "weights",
        "--set",
        "finetune.epochs=3",
        "--set",
        "finetune.lr=0.01",
    ]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call(*given, "--out", whole).exit_code == 0

    saved, write = list[int](), Checkpoints.save

    def crash(self: Checkpoints, step: int, *rest: Any, **more: Any) -> Path:
        path = write(self, step, *rest, **more)
        saved.append(step)
        if len(saved) == 5:
            raise Crash
        return path

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "due", lambda self, step: True)
        patched.setattr(Checkpoints, "save", crash)
        with pytest.raises(Crash):
            call(*given, "--out", out)
    assert list((out / "checkpoints").iterdir())
    refused = call(*given, "--out", out)
    assert "Go on with it by --resume, start again by --force" in str(refused.exception)
    other = call(*given, "--set", "finetune.lr=0.02", "--out", out, "--resume")
    assert "lr was 0.01 and is 0.02" in str(other.exception)
    done = call(*given, "--out", out, "--resume", "--tensorboard", tmp_path / "board")
    assert done.exit_code == 0, done.output
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (out / "checkpoints").exists()

    again = call(*given, "--out", out, "--resume", "--json")
    assert "is complete: nothing is left to do" in again.stderr
    assert json.loads(again.stdout) == json.loads((out / "finetune.json").read_text())
    other = call(*given, "--set", "finetune.lr=0.02", "--out", out, "--resume")
    assert "results of another recipe: finetune.lr was 0.01 and is 0.02" in str(other.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights"], "has no fine-tuning of its own"),
        (["weights", "--set", "budget.params=0.1"], "only its training can be changed"),
        (["weights", "--set", "finetune.epoch=3"], "Did you mean 'epochs'"),
        (["nothing"], "is no directory"),
        (["."], "holds no recipe.yaml"),
        (["stages", "--out", "stages"], "is the directory that is read"),
        (["stages", "--out", "weights"], "already holds model.safetensors"),
        (["stages", "--out", "weights.yaml"], "is a file"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(runs)
    done = call("finetune", *arguments)
    assert done.exit_code != 0
    assert message in str(done.exception)
