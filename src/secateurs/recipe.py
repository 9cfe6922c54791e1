"""Recipes: a pruning run as a YAML file, validated before anything expensive.

A recipe uses the words of the Python arguments. It names a built-in `task`, or the user's own
`model` and `data` functions by import path (`package.module:function` or `path/file.py:function`),
and exactly one of `budget` and `threshold`; `stages` holds a list of such blocks that run in order.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateurs.errors import ConfigError, choose
from secateurs.finetuning import Finetune
from secateurs.pipeline import Stage
from secateurs.schedules import Schedule
from secateurs.types import Budget, Threshold

__all__ = ["Recipe", "StageRecipe", "import_function", "override", "read_recipe"]


class StageRecipe(BaseModel):
    """One round of pruning; the fields are those of `secateurs.pipeline.Stage`."""

    model_config = ConfigDict(extra="forbid")

    budget: Budget | None = None
    threshold: Threshold | None = None
    criterion: str | dict[str, Any] = "taylor"
    granularity: str | list[str] = "structured"
    allocation: str = "uniform"
    schedule: Schedule | None = None
    finetune: Finetune | None = None
    min_keep: int = 1
    round_to: int = 1
    control: str | None = None

    def stage(self) -> Stage:
        """The block as an argument of `prune_stages`; checks names and ranges."""
        kinds = self.granularity if isinstance(self.granularity, str) else tuple(self.granularity)
        return Stage(
            budget=self.budget, threshold=self.threshold, criterion=self.criterion,
            granularity=kinds, allocation=self.allocation, schedule=self.schedule,
            finetune=self.finetune, min_keep=self.min_keep, round_to=self.round_to,
            control=self.control,
        )  # fmt: skip


class Recipe(StageRecipe):
    """A whole run.

    Attributes:
        task: a built-in task; or
        model, data: import paths of functions: `model()` returns a trained module, `data()` a dict
            with "train", "validation" and "test" (re-iterable batches) and, if wanted,
            "calibration" (batches for scoring) and "example_inputs".
        loss: import path of `loss_fn(outputs, targets)`.
        metric: import path of `metric(model, batches) -> float or dict`, larger = better; None:
            accuracy.
        stages: rounds that run in order, instead of the fields of a single one.
        form: "auto", "module" or "graph".
        seed: of everything random.
        full_data: train a task on all its data where it uses a subset.
        latency: batch sizes that are timed.
    """

    task: str | None = None
    model: str | None = None
    data: str | None = None
    loss: str = "torch.nn.functional:cross_entropy"
    metric: str | None = None
    stages: list[StageRecipe] = Field(default_factory=list)
    form: str = "auto"
    seed: int = 0
    full_data: bool = False
    latency: list[int] = Field(default_factory=lambda: [1, 256])

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.task is None) == (self.model is None):
            raise ValueError("give exactly one of task, and model with data")
        if (self.model is None) != (self.data is None):
            raise ValueError("model and data belong together: give both or neither")
        own = sorted(set(StageRecipe.model_fields) & self.model_fields_set)
        if self.stages and own:
            raise ValueError(f"with stages, move {', '.join(own)} into a stage")
        choose(self.form, ["auto", "module", "graph"], "form")
        for block in self.stages or [self]:
            block.stage()
        return self

    def all_stages(self) -> list[Stage]:
        """The rounds, whether one or several."""
        return [block.stage() for block in self.stages or [self]]

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the run, defaults included, without what is not set."""
        full = self.model_dump(mode="json", exclude_none=True)
        for block in [full, *full.get("stages", [])]:
            stage = self if block is full else None
            if stage is not None and self.stages:
                for name in StageRecipe.model_fields:
                    block.pop(name, None)
            elif "schedule" not in block and "budget" in block:
                block["schedule"] = {"curve": "cubic", "steps": 5}
        if not full.get("stages"):
            full.pop("stages", None)
        return full

    def anchored(self, base: Path | None) -> Recipe:
        """The same recipe with file paths made absolute, so that it runs from anywhere."""
        changed = {}
        for name in ("model", "data", "loss", "metric"):
            path = getattr(self, name)
            place, colon, function = (path or "").rpartition(":")
            if place.endswith(".py"):
                changed[name] = f"{find_file(place, base)}{colon}{function}"
        return self.model_copy(update=changed)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)


