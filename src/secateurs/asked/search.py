"""`Search`: what is tried, what is wanted, and how each try is judged; the block of a recipe."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from numbers import Integral, Real
from typing import Any, ClassVar

from secateurs.errors import ConfigError, choose

__all__ = ["GOALS", "KINDS_OF_FOLDS", "SAMPLERS", "SIZES", "Candidate", "Folds", "Range", "Search",
           "Space"]  # fmt: skip

GOALS = ("smallest", "fastest", "pareto", "best")
SIZES = ("macs", "params", "bytes")
RULES = ("bound", "one_se")
MODES = ("auto", "refit", "fixed")
KINDS_OF_FOLDS = ("stratified", "kfold", "grouped", "bootstrap")
SAMPLERS = ("grid", "random", "tpe", "nsga2")


@dataclass(frozen=True)
class Candidate:
    """One setting to try.

    Attributes:
        number: from 0, in the order of the grid or of the draws.
        values: dotted recipe key ("budget.macs", "stages.0.allocation") -> JSON value.
    """

    number: int
    values: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The values in one line: "budget.macs=0.5, criterion=taylor"."""
        return ", ".join(f"{k}={_short(v)}" for k, v in self.values.items()) or "the recipe itself"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"number": self.number, "values": dict(self.values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_dict`."""
        return cls(int(data["number"]), dict(data["values"]))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included.

    Args:
        low, high: whole numbers for a whole-numbered choice, else floats.
        log: even in the logarithm; `low` above 0.
        step: only low, low + step, ...; not with `log`.
        n: how many values a grid takes, evenly from `low` to `high`, at least 2.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> Range(0.1, 0.4, n=4).grid()
        (0.1, 0.2, 0.3, 0.4)
        >>> Range(1, 100, log=True, n=3).grid()
        (1, 10, 100)
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if not _number(getattr(self, name)):
                raise ConfigError(f"Range({name}={getattr(self, name)!r}): a finite number")
        if not self.low < self.high:
            raise ConfigError(f"Range: low must be below high, got {self.low} and {self.high}")
        if not isinstance(self.log, bool) or (self.log and self.low <= 0):
            raise ConfigError(f"Range(log={self.log!r}): true or false; true needs low above 0")
        if self.step is not None and (not _number(self.step) or self.step <= 0 or self.log):
            raise ConfigError(f"Range(step={self.step!r}): above 0, and not with log")
        if self.n is not None and (not _whole(self.n) or self.n < 2 or self.step is not None):
            raise ConfigError(f"Range(n={self.n!r}): a whole number, at least 2, and not with step")

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return _whole(self.low) and _whole(self.high) and (self.step is None or _whole(self.step))

    def grid(self) -> tuple[float, ...]:
        """Its values for a grid, ascending.

        Raises:
            ConfigError: neither `n` nor `step` is given.
        """
        if self.step is not None:
            count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
            return tuple(self._tidy(self.low + i * self.step) for i in range(count))
        if self.n is None:
            raise ConfigError(
                f"a grid needs a number of values: add n or step to {{low: {self.low}, high: "
                f"{self.high}}}, or choose sampler: random, tpe or nsga2"
            )
        return tuple(dict.fromkeys(self.at(i / (self.n - 1)) for i in range(self.n)))

    def at(self, share: float) -> float:
        """The value at a share in [0, 1] of the way from `low` to `high`."""
        if self.log:
            ratio = math.log(self.high / self.low)
            return self._tidy(self.low * math.exp(share * ratio))
        if self.step is not None:
            count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
            return self._tidy(self.low + min(count - 1, int(share * count)) * self.step)
        return self._tidy(self.low + share * (self.high - self.low))

    def _tidy(self, value: float) -> float:
        """Without the last digits that arithmetic adds, and inside the range."""
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.12g}"), self.low), self.high)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


class Space(Mapping[str, "tuple[Any, ...] | Range"]):
    """What a search may choose: dotted recipe key -> its values, or a `Range`.

    Args:
        choices: key -> a list of values, a `Range`, or a mapping with the fields of one.

    Raises:
        ConfigError: empty, a key without values, or a value that is listed twice.

    Example:
        >>> space = Space({"budget.macs": [0.5, 0.25], "criterion": ["taylor", "magnitude"]})
        >>> [c.text for c in space.grid()][:2]
        ['budget.macs=0.5, criterion=taylor', 'budget.macs=0.5, criterion=magnitude']
    """

    def __init__(self, choices: Mapping[str, Any]) -> None:
        if not isinstance(choices, Mapping) or not choices:
            raise ConfigError(
                "search.space: a mapping of recipe keys to lists of values, for example "
                "{budget.macs: [0.5, 0.25]}"
            )
        self._choices = {str(key): _choice(str(key), value) for key, value in choices.items()}

    def __getitem__(self, key: str) -> tuple[Any, ...] | Range:
        return self._choices[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __repr__(self) -> str:
        return f"Space({self._choices!r})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON: lists, and mappings for ranges."""
        return {
            key: {k: v for k, v in asdict(choice).items() if v is not None and v is not False}
            if isinstance(choice, Range) else list(choice)
            for key, choice in self._choices.items()
        }  # fmt: skip

    def grid(self) -> list[Candidate]:
        """Every combination; the last key changes fastest.

        Raises:
            ConfigError: a range without `n` and `step`.
        """
        lists = [c.grid() if isinstance(c, Range) else c for c in self._choices.values()]
        return [
            Candidate(number, dict(zip(self._choices, values, strict=True)))
            for number, values in enumerate(product(*lists))
        ]

    def sampled(self, n: int, seed: int) -> list[Candidate]:
        """`n` combinations drawn at random; the first `m` of them are those of `sampled(m)`."""
        drawn = random.Random(seed)
        return [
            Candidate(
                number,
                {
                    key: choice.at(drawn.random()) if isinstance(choice, Range)
                    else choice[int(drawn.random() * len(choice))]
                    for key, choice in self._choices.items()
                },
            )
            for number in range(n)
        ]  # fmt: skip


def _choice(key: str, value: Any) -> tuple[Any, ...] | Range:
    where = f"search.space.{key}"
    if isinstance(value, Range):
        return value
    if isinstance(value, Mapping):
        names = list(Range.__dataclass_fields__)
        for name in value:
            choose(str(name), names, f"field of a range in {where}")
        if not {"low", "high"} <= set(value):
            raise ConfigError(f"{where}: a range needs low and high, got {dict(value)}")
        try:
            return Range(**value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(
            f"{where}: a list of values or {{low: ..., high: ...}}, got {value!r}"
            + (f"; write [{value}]" if isinstance(value, (str, int, float)) else "")
        )
    values = tuple(value)
    twice = [v for i, v in enumerate(values) if v in values[:i]]
    if twice:
        raise ConfigError(f"{where}: {twice[0]!r} is listed twice")
    return values


@dataclass(frozen=True)
class Folds:
    """How the samples are divided to judge a candidate.

    Args:
        kind: "stratified" (class proportions kept), "kfold", "grouped" (a group is never on both
            sides) or "bootstrap" (drawn with replacement, judged on what was not drawn).
        k: number of folds, at least 2.
        seed: of the division.
        groups: import path of a function that returns the group of each sample, in order; only for
            "grouped", where `data()` gives no "groups".
    """

    kind: str = "stratified"
    k: int = 5
    seed: int = 0
    groups: str | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.kind, KINDS_OF_FOLDS, "kind of folds")
        if not _whole(self.k) or self.k < 2:
            raise ConfigError(f"folds.k must be a whole number, at least 2, got {self.k!r}")
        if not _whole(self.seed) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"folds.seed must be from 0 to 2**32 - 1, got {self.seed!r}")
        if self.groups is not None and self.kind != "grouped":
            raise ConfigError(f"folds.groups is for kind: grouped, not {self.kind!r}")


@dataclass(frozen=True)
class Search:
    """What is tried, what is wanted, and how each try is judged.

    Args:
        space: recipe keys and their values: see `Space`.
        goal: "smallest" or "fastest" model within `max_drop`, the "pareto" front, or the "best"
            metric.
        size: what "smallest" counts: "macs", "params" or "bytes".
        max_drop: how much worse than the dense network the main metric may get, at least 0, in
            its own unit; needed for "smallest" and "fastest" under the rule "bound".
        confidence: that the drop stays within `max_drop`, in (0.5, 1).
        rule: "bound" (an upper bound on the drop stays within `max_drop`) or "one_se" (within one
            standard error of the best candidate; promises nothing).
        folds: see `Folds`.
        sampler: "grid", "random", "tpe" or "nsga2".
        trials: candidates that are tried; needed unless the sampler is "grid".
        mode: "refit" (a new dense network for each fold), "fixed" (the given one, judged on
            validation data) or "auto" (refit where the dense network can be trained again).
        copies: "error" or "note" where samples of the test split occur in other data.

    Raises:
        ConfigError: a field is out of range or contradicts another.

    Example:
        >>> Search({"budget.macs": [0.5, 0.25]}, max_drop=0.01).folds.k
        5
    """

    space: Mapping[str, Any]
    goal: str = "smallest"
    size: str = "macs"
    max_drop: float | None = None
    confidence: float = 0.95
    rule: str = "bound"
    folds: Folds = field(default_factory=Folds)
    sampler: str = "grid"
    trials: int | None = None
    mode: str = "auto"
    copies: str = "error"

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", Space(self.space))
        choose(self.goal, GOALS, "search goal")
        choose(self.size, SIZES, "search size")
        choose(self.rule, RULES, "search rule")
        choose(self.sampler, SAMPLERS, "search sampler")
        choose(self.mode, MODES, "search mode")
        choose(self.copies, ("error", "note"), "value of search.copies")
        if self.max_drop is not None and (not _number(self.max_drop) or self.max_drop < 0):
            raise ConfigError(f"search.max_drop must be at least 0, got {self.max_drop!r}")
        if not _number(self.confidence) or not 0.5 < self.confidence < 1:
            hint = f" Did you mean {self.confidence / 100:g}?" if _percent(self.confidence) else ""
            raise ConfigError(f"search.confidence is in (0.5, 1), got {self.confidence!r}.{hint}")
        if self.trials is not None and (not _whole(self.trials) or self.trials < 1):
            raise ConfigError(f"search.trials must be at least 1, got {self.trials!r}")
        if self.bounded and self.max_drop is None:
            raise ConfigError(
                f"search: goal {self.goal!r} needs max_drop: how much the metric may lose, for "
                "example max_drop: 0.01 (one point of accuracy)"
            )
        if self.sampler == "grid":
            n = len(self.grid_space.grid())
            if self.trials is not None and self.trials != n:
                raise ConfigError(
                    f"search.trials: the grid has {n} candidates, got {self.trials}; leave it away "
                    "or choose sampler: random"
                )
        elif self.trials is None:
            raise ConfigError(f"search: sampler {self.sampler!r} needs trials, for example 50")

    @property
    def bounded(self) -> bool:
        """Whether the choice promises a limit on the drop."""
        return self.goal in ("smallest", "fastest") and self.rule == "bound"

    @property
    def grid_space(self) -> Space:
        """`space`, typed."""
        assert isinstance(self.space, Space)
        return self.space

    @property
    def n_trials(self) -> int:
        """Candidates that are tried."""
        return len(self.grid_space.grid()) if self.trials is None else self.trials

    def with_mode(self, mode: str) -> Search:
        """The same search with `mode` settled."""
        return replace(self, mode=mode)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without what is not set."""
        plain = {k: v for k, v in vars(self).items() if v is not None}
        folds = {k: v for k, v in asdict(self.folds).items() if v is not None}
        return {**plain, "space": self.grid_space.to_dict(), "folds": folds}


def _percent(value: Any) -> bool:
    return _number(value) and 50 < value < 100
