"""From a YAML file, or a mapping, to a `Recipe`; everything that is wrong is said at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from secateurs.allocation import BY_SIZE
from secateurs.asked.dotted import set_value
from secateurs.asked.search import Folds, Search
from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune
from secateurs.imports import near_file
from secateurs.penalties import Penalty
from secateurs.pipeline.fitting import unread_by, unread_criterion
from secateurs.posttraining import FisherSearch, LayerwiseCut
from secateurs.recipe.fields import Recipe, StageRecipe
from secateurs.regrowth import Regrow
from secateurs.schedules import Schedule
from secateurs.tickets import AtInit, TicketSearch
from secateurs.types import Budget, Threshold

__all__ = ["override", "parse_recipe", "read_recipe"]


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
    if data.get("start") == "untrained":
        yield from _untrained(data, blocks)
    for place, block in blocks.items():
        if isinstance(block, Mapping):
            inner = block.get("control") if stages else None
            if inner is not None and (compares or inner == "all" or isinstance(inner, list)):
                yield f"{place}.control: a comparison is of the whole run: put it beside stages"
            for name in ("at_init", "fisher_masks"):
                if block.get(name) is not None:
                    yield from _beside(name, place, block, data)
            yield from _layerwise(place, block, data)
            known = block.get("budget") is not None, block.get("threshold") is not None
            if sum(known) != 1:
                yield f"{place}: give exactly one of budget and threshold"


def _beside(
    decider: str, place: str, block: Mapping[str, Any], data: Mapping[str, Any]
) -> Iterator[str]:
    """What a stage says beside what decides its cut although it is the default, and its start."""
    where = "" if place == "recipe" else f"{place}."
    for name, default in unread_by(decider).items():
        if block.get(name) is not None and block[name] == default:
            yield f"{where}{name}: {decider} does not read it: leave it away"
    untrained = data.get("start") == "untrained"
    if decider == "at_init" and not untrained:
        yield f"{where}at_init: is for a network that was not trained: add start: untrained"
    if decider == "fisher_masks" and untrained:
        yield f"{where}fisher_masks: is for a trained network: leave start away, or take at_init"


def _layerwise(place: str, block: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    """What a cut layer by layer does not read although it is the default, and its start."""
    if block.get("layerwise") is None:
        return
    where = "" if place == "recipe" else f"{place}."
    default = {name: field.default for name, field in StageRecipe.model_fields.items()}
    allocation = block.get("allocation") or default["allocation"]
    by_size = isinstance(allocation, str) and allocation in BY_SIZE
    if by_size and block.get("criterion") == default["criterion"]:
        yield f"{where}criterion: {unread_criterion(allocation)}"
    first = place in ("recipe", "stages.0") and block.get("prepare") is None
    if data.get("start") == "untrained" and first:
        yield (
            f"{where}layerwise: keeps what the layers of a trained network say: leave start away, "
            "or take at_init"
        )


def _untrained(data: Mapping[str, Any], blocks: Mapping[str, Any]) -> Iterator[str]:
    """What compares with the network that came in, or learns from it, and it is not trained."""
    if data.get("search") is not None:
        yield "search: compares with a trained network: leave start: untrained away"
    for place, block in blocks.items():
        where = "" if place == "recipe" else f"{place}."
        budget = block.get("budget") if isinstance(block, Mapping) else None
        if not isinstance(block, Mapping):
            continue
        if budget == "auto" or (
            isinstance(budget, Mapping) and budget.get("metric_drop") is not None
        ):
            yield f"{where}budget: the metric of an untrained network is nothing to hold on to"
        if block.get("max_drop") is not None:
            yield f"{where}max_drop: the metric of an untrained network is nothing to hold on to"
        for name in ("finetune", "prepare"):
            config = block.get(name)
            if isinstance(config, Mapping) and (config.get("distill") or config.get("hidden")):
                yield f"{where}{name}: an untrained network teaches nothing: no distill, no hidden"


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
        "prepare": Finetune, "penalty": Penalty, "regrow": Regrow, "at_init": AtInit,
        "ticket": TicketSearch, "fisher_masks": FisherSearch, "layerwise": LayerwiseCut,
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
