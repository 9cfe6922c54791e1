"""What is asked for: how much may remain (`Budget`), or below which score units go (`Threshold`).

Both are blocks of a recipe and arguments of `allocate` and `prune`, and check themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np

from secateurs.errors import ConfigError, choose

__all__ = ["THRESHOLD_PARAMETER", "Budget", "Threshold"]


def _one_of(name: str, options: Mapping[str, Any]) -> str:
    given = [key for key, value in options.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{name} needs exactly one of {', '.join(options)}; got {', '.join(given) or 'none'}"
        )
    return given[0]


@dataclass(frozen=True)
class Budget:
    """What may remain of the model, as a fraction of the dense one or as an absolute figure.

    A float in (0, 1] is a fraction, an int or a text such as "120M" an absolute number.
    Exactly one of the fields is given.

    Args:
        units: units (at weight granularity: weights) among the targets.
        params: parameters of the whole model; at weight granularity, non-zero ones.
        macs: multiply-adds for one sample.

    Raises:
        ConfigError: not exactly one field, or a figure out of range.

    Example:
        >>> Budget(macs=0.25)
        Budget(units=None, params=None, macs=0.25)
        >>> Budget(params="1.5M").amount
        1500000
        >>> Budget(macs=90.0)
        Traceback (most recent call last):
        secateurs.errors.ConfigError: Budget(macs=90.0): a float is the fraction that may \
remain, in (0, 1]. Did you mean 0.9? (an absolute figure is an int or a text such as "120M")
    """

    units: float | int | str | None = None
    params: float | int | str | None = None
    macs: float | int | str | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _one_of("Budget", self._fields())
        _ = self.amount

    def _fields(self) -> dict[str, Any]:
        return {"units": self.units, "params": self.params, "macs": self.macs}

    @property
    def quantity(self) -> Literal["units", "params", "macs"]:
        """Which figure is limited."""
        return _one_of("Budget", self._fields())  # type: ignore[return-value]

    @property
    def amount(self) -> float | int:
        """The limit: a float is a fraction of the dense model, an int is absolute."""
        key = self.quantity
        return _amount(f"Budget({key}={self._fields()[key]!r})", self._fields()[key])

    def fraction(self, dense: int) -> float:
        """The limit as a fraction of the dense model, at most 1."""
        return self.amount if isinstance(self.amount, float) else min(1.0, self.amount / dense)


_SUFFIX = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def _amount(where: str, value: Any) -> float | int:
    no_number = ConfigError(f'{where}: not a number; write for example "120M", 5000 or 0.5')
    if isinstance(value, str):
        value = _amount_of_text(value)
    if isinstance(value, bool) or not isinstance(value, Real) or value != value:
        raise no_number
    if isinstance(value, Integral):
        if value < 1:
            raise ConfigError(f"{where}: an absolute figure must be at least 1")
        return int(value)
    share = float(value)
    if 0 < share <= 1:
        return share
    hint = f" Did you mean {share / 100:g}?" if 1 < share <= 100 else ""
    raise ConfigError(
        f"{where}: a float is the fraction that may remain, in (0, 1].{hint} "
        f'(an absolute figure is an int or a text such as "120M")'
    )


def _amount_of_text(text: str) -> float | int | None:
    """ "120M" -> 120000000, "0.5" -> 0.5, "1e-1" (a text in YAML) -> 0.1; None: not a number."""
    text = text.strip().upper()
    factor = _SUFFIX.get(text[-1:], 1)
    try:
        number = float(text[:-1] if factor > 1 else text)
    except ValueError:
        return None
    if not np.isfinite(number):
        return None
    fraction = abs(number) < 1 or ("." in text and "E" not in text)
    return number if factor == 1 and fraction else round(number * factor)


THRESHOLD_PARAMETER: Mapping[str, str | None] = {
    "value": "value",
    "mean": None,
    "k_std": "k",
    "rate_mean": "rate",
    "quantile": "q",
}
"""Threshold rule -> the parameter that it needs."""


@dataclass(frozen=True)
class Threshold:
    """A rule that turns scores into a cut: units whose score is below it are removed.

    Args:
        rule: one of `THRESHOLD_PARAMETER`:
            "value" (at `value`), "mean", "k_std" (mean + k standard deviations, k may be
            negative), "rate_mean" (rate x mean; with criterion="gradient" this is
            rate x mean |gradient|), "quantile" (the lowest fraction `q` goes).
        value: for "value".
        k: for "k_std".
        rate: for "rate_mean".
        q: for "quantile", in [0, 1).
        scope: "target": one threshold per target; "global": one over all scores.

    Raises:
        ConfigError: unknown rule, or its parameter missing, out of range or of another rule.
    """

    rule: str
    value: float | None = None
    k: float | None = None
    rate: float | None = None
    q: float | None = None
    scope: Literal["target", "global"] = "target"

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.rule, THRESHOLD_PARAMETER, "threshold rule")
        choose(self.scope, ["target", "global"], "threshold scope")
        wanted = THRESHOLD_PARAMETER[self.rule]
        given = {n: v for n in ("value", "k", "rate", "q") if (v := getattr(self, n)) is not None}
        if wanted is not None and wanted not in given:
            raise ConfigError(f"Threshold({self.rule!r}) needs {wanted}=, got none")
        extra = sorted(set(given) - {wanted})
        if extra:
            raise ConfigError(f"Threshold({self.rule!r}) takes no {', '.join(extra)}")
        for name, number in given.items():
            if not np.isfinite(number):
                raise ConfigError(f"Threshold({self.rule!r}, {name}={number}): must be finite")
        if self.q is not None and not 0 <= self.q < 1:
            hint = f" Did you mean {self.q / 100:g}?" if 1 <= self.q < 100 else ""
            raise ConfigError(f"Threshold('quantile', q={self.q}): q must be in [0, 1).{hint}")
        if self.rate is not None and self.rate < 0:
            raise ConfigError(f"Threshold('rate_mean', rate={self.rate}): must be at least 0")
