"""What a criterion is: data and one pure function.

Every criterion has the signature `fn(stats) -> contribution`. `stats` maps the names in `needs` to
tensors of one shape (elements of a parameter, or units, possibly with samples in front), and the
contribution is the predicted increase of the loss when the element or unit is removed. What
happens to it next is data: where it is summed into units, when `finish` is applied, and over what
the average runs. "Taylor" alone is at least four criteria; the order of the reductions is the
criterion. This room reads no model and no data: `scoring` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from secateurs.errors import ConfigError, choose
from secateurs.types import KINDS, Kind

__all__ = [
    "CRITERIA",
    "FINISH",
    "STATISTICS",
    "Criterion",
    "Option",
    "Statistic",
    "criterion",
    "get_criterion",
]

Option = float | int | str
Stats = Mapping[str, Tensor]
Finish = Literal["none", "abs", "square", "sqrt"]

FINISH: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": torch.sqrt,
}


Cost = Literal["free", "forward", "backward", "second order", "training", "per unit"]


@dataclass(frozen=True)
class Statistic:
    """What a criterion may need.

    Attributes:
        level: "element" (a value for each parameter element) or "unit" (one for each unit).
        cost: what a batch costs: nothing, a forward pass, forward and backward, a second
            derivative, a training step, or a run of the model for every unit.
        loss: whether the loss is needed; "option" when the option `of="loss"` decides.
        weight: whether it exists for single weights.
        summary: one sentence for the docs.
        options: names of criterion options that shape it; criteria that agree on them share it.
        labels: whether the targets of the batches are read without a loss.
    """

    level: Literal["element", "unit"]
    cost: Cost
    loss: bool | Literal["option"]
    weight: bool
    summary: str
    options: tuple[str, ...] = ()
    labels: bool = False

    @property
    def data(self) -> bool:
        """Whether batches are needed."""
        return self.cost != "free"


STATISTICS: dict[str, Statistic] = {
    "weight": Statistic("element", "free", False, True, "the parameter itself"),
    "grad": Statistic("element", "backward", True, True, "dL/dw"),
    "gate": Statistic(
        "element", "backward", True, True,
        "w dL/dw: the derivative of the loss to scaling by a gate at 1",
    ),
    "act": Statistic(
        "unit", "forward", False, False, "mean |activation| over samples and positions"
    ),
    "ablation": Statistic(
        "unit", "per unit", "option", True, "(f(theta + t v) - f(theta)) / t, v = minus the unit",
        options=("step", "of"),
    ),
    "jvp_output": Statistic(
        "unit", "per unit", False, True, "mean over samples of ||J v||_2, v = minus the unit"
    ),
    "noise": Statistic(
        "unit", "free", False, True, "seeded uniform noise in [0, 1)", options=("seed",)
    ),
}  # fmt: skip
"""Statistic -> what it is. `secateurs.statistics.COLLECTORS` says who collects it."""

REDUCTIONS: Mapping[str, tuple[str, ...]] = {
    "finish": ("none", "abs", "square", "sqrt"),
    "finish_on": ("element", "unit"),
    "average": ("dataset", "batch", "sample"),
    "members": ("producers", "removal", "consumers", "all"),
}
"""Fields of a criterion that its user may override by name."""


@dataclass(frozen=True)
class Criterion:
    """A rule that yields scores; larger = keep.

    Attributes:
        name: how it is asked for.
        fn: `fn(stats) -> contribution`, pure and elementwise.
        needs: names in `STATISTICS`, all of one level.
        family: the room it lives in: weight, gradient, directional, activation, control.
        linear: whether `fn` is linear in the gradient: sums of squared gradients are then enough
            for its square.
        finish: applied to the signed contribution: "none", "abs", "square" or "sqrt".
        finish_on: "element": before elements are summed into units; "unit": after.
        average: "dataset": from the exact mean over all samples; "batch": finished for each batch,
            then averaged by batch size (depends on the partition); "sample": finished for each
            sample, then averaged. Only gradients know the last two.
        members: which members of a structural unit are summed. "producers", "consumers", "all";
            "removal": the outermost producers or the consumers, whichever alone remove the unit.
        granularities: "any", "structured" (all but weight), or kinds such as ("channel",).
        formula: of the finished score, in plain text.
        reference: arXiv id, or where it comes from.
        summary: one sentence.
        words: what it means, in plain words.
        use: when to use it.
        avoid: when not to.
        options: effective value of each option.
        allowed: option -> its choices, or (low, high) inclusive for a number.
        variants: "option=value" -> fields that this choice replaces.
    """

    name: str
    fn: Callable[[Stats], Tensor]
    needs: frozenset[str]
    family: str
    linear: bool = False
    finish: Finish = "none"
    finish_on: Literal["element", "unit"] = "unit"
    average: Literal["dataset", "batch", "sample"] = "dataset"
    members: Literal["producers", "removal", "consumers", "all"] = "producers"
    granularities: Literal["any", "structured"] | tuple[Kind, ...] = "any"
    formula: str = ""
    reference: str = ""
    summary: str = ""
    words: str = ""
    use: str = ""
    avoid: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Option, ...]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        where = f"criterion {self.name!r}"
        for need in self.needs:
            choose(need, STATISTICS, f"statistic of {where}")
        for name, choices in REDUCTIONS.items():
            choose(getattr(self, name), choices, f"{name} of {where}")
        if isinstance(self.granularities, str):
            choose(self.granularities, ["any", "structured"], f"granularities of {where}")
        else:
            for kind in self.granularities:
                choose(kind, KINDS, f"granularities of {where}")
        if len({STATISTICS[need].level for need in self.needs}) != 1:
            raise ConfigError(
                f"{where} needs {', '.join(sorted(self.needs)) or 'nothing'}: name at least one "
                "statistic, all of one level (element or unit)"
            )
        if self.average != "dataset" and not self.needs & {"grad", "gate"}:
            raise ConfigError(
                f"{where}: average={self.average!r} is for criteria that need grad or gate; "
                'use average="dataset"'
            )
        for name, value in self.options.items():
            _check_option(where, name, value, self.allowed.get(name))
        if not self.label:
            object.__setattr__(self, "label", self.name)

    @property
    def level(self) -> Literal["element", "unit"]:
        """Whether `fn` sees parameter elements or units."""
        return STATISTICS[next(iter(self.needs))].level

    @property
    def needs_data(self) -> bool:
        """Whether scoring runs the model on batches."""
        return any(STATISTICS[need].data for need in self.needs)

    @property
    def needs_loss(self) -> bool:
        """Whether scoring needs targets and a loss."""
        asked = {STATISTICS[need].loss for need in self.needs}
        return True in asked or ("option" in asked and self.options.get("of") == "loss")

    @property
    def sees(self) -> Literal["weights", "inputs", "inputs, labels", "inputs, labels, loss"]:
        """What it looks at."""
        if self.needs_loss:
            return "inputs, labels, loss"
        if any(STATISTICS[need].labels for need in self.needs):
            return "inputs, labels"
        return "inputs" if self.needs_data else "weights"

    @property
    def cost(self) -> Cost:
        """The dearest of what it needs."""
        order = get_args(Cost)
        return max((STATISTICS[need].cost for need in self.needs), key=order.index)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of units that it can score."""
        if not isinstance(self.granularities, str):
            return self.granularities
        weight = self.granularities == "any" and all(STATISTICS[n].weight for n in self.needs)
        return tuple(k for k in KINDS if weight or k != "weight")

    def covers(self, kind: Kind) -> bool:
        """Whether targets of that kind can be scored at all."""
        return kind in self.kinds


