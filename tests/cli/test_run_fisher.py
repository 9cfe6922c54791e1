"""`secateurs run` with masks by Fisher information."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import secateurs as sc
from secateurs.cli import app
from secateurs.posttraining import any_output, search_masks
from secateurs.surgery import load
from secateurs.surgery.files import load_plan
from secateurs.tasks import dense_checkpoint, get_task

RECIPE = """task: cancer-mlp
budget: {macs: 0.3}
fisher_masks: {importance: any_output, n_samples: 100, tune: TUNE}
latency: []
seed: 2
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "weights.yaml").write_text(RECIPE.replace("TUNE", "weights"))
    (tmp_path / "neither.yaml").write_text(RECIPE.replace("TUNE", "null"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["weights", "neither"])
def test_a_recipe_finds_what_the_search_finds(name: str, folder: Path) -> None:
    done = call("run", f"{name}.yaml", "--out", "out", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["reached"]["macs"] <= 0.3
    assert report["recipe"]["fisher_masks"]["tune"] == (None if name == "neither" else "weights")
    task = get_task("cancer-mlp")
    dense, data, _ = dense_checkpoint(task, seed=2)
    found = search_masks(
        dense, data.calibration, task.loss_fn, graph=sc.trace(dense, data.example_inputs),
        budget=sc.Budget(macs=0.3), importance=any_output(2), n_samples=100, seed=2,
        tune="weights" if name == "weights" else None,
    )  # fmt: skip
    plan = load_plan(folder / "out")
    assert {n: r.tolist() for n, r in plan.removed.items()} == {
        n: r.tolist() for n, r in found.plan.removed.items()
    }
    model = load(folder / "out", task.build)
    sc.verify(dense, model, found.plan, data.example_inputs)
    steps = [note for note in report["notes"] if note.startswith("fisher masks: ")]
    assert len(steps) == len(found.won)
    # what it wrote and what it suggests can be run
    again = call("run", "out/recipe.yaml", "--out", "again")
    assert again.exit_code == 0, again.output
    for tensor, value in load(folder / "again", task.build).state_dict().items():
        assert torch.equal(value, model.state_dict()[tensor])
    better = [line for line in report["next_steps"] if "better than chance" in line]
    assert len(better) == 1
    assert ("repair=[reconstruct]" in better[0]) == (name == "weights")
    for line in report["next_steps"]:
        _, _, command = line.partition("secateurs run ")
        if command:
            dry = call("run", *shlex.split(command), "--dry-run")
            assert dry.exit_code == 0, (line, dry.exception)


def test_a_dry_run_says_how(folder: Path) -> None:
    for name, tuned in (("weights", "'weights'"), ("neither", "None")):
        done = call("run", f"{name}.yaml", "--out", "out", "--dry-run")
        assert done.exit_code == 0, done.output
        assert (
            f"stage 1: Budget(macs=0.3), FisherSearch(tune={tuned}, importance='any_output', "
            "damping=0.01, n_samples=100)"
        ) in done.stdout
    assert not (folder / "out").exists()


def test_controls_are_refused(folder: Path) -> None:
    done = call("run", "weights.yaml", "--controls", "random", "--dry-run")
    assert "does not read control" in str(done.exception)
