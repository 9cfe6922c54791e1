"""Recipes: schedules, fine-tuning clocks, the guard, budgets that may be missed."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secateurs.ablation.plan import check_ablation
from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune
from secateurs.recipe import parse_recipe, read_recipe
from secateurs.schedules import Schedule
from secateurs.types import Budget

GOOD: dict[str, Any] = {"task": "digits-mlp", "budget": {"macs": 0.5}}


def problem(data: dict[str, Any]) -> str:
    """The only line of the error."""
    with pytest.raises(ConfigError) as caught:
        parse_recipe(data)
    _, line = str(caught.value).splitlines()
    return line.strip()


def test_the_words_are_those_of_python() -> None:
    recipe = parse_recipe(
        {
            **GOOD,
            "schedule": {"curve": "cosine", "steps": 3, "every": "2 epochs", "begin": "1 epoch",
                         "rescore": False},
            "finetune": {"epochs": 8, "accumulate": 4, "lr_schedule": "cosine", "cycles": 2},
            "allow_missed": True,
        }
    )  # fmt: skip
    (stage,) = recipe.all_stages()
    assert stage.schedule == Schedule("cosine", 3, every="2 epochs", begin="1 epoch", rescore=False)
    assert stage.finetune == Finetune(epochs=8, accumulate=4, lr_schedule="cosine", cycles=2)
    assert stage.allow_missed
    guarded = parse_recipe({**GOOD, "max_drop": 0.01}).all_stages()[0]
    assert guarded.max_drop == 0.01
    smallest = parse_recipe({**GOOD, "budget": {"metric_drop": 0.01}}).all_stages()[0]
    assert smallest.budget == Budget(metric_drop=0.01)
    assert smallest.steps == Schedule("exponential", 20)
    assert parse_recipe({**GOOD, "budget": "auto"}).all_stages()[0].budget == "auto"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"budget": "atuo"}, "budget: got 'atuo', should be 'auto'"),
        ({"max_drop": -1}, "recipe: max_drop=-1.0: how much worse the metric may get, at least 0"),
        ({"max_dorp": 0.1}, "max_dorp: unknown key. Did you mean 'max_drop'?"),
        ({"max_drop": 0.1, "budget": {"metric_drop": 0.1}}, "recipe: max_drop and a budget that"),
        ({"allow_missed": 3}, "allow_missed: got 3, should be a valid boolean"),
        ({"schedule": {"evry": "1 epoch"}}, "schedule.evry: unknown key. Did you mean 'every'?"),
        ({"schedule": {"every": "2 weeks"}}, "schedule: Schedule: every must be a text such as"),
        ({"schedule": {"every": "1 epoch"}}, "recipe: Schedule(every='1 epoch') cuts inside one"),
        ({"schedule": {"begin": "1 epoch"}}, "schedule: Schedule(begin='1 epoch') is the first"),
        ({"schedule": {"curve": "cubik"}}, "schedule: unknown schedule curve 'cubik'. Did you"),
        ({"schedule": {"curve": "no_such:f"}}, "schedule: schedule curve: importing no_such fails"),
        ({"schedule": {"curve": "math:cos"}}, "schedule: curve math:cos: must be 0 at progress 0"),
        ({"schedule": {"rescore": 3}}, "schedule.rescore: got 3, should be a valid boolean"),
        ({"finetune": {"accumulate": 0}}, "finetune: Finetune: accumulate must be a whole number"),
        ({"finetune": {"cycles": 2}}, "finetune: Finetune: cycles has no effect"),
    ],
)
def test_one_fault(change: dict[str, Any], line: str) -> None:
    assert problem({**GOOD, **change}).startswith(line)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"every": "5 steps", "steps": 2}, "finetune": {"epochs": 2, "accumulate": 2}},
        {"schedule": {"rescore": False}},
        {"budget": {"metric_drop": 0.02}},
        {"budget": {"macs": 0.5, "metric_drop": 0.02}, "allow_missed": True},
        {"budget": "auto"},
        {"max_drop": 0.05},
    ],
)
def test_a_resolved_recipe_says_the_same(change: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe({**GOOD, **change})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = read_recipe(tmp_path / "recipe.yaml")
    assert again.resolved() == recipe.resolved()
    (mine,), (other,) = recipe.all_stages(), again.all_stages()
    assert mine.steps == other.steps
    assert (mine.budget, mine.finetune, mine.max_drop, mine.allow_missed) == (
        other.budget, other.finetune, other.max_drop, other.allow_missed
    )  # fmt: skip


def test_a_resolved_recipe_leaves_out_what_is_not_used() -> None:
    found = parse_recipe(GOOD).resolved()
    assert found["schedule"] == {"curve": "cubic", "steps": 5}
    assert not {"max_drop", "allow_missed"} & set(found)


@pytest.mark.parametrize(
    "change", [{"max_drop": 0.1}, {"budget": {"macs": 0.5, "metric_drop": 0.1}}, {"budget": "auto"}]
)
def test_runs_of_unequal_size_are_not_compared(change: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe({**GOOD, **change, "control": "all"})
    with pytest.raises(ConfigError, match="needs runs of equal size"):
        check_ablation(recipe, tmp_path)


# --- curves of one's own -------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A recipe's folder with a curve beside it, while the current directory is another."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    base = tmp_path / "project"
    base.mkdir()
    (base / "mycurves.py").write_text("def late(t):\n    return t * t\n")
    yield base
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("path", ["mycurves.py:late", "mycurves:late"])
def test_a_curve_is_found_beside_the_recipe(project: Path, path: str) -> None:
    file = project / "recipe.yaml"
    file.write_text(f"task: a\nbudget: {{macs: 0.5}}\nschedule: {{curve: '{path}', steps: 2}}\n")
    recipe = read_recipe(file)
    (stage,) = recipe.all_stages()
    assert list(stage.steps.fractions()) == [0.25, 1.0]
    assert recipe.resolved()["schedule"]["curve"] == f"{project}/mycurves.py:late"
    again = pickle.loads(pickle.dumps(recipe))  # as the workers of a comparison get it
    assert list(again.all_stages()[0].steps.fractions()) == [0.25, 1.0]
    staged = project / "staged.yaml"
    staged.write_text(
        f"task: a\nstages:\n- budget: {{macs: 0.5}}\n  schedule: {{curve: '{path}', steps: 2}}\n"
    )
    assert list(read_recipe(staged).all_stages()[0].steps.fractions()) == [0.25, 1.0]


def test_a_curve_that_is_not_there(project: Path) -> None:
    file = project / "recipe.yaml"
    file.write_text("task: a\nbudget: {macs: 0.5}\nschedule: {curve: 'mycurve.py:late'}\n")
    with pytest.raises(ConfigError, match=r"file mycurve\.py does not exist .*'mycurves\.py'"):
        read_recipe(file)
