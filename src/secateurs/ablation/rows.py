"""One finished run of a comparison, and the file that remembers it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from secateurs.errors import ConfigError, FileFormatError

__all__ = ["Row", "changes", "read_row", "row_file", "write_row"]

FORMAT = 1
ABSENT = "nothing"


@dataclass(frozen=True)
class Row:
    """What one run left behind.

    Attributes:
        control: None for the criterion itself.
        seed: of data split, dense network, control and training.
        dense, test: test metric of the dense and of the pruned model.
        after_cut: validation metric right after the last cut, before the training that follows.
        kept, units: of each target.
        reached: what remains of the dense model, by quantity.
        metric: name of the metric.
        dense_weights: a hash; equal for all runs of a seed.
        seconds: of wall time.
    """

    control: str | None
    seed: int
    dense: float
    test: float
    after_cut: float
    kept: dict[str, int]
    units: dict[str, int]
    reached: dict[str, float | None]
    metric: str
    dense_weights: str
    seconds: float

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


def row_file(out: Path, control: str | None, seed: int) -> Path:
    """Where the row of a run belongs."""
    return out / "rows" / f"{control or 'criterion'}-seed{seed}.json"


def write_row(row: Row, made_by: Mapping[str, Any], file: Path) -> None:
    """Write a row with what made it; a reader never sees half of it."""
    text = json.dumps({"format": FORMAT, "made_by": made_by, "row": asdict(row)}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, file)


def read_row(file: Path, made_by: Mapping[str, Any]) -> Row | None:
    """The row of an earlier call; None if there is none.

    Raises:
        ConfigError: something else made it; says what differs.
        FileFormatError: the file is not a row.
    """
    if not file.exists():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        before = data["made_by"]
        if data["format"] != FORMAT or not isinstance(before, dict):
            raise ValueError(f"format {data['format']!r}, expected {FORMAT}")
        row = TypeAdapter(Row).validate_python(data["row"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise FileFormatError(
            f"{file} is no finished run: {type(error).__name__}: {str(error).splitlines()[0]}. "
            "Delete it, and its run is repeated"
        ) from error
    found = changes(before, made_by)
    if found:
        raise ConfigError(
            f"{file} was made by another recipe or program: {'; '.join(found)}. Add --force to "
            "throw the finished runs away and start over, or choose another --out"
        )
    return row


def changes(before: Any, now: Any, place: str = "") -> list[str]:
    """What differs between two nested mappings, one text each.

    Example:
        >>> changes({"budget": {"macs": 0.3}, "a": 1}, {"budget": {"macs": 0.2}, "a": 1})
        ['budget.macs was 0.3, is 0.2']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now})
        return [
            text
            for key in keys
            for text in changes(
                before.get(key, ABSENT), now.get(key, ABSENT), f"{place}.{key}" if place else key
            )
        ]
    return [] if before == now else [f"{place} was {before}, is {now}"]
