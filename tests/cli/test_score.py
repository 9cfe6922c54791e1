"""`secateurs score`: scores in files, and how far the criteria agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from secateurs.cli import app
from secateurs.graph import trace
from secateurs.scores import load_scores
from secateurs.tasks import dense_checkpoint, get_task


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["score", *arguments])


def test_scores_of_a_task(tmp_path: Path) -> None:
    out = tmp_path / "scores"
    result = run(
        "cancer-mlp", "--criteria", "taylor, magnitude", "--max-batches", "2", "--out", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "taylor: 128 samples" in result.stdout
    assert "layers.0:neuron: 64 units" in result.stdout
    assert {f.name for f in out.iterdir()} == {
        "taylor.safetensors", "magnitude.safetensors", "taylor.png", "magnitude.png",
        "agreement.png",
    }  # fmt: skip
    model, data, _ = dense_checkpoint(get_task("cancer-mlp"), 0)
    held = load_scores(out / "magnitude.safetensors", trace(model, data.example_inputs))
    rows = model.get_parameter("layers.0.weight").abs().sum(1)
    rows = rows + model.get_parameter("layers.0.bias").abs()
    torch.testing.assert_close(held.values["layers.0:neuron"], rows.detach())
    again = run("cancer-mlp", "--criteria", "taylor", "--out", str(out))
    assert "already holds taylor.safetensors. Add --force" in str(again.exception)


def test_as_json() -> None:
    found = json.loads(run("cancer-mlp", "--criteria", "magnitude,random", "--json").stdout)
    assert list(found["scores"]) == ["magnitude", "random"]
    assert found["agreement"]["labels"] == ["magnitude", "random"]
    alone = json.loads(run("cancer-mlp", "--criteria", "magnitude", "--json").stdout)
    assert alone["agreement"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cancer-mpl"], "Did you mean 'cancer-mlp'"),
        (["cancer-mlp", "--criteria", "taylr"], "Did you mean 'taylor'"),
        (["cancer-mlp", "--criteria", ","], "--criteria names none"),
        (["cancer-mlp", "--within", "net"], "unknown --within 'net'"),
        (["nothing.yaml"], "nothing.yaml"),
        (["cancer-mlp", "--granularity", "nueron"], "Did you mean 'neuron'"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)