def read_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: a YAML file.
        overrides: `key=value` texts, dotted for nested keys: `budget.macs=0.1`.

    Raises:
        ConfigError: the file is missing or not YAML (the line is named), or a key or value is
            wrong (all of them are listed, unknown keys with the nearest match).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "recipe.yaml")
        ...     _ = file.write_text("task: digits-cnn\\nbudget: {macs: 0.5}\\n")
        ...     read_recipe(file, ("budget.macs=0.25",)).budget
        Budget(units=None, params=None, macs=0.25)
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"recipe {file} does not exist")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds {type(data).__name__}, not a mapping of keys to values")
    for text in overrides:
        override(data, text)
    return parse_recipe(data, str(file))


def parse_recipe(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe that is a mapping already; errors as `read_recipe`."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = sorted({_problem(dict(e)) for e in error.errors()})
        raise ConfigError(f"{where}:\n  " + "\n  ".join(problems)) from error


def _problem(error: Mapping[str, Any]) -> str:
    """One line for one fault: the key, what is wrong, the nearest key."""
    skip = {"function-after[_consistent(), Recipe]"}
    parts = [str(p) for p in error["loc"] if str(p) not in skip and not str(p)[:1].isupper()]
    place = ".".join(parts) or "recipe"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = get_close_matches(parts[-1], _known_keys(parts[:-1]), n=1, cutoff=0.5)
        return f"{place}: unknown key" + (f". Did you mean {near[0]!r}?" if near else "")
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {text}"


def _known_keys(path: list[str]) -> list[str]:
    nested: dict[str, Any] = {
        "budget": Budget, "threshold": Threshold, "schedule": Schedule, "finetune": Finetune
    }  # fmt: skip
    names = [p for p in path if not p.isdigit()]
    if names and names[-1] in nested:
        return list(nested[names[-1]].__dataclass_fields__)
    return list(StageRecipe.model_fields if names else Recipe.model_fields)


def override(data: dict[str, Any], text: str) -> None:
    """Set one value of a recipe in place from `key=value`; the value is read as YAML.

    Example:
        >>> recipe = {"budget": {"units": 0.5}}
        >>> override(recipe, "budget={macs: 0.1}")
        >>> override(recipe, "finetune.epochs=3")
        >>> recipe
        {'budget': {'macs': 0.1}, 'finetune': {'epochs': 3}}
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write key=value, for example budget.macs=0.25")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not valid YAML") from error
    *parents, last = key.strip().split(".")
    place: Any = data
    for part in parents:
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(f"--set {text!r}: there is no entry {part} ({len(place)} stages)")
            place = place[int(part)]
            continue
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"--set {text!r}: {part} is {place!r}, it has no keys below it")
    if not isinstance(place, dict):
        raise ConfigError(f"--set {text!r}: name the stage by its number, as in stages.0.criterion")
    place[last] = parsed


def import_function(path: str, what: str, base: Path | None = None) -> Callable[..., Any]:
    """The function at `package.module:function` or `path/to/file.py:function`.

    Args:
        path: import path; a file path may be relative to `base` or to the current directory.
        what: for messages ("model", "data").
        base: the directory of the recipe.

    Raises:
        ConfigError: the module or the function does not exist, or importing it fails.
    """
    place, colon, name = path.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"{what}: {path!r}: write package.module:function or file.py:function")
    try:
        module = _load_file(place, base) if place.endswith(".py") else _load_module(place, base)
    except ConfigError:
        raise
    except Exception as error:  # the user's module can raise anything while it is imported
        raise ConfigError(
            f"{what}: importing {place} fails: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        near = get_close_matches(name, [n for n in dir(module) if n[:1] != "_"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{what}: {place} has no function {name!r}.{hint}")
    function: Callable[..., Any] = found
    return function


def _load_module(name: str, base: Path | None) -> Any:
    for folder in (str(base) if base else "", str(Path.cwd())):
        if folder and folder not in sys.path:
            sys.path.append(folder)
    return importlib.import_module(name)


def find_file(place: str, base: Path | None) -> Path:
    """The absolute path of a user's file, relative to the recipe or to the current directory.

    Raises:
        ConfigError: it is in neither place.
    """
    given = Path(place).expanduser()
    tried = [given] if given.is_absolute() else [*([base / given] if base else []), given]
    file = next((p for p in tried if p.is_file()), None)
    if file is None:
        raise ConfigError(f"file {place} does not exist (looked at {', '.join(map(str, tried))})")
    return file.resolve()


def _load_file(place: str, base: Path | None) -> Any:
    file = find_file(place, base)
    name = f"secateurs_user_{file.stem}_{abs(hash(file))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