def _check_option(
    where: str, name: str, value: Option, allowed: tuple[Option, ...] | None
) -> Option:
    if allowed and isinstance(allowed[0], str):
        return choose(str(value), [str(a) for a in allowed], f"{name} of {where}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where}: {name} must be a finite number, got {value!r}")
    if allowed:
        low, high = (float(a) for a in allowed)
        if not low <= value <= high:
            raise ConfigError(f"{where}: {name} must be in [{low:g}, {high:g}], got {value!r}")
    return value


CRITERIA: dict[str, Criterion] = {}
"""The registry: name -> criterion, in order of definition."""


def criterion(
    name: str, *, needs: set[str], family: str, **fields: Any
) -> Callable[[Callable[[Stats], Tensor]], Callable[[Stats], Tensor]]:
    """Register a function as the criterion `name`; other keywords are fields of `Criterion`.

    The docstring is the documentation: its first line becomes the summary, a paragraph that begins
    with "Use it" says when to, one that begins with "Avoid it" when not to, and the others are the
    words between.

    Raises:
        ConfigError: the name is taken, or a field is out of range.
    """

    def register(fn: Callable[[Stats], Tensor]) -> Callable[[Stats], Tensor]:
        if name in CRITERIA:
            raise ConfigError(f"criterion {name!r} is already registered; choose another name")
        CRITERIA[name] = Criterion(
            name=name, fn=fn, needs=frozenset(needs), family=family, **{**_said(fn), **fields}
        )
        return fn

    return register


