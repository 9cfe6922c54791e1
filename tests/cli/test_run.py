"""`secateurs run` and `secateurs tasks`: streams, exit codes, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateurs import cli
from secateurs.report.data import Report
from secateurs.tasks import TASKS, Source
from tests.cli.signals import hears_ctrl_c

Run = Callable[..., tuple[int, str, str]]

RECIPE = """task: digits-mlp
budget: {macs: 0.3}
schedule: {curve: linear, steps: 1}
finetune: {steps: 5}
latency: []
"""
NETS = """
import sys
import torch
from torch import nn

def build():
    print("building")
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))

def read():
    print("reading")
    x = torch.randn(32, 4)
    return {name: [(x, (x[:, 0] > 0).long())] for name in ("train", "validation", "test")}

def raises(): raise RuntimeError("my own mistake")

def stops(model, batches): raise KeyboardInterrupt

def fails(model, batches): return len(batches) / 0
"""
OWN = """model: nets.py:build
data: nets.py:read
budget: {units: 0.5}
schedule: {curve: linear, steps: 1}
latency: []
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command in a folder of its own; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "r.yaml").write_text(RECIPE)
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


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something expensive has begun")

    monkeypatch.setattr("secateurs.runner.problem.dense_checkpoint", refuse)
    monkeypatch.setattr("secateurs.runner.run.prune_stages", refuse)


def files(folder: Path) -> dict[str, bytes]:
    """What is below a folder, without compiled Python."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


RESULTS = {"model.safetensors", "plan.json", "recipe.yaml", "report.json", "report.html"}


def test_a_run_and_its_recipe_again(run: Run, tmp_path: Path) -> None:
    code, out, err = run("run", "r.yaml", "--out", "o", "--seed", "1")
    assert code == 0, err
    assert files(tmp_path / "o").keys() == RESULTS
    report = Report.from_dict(json.loads((tmp_path / "o" / "report.json").read_text()))
    assert report.recipe["seed"] == 1
    assert " ".join(report.headline.split()) in " ".join(out.split())
    assert all(line in out for line in report.next_steps)
    assert "written" in err
    assert "written" not in out
    code, _, err = run("run", "o/recipe.yaml", "--out", "p")
    assert code == 0, err
    first, second = files(tmp_path / "o"), files(tmp_path / "p")
    for name in ("model.safetensors", "plan.json", "recipe.yaml"):
        assert first[name] == second[name]


def test_json_is_all_that_is_on_stdout(run: Run, tmp_path: Path) -> None:
    code, out, err = run("run", "own.yaml", "--json", "--out", "o")
    assert code == 0, err
    assert json.loads(out) == json.loads((tmp_path / "o" / "report.json").read_text())
    assert "building" in err  # what the user's functions print
    assert "reading" in err


def test_the_default_directory(run: Run, tmp_path: Path) -> None:
    assert run("run", "own.yaml")[0] == 0
    assert files(tmp_path / "runs" / "own").keys() == RESULTS


@pytest.mark.usefixtures("no_training")
def test_a_dry_run_runs_nothing_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    before = files(tmp_path)
    code, out, err = run("run", "r.yaml", "--dry-run", "--set", "budget.macs=0.2")
    assert code == 0, err
    for text in (
        "macs: 0.2", "digits-mlp: 17,226 parameters, 17,024 MACs", "1078 train",
        "stage 1: Budget(macs=0.2), Schedule(curve='linear', steps=1)",
        "layers.0:neuron: 128 units", "left whole: layers.4:neuron", "would write to runs/r",
    ):  # fmt: skip
        assert text in out
    code, out, err = run("run", "r.yaml", "--dry-run", "--json")
    found = json.loads(out)
    assert found["units"] == [{"layers.0:neuron": 128, "layers.2:neuron": 64}]
    assert found["model"]["macs"] == 17024
    assert found["excluded"][0]["name"] == "layers.4:neuron"
    code, out, err = run("run", "r.yaml", "--dry-run", "--set", "exclude=re:2.neuron")
    assert code == 0, err
    assert "layers.2:neuron: 64" not in out
    assert "left whole: layers.2:neuron: excluded by the user: re:2.neuron" in out
    assert files(tmp_path) == before


FAULTS: list[tuple[list[str], int, str]] = [
    (["run"], 2, "Missing argument"),
    (["run", "r.yaml", "--seeed", "1"], 2, "No such option: --seeed"),
    (["run", "r.yaml", "--seed", "a"], 2, "'--seed'"),
    (["rum"], 2, "No such command 'rum'"),
    (["run", "s.yaml"], 2, "recipe s.yaml does not exist. Did you mean 'r.yaml'?"),
    (["run", "r.yaml", "--set", "seed"], 2, "write key=value"),
    (["run", "r.yaml", "--set", "sed=1"], 2, "sed: unknown key. Did you mean 'seed'?"),
    (["run", "r.yaml", "--set", "finetune.epoch=1"], 2, "Did you mean 'epochs'?"),
    (["run", "r.yaml", "--set", "budget.macs=90.0"], 2, "Did you mean 0.9?"),
    (["run", "r.yaml", "--set", "budget.macs=-0.1"], 2, "in (0, 1]"),
    (["run", "r.yaml", "--set", "criterion=tailor"], 2, "Did you mean 'taylor'?"),
    (["run", "r.yaml", "--set", "task=digit-mlp"], 2, "Did you mean 'digits-mlp'?"),
    (["run", "r.yaml", "--set", "round_to=atuo"], 2, 'at least 1, "auto"'),
    (["run", "r.yaml", "--dry-run", "--set", "exclude=layrs"], 2, "Did you mean 'layers'?"),
    (["run", "r.yaml", "--seed", "-1"], 2, "seed: got -1"),
    (["run", "r.yaml", "--out", "r.yaml"], 2, "r.yaml is a file; name a directory"),
    (["run", "r.yaml", "--out", "r.yaml/deep"], 2, "r.yaml is a file; name a directory"),
    (["run", "r.yaml", "--out", "full"], 2, "full already holds plan.json. Add --force"),
    (["run", "own.yaml", "--set", "model=nets.py:biuld"], 2, "Did you mean 'build'?"),
    (["run", "own.yaml", "--set", "data=nots.py:read"], 2, "Did you mean 'nets.py'?"),
    (["run", "own.yaml", "--set", "data=nets.py:raises"], 2, "RuntimeError: my own mistake"),
    (["run", "r.yaml", "--dry-run", "--set", "budget.macs=10"], 1, "allows 10 of 17024 macs"),
    (["run", "r.yaml", "--dry-run", "--set", "granularity=head"], 2, "it has neuron, weight"),
]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("arguments", "code", "text"), FAULTS)
def test_a_fault_is_one_message_and_an_exit_code(
    run: Run, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "plan.json").write_text("{}")
    before = files(tmp_path)
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert text in " ".join(err.split())
    assert "Traceback" not in err
    assert files(tmp_path) == before


def test_force_overwrites(run: Run, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "plan.json").write_text("{}")
    (tmp_path / "o" / "mine.txt").write_text("mine")
    assert run("run", "own.yaml", "--out", "o")[0] == 2
    assert run("run", "own.yaml", "--out", "o", "--force")[0] == 0
    assert files(tmp_path / "o").keys() == RESULTS | {"mine.txt"}


@pytest.mark.usefixtures("no_training")
def test_missing_packages_and_data_are_told_before_training(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        for verb in (["run", "r.yaml"], ["demo"]):
            code, out, err = run(*verb)
            assert (code, out) == (1, "")
            assert "the HTML report needs matplotlib: pip install 'secateurs[report]'" in err
    source = Source("the moon", "buy it", lambda: False)
    monkeypatch.setitem(TASKS, "digits-cnn", replace(TASKS["digits-cnn"], source=source))
    code, out, err = run("demo")
    assert (code, out, err) == (1, "", "secateurs: this task needs the moon; install: buy it\n")


@pytest.mark.parametrize("metric", ["stops", "fails"])
def test_a_run_that_ends_early_writes_nothing(run: Run, tmp_path: Path, metric: str) -> None:
    before = files(tmp_path)
    code, out, err = run("run", "own.yaml", "--out", "o", "--set", f"metric=nets.py:{metric}")
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    what = {"stops": "interrupted", "fails": "evaluate fails: ZeroDivisionError: division by zero"}
    assert err.endswith(f"secateurs: {what[metric]}\n")
    assert files(tmp_path) == before


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"recipe no\.yaml does not exist"):
        run("run", "no.yaml", "--debug")

    def bug(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("secateurs.recipe.read_recipe", bug)
    code, _, err = run("run", "r.yaml")
    assert code == 1
    assert err == "secateurs: ZeroDivisionError: a bug\n(--debug shows where)\n"
    with pytest.raises(ZeroDivisionError):
        run("--debug", "run", "r.yaml")


def test_the_list_of_tasks(run: Run) -> None:
    code, out, err = run("tasks", "--json")
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows.keys() == TASKS.keys()
    assert rows["digits-mlp"]["prunes"] == "neuron"
    code, out, _ = run("tasks")
    assert code == 0
    assert all(name in out for name in TASKS)


# --- a process of its own ------------------------------------------------------------------------

HELP = """
import sys
from secateurs.cli import main
sys.argv = ["secateurs", *{arguments}]
try:
    main()
