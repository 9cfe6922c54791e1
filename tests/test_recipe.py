"""Recipes: every fault of a file is named before anything runs, all of them at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune
from secateurs.imports import import_function
from secateurs.posttraining import FisherSearch, LayerwiseCut
from secateurs.recipe import Recipe, override, parse_recipe, read_recipe
from secateurs.schedules import Schedule
from secateurs.tickets import AtInit, TicketSearch
from secateurs.types import Budget, Threshold

GOOD: dict[str, Any] = {"task": "digits-mlp", "budget": {"macs": 0.5}}
OWN: dict[str, Any] = {"model": "a:b", "data": "a:c", "budget": {"macs": 0.5}}


def problems(data: dict[str, Any]) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ConfigError) as caught:
        parse_recipe(data)
    head, *lines = str(caught.value).splitlines()
    assert head == "recipe:"
    return [line.strip() for line in lines]


def test_the_least_recipe() -> None:
    recipe = parse_recipe(GOOD)
    (stage,) = recipe.all_stages()
    assert stage.budget == Budget(macs=0.5)
    assert stage.steps == Schedule("cubic", 5)
    assert recipe.latency == [1, 256]


def test_every_key() -> None:
    recipe = parse_recipe(
        {
            **OWN,
            "budget": {"params": "1.5M"},
            "criterion": {"name": "taylor", "average": "batch"},
            "granularity": ["neuron", "channel"],
            "allocation": "global",
            "schedule": {"curve": "linear", "steps": 2},
            "finetune": {"epochs": 3, "lr": "1e-3"},  # YAML reads 1e-3 as a text
            "min_keep": 2,
            "round_to": {"channel": 8},
            "homogeneous": True,
            "include": ["layer*", "re:^fc"],
            "exclude": "head",
            "control": "shuffle",
            "loss": "a:d",
            "metric": "a:e",
            "maximize": False,
            "form": "graph",
            "seed": 7,
            "latency": [],
        }
    )
    (stage,) = recipe.all_stages()
    assert stage.granularity == ("neuron", "channel")
    assert stage.finetune == Finetune(epochs=3, lr=0.001)
    assert (stage.min_keep, stage.round_to, stage.control) == (2, {"channel": 8}, "shuffle")
    assert stage.homogeneous
    assert (recipe.include, recipe.exclude) == (["layer*", "re:^fc"], "head")
    assert not recipe.maximize


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"budgt": 1}, "budgt: unknown key. Did you mean 'budget'?"),
        ({"Seed": 1}, "Seed: unknown key. Did you mean 'seed'?"),
        ({"zzzz": 1}, "zzzz: unknown key"),
        ({"budget": {"mac": 0.5}}, "budget.mac: unknown key. Did you mean 'macs'?"),
        ({"finetune": {"epoch": 3}}, "finetune.epoch: unknown key. Did you mean 'epochs'?"),
        ({"schedule": {"step": 3}}, "schedule.step: unknown key. Did you mean 'steps'?"),
        ({"criterion": "tailor"}, "criterion: unknown criterion 'tailor'. Did you mean 'taylor'?"),
        ({"criterion": {"nam": "x"}}, "criterion: criterion {'nam': 'x'} has no name"),
        ({"criterion": 5}, "criterion: got 5, should be a valid string or a valid mapping"),
        ({"granularity": "chanel"}, "granularity: unknown granularity 'chanel'. Did you mean"),
        ({"granularity": {}}, "granularity: got {}, should be a valid string or a valid list"),
        ({"allocation": "globl"}, "allocation: unknown allocation 'globl'. Did you mean 'global'?"),
        ({"control": "rnd"}, "control: unknown control 'rnd'. Did you mean 'random'?"),
        ({"form": "modul"}, "form: unknown form 'modul'. Did you mean 'module'?"),
        ({"min_keep": 0}, "min_keep: got 0, should be greater than 0"),
        ({"round_to": 0}, "round_to: round_to must be a whole number, at least 1"),
        ({"round_to": "atuo"}, "round_to: round_to must be a whole number, at least 1, \"auto\""),
        ({"round_to": {"chanel": 8}}, "round_to: unknown kind in round_to 'chanel'. Did you mean"),
        ({"homogeneous": 3}, "homogeneous: got 3, should be a valid boolean"),
        ({"exclude": 3}, "exclude: got 3, should be a valid string or a valid list"),
        ({"exlude": "head"}, "exlude: unknown key. Did you mean 'exclude'?"),
        ({"seed": -1}, "seed: got -1, should be greater than or equal to 0"),
        ({"seed": "a"}, "seed: got 'a', should be a valid integer"),
        ({"seed": 2**32}, "seed: got 4294967296, should be less than 4294967296"),
        ({"latency": [1, 0]}, "latency.1: got 0, should be greater than 0"),
        ({"latency": 5}, "latency: got 5, should be a valid list"),
        ({"budget": 0.5}, "budget: got 0.5, should be a mapping"),
        ({"budget": {"macs": 90.0}}, "budget: Budget(macs=90.0): a float is the fraction"),
        ({"budget": {"macs": -0.1}}, "budget: Budget(macs=-0.1): a float is the fraction"),
        ({"budget": {}}, "budget: Budget needs at least one of units, params, macs"),
        ({"budget": {"macs": [1]}}, "budget.macs: got [1], should be a valid number or a valid i"),
        ({"finetune": {"lr": -1}}, "finetune: Finetune: lr must be above 0"),
        ({"schedule": {"steps": 0}}, "schedule: Schedule(steps=0): a whole number"),
        ({"threshold": {"rule": "mean"}}, "recipe: give exactly one of budget and threshold"),
        ({"budget": None}, "recipe: give exactly one of budget and threshold"),
        ({"task": None}, "recipe: give task, or model with data"),
        ({"task": 5}, "task: got 5, should be a valid string"),
        ({"model": "a:b"}, "model: a task has its own; give task, or model with data"),
        ({"loss": "a:b"}, "loss: a task has its own; give task, or model with data"),
        ({1: 2}, "1: Keys should be strings"),
        ({"stages": [{"budget": {"macs": 0.5}}]}, "stages: move budget into a stage"),
        ({"stages": 5}, "stages: got 5, should be a valid list"),
        ({"control": "random-labels", "criterion": "magnitude"}, "recipe: control="),
    ],
)  # fmt: skip
def test_one_fault(change: dict[str, Any], line: str) -> None:
    found = problems({**GOOD, **change})
    assert len(found) == 1, found
    assert found[0].startswith(line)


def test_faults_of_recipes_with_own_model() -> None:
    assert problems({"model": "a:b", "budget": {"macs": 0.5}}) == [
        "model: model and data belong together: give both or neither"
    ]
    assert problems({**OWN, "full_data": True}) == ["full_data: is for a task only"]


def test_faults_inside_stages() -> None:
    stages = [
        {"budget": {"macs": 0.5}, "criterion": "tailor"},
        {"threshold": {"q": 0.5}},
        {"budgt": {"macs": 0.5}},
        {"budget": {"macs": 0.5}, "finetune": {"epoch": 1}},
        5,
    ]
    first, *others = problems({"task": "digits-mlp", "stages": stages})
    assert first.startswith("stages.0.criterion: unknown criterion 'tailor'. Did you mean 'taylor'")
    assert others == [
        "stages.1.threshold.rule: Field required",
        "stages.2.budgt: unknown key. Did you mean 'budget'?",
        "stages.2: give exactly one of budget and threshold",
        "stages.3.finetune.epoch: unknown key. Did you mean 'epochs'?",
        "stages.4: got 5, should be a valid mapping",
    ]


def test_all_faults_at_once_and_sorted() -> None:
    found = problems(
        {"task": "a", "data": "x:y", "criterion": "tailor", "form": "x", "shedule": {}, "seed": "s"}
    )
    assert found == sorted(found)
    assert [line.partition(":")[0] for line in found] == [
        "criterion", "data", "form", "recipe", "seed", "shedule"
    ]  # fmt: skip


# --- files ---------------------------------------------------------------------------------------


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: a\nbudget: {macs: 0.5\n", r"line 3, column 1: not valid YAML"),
        ("task: a\n\tbudget: 1", "line 2, column 1: not valid YAML"),
        (
            "task: a\nseed: 0\ntask: b\n",
            "line 3, column 1: not valid YAML: key 'task' appears twice",
        ),
        ("budget: {macs: 1, macs: 2}", "line 1, column 19: not valid YAML: key 'macs' appears"),
        ("a: !!python/object:os.system {}", "line 1, column 4: not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("", "is empty; a recipe is a mapping"),
        ("# nothing\n", "is empty"),
        ("- task: a\n", "holds a list; a recipe is a mapping"),
        ("just text", "holds a str"),
        (b"task: caf\xe9", "not valid YAML in UTF-8"),
        (b"task: a\x00b", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(written(tmp_path, text))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    written(tmp_path, "task: a")
    with pytest.raises(ConfigError, match=r"does not exist\. Did you mean 'recipe\.yaml'\?"):
        read_recipe(tmp_path / "recipes.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        read_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"does not exist$"):
        read_recipe(tmp_path / "no" / "r.yaml")


def test_the_error_names_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "task: a\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(f"{file}:\n  recipe: give exactly one of")


# --- from the start ------------------------------------------------------------------------------

INIT: dict[str, Any] = {
    "task": "a", "start": "untrained", "granularity": "weight", "budget": {"params": 0.1},
    "at_init": "force",
}  # fmt: skip
FISHER: dict[str, Any] = {
    "task": "a", "budget": {"macs": 0.5}, "fisher_masks": {"tune": None, "n_samples": 64},
    "finetune": {"epochs": 2, "distill": 0.5},
}  # fmt: skip
LAYERWISE: dict[str, Any] = {
    "task": "a", "granularity": "weight", "budget": {"params": 0.3},
    "layerwise": {"method": "wanda"}, "finetune": {"epochs": 2, "distill": 0.5},
}  # fmt: skip
LOTTERY: dict[str, Any] = {
    "task": "a", "granularity": "weight", "budget": {"params": 0.1}, "criterion": "magnitude",
    "ticket": {"rounds": 4, "rewind": 0.1, "reset": "lr"}, "finetune": {"epochs": 2},
}  # fmt: skip


def test_pruning_at_initialisation() -> None:
    recipe = parse_recipe(INIT)
    assert recipe.all_stages()[0].at_init == AtInit("force")
    found = recipe.resolved()
    assert found["start"] == "untrained"
    assert found["at_init"] == {"method": "force", "reinitialise": False}
    assert not {"criterion", "allocation", "schedule", "round_to"} & set(found)
    assert "start" not in parse_recipe(GOOD).resolved()


def test_masks_by_fisher_information() -> None:
    recipe = parse_recipe(FISHER)
    assert recipe.all_stages()[0].fisher_masks == FisherSearch(tune=None, n_samples=64)
    found = recipe.resolved()
    assert found["fisher_masks"] == {
        "rearrange": True, "tune": None, "importance": "loss", "damping": 0.01, "n_samples": 64,
    }  # fmt: skip
    assert found["round_to"] == "auto"
    assert not {"criterion", "allocation", "schedule", "repair", "homogeneous"} & set(found)
    assert "fisher_masks" not in parse_recipe(GOOD).resolved()
    plain = parse_recipe({**FISHER, "fisher_masks": {}})
    assert plain.all_stages()[0].fisher_masks == FisherSearch()


def test_layer_by_layer() -> None:
    recipe = parse_recipe(LAYERWISE)
    assert recipe.all_stages()[0].layerwise == LayerwiseCut("wanda")
    found = recipe.resolved()
    assert found["layerwise"] == {"method": "wanda", "block": 128, "damping": 0.01}
    assert (found["allocation"], found["schedule"]) == (
        "uniform", {"curve": "one_shot", "steps": 1},
    )  # fmt: skip
    assert "criterion" not in found
    ranked = parse_recipe({**LAYERWISE, "allocation": "global", "criterion": "taylor"})
    assert ranked.resolved()["criterion"] == "taylor"
    assert "layerwise" not in parse_recipe(GOOD).resolved()
    plain = parse_recipe({**LAYERWISE, "layerwise": {}})
    assert plain.all_stages()[0].layerwise == LayerwiseCut()
    later = {**LAYERWISE, "granularity": "weight", "repair": ["norms"]}
    del later["task"]
    start = {k: INIT[k] for k in ("granularity", "budget", "at_init")} | {"finetune": {"epochs": 1}}
    del later["finetune"]
    both = {"task": "a", "start": "untrained", "stages": [start, later]}
    assert parse_recipe(both).all_stages()[1].layerwise == LayerwiseCut("wanda")


def test_a_ticket() -> None:
    recipe = parse_recipe(LOTTERY)
    assert recipe.all_stages()[0].ticket == TicketSearch(rounds=4, rewind=0.1, reset="lr")
    found = recipe.resolved()
    assert found["ticket"] == {"rounds": 4, "rewind": 0.1, "reset": "lr"}
    assert found["criterion"] == "magnitude"
    assert "schedule" not in found


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({**INIT, "start": "untrianed"},
         "start: unknown start 'untrianed'. Did you mean 'untrained'? "
         "(choices: trained, untrained)"),
        ({**INIT, "start": "trained"},
         "at_init: is for a network that was not trained: add start: untrained"),
        ({**INIT, "criterion": "taylor"}, "criterion: at_init does not read it: leave it away"),
        ({**INIT, "at_init": {"methd": "snip"}}, "at_init.methd: unknown key. Did you mean "
         "'method'?"),
        ({**INIT, "at_init": {"reinitialize": True}}, "at_init.reinitialize: unknown key. Did you "
         "mean 'reinitialise'?"),
        ({**FISHER, "start": "untrained"},
         "fisher_masks: is for a trained network: leave start away, or take at_init"),
        ({**FISHER, "criterion": "taylor"},
         "criterion: fisher_masks does not read it: leave it away"),
        ({"task": "a", "stages": [{k: FISHER[k] for k in ("budget", "fisher_masks")}
                                  | {"allocation": "uniform"}]},
         "stages.0.allocation: fisher_masks does not read it: leave it away"),
        ({**FISHER, "fisher_masks": {"rearange": False}}, "fisher_masks.rearange: unknown key. Did "
         "you mean 'rearrange'?"),
        ({**FISHER, "fisher_masks": {"damping": 0.5}},
         "fisher_masks: damping= is of tune='scales', and tune='weights': leave it away"),
        ({**FISHER, "fisher_masks": {"importance": "any"}},
         "fisher_masks.importance: got 'any', should be 'loss' or 'any_output'"),
        ({**LAYERWISE, "finetune": {"epochs": 2}, "start": "untrained"},
         "layerwise: keeps what the layers of a trained network say: leave start away, or take "
         "at_init"),
        ({**LAYERWISE, "layerwise": {"methd": "wanda"}}, "layerwise.methd: unknown key. Did you "
         "mean 'method'?"),
        ({**LAYERWISE, "layerwise": {"method": "wandah"}}, "layerwise.method: got 'wandah', should "
         "be 'sparsegpt', 'wanda' or 'magnitude'"),
        ({**LAYERWISE, "layerwise": {"method": "wanda", "block": 64}},
         "layerwise: block= is of method='sparsegpt', and method='wanda': leave it away"),
        ({**LOTTERY, "ticket": {"round": 3}}, "ticket.round: unknown key. Did you mean 'rounds'?"),
        ({**INIT, "finetune": {"distill": 0.5}},
         "finetune: an untrained network teaches nothing: no distill, no hidden"),
        ({**GOOD, "start": "untrained", "max_drop": 0.1},
         "max_drop: the metric of an untrained network is nothing to hold on to"),
        ({**GOOD, "start": "untrained", "budget": "auto"},
         "budget: the metric of an untrained network is nothing to hold on to"),
    ],
)  # fmt: skip
def test_what_cannot_start(data: dict[str, Any], line: str) -> None:
    assert line in problems(data)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({**LAYERWISE, "criterion": "taylor"},
         "criterion: layerwise chooses weights without it, and allocation='uniform' goes by sizes"),
        ({**LAYERWISE, "criterion": "taylor", "allocation": "erk"}, "allocation='erk' goes by"),
        ({"task": "a", "stages": [{k: LAYERWISE[k] for k in ("budget", "granularity", "layerwise")}
                                  | {"criterion": "taylor"}]},
         "stages.0.criterion: layerwise chooses weights without it"),
        ({**LAYERWISE, "criterion": "magnitude"}, "criterion='magnitude': layerwise chooses"),
        ({**LAYERWISE, "granularity": "structured"}, "it needs granularity='weight'"),
    ],
)  # fmt: skip
def test_what_a_cut_layer_by_layer_does_not_read(data: dict[str, Any], line: str) -> None:
    (found,) = problems(data)
    assert line in found
    assert "leave it away, or take an allocation that reads scores (" in found or "needs" in found


# --- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("budget.macs=0.1", {"budget": {"macs": 0.1}}),
        ("finetune.epochs=3", {"finetune": {"epochs": 3}}),
        ("stages.1.criterion=l2_norm", {"stages": [{}, {"criterion": "l2_norm"}]}),
        ("granularity=[neuron, channel]", {"granularity": ["neuron", "channel"]}),
        ("control=", {"control": None}),
        ("a=b=c", {"a": "b=c"}),
    ],
)
def test_override(text: str, expected: dict[str, Any]) -> None:
    data: dict[str, Any] = {"stages": [{}, {}]} if "stages" in text else {}
    override(data, text)
    assert data == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("seed=[", "the value is not valid YAML"),
        ("seed.deep=3", "0 has no key 'deep' below it"),
        ("stages.2.seed=1", r"by its number \(0 to 1\)"),
        ("stages.first.seed=1", r"a list has no key 'first'; name an entry by its number"),
        ("stages.0=1", "a list has no key '0'"),
        ("stages.1.budget.macs=1", "5 has no key 'budget' below it"),
        ("stages.1.seed=1", "5 has no key 'seed' below it"),
    ],
)
def test_override_that_fits_nowhere(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--set .*{message}"):
        override({"seed": 0, "stages": [{}, 5]}, text)


def test_an_overridden_recipe_is_checked(tmp_path: Path) -> None:
    file = written(tmp_path, "task: a\nbudget: {macs: 0.5}\n")
    assert read_recipe(file, ("budget.macs=0.25", "seed=4")).seed == 4
    with pytest.raises(ConfigError, match=r"finetune\.epoch: unknown key\. Did you mean 'epochs'"):
        read_recipe(file, ("finetune.epoch=3",))


# --- resolved ------------------------------------------------------------------------------------

STAGES: dict[str, Any] = {
    "task": "digits-mlp",
    "stages": [
        {"threshold": {"rule": "rate_mean", "rate": 0.5}, "granularity": "weight"},
        {"budget": {"units": 100}, "finetune": {"steps": 3, "lr": 1e-05}},
    ],
}


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        STAGES,
        INIT,
        {**INIT, "at_init": {"method": "snip", "reinitialise": True}},
        FISHER,
        {**FISHER, "round_to": 4, "fisher_masks": {"tune": "scales", "damping": 1, "shrink": 0}},
        LAYERWISE,
        {
            **LAYERWISE,
            "layerwise": {"block": 64, "damping": 1},
            "allocation": "lamp",
            "criterion": "magnitude",
            "schedule": {"curve": "cubic", "steps": 3},
        },
        LOTTERY,
        {
            "task": "a",
            "start": "untrained",
            "stages": [
                {k: INIT[k] for k in ("granularity", "budget", "at_init")},
                {"budget": {"macs": 0.5}},
            ],
        },
        {**OWN, "criterion": {"name": "taylor", "finish": "abs"}, "granularity": ["head"]},
        {**OWN, "latency": [], "budget": {"params": "1.5M"}, "maximize": False, "seed": 9},
        {"task": "a", "threshold": {"rule": "mean"}, "schedule": {"curve": "linear", "steps": 3}},
    ],
)
def test_a_resolved_recipe_says_the_same(data: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(data)
    again = read_recipe(written(tmp_path, recipe.to_yaml()))
    assert again.resolved() == recipe.resolved()
    assert again.to_yaml() == recipe.to_yaml()
    for mine, other in zip(recipe.all_stages(), again.all_stages(), strict=True):
        assert mine.steps == other.steps
        assert (mine.budget, mine.threshold, mine.finetune) == (
            other.budget, other.threshold, other.finetune
        )  # fmt: skip


def test_a_resolved_recipe_holds_the_defaults() -> None:
    found = parse_recipe(STAGES).resolved()
    assert "budget" not in found
    first, second = found["stages"]
    assert first["schedule"] == {"curve": "one_shot", "steps": 1}
    assert second["schedule"] == {"curve": "cubic", "steps": 5}
    assert second["finetune"]["lr"] == 1e-05
    assert yaml.safe_load(parse_recipe(STAGES).to_yaml()) == found
    assert parse_recipe(STAGES).all_stages()[0].threshold == Threshold("rate_mean", rate=0.5)


# --- the user's functions ------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of user files; what it adds to the import system is taken away again."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    base = tmp_path / "project"
    (base / "pack").mkdir(parents=True)
    (base / "userfile.py").write_text(
        "from userhelp import VALUE\ndef build(): return VALUE\nNO = 1\n"
    )
    (base / "userhelp.py").write_text("VALUE = 'base'\n")
    (base / "pack" / "__init__.py").write_text("")
    (base / "pack" / "inner.py").write_text("def build(): return 'inner'\n")
    (base / "raises.py").write_text("1 / 0\n")
    (base / "exits.py").write_text("import sys; sys.exit(0)\n")
    (base / "broken.py").write_text("def (\n")
    (base / "needs.py").write_text("import a_package_that_is_not_installed\n")
    (tmp_path / "cwd" / "herefile.py").write_text("def build(): return 'cwd'\n")
    yield base
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("userfile.py:build", "base"),
        ("userfile:build", "base"),
        ("pack.inner:build", "inner"),
        ("pack/inner.py:build", "inner"),
        ("herefile.py:build", "cwd"),
        ("herefile:build", "cwd"),
    ],
)
def test_functions_are_found_beside_the_recipe_and_here(
    project: Path, path: str, answer: str
) -> None:
    assert import_function(path, "model", project)() == answer


def test_an_absolute_path(project: Path) -> None:
    assert import_function(f"{project}/userfile.py:build", "model")() == "base"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("userfile.py", "'userfile.py': write package.module:function or file.py:function"),
        (":build", "write package.module:function"),
        ("userfile:", "write package.module:function"),
        ("userfile.py:biuld", r"userfile\.py has no function 'biuld'\. Did you mean 'build'\?"),
        ("userfile.py:NO", "has no function 'NO'"),
        ("userfil.py:build", r"file userfil\.py does not exist .*Did you mean 'userfile\.py'\?"),
        ("userfil:build", r"No module named 'userfil'\. Did you mean 'userfile'\?"),
        ("pack.iner:build", r"Did you mean 'pack\.inner'\?"),
        ("torch.nn.functionl:mse_loss", r"Did you mean 'torch\.nn\.functional'\?"),
        ("torch.nn.functional:mse_los", r"Did you mean 'mse_loss'\?"),
        ("qwertz.uiop:build", r"No module named 'qwertz'$"),
        ("raises.py:build", "importing raises.py fails: ZeroDivisionError"),
        ("raises:build", "importing raises fails: ZeroDivisionError"),
        ("exits.py:build", "importing exits.py fails: SystemExit: 0"),
        ("broken.py:build", "importing broken.py fails: SyntaxError"),
        ("needs:build", "No module named 'a_package_that_is_not_installed'$"),
    ],
)
def test_functions_that_cannot_be_had(project: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model: .*{message}"):
        import_function(path, "model", project)


def test_an_anchored_recipe_runs_from_anywhere(project: Path) -> None:
    recipe = parse_recipe({**GOOD, "task": None, "model": "userfile.py:build",
                           "data": "userhelp:read", "loss": "torch.nn.functional:mse_loss",
                           "metric": "herefile.py:build"})  # fmt: skip
    found = recipe.anchored(project)
    assert found.model == f"{project}/userfile.py:build"
    assert found.data == f"{project}/userhelp.py:read"
    assert found.loss == recipe.loss
    assert found.metric == f"{Path.cwd()}/herefile.py:build"
    assert found.anchored(Path("/")) == found
    with pytest.raises(ConfigError, match=r"^model: file no\.py does not exist"):
        Recipe.model_validate({**OWN, "model": "no.py:f"}).anchored(project)
