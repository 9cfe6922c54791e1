"""`secateurs sensitivity`: curves, a picture and words; a second call measures nothing again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from secateurs.allocation.curves import Sensitivity
from secateurs.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["sensitivity", *arguments])


def test_curves_of_a_task(tmp_path: Path) -> None:
    out = tmp_path / "found"
    first = run("cancer-mlp", "--fractions", "0.25,0.5", "--out", str(out), "--drop", "0.02")
    assert first.exit_code == 0, first.output
    assert "rise of the loss when a target alone is cut" in first.stdout
    assert "  layers.0:neuron: 25 %: " in first.stdout
    assert "a rise of the loss of at most 0.02:" in first.stdout
    assert {f.name for f in out.iterdir()} == {"sensitivity.json", "sensitivity.png"}
    again = run("cancer-mlp", "--fractions", "0.25,0.5", "--out", str(out), "--json")
    assert again.exit_code == 0, again.output
    data = json.loads(again.stdout)
    held = json.loads((out / "sensitivity.json").read_text(encoding="utf-8"))
    assert Sensitivity.from_dict(data) == Sensitivity.from_dict(held)
    assert data["n_samples"] > 0
    assert "What can go" in data["recommendation"]


def test_curves_of_a_metric() -> None:
    result = run("cancer-mlp", "--on", "metric", "--criterion", "magnitude", "--fractions", "0.5",
                 "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["measure"].startswith("drop of ")
    assert data["criterion"] == "magnitude"
    assert 0.8 < data["dense"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on", "speed"), "unknown --on 'speed'"),
        (("--drop", "0"), "--drop is above 0"),
        (("--fractions", "a"), "write numbers with commas"),
        (("--fractions", "50"), "Did you mean 0.5"),
        (("--on", "metric", "--max-batches", "2"), "--max-batches is for --on loss"),
    ],
)
def test_options_that_make_no_sense(arguments: tuple[str, ...], message: str) -> None:
    result = run("cancer-mlp", *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)