finally:
    heavy = sorted({{"torch", "numpy", "sklearn", "matplotlib"}} & set(sys.modules))
    print(heavy, file=sys.stderr)
"""


@pytest.mark.parametrize("verb", [[], ["run"], ["demo"], ["tasks"]], ids=str)
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    code = HELP.format(arguments=[*verb, "--help"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert "--debug" in done.stdout or verb
    assert "Usage: " in done.stdout


def test_ctrl_c_ends_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        NETS + "\nimport time\ndef waits():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    (tmp_path / "own.yaml").write_text(OWN.replace(":read", ":waits"))
    command = [sys.executable, "-c", "from secateurs.cli import main; main()", "run", "own.yaml"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=hears_ctrl_c,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        while (line := process.stderr.readline()) and "ready" not in line:
            pass
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.strip() == "secateurs: interrupted"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (("tasks",), "this command works in one process"),
        (("tasks",), "run and finetune work in several"),
        (("run", "own.yaml"), "start with torchrun, or unset WORLD_SIZE"),
    ],
)
def test_several_processes_are_refused(
    run: Run, verb: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But for `run` and `finetune` by torchrun: see tests/distributed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run(*verb)
    assert (code, out) == (2, "")
    assert "WORLD_SIZE=2" in err
    assert said in err
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("RANK", "1")
    if verb == ("tasks",):
        assert run(*verb) == (2, "", "")  # the first one has said it
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("tasks")[0] == 0
