"""From a recipe to files: problems, suggestions, results that can be made again."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.errors import (
    BudgetError,
    CaptureError,
    ConfigError,
    DataError,
    MissingDependencyError,
    PruningError,
    ScoringError,
)
from secateurs.recipe import parse_recipe, read_recipe
from secateurs.report.data import MetricRow, Report
from secateurs.runner import (
    Problem,
    check_output,
    check_recipe,
    load_problem,
    run_recipe,
    suggestions,
    write_results,
)
from secateurs.surgery.files import load
from secateurs.tasks import TASKS, get_task
from secateurs.tasks.data import Source

TASK: dict[str, Any] = {
    "task": "digits-mlp",
    "budget": {"macs": 0.3},
    "schedule": {"curve": "linear", "steps": 2},
    "finetune": {"epochs": 1, "lr": 0.002},
    "latency": [],
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return load_problem(parse_recipe(TASK))


# --- a task --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"form": "graph"},
        {
            "budget": None, "schedule": None, "finetune": None,
            "stages": [
                {"threshold": {"rule": "mean"}, "criterion": "magnitude", "granularity": "weight"},
                {"budget": {"units": 0.5}, "schedule": {"curve": "linear", "steps": 1},
                 "finetune": {"steps": 5, "distill": 0.5}},
            ],
        },
    ],
    ids=["module", "graph", "stages"],
)  # fmt: skip
def test_the_recipe_of_the_results_gives_the_same_files(
    change: dict[str, Any], tmp_path: Path
) -> None:
    recipe = parse_recipe({k: v for k, v in {**TASK, **change}.items() if v is not None})
    files: list[dict[str, bytes]] = []
    for out in (tmp_path / "one", tmp_path / "two"):
        torch.manual_seed(len(files))  # the global random state does not matter
        result = run_recipe(recipe, load_problem(recipe), out=str(out))
        assert all(f.is_file() for f in write_results(result, recipe, out, force=False))
        files.append({p.name: p.read_bytes() for p in out.iterdir()})
        recipe = read_recipe(out / "recipe.yaml")
    first, second = files
    assert first.keys() == second.keys()
    for name in first.keys() - {"report.json", "report.html"}:  # these hold the time
        assert first[name] == second[name], name
    assert ("graph.json" in first) == (change.get("form") == "graph")
    small = load(tmp_path / "one", get_task("digits-mlp").build)
    other = result.model.state_dict()
    assert all(torch.equal(v, other[k]) for k, v in small.state_dict().items())


def test_the_report_of_a_task(problem: Problem) -> None:
    recipe = parse_recipe(TASK)
    report = run_recipe(recipe, problem, out="o").report
    assert report.title == "digits-mlp"
    assert report.recipe == recipe.resolved()
    assert report.rows[0].name == "test accuracy"
    assert report.rows[0].before == problem.metric(problem.model, problem.test)["accuracy"]
    assert report.notes[0] == "samples: 1078 train, 360 validation, 359 test"
    assert len(report.next_steps) == 3


def test_a_dry_run_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("training")

    monkeypatch.setattr("secateurs.runner.problem.dense_checkpoint", trained)
    recipe = parse_recipe(TASK)
    found = load_problem(recipe, train=False)
    assert set(check_recipe(recipe, found).units) == {"layers.0:neuron", "layers.2:neuron"}
    with pytest.raises(BudgetError, match="allows"):
        check_recipe(parse_recipe({**TASK, "budget": {"macs": 10}}), found)


def test_include_and_exclude_reach_the_run(problem: Problem) -> None:
    recipe = parse_recipe({**TASK, "exclude": "layers.2:neuron", "round_to": 8})
    assert set(check_recipe(recipe, problem).units) == {"layers.0:neuron"}
    report = run_recipe(recipe, problem).report
    assert [t.name for t in report.targets] == ["layers.0:neuron"]
    assert report.targets[0].n_kept % 8 == 0
    assert ("layers.2:neuron", "excluded by the user: layers.2:neuron") in [
        (e.name, e.reason) for e in report.excluded
    ]
    recipe = parse_recipe({**TASK, "include": ["layers.2*", "lyers.0"]})
    with pytest.raises(ConfigError, match=r"include 'lyers\.0' .* Did you mean 'layers\.0'"):
        check_recipe(recipe, problem)


def test_an_unknown_task() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'digits-mlp'"):
        load_problem(parse_recipe({**TASK, "task": "digit-mlp"}))


def test_missing_data_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(seed: int, n: int | None) -> Any:
        source.require()

    source = Source("the moon", "buy it", lambda: False)
    task = replace(TASKS["digits-mlp"], source=source, read=read)
    monkeypatch.setitem(TASKS, "digits-mlp", task)
    with pytest.raises(MissingDependencyError, match="needs the moon; install: buy it"):
        load_problem(parse_recipe(TASK))


def test_a_missing_package_is_told_before_pruning(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="needs jinja2: pip install"):
        run_recipe(parse_recipe(TASK), replace(problem, model=nn.Identity()))


# --- the user's own model and data ---------------------------------------------------------------

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 2)
    def forward(self, x):
        return self.second(self.first(x).relu())

def build():
    return Net()

def batches(n, kind="class"):
    x = torch.randn(n, 4)
    y = (x[:, 0] > 0).long() if kind == "class" else x[:, :2]
    return [(x, y)]

def read():
    return {"train": batches(32), "validation": batches(16), "test": batches(16)}

def regression():
    return {k: batches(16, "value") for k in ("train", "validation", "test")}

def error(model, batches):
    return {"mse": sum(nn.functional.mse_loss(model(x), y).item() for x, y in batches)}

def calibrated(): return {**read(), "calibration": batches(8), "example_inputs": torch.zeros(3, 4)}
def no_module(): return build
def raises(): raise RuntimeError("my own")
def exits(): raise SystemExit(3)
def no_dict(): return batches(3)
def no_test(): return {"train": batches(3), "validation": batches(3), "test": None}
def empty(): return {**read(), "validation": []}
def generator(): return {**read(), "test": iter(batches(3))}
def labels(): return {**read(), "test": [(torch.randn(4, 4), torch.full((4,), 5))]}
def shape(): return {**read(), "validation": [(torch.randn(4, 3), torch.zeros(4).long())]}
def bad_calibration(): return {**read(), "calibration": []}
def nothing(outputs, targets): return None
def no_metric(model, batches): return {"a": None}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(OWN)
    return tmp_path


def recipe_of(**change: Any) -> Any:
    base = {
        "model": "nets.py:build", "data": "nets.py:read", "budget": {"units": 0.5},
        "schedule": {"curve": "linear", "steps": 1}, "finetune": {"steps": 2}, "latency": [],
    }  # fmt: skip
    return parse_recipe({**base, **change})


def test_an_own_model_runs_and_runs_again_from_its_results(own: Path) -> None:
    recipe = recipe_of().anchored(own)
    outs = own / "one", own / "two"
    for out in outs:
        result = run_recipe(recipe, load_problem(recipe, own), out=str(out))
        write_results(result, recipe, out, force=False)
        recipe = read_recipe(out / "recipe.yaml").anchored(out)
    for name in ("model.safetensors", "plan.json", "recipe.yaml"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert (
        result.report.title == "nets.py:build"
    )  # no path of this machine in a report that is shared


def test_calibration_and_example_inputs(own: Path) -> None:
    found = load_problem(recipe_of(data="nets.py:calibrated"), own)
    ((x, _),) = found.calibration
    assert x.shape == (8, 4)
    assert isinstance(found.example_inputs, Tensor)
    assert found.example_inputs.shape == (3, 4)
    plain = load_problem(recipe_of(), own)
    assert plain.calibration is plain.train
    assert plain.loss_fn is F.cross_entropy


def test_regression_where_less_is_better(own: Path) -> None:
    change = {"data": "nets.py:regression", "loss": "torch.nn.functional:mse_loss"}
    with pytest.raises(ConfigError, match="metric: accuracy, the default, needs integer labels"):
        load_problem(recipe_of(**change), own)
    recipe = recipe_of(**change, metric="nets.py:error", maximize=False)
    report = run_recipe(recipe, load_problem(recipe, own)).report
    assert report.rows[0].name == "test mse"
    assert {r.better for r in report.rows[:2]} == {"lower"}


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"model": "nets.py:no_module"}, ConfigError, "returned function, expected a torch.nn.Mod"),
        ({"model": "nets.py:raises"}, ConfigError, "model: nets.py:raises fails: RuntimeError: my"),
        ({"data": "nets.py:raises"}, ConfigError, "data: nets.py:raises fails: RuntimeError: my"),
        ({"data": "nets.py:exits"}, ConfigError, "data: nets.py:exits fails: SystemExit: 3"),
        ({"data": "nets.py:no_dict"}, ConfigError, "missing: train, validation, test"),
        ({"data": "nets.py:no_test"}, ConfigError, "missing: test"),
        ({"data": "nets.py:empty"}, DataError, "validation data: batches is empty"),
        ({"data": "nets.py:generator"}, DataError, "test data: batches can be read only once"),
        ({"data": "nets.py:labels"}, DataError, "test data: batch 0: the loss refuses"),
        ({"data": "nets.py:shape"}, CaptureError, "validation data: batch 0: the model refuses"),
        ({"data": "nets.py:bad_calibration"}, DataError, "calibration data: batches is empty"),
        ({"loss": "nets.py:nothing"}, ScoringError, "train data: batch 0: loss_fn must return a"),
        ({"loss": "nets.py:nothin"}, ConfigError, "Did you mean 'nothing'"),
        ({"metric": "nets.py:metric"}, ConfigError, "Did you mean 'no_metric'"),
    ],
)
def test_own_functions_that_return_the_wrong_thing(
    own: Path, change: dict[str, Any], kind: type[PruningError], text: str
) -> None:
    with pytest.raises(kind, match=text):
        load_problem(recipe_of(**change), own)


def test_a_metric_that_returns_nothing(own: Path) -> None:
    recipe = recipe_of(metric="nets.py:no_metric")
    with pytest.raises(ScoringError, match="evaluate returned a = None"):
        run_recipe(recipe, load_problem(recipe, own))


# --- output --------------------------------------------------------------------------------------


def test_where_results_may_go(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deep", force=False)
    check_output(tmp_path, force=False)
    (tmp_path / "notes.txt").write_text("mine")
    check_output(tmp_path, force=False)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"already holds plan\.json\. Add --force"):
        check_output(tmp_path, force=False)
    check_output(tmp_path, force=True)
    for place in ("notes.txt", "notes.txt/below/it"):
        with pytest.raises(ConfigError, match=r"notes\.txt is a file"):
            check_output(tmp_path / place, force=True)


def test_where_nobody_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_output(tmp_path / "new", force=False)


def test_the_graph_of_an_earlier_run_does_not_stay(own: Path) -> None:
    out = own / "out"
    for form in ("graph", "module"):
        recipe = recipe_of(form=form)
        result = run_recipe(recipe, load_problem(recipe, own))
        files = write_results(result, recipe, out, force=True)
        assert (out / "graph.json" in files) == (out / "graph.json").exists() == (form == "graph")


# --- suggestions ---------------------------------------------------------------------------------

STAGES: dict[str, Any] = {
    "task": "digits-mlp",
    "stages": [{"budget": {"macs": 0.9}}, {"budget": {"units": 0.8}, "schedule": {"steps": 1}}],
}


@pytest.mark.parametrize(
    "data",
    [
        TASK,
        STAGES,
        {**TASK, "budget": {"macs": 0.9}},
        {**TASK, "budget": {"macs": 9000}, "finetune": {"steps": 50}},
        {**TASK, "budget": {"macs": 9000}, "finetune": None},
        {"task": "digits-mlp", "threshold": {"rule": "mean"}},
    ],
)
@pytest.mark.parametrize("lost", [0.0, 0.5])
def test_every_suggested_command_is_a_recipe_that_can_run(
    data: dict[str, Any], lost: float, problem: Problem, tmp_path: Path
) -> None:
    recipe = parse_recipe({k: v for k, v in data.items() if v is not None})
    out = tmp_path / "a place"
    out.mkdir()
    (out / "recipe.yaml").write_text(recipe.to_yaml())
    rows = (MetricRow("test accuracy", "", 0.9, 0.9 - lost, better="higher"),)
    lines = suggestions(recipe, Report("t", "h", met=True, rows=rows), str(out))
    commands = [line for line in lines if "secateurs run" in line]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command[command.index("secateurs run") :])
        assert words[:3] == ["secateurs", "run", str(out / "recipe.yaml")]
        assert words[3::2] == ["--set", "--out"]
        changed = read_recipe(words[2], (words[4],))
        assert changed.resolved() != recipe.resolved()
        check_recipe(changed, problem)
    assert lines[2] == f'use it: secateurs.load("{out}", get_task("digits-mlp").build)'


def test_less_is_suggested_when_much_was_lost() -> None:
    recipe = parse_recipe(TASK)
    for before, after, better, word in (
        (0.97, 0.965, "higher", "deeper"),
        (0.97, 0.90, "higher", "less deep"),
        (2.0, 1.0, "lower", "deeper"),
        (1.0, 2.0, "lower", "less deep"),
    ):
        row = MetricRow("m", "", before, after, better=better)  # type: ignore[arg-type]
        lines = suggestions(recipe, Report("t", "h", met=True, rows=(row,)), "o")
        assert lines[0].startswith(f"cut {word}: ")
