"""The keys of a recipe, and what they must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
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
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from secateurs.allocation import ALLOCATORS, check_round_to
from secateurs.asked.search import Search
from secateurs.controls import CONTROLS
from secateurs.criteria import get_combination
from secateurs.errors import ConfigError, choose
from secateurs.finetuning import Finetune
from secateurs.imports import find_file
from secateurs.penalties import Penalty
from secateurs.pipeline import Stage
from secateurs.pipeline.fitting import unread_by
from secateurs.pipeline.request import NORMS
from secateurs.posttraining import FisherSearch, LayerwiseCut
from secateurs.regrowth import Regrow
from secateurs.schedules import Schedule
from secateurs.tickets import AtInit, TicketSearch
from secateurs.types import Budget, Threshold, expand_granularity

__all__ = ["Recipe", "StageRecipe"]

STARTS = ("trained", "untrained")

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
    prepare: Finetune | None = None
    penalty: Penalty | None = None
    repair: list[str] = Field(default_factory=list)
    regrow: Regrow | None = None
    at_init: AtInit | None = None
    ticket: TicketSearch | None = None
    fisher_masks: FisherSearch | None = None
    layerwise: LayerwiseCut | None = None

    @field_validator("schedule", mode="before")
    @classmethod
    def _curve_beside_recipe(cls, value: Any, info: ValidationInfo) -> Any:
        """A curve of the user's own is looked for beside the recipe first."""
        curve = value.get("curve") if isinstance(value, Mapping) else None
        if isinstance(curve, str) and ":" in curve:
            base = (info.context or {}).get("base")
            return {**value, "curve": _anchored(curve, "schedule curve", base)}
        return value

    @field_validator("at_init", mode="before")
    @classmethod
    def _method_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @field_serializer("fisher_masks")
    def _with_no_tuning(self, value: FisherSearch | None) -> dict[str, Any] | None:
        """Without what is not set, but with `tune: null`, which is not the default."""
        said = {} if value is None else asdict(value)
        return {k: v for k, v in said.items() if v is not None or k == "tune"} or None

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
            allow_missed=self.allow_missed, prepare=self.prepare, penalty=self.penalty,
            repair=tuple(self.repair), regrow=self.regrow,
            at_init=self.at_init, ticket=self.ticket, fisher_masks=self.fisher_masks,
            layerwise=self.layerwise,
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
        start: "trained"; or "untrained": the network as built, under the seed, to be pruned before
            its training, which `finetune` is then. A model of the user's own is taken as its
            function returns it; the word only says what it is.
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
    start: str = "trained"
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

    @field_validator("start")
    @classmethod
    def _known_start(cls, value: str) -> str:
        return choose(value, STARTS, "start")

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
        if self.start == "trained":
            del full["start"]
        blocks = []
        for stage in self.stages or [self]:
            block = stage.model_dump(mode="json", exclude_none=True, include=own)
            block["schedule"] = _said(stage.stage().steps)
            if (decider := stage.stage().decided_by) is not None:
                for name in unread_by(decider):
                    block.pop(name, None)
            if stage.stage().unscored:
                block.pop("criterion", None)
            for name in ("allow_missed", "repair"):
                if not block.get(name):
                    block.pop(name, None)
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
