"""What a search is asked for: space, ranges, folds, and the block of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateurs.errors import ConfigError
from secateurs.recipe import Recipe, parse_recipe, read_recipe
from secateurs.searching.config import Candidate, Folds, Range, Search, Space


def test_a_grid_holds_every_combination_and_the_last_key_changes_fastest() -> None:
    space = Space({"budget.macs": [0.5, 0.25], "criterion": ["taylor", "magnitude"]})
    assert [(c.number, *c.values.values()) for c in space.grid()] == [
        (0, 0.5, "taylor"),
        (1, 0.5, "magnitude"),
        (2, 0.25, "taylor"),
        (3, 0.25, "magnitude"),
    ]


@pytest.mark.parametrize(
    ("given", "values"),
    [
        (Range(0.1, 0.4, n=4), (0.1, 0.2, 0.3, 0.4)),
        (Range(0.1, 0.5, step=0.2), (0.1, 0.3, 0.5)),
        (Range(1, 10, step=4), (1, 5, 9)),
        (Range(1e-4, 1e-2, log=True, n=3), (1e-4, 1e-3, 1e-2)),
        (Range(1, 3, n=5), (1, 2, 3)),
    ],
)
def test_the_grid_of_a_range(given: Range, values: tuple[float, ...]) -> None:
    assert given.grid() == values
    assert all(type(v) is type(values[0]) for v in given.grid())


def test_draws_lie_in_the_range_and_do_not_depend_on_their_number() -> None:
    space = Space(
        {
            "finetune.lr": {"low": 1e-4, "high": 1e-2, "log": True},
            "finetune.epochs": {"low": 1, "high": 4},
            "threshold.k": {"low": 0.0, "high": 1.0, "step": 0.5},
            "criterion": ["taylor", "magnitude"],
        }
    )
    many = space.sampled(200, seed=3)
    assert space.sampled(5, seed=3) == many[:5]
    assert space.sampled(5, seed=4) != many[:5]
    rates = [c.values["finetune.lr"] for c in many]
    assert all(1e-4 <= r <= 1e-2 for r in rates)
    assert 70 < sum(r < 1e-3 for r in rates) < 130  # half of the draws are in the lower decade
    assert {c.values["finetune.epochs"] for c in many} == {1, 2, 3, 4}
    assert {c.values["threshold.k"] for c in many} == {0.0, 0.5, 1.0}
    assert {c.values["criterion"] for c in many} == {"taylor", "magnitude"}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "a mapping of recipe keys"),
        ({"budget.macs": []}, r"search.space.budget.macs: a list of values"),
        ({"budget.macs": 0.5}, r"write \[0.5\]"),
        ({"budget.macs": [0.5, 0.5]}, "0.5 is listed twice"),
        ({"budget.macs": {"low": 0.1}}, "needs low and high"),
        ({"budget.macs": {"lo": 0.1, "high": 1}}, "Did you mean 'low'"),
        ({"budget.macs": {"low": 1.0, "high": 0.1}}, "low must be below high"),
        ({"budget.macs": {"low": 0.1, "high": 0.5}}, "add n or step"),
        ({"budget.macs": {"low": 0.0, "high": 0.5, "log": True}}, "needs low above 0"),
        ({"budget.macs": {"low": 0.1, "high": 0.5, "n": 1}}, "at least 2"),
    ],
)
def test_a_wrong_space_is_refused_in_words(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Search(space, max_drop=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs max_drop"),
        ({"max_drop": -0.1}, "at least 0"),
        ({"max_drop": 0.1, "confidence": 95}, "Did you mean 0.95"),
        ({"max_drop": 0.1, "goal": "smalest"}, "Did you mean 'smallest'"),
        ({"max_drop": 0.1, "rule": "bounds"}, "Did you mean 'bound'"),
        ({"max_drop": 0.1, "sampler": "tpe"}, "needs trials"),
        ({"max_drop": 0.1, "trials": 7}, "the grid has 2 candidates, got 7"),
        ({"max_drop": 0.1, "mode": "refitted"}, "Did you mean 'refit'"),
        ({"max_drop": 0.1, "copies": "warn"}, "choices: error, note"),
    ],
)
def test_a_wrong_option_is_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Search({"budget.macs": [0.5, 0.25]}, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "stratifed"}, "Did you mean 'stratified'"),
        ({"k": 1}, "at least 2"),
        ({"seed": -1}, "from 0"),
        ({"groups": "a:b"}, "is for kind: grouped"),
    ],
)
def test_wrong_folds_are_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Folds(**options)


RECIPE = """
task: digits-cnn
criterion: taylor
finetune: {epochs: 3}
search:
  space:
    budget.macs: [0.8, 0.4]
    finetune.lr: {low: 0.0001, high: 0.01, log: true, n: 3}
  max_drop: 0.02
  folds: {kind: kfold, k: 3, seed: 1}
"""


def test_the_block_of_a_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    recipe = read_recipe(file)
    assert recipe.search is not None
    assert recipe.search.folds == Folds("kfold", 3, 1)
    assert recipe.search.n_trials == 6
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    again = read_recipe(file)
    assert again.search is not None
    assert again.search.to_dict() == recipe.search.to_dict()
    json.dumps(recipe.resolved())


def test_a_budget_that_only_the_search_names_starts_at_its_first_value(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    budget = read_recipe(file).budget
    assert budget is not None
    assert budget != "auto"
    assert budget.macs == 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spaces": {}}, r"search.spaces: unknown key. Did you mean 'space'"),
        ({"folds": {"kinds": "kfold"}}, r"search.folds.kinds: unknown key. Did you mean 'kind'"),
        ({"max_drop": -1}, "search.max_drop must be at least 0"),
    ],
)
def test_a_wrong_block_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    block = {"space": {"budget.macs": [0.5, 0.4]}, "max_drop": 0.1, **change}
    with pytest.raises(ConfigError, match=message):
        parse_recipe({"task": "digits-cnn", "search": block})


def test_fit_belongs_to_a_model_of_ones_own() -> None:
    with pytest.raises(ConfigError, match="fit: a task has its own"):
        parse_recipe({"task": "digits-cnn", "budget": {"macs": 0.5}, "fit": "a:b"})


def test_a_recipe_without_a_search_is_as_before() -> None:
    recipe: Recipe = parse_recipe({"task": "digits-cnn", "budget": {"macs": 0.5}})
    assert recipe.search is None
    assert "search" not in recipe.resolved()


def test_a_candidate_survives_json() -> None:
    one = Candidate(3, {"budget.macs": 0.5, "stages.0.criterion": "taylor"})
    assert Candidate.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.text == "budget.macs=0.5, stages.0.criterion=taylor"


def test_the_function_of_groups_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def groups(): ...\n", encoding="utf-8")
    recipe = parse_recipe(
        {
            "task": "digits-cnn",
            "search": {
                "space": {"budget.macs": [0.5, 0.4]}, "max_drop": 0.1,
                "folds": {"kind": "grouped", "groups": "own.py:groups"},
            },
        }
    )  # fmt: skip
    search = recipe.anchored(tmp_path).search
    assert search is not None
    assert search.folds.groups == f"{(tmp_path / 'own.py').resolve()}:groups"
    assert search.n_trials == 2
