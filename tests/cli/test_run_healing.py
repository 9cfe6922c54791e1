"""`secateurs run` from an untrained network, and with a log for TensorBoard."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from secateurs.cli import app
from secateurs.surgery import load
from secateurs.surgery.files import load_plan
from secateurs.tasks import get_task

BEGIN = "task: cancer-mlp\nstart: untrained\ngranularity: weight\nbudget: {params: 0.2}\n"
TRAIN = "finetune: {epochs: 3, lr: 0.01}\nlatency: []\n"
RECIPES = {
    "synflow": BEGIN + TRAIN + "criterion: synflow\nschedule: {curve: exponential, steps: 5}\n"
    "round_to: 1\n",
    "at_init": BEGIN + TRAIN + "at_init: {method: force, iterations: 4}\n",
    "anew": BEGIN + TRAIN + "at_init: {method: synflow, reinitialise: true}\n",
    "ticket": BEGIN + TRAIN + "criterion: magnitude\nticket: {rounds: 2, rewind: 0.1}\n",
}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_an_untrained_network_is_pruned_and_learns(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "secateurs.runner.problem.dense_checkpoint"  # nothing is trained before
    monkeypatch.setattr(target, None)
    done = call("run", f"{name}.yaml", "--out", "out", "--tensorboard", "board", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    auc = next(row for row in report["rows"] if row["name"] == "test auc")
    assert auc["before"] < 0.9 < auc["after"]
    assert "Before, the network was not trained." in report["headline"]
    assert any("those of the untrained network" in note for note in report["notes"])
    assert report["reached"]["params"] <= 0.2
    assert list((folder / "board").glob("events.*"))
    assert not (folder / "out" / "checkpoints").exists()
    model, plan = load(folder / "out", get_task("cancer-mlp").build), load_plan(folder / "out")
    for tensor, mask in plan.masks.items():
        assert not dict(model.named_parameters())[tensor][~mask].any()
    # what it suggests can be run
    for line in report["next_steps"]:
        _, _, command = line.partition("secateurs run ")
        if command:
            again = call("run", *shlex.split(command), "--dry-run")
            assert again.exit_code == 0, (line, again.exception)


def test_the_log_changes_nothing(folder: Path) -> None:
    for out, log in (("plain", []), ("logged", ["--tensorboard", "board"])):
        assert call("run", "ticket.yaml", "--out", out, *log).exit_code == 0
    plain, logged = (folder / out / "model.safetensors" for out in ("plain", "logged"))
    assert plain.read_bytes() == logged.read_bytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("at_init", "AtInit(method='force', iterations=4)"),
        ("anew", "AtInit(method='synflow', reinitialise=True)"),
        ("ticket", "TicketSearch(rounds=2, rewind=0.1, reset='weights')"),
        ("synflow", "Schedule(curve='exponential', steps=5"),
    ],
)
def test_a_dry_run_says_how(name: str, text: str, folder: Path) -> None:
    done = call("run", f"{name}.yaml", "--out", "out", "--dry-run")
    assert done.exit_code == 0, done.output
    assert text in done.stdout
    assert "what is pruned was not trained before" in done.stdout
    assert not (folder / "out").exists()


def test_curves_of_a_comparison_are_refused(folder: Path) -> None:
    done = call("run", "synflow.yaml", "--controls", "random", "--tensorboard", "board")
    assert "--tensorboard is for a single run" in str(done.exception)
