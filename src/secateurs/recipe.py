"""Recipes: a pruning run as a YAML file, validated before anything expensive.

A recipe uses the words of the Python arguments. It names a built-in `task`, or the user's own
`model` and `data` functions by import path (`package.module:function` or `path/file.py:function`),
and exactly one of `budget` and `threshold`; `stages` holds a list of such blocks that run in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from secateurs.allocation import ALLOCATORS, check_round_to
from secateurs.asked.dotted import set_value
from secateurs.asked.search import Folds, Search
from secateurs.controls import CONTROLS
from secateurs.criteria import get_combination
from secateurs.errors import ConfigError, choose
from secateurs.finetuning import Finetune
from secateurs.imports import find_file, near_file
from secateurs.pipeline import Stage
from secateurs.pipeline.request import NORMS
from secateurs.schedules import Schedule
from secateurs.types import Budget, Threshold, expand_granularity

__all__ = ["Recipe", "StageRecipe", "override", "parse_recipe", "read_recipe"]


Asked = Annotated[
    Annotated[Budget, Tag("limits")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "limits"),
]
"""A budget: limits, or "auto"."""


class StageRecipe(BaseModel):
    """One round of pruning; the fields are those of `secateurs.pipeline.Stage`."""

    model_config = ConfigDict(extra="forbid")

    budget: Asked | None = None
    threshold: Threshold | None = None
    criterion: str | dict[str, Any] = "taylor"
    granularity: str | list[str] = "structured"
    allocation: str = "uniform"
    schedule: Schedule | None = None
    finetune: Finetune | None = None
    min_keep: PositiveInt = 1
    round_to: int | str | dict[str, int] = "auto"
    homogeneous: bool = False
    control: str | list[str] | None = None
    max_drop: float | None = None
    allow_missed: bool = False

    @field_validator("schedule", mode="before")
    @classmethod
    def _curve_beside_recipe(cls, value: Any, info: ValidationInfo) -> Any:
        """A curve of the user's own is looked for beside the recipe first."""
        curve = value.get("curve") if isinstance(value, Mapping) else None
        if isinstance(curve, str) and ":" in curve:
            base = (info.context or {}).get("base")
            return {**value, "curve": _anchored(curve, "schedule curve", base)}
        return value

    @field_validator("criterion", "granularity", "allocation", "round_to", "control")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "criterion":
            get_combination(value)
        elif info.field_name == "granularity":
            expand_granularity(value)
        elif info.field_name == "round_to":
            check_round_to(value)
        elif isinstance(value, list):
            _once([choose(name, CONTROLS, "control") for name in value], "control", "[shuffle]")
        elif value is not None:
            known = ALLOCATORS if info.field_name == "allocation" else (*CONTROLS, "all")
            choose(value, known, str(info.field_name))
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not getattr(self, "stages", None):
            self.stage()
        return self

    def stage(self) -> Stage:
        """The block as an argument of `prune_stages`; checks names and ranges."""
        kinds = self.granularity if isinstance(self.granularity, str) else tuple(self.granularity)
        control = self.control if isinstance(self.control, str) and self.control != "all" else None
        return Stage(
            budget=self.budget, threshold=self.threshold, criterion=self.criterion,
            granularity=kinds, allocation=self.allocation, schedule=self.schedule,
            finetune=self.finetune, min_keep=self.min_keep, round_to=self.round_to,
            homogeneous=self.homogeneous, control=control, max_drop=self.max_drop,
            allow_missed=self.allow_missed,
        )  # fmt: skip


