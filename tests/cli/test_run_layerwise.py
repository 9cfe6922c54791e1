"""`secateurs run` layer by layer."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import secateurs as sc
from secateurs.allocation import allocate
from secateurs.cli import app
from secateurs.posttraining import prune_layerwise
from secateurs.surgery import load
from secateurs.surgery.files import load_plan
from secateurs.types import Scores

RECIPE = """model: tiny:build
data: tiny:read
granularity: weight
budget: {units: 0.3}
layerwise: {METHOD}
latency: []
seed: 2
"""
HEALED = """model: tiny:build
data: tiny:read
granularity: weight
budget: {params: 0.4}
allocation: global_normalized
criterion: magnitude
layerwise: {method: wanda}
schedule: {curve: linear, steps: 2}
finetune: {epochs: 1, distill: 0.5}
latency: []
"""
TINY = """import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.first.weight
        self.wide, self.head = nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x):
        x = torch.relu(self.again(torch.relu(self.first(x))))
        return self.head(torch.relu(self.wide(x)))


def build():
    torch.manual_seed(0)
    return Tied()


def read():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(120, 8, generator=draw) @ torch.randn(8, 8, generator=draw)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    parts = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 120, 20)]
    return {"train": parts[:4], "validation": parts[4:5], "test": parts[5:]}
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.py").write_text(TINY)
    for method in ("sparsegpt", "wanda"):
        (tmp_path / f"{method}.yaml").write_text(RECIPE.replace("METHOD", f"method: {method}"))
    (tmp_path / "healed.yaml").write_text(HEALED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_a_recipe_prunes_layer_by_layer(method: str, folder: Path) -> None:
    done = call("run", f"{method}.yaml", "--out", "out", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    space: dict[str, object] = {}
    exec(TINY, space)
    build, read = space["build"], space["read"]
    assert callable(build)
    assert callable(read)
    dense, train = build(), read()["train"]
    graph = sc.trace(dense, train[0][0])
    seen = {n: torch.zeros(graph.targets[n].n_units) for n in ("wide.weight", "head.weight")}
    counts = allocate(Scores(graph, seen, ""), sc.Budget(units=0.3)).kept
    density = {n: kept / graph.targets[n].n_units for n, kept in counts.items()}
    plan, _ = prune_layerwise(dense, train, density=density, method=method)  # type: ignore[arg-type]
    found = load_plan(folder / "out")
    assert {n: r.tolist() for n, r in found.removed.items()} == {
        n: r.tolist() for n, r in plan.removed.items()
    }
    model = load(folder / "out", build)
    assert all(torch.equal(model.state_dict()[n], w) for n, w in dense.state_dict().items())

    assert report["recipe"]["layerwise"]["method"] == method
    assert report["reached"]["units"] == sum(counts.values()) / 264
    assert [e["reason"] for e in report["excluded"] if e["name"] == "first.weight"] == [
        "layerwise: tied to again.weight, which reads other inputs"
    ]
    (note,) = (n for n in report["notes"] if n.startswith(f"after cut 1: pruned by {method}: "))
    assert "accuracy" in note
    assert (folder / "out" / "report.html").is_file()
    # what it wrote and what it suggests can be run
    again = call("run", "out/recipe.yaml", "--out", "again")
    assert again.exit_code == 0, again.output
    for tensor, value in load(folder / "again", build).state_dict().items():
        assert torch.equal(value, model.state_dict()[tensor])
    (chance,) = (line for line in report["next_steps"] if "better than chance" in line)
    assert chance.startswith(f"is {method} better than chance? ")
    assert ("repair=[reconstruct]" in chance) == (method == "sparsegpt")
    for line in report["next_steps"]:
        _, _, command = line.partition("secateurs run ")
        if command:
            tried = call("run", *shlex.split(command), *([] if line == chance else ["--dry-run"]))
            assert tried.exit_code == 0, (line, tried.exception)
    random = json.loads((folder / "out-random" / "report.json").read_text())
    assert random["recipe"]["criterion"] == "random"
    assert "layerwise" not in random["recipe"]


def test_steps_that_heal(folder: Path) -> None:
    done = call("run", "healed.yaml", "--out", "out", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["reached"]["params"] <= 0.4
    assert [row["metric_healed"] is not None for row in report["steps"]] == [True, True]
    assert sum("pruned by wanda" in note for note in report["notes"]) == 2
    assert report["recipe"]["criterion"] == "magnitude"


def test_a_dry_run_says_how(folder: Path) -> None:
    for recipe, how in (
        ("sparsegpt", "Budget(units=0.3), Schedule(curve='one_shot', steps=1), "
         "LayerwiseCut(method='sparsegpt', block=128, damping=0.01)"),
        ("healed", "Budget(params=0.4), Schedule(curve='linear', steps=2), "
         "LayerwiseCut(method='wanda', block=128, damping=0.01)"),
    ):  # fmt: skip
        done = call("run", f"{recipe}.yaml", "--out", "out", "--dry-run")
        assert done.exit_code == 0, done.output
        assert f"stage 1: {how}" in done.stdout
        assert "left whole: first.weight: layerwise: tied to again.weight" in done.stdout
        assert "  first.weight: " not in done.stdout
        assert "  wide.weight: 192 units" in done.stdout
    assert not (folder / "out").exists()


def test_fresh_weights_are_the_only_control(folder: Path) -> None:
    done = call("run", "wanda.yaml", "--controls", "all", "--seeds", "0", "--dry-run")
    assert "none of the controls can be run" in str(done.exception)  # there is no finetune either
    assert "layerwise= chooses weights without them" in str(done.exception)
    done = call("run", "healed.yaml", "--controls", "all", "--seeds", "0,1", "--out", "compared")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((folder / "compared" / "ablation.json").read_text())
    assert found["method"] == "wanda"
    assert {row["control"] for row in found["rows"]} == {None, "reinit"}
    assert set(found["skipped"]) == {"random", "shuffle", "invert", "random-labels"}
