"""`secateurs analyze`: the table, JSON, the page, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from secateurs import cli

Run = Callable[..., tuple[int, str, str]]

NETS = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return {"side": self.b(h).cumsum(1), "main": self.c(h)}

def build():
    print("building")
    return Two()

def example(): return torch.zeros(2, 3)

def raises(): raise RuntimeError("my own mistake")

def read():
    x = torch.randn(8, 3)
    return {name: [(x, torch.zeros(8, 2))] for name in ("train", "validation", "test")}

def loss(outputs, targets): return (outputs["main"] - targets).square().mean()

def metric(model, batches): return 0.0
"""
RECIPE = """model: nets.py:build
data: nets.py:read
loss: nets.py:loss
metric: nets.py:metric
budget: {units: 0.5}
"""
OWN = ["--model", "nets.py:build", "--inputs", "nets.py:example"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command in a folder of its own; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "own.yaml").write_text(RECIPE)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateurs", "analyze", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        code = end.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, err

    return call


def test_the_table_of_a_model_of_your_own(run: Run) -> None:
    code, out, err = run(*OWN)
    assert code == 0, err
    assert out == (
        "nets.py:build\n"
        "\n"
        "group     kind    units  params/unit  params   share  MACs    share\n"
        "a:neuron  neuron      4           11      44  86.3 %    40  100.0 %\n"
        "    4 tensors: a.weight[0], a.bias[0], b.weight[1], c.weight[1]\n"
        "\n"
        "in reach: 86.3 % of 51 parameters and 100.0 % of 40 MACs, as 4 units in 1 group\n"
        "\n"
        "left whole: cumsum runs over it\n"
        "    b:neuron  cumsum (nets.py:12)\n"
        "\n"
        "left whole: it is part of the model's output\n"
        "    c:neuron\n"
    )
    assert "building" in err


def test_json_is_all_that_is_on_stdout(run: Run) -> None:
    code, out, err = run(*OWN, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["model"] == {"name": "nets.py:build", "params": 51, "macs": 40}
    assert found["in_reach"]["params"] == 44
    [group] = found["groups"]
    assert (group["name"], group["kind"], group["n_units"]) == ("a:neuron", "neuron", 4)
    assert group["members"][0] == {
        "tensor": "a.weight", "dim": 0, "n": 4, "role": "producer", "outermost": True
    }  # fmt: skip
    assert group["params_per_unit"] == {"min": 11, "max": 11}
    assert {e["name"]: e["where"] for e in found["excluded"]} == {
        "b:neuron": "cumsum (nets.py:12)", "c:neuron": ""
    }  # fmt: skip
    assert found.keys() == {
        "model", "outputs", "in_reach", "in_reach_by_default", "groups", "excluded",
        "unknown_ops", "notes",
    }  # fmt: skip


def test_a_recipe_and_a_task(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is trained")

    monkeypatch.setattr("secateurs.runner.problem.dense_checkpoint", refuse)
    code, out, err = run("own.yaml")
    assert code == 0, err
    assert out.startswith("own\n\ngroup")
    assert "a:neuron" in out
    code, out, err = run("digits-mlp")
    assert code == 0, err
    assert "layers.0:neuron" in out
    Path("task.yaml").write_text(
        "task: digits-mlp\nbudget: {macs: 0.5}\nexclude: layers.2:neuron\n"
    )
    code, out, err = run("task.yaml")
    assert code == 0, err
    assert "left whole: excluded by the user: layers.2:neuron" in out
    code, out, err = run("task.yaml", "--exclude", "layers.0:neuron")  # instead of the recipe's
    assert "left whole: excluded by the user: layers.0:neuron\n    layers.0:neuron" in out


def test_options_reach_the_graph(run: Run) -> None:
    code, out, err = run(*OWN, "--output", "main", "--json")
    assert code == 0, err
    assert json.loads(out)["outputs"] == ["main"]
    code, out, err = run(*OWN, "--granularity", "weight", "--json", "--include", "b")
    assert code == 0, err
    found = json.loads(out)
    assert [(g["name"], g["n_units"]) for g in found["groups"]] == [("b.weight", 20)]
    assert found["in_reach"]["params"] == 20
    code, out, err = run(*OWN, "--granularity", "channel")
    assert code == 0, err
    assert "nothing can be pruned" in out


def test_the_page(run: Run, tmp_path: Path) -> None:
    code, out, err = run(*OWN, "--html", "deep/page.html")
    assert code == 0, err
    assert "written: deep/page.html" in err
    text = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    (tmp_path / "deep" / "page.html").write_text("mine")
    code, out, err = run(*OWN, "--html", "deep/page.html")
    assert (code, out) == (2, "")
    assert "deep/page.html exists. Add --force to overwrite" in err
    assert (tmp_path / "deep" / "page.html").read_text() == "mine"
    assert run(*OWN, "--html", "deep/page.html", "--force")[0] == 0
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8") == text


FAULTS: list[tuple[list[str], int, str]] = [
    ([], 2, "give either a recipe or a task, or --model with --inputs"),
    (["digits-mlp", *OWN], 2, "give either a recipe or a task"),
    (OWN[:2], 2, "--model and --inputs belong together"),
    (["digits-mlp", *OWN[2:]], 2, "--model and --inputs belong together"),
    (["digits-mpl"], 2, "Did you mean 'digits-mlp'?"),
    (["onw.yaml"], 2, "recipe onw.yaml does not exist. Did you mean 'own.yaml'?"),
    (["folder"], 2, "folder is a directory; give a recipe or a task"),
    (["nets.py"], 2, "not valid YAML"),
    ([*OWN, "--granularity", "neurons"], 2, "Did you mean 'neuron'?"),
    ([*OWN, "--heads", "haed"], 2, "unknown --heads 'haed'. Did you mean 'head'?"),
    ([*OWN, "--norm", "pins"], 2, "unknown --norm 'pins'. Did you mean 'pin'?"),
    ([*OWN, "--exclude", "a:neuro"], 2, "Did you mean 'a:neuron'?"),
    ([*OWN, "--output", "mian"], 2, "mian"),
    ([*OWN, "--html", "folder"], 2, "folder is a directory; name a file"),
    ([*OWN, "--html", "nets.py/page.html"], 2, "cannot be written to"),
    ([*OWN[:3], "nets.py:exmaple"], 2, "Did you mean 'example'?"),
    ([*OWN[:3], "nets.py:raises"], 2, "--inputs: nets.py:raises fails: RuntimeError: my own"),
    (["--model", "nets.py:example", *OWN[2:]], 2, "returned Tensor, expected an nn.Module"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), FAULTS)
def test_a_fault_is_one_message_and_an_exit_code(
    run: Run, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    (tmp_path / "folder").mkdir()
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert text in " ".join(err.split())
    assert "Traceback" not in err


def test_a_missing_package_is_told_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, out, err = run(*OWN, "--html", "page.html")
    assert (code, out) == (1, "")
    assert "the HTML page needs jinja2: pip install 'secateurs[report]'" in err
    assert "building" not in err


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    start = [sys.executable, "-c", "from secateurs.cli import main; main()", "analyze"]
    done = subprocess.run(
        [*start, *OWN, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["params"] == 51
    assert "Traceback" not in done.stderr
    code = (
        "import sys; from secateurs.cli import main\n"
        "sys.argv = ['secateurs', 'analyze', '--help']\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'numpy', 'jinja2'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "--granularity" in done.stdout