def _once(values: Sequence[object], what: str, example: str) -> None:
    """A list that holds something, and nothing twice."""
    if not values:
        raise ConfigError(f"an empty list; write for example {what}: {example}")
    twice = sorted({str(v) for v in values if values.count(v) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is listed twice; each counts once")


class Recipe(StageRecipe):
    """A whole run, made by `read_recipe` or `parse_recipe`.

    Attributes:
        task: a built-in task; or
        model, data: import paths of functions: `model()` returns a trained module, `data()` a dict
            with "train", "validation" and "test" (re-iterable batches) and, if wanted,
            "calibration" (batches for scoring) and "example_inputs".
        loss: with model and data, import path of `loss_fn(outputs, targets)`; None: cross entropy.
        metric: with model and data, import path of `metric(model, batches) -> float or dict`; None:
            accuracy.
        include, exclude: names, globs, kinds or "re:..." of what may be pruned: see `Graph.only`.
        outputs: names of the model's outputs that matter; None: all of them.
        norm: "exact", "plain" or "pin": see `prune_stages`.
        maximize: whether a larger metric is better.
        stages: rounds that run in order, instead of the fields of a single one.
        form: "auto", "module" or "graph".
        seed: of everything random.
        seeds: of a comparison with controls, in place of `seed`; see `controls`.
        full_data: train a task on all its data where it uses a subset.
        latency: batch sizes that are timed.
        search: what `secateurs search` tries and wants, see `Search`.
        fit: for a search with model and data: import path of `fit(batches)`, which trains a new
            dense network of the same architecture on these batches and returns it.
    """

    task: str | None = None
    model: str | None = None
    data: str | None = None
    loss: str | None = None
    metric: str | None = None
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    outputs: list[str] | None = None
    norm: str = "exact"
    maximize: bool = True
    stages: list[StageRecipe] = Field(default_factory=list)
    form: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = None
    full_data: bool = False
    latency: list[PositiveInt] = Field(default_factory=lambda: [1, 256])
    search: Search | None = None
    fit: str | None = None

    @field_serializer("search")
    def _plain_search(self, value: Search | None) -> dict[str, Any] | None:
        return None if value is None else value.to_dict()

    @field_validator("form")
    @classmethod
    def _known_form(cls, value: str) -> str:
        return choose(value, ["auto", "module", "graph"], "form")

    @field_validator("norm")
    @classmethod
    def _known_norm(cls, value: str) -> str:
        return choose(value, NORMS, "norm")

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: list[int] | None) -> list[int] | None:
        if value is not None:
            _once(value, "seeds", "[0, 1, 2]")
        return value

    @property
    def controls(self) -> tuple[str, ...]:
        """What the criterion is compared with; empty for a single run.

        A comparison is asked for by a list of controls, by "all", or by one name with `seeds`. One
        name alone is a single run under that control.
        """
        if self.control == "all":
            return CONTROLS
        if isinstance(self.control, list):
            return tuple(self.control)
        return (self.control,) if self.control is not None and self.seeds is not None else ()

    def all_stages(self) -> list[Stage]:
        """The rounds, whether one or several."""
        return [block.stage() for block in self.stages or [self]]

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the run, defaults included, without what is not set."""
        own = set(StageRecipe.model_fields)
        full = self.model_dump(mode="json", exclude_none=True, exclude=own | {"stages"})
        blocks = []
        for stage in self.stages or [self]:
            block = stage.model_dump(mode="json", exclude_none=True, include=own)
            block["schedule"] = _said(stage.stage().steps)
            if not stage.allow_missed:
                del block["allow_missed"]
            blocks.append({k: block[k] for k in StageRecipe.model_fields if k in block})
        if self.stages and self.control is not None:
            full["control"] = self.control
        return {**full, **({"stages": blocks} if self.stages else blocks[0])}

    def anchored(self, base: Path | None) -> Recipe:
        """The same recipe with absolute file paths, so that it runs from anywhere."""
        changed: dict[str, Any] = {
            name: _anchored(path, name, base)
            for name in ("model", "data", "loss", "metric", "fit")
            if (path := getattr(self, name)) is not None
        }
        if self.search is not None and (groups := self.search.folds.groups) is not None:
            folds = replace(self.search.folds, groups=_anchored(groups, "folds.groups", base))
            changed["search"] = replace(self.search, folds=folds)
        return self.model_copy(update=changed)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)


def _anchored(path: str, what: str, base: Path | None) -> str:
    """An import path whose file, if it names one beside the recipe, is absolute."""
    place, colon, function = path.rpartition(":")
    beside = base / f"{place}.py" if base and "." not in place else None
    if place.endswith(".py"):
        return f"{find_file(place, what, base)}{colon}{function}"
    if beside is not None and beside.is_file() and find_spec(place) is None:
        return f"{beside.resolve()}{colon}{function}"
    return path


def _said(schedule: Schedule) -> dict[str, Any]:
    """A schedule with curve and steps, and what else differs from the default."""
    own = {f.name: f.default for f in fields(Schedule)}
    return {
        name: value
        for name, value in asdict(schedule).items()
        if name in ("curve", "steps") or value != own[name]
    }


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
        Budget(macs=0.25)
    """
    file = Path(path)
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise ConfigError(f"recipe {file} {what}{near_file(file)}")
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML in UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        held = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise ConfigError(f"{file} {held}; a recipe is a mapping of keys to values")
    for text in overrides:
        override(data, text)
    return parse_recipe(data, str(file), file.absolute().parent)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that appears twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"key {key.value!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def parse_recipe(
    data: Mapping[str, Any], where: str = "recipe", base: Path | None = None
) -> Recipe:
    """Validate a recipe that is a mapping already; errors as `read_recipe`.

    Args:
        data: keys and values.
        where: for messages.
        base: directory where a curve of the user's own is looked for first.
    """
    data = _started(data)
    problems = set(_conflicts(data))
    try:
        recipe = Recipe.model_validate(data, context={"base": base})
    except ValidationError as error:
        problems |= set(_problems(data, [dict(e) for e in error.errors()]))
    if problems:
        raise ConfigError(f"{where}:\n  " + "\n  ".join(sorted(problems)))
    return recipe


