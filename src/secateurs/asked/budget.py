"""`Budget`: how much may remain."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from secateurs.errors import ConfigError

__all__ = ["QUANTITIES", "Budget"]

QUANTITIES = ("units", "params", "macs", "bytes")
"""What counts alone decide; `latency_ms` and `metric_drop` must be measured."""


@dataclass(frozen=True, repr=False)
class Budget:
    """What may remain of the model. Several limits together must all hold.

    Of `units`, `params`, `macs` and `bytes` a float in (0, 1] is a fraction of the dense model, an
    int or a text such as "120M" an absolute number.

    Args:
        units: units (at weight granularity: weights) among the targets.
        params: parameters of the whole model; at weight granularity, non-zero ones.
        macs: multiply-adds for one sample.
        bytes: tensors of the stored model, without the header of the file; at weight granularity,
            of the sparse file.
        latency_ms: milliseconds of one forward call on the example inputs (the median), above 0.
        metric_drop: how much worse the main metric may get, in its own unit, at least 0.

    Raises:
        ConfigError: no field at all, or a figure out of range.

    Example:
        >>> Budget(macs=0.25)
        Budget(macs=0.25)
        >>> Budget(params="1.5M", macs=0.5).sizes
        {'params': 1500000, 'macs': 0.5}
        >>> Budget(macs=90.0)
        Traceback (most recent call last):
        secateurs.errors.ConfigError: Budget(macs=90.0): a float is the fraction that may \
remain, in (0, 1]. Did you mean 0.9? (an absolute figure is an int or a text such as "120M")
    """

    units: float | int | str | None = None
    params: float | int | str | None = None
    macs: float | int | str | None = None
    bytes: float | int | str | None = None
    latency_ms: float | None = None
    metric_drop: float | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not self.given:
            names = ", ".join(f.name for f in fields(self))
            raise ConfigError(f"Budget needs at least one of {names}; got none")
        _ = self.sizes
        if self.latency_ms is not None and not _at_least(self.latency_ms, 0, above=True):
            raise ConfigError(
                f"Budget(latency_ms={self.latency_ms!r}): milliseconds of one call, above 0"
            )
        if self.metric_drop is not None and not _at_least(self.metric_drop, 0):
            raise ConfigError(
                f"Budget(metric_drop={self.metric_drop!r}): how much worse the metric may get, "
                "at least 0, in the unit of the metric (0.01 is one point of accuracy)"
            )

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{k}={v!r}' for k, v in self.given.items())})"

    @property
    def given(self) -> dict[str, Any]:
        """The limits, as they were written."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    @property
    def sizes(self) -> dict[str, float | int]:
        """Limits that counts alone decide: a float is a fraction of the dense model."""
        return {
            name: _amount(f"Budget({name}={value!r})", value)
            for name, value in self.given.items()
            if name in QUANTITIES
        }

    def limit(self, quantity: str, dense: int) -> int:
        """One of `sizes` as an absolute figure, rounded down.

        Example:
            >>> Budget(units=0.29).limit("units", 100)
            29
        """
        amount = self.sizes[quantity]
        # 0.29 * 100 is 28.999999999999996.
        return math.floor(amount * dense * (1 + 1e-12)) if isinstance(amount, float) else amount

    def fraction(self, quantity: str, dense: int) -> float:
        """One of `sizes` as a fraction of the dense model, at most 1."""
        amount = self.sizes[quantity]
        return amount if isinstance(amount, float) else min(1.0, amount / dense)


def _at_least(value: Any, low: float, *, above: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return False
    return float(value) > low or (not above and float(value) == low)


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
    if not math.isfinite(number):
        return None
    fraction = abs(number) < 1 or ("." in text and "E" not in text)
    return number if factor == 1 and fraction else round(number * factor)
