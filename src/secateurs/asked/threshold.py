"""`Threshold`: below which score units go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Literal

from secateurs.errors import ConfigError, choose

__all__ = ["RULES", "THRESHOLD_FIELDS", "Parameter", "Rule", "Threshold"]


@dataclass(frozen=True)
class Parameter:
    """A figure that a threshold rule takes.

    Attributes:
        default: used when it is not given; None: it must be given.
        low, high: range; an end is part of it when `ends` says "[" or "]".
        ends: for example "[)" for low <= figure < high.
        share: whether it is a fraction of the units, which people mix up with percent.
    """

    default: float | bool | None = None
    low: float = -math.inf
    high: float = math.inf
    ends: Literal["[]", "[)", "(]", "()"] = "[]"
    share: bool = False

    def problem(self, name: str, given: Any) -> str | None:
        """What is wrong with a value, if anything."""
        if isinstance(self.default, bool):
            return None if isinstance(given, bool) else f"{name} must be True or False"
        if isinstance(given, bool) or not isinstance(given, Real):
            return f"{name} must be a number"
        value = float(given)
        if not math.isfinite(value):
            return f"{name} must be finite"
        above = value > self.low or (value == self.low and self.ends[0] == "[")
        below = value < self.high or (value == self.high and self.ends[1] == "]")
        if above and below:
            return None
        if not math.isfinite(self.high):
            least = "at least" if self.ends[0] == "[" else "above"
            return f"{name} must be {least} {self.low:g}"
        hint = f". Did you mean {value / 100:g}?" if self.share and 1 <= value < 100 else ""
        span = f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"
        return f"{name} must be in {span}{hint}"


@dataclass(frozen=True)
class Rule:
    """What a threshold rule is, beside its function: data for checks, tables and messages.

    Attributes:
        cut: the score below which units go, in plain text.
        parameters: fields of `Threshold` that it takes.
        null: whether it compares with scores on shuffled labels.
        reference: where it comes from.
    """

    cut: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    null: bool = False
    reference: str = ""


_ANY = Parameter()
_Z = "Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993, section 3.3"
_OTSU = "Otsu, A Threshold Selection Method from Gray-Level Histograms, 1979"
_EM = (
    "Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977"
)
_KNEEDLE = "Satopaa et al., Finding a Kneedle in a Haystack, 2011"
_BH = "Benjamini and Hochberg, Controlling the False Discovery Rate, 1995"

RULES: dict[str, Rule] = {
    "value": Rule("value", {"value": _ANY}),
    "quantile": Rule(
        "the lowest fraction q goes", {"q": Parameter(low=0.0, high=1.0, ends="[)", share=True)}
    ),
    "mean": Rule("mean"),
    "k_std": Rule("mean + k standard deviations", {"k": _ANY}),
    "mad": Rule("median + k x 1.4826 x median absolute deviation", {"k": _ANY}, reference=_Z),
    "rate_mean": Rule("rate x mean", {"rate": Parameter(low=0.0)}),
    "otsu": Rule(
        "where the variance between the two sides is largest",
        {"log": Parameter(default=False)},
        reference=_OTSU,
    ),
    "gaussian_mixture": Rule(
        "where two Gaussians fitted to the log scores are equally responsible", reference=_EM
    ),
    "knee": Rule("the corner of the sorted scores", reference=_KNEEDLE),
    "permutation": Rule(
        "the lowest score that beats shuffled labels at false-discovery rate fdr",
        {"fdr": Parameter(low=0.0, high=1.0, ends="()", share=True)},
        null=True,
        reference=_BH,
    ),
}
"""Threshold rule -> what it is. `secateurs.allocation.threshold` adds a rule and its function."""


@dataclass(frozen=True)
class Threshold:
    """A rule that turns scores into a cut: units whose score is below it are removed.

    Args:
        rule: one of `RULES`:
            "value" (at `value`), "quantile" (the lowest fraction `q` goes), "mean", "k_std" (mean +
            k standard deviations), "mad" (median + k x 1.4826 x median absolute deviation),
            "rate_mean" (rate x mean; with criterion="gradient" this is rate x mean |gradient|),
            "otsu" (where the variance between the two sides is largest), "gaussian_mixture" (where
            two Gaussians on the log scores are equally responsible), "knee" (the corner of the
            sorted scores), "permutation" (the lowest score that beats shuffled labels at a
            false-discovery rate of `fdr`).
        value: for "value".
        k: for "k_std" and "mad"; may be negative.
        rate: for "rate_mean", at least 0.
        q: for "quantile", in [0, 1).
        scope: "target": one threshold per target; "global": one over all scores.
        fdr: for "permutation", in (0, 1).
        log: for "otsu": on the logarithms of the scores; False by default.

    Raises:
        ConfigError: unknown rule, or its parameter missing, out of range or of another rule.

    Example:
        >>> Threshold("k_std", k=1).parameters
        {'k': 1}
        >>> Threshold("otsu").parameters
        {'log': False}
        >>> Threshold("otsoo")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        secateurs.errors.ConfigError: unknown threshold rule 'otsoo'. Did you mean 'otsu'? ...
    """

    rule: str
    value: float | None = None
    k: float | None = None
    rate: float | None = None
    q: float | None = None
    scope: Literal["target", "global"] = "target"
    fdr: float | None = None
    log: bool | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.rule, RULES, "threshold rule")
        choose(self.scope, ["target", "global"], "threshold scope")
        takes, given = RULES[self.rule].parameters, self._given()
        extra = ", ".join(sorted(set(given) - set(takes)))
        if extra:
            raise ConfigError(
                f"Threshold({self.rule!r}) takes no {extra}; it takes "
                f"{', '.join(takes) or 'no parameter'}"
            )
        missing = [n for n, p in takes.items() if p.default is None and n not in given]
        if missing:
            raise ConfigError(f"Threshold({self.rule!r}) needs {', '.join(missing)}=, got none")
        for name, figure in given.items():
            problem = takes[name].problem(name, figure)
            if problem is not None:
                raise ConfigError(f"Threshold({self.rule!r}, {name}={figure!r}): {problem}")

    def _given(self) -> dict[str, float | bool]:
        return {n: v for n in THRESHOLD_FIELDS if (v := getattr(self, n)) is not None}

    @property
    def parameters(self) -> dict[str, float | bool]:
        """The parameters of the rule, defaults included."""
        takes, given = RULES[self.rule].parameters, self._given()
        return {n: given.get(n, p.default) for n, p in takes.items()}  # type: ignore[misc]

    @property
    def needs_null(self) -> bool:
        """Whether scores on shuffled labels are needed."""
        return RULES[self.rule].null

    @property
    def text(self) -> str:
        """For messages, such as "k_std(k=1) per target"."""
        inner = ", ".join(
            f"{k}={v}" if isinstance(v, bool) else f"{k}={v:g}" for k, v in self.parameters.items()
        )
        where = "per target" if self.scope == "target" else "over all targets"
        return f"{self.rule}({inner}) {where}"


THRESHOLD_FIELDS = tuple(f.name for f in fields(Threshold) if f.name not in ("rule", "scope"))
"""Names that a parameter of a threshold rule may have."""