def _started(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the first value of each budget and threshold that only the search names."""
    search = data.get("search")
    space = search.get("space") if isinstance(search, Mapping) else None
    if not isinstance(space, Mapping):
        return data
    filled = deepcopy(dict(data))
    for key, choice in space.items():
        root = str(key).partition(".")[0]
        if root not in ("budget", "threshold") or data.get(root) is not None:
            continue
        listed = isinstance(choice, Sequence) and not isinstance(choice, str) and choice
        value = choice[0] if listed else choice.get("low") if isinstance(choice, Mapping) else None
        if value is not None:
            set_value(filled, str(key), value, "search.space")
    return filled


def _conflicts(data: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between keys; one line each."""
    given = {str(key) for key, value in data.items() if value is not None}
    own = sorted(given & {"model", "data"})
    if "task" in given:
        for name in sorted(given & {"fit", "loss", "metric", "model", "data"}):
            yield f"{name}: a task has its own; give task, or model with data"
    elif not own:
        yield "recipe: give task, or model with data"
    elif len(own) == 1:
        yield f"{own[0]}: model and data belong together: give both or neither"
    if own and data.get("full_data"):
        yield "full_data: is for a task only"
    listed = data.get("stages")
    stages = listed if isinstance(listed, list) else []
    compares = "seeds" in given or isinstance(data.get("control"), list)
    compares = compares or data.get("control") == "all"
    if "seeds" in given and "control" not in given:
        yield "seeds: is for a comparison; add control: all, or a list (--controls all)"
    of_stage = sorted(given & set(StageRecipe.model_fields) - ({"control"} if compares else set()))
    if stages and of_stage:
        yield f"stages: move {', '.join(of_stage)} into a stage"
    blocks = {f"stages.{i}": block for i, block in enumerate(stages)} or {"recipe": data}
    for place, block in blocks.items():
        if isinstance(block, Mapping):
            inner = block.get("control") if stages else None
            if inner is not None and (compares or inner == "all" or isinstance(inner, list)):
                yield f"{place}.control: a comparison is of the whole run: put it beside stages"
            known = block.get("budget") is not None, block.get("threshold") is not None
            if sum(known) != 1:
                yield f"{place}: give exactly one of budget and threshold"


def _problems(data: Mapping[str, Any], errors: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each faulty place: the key, what is wrong, the nearest key."""
    found: dict[str, list[str]] = {}
    for error in errors:
        parts = _path(data, error)
        if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            near = get_close_matches(parts[-1], _known_keys(parts[:-1]), n=1, cutoff=0.5)
            text = "unknown key" + (f". Did you mean {near[0]!r}?" if near else "")
        else:
            text = str(error["msg"]).removeprefix("Value error, ")
            if text.startswith("Input should be "):
                text = re.split(r" or (an )?instance", text)[0].replace("dictionary", "mapping")
                text = f"got {error['input']!r}, " + text.removeprefix("Input ")
        found.setdefault(".".join(parts) or "recipe", []).append(text)
    for place, texts in found.items():
        first, *others = texts  # several: none of the types that are allowed here fits
        yield f"{place}: " + " or ".join(
            [first, *(t.partition("should be ")[2] or t for t in others)]
        )


def _path(data: Any, error: Mapping[str, Any]) -> list[str]:
    """The keys of an error's location; pydantic puts names of types between them."""
    parts = []
    for part in error["loc"]:
        inside = isinstance(data, Mapping) and part in data
        if inside or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        parts.append(str(part))
    return parts


def _known_keys(path: list[str]) -> list[str]:
    nested: dict[str, Any] = {
        "budget": Budget, "threshold": Threshold, "schedule": Schedule, "finetune": Finetune,
        "search": Search, "folds": Folds,
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
    set_value(data, key.strip(), parsed, f"--set {text!r}")