def _said(fn: Callable[[Stats], Tensor]) -> dict[str, str]:
    """What the docstring of a criterion says: summary, words, use, avoid."""
    paragraphs = [" ".join(p.split()) for p in (fn.__doc__ or "").split("\n\n")]
    found = {"summary": paragraphs[0], "words": "", "use": "", "avoid": ""}
    for text in paragraphs[1:]:
        starts = {"Use it": "use", "Avoid it": "avoid"}
        key = next((k for begin, k in starts.items() if text.startswith(begin)), "words")
        found[key] = f"{found[key]} {text}".strip()
    return found


def get_criterion(
    spec: str | Mapping[str, Any] | Criterion, **options: Option | Mapping[str, Any]
) -> Criterion:
    """The criterion of that name, with options.

    Options are those of the criterion and, for every criterion, its reductions: `finish`,
    `finish_on`, `average` and `members`.

    Args:
        spec: a name, a mapping such as `{"name": "finite_difference", "step": 0.5}`, or a
            `Criterion` of your own.
        options: option values; they win over those of the mapping.

    Raises:
        ConfigError: unknown name or option, or a value out of range.

    Example:
        >>> get_criterion("finite_difference", step=0.5).label
        'finite_difference(step=0.5)'
        >>> get_criterion({"name": "taylor", "average": "batch"}).label
        'taylor(average=batch)'
        >>> get_criterion("magnitud")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        secateurs.errors.ConfigError: unknown criterion 'magnitud'. Did you mean 'magnitude'? ...
    """
    if isinstance(spec, Mapping):
        given = dict(spec)
        if "name" not in given:
            raise ConfigError(
                f'criterion {given!r} has no name; write for example {{"name": "taylor"}}'
            )
        options = {**{k: v for k, v in given.items() if k != "name"}, **options}
        spec = str(given["name"])
    if isinstance(spec, str):
        spec = CRITERIA[choose(spec, CRITERIA, "criterion")]
    if not isinstance(spec, Criterion):
        raise ConfigError(
            f"a criterion is a name, a mapping or a Criterion, got {type(spec).__name__}"
        )
    return _with_options(spec, options) if options else spec


def _with_options(base: Criterion, options: Mapping[str, Any]) -> Criterion:
    """The criterion with other options, reductions, and what its variants replace."""
    for key in options:
        choose(key, [*base.options, *REDUCTIONS], f"option of criterion {base.name!r}")
    values = {**base.options, **{k: v for k, v in options.items() if k in base.options}}
    where = f"criterion {base.name!r}"
    fields: dict[str, Any] = {}
    for name, value in values.items():
        _check_option(where, name, value, base.allowed.get(name))
        fields |= base.variants.get(f"{name}={value}", {})
    fields |= {k: v for k, v in options.items() if k in REDUCTIONS}
    before = {**base.options, **{k: getattr(base, k) for k in REDUCTIONS}}
    changed = [f"{k}={v}" for k, v in options.items() if before[k] != v]
    label = f"{base.label}({', '.join(changed)})" if changed else base.label
    return replace(base, options=values, label=label, **fields)
