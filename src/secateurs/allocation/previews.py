"""What a threshold would remove, before it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Preview", "PreviewRow"]


@dataclass(frozen=True)
class PreviewRow:
    """What a threshold would remove from one target.

    Attributes:
        target, kind: which.
        units: units that are left.
        threshold: score below which units go; inf when the rule lets none stay.
        goes: units that would go, after rounding.
        lowest, median, largest: of the scores of the units that are left.
        goes_to: the largest score that would go; None if nothing does.
        stays_from: the lowest score that would stay; None if nothing does.
        problem: why `allocate` would refuse; "" if it would not.
    """

    target: str
    kind: str
    units: int
    threshold: float
    goes: int
    lowest: float
    median: float
    largest: float
    goes_to: float | None
    stays_from: float | None
    problem: str = ""

    @property
    def share(self) -> float:
        """Fraction of the units that are left that would go."""
        return self.goes / self.units


@dataclass(frozen=True)
class Preview:
    """What a threshold would remove.

    Attributes:
        asked: the rule, as text.
        criterion: of the scores.
        rows: one for each target.
    """

    asked: str
    criterion: str
    rows: tuple[PreviewRow, ...]

    @property
    def units(self) -> int:
        """Units that are left, in all targets."""
        return sum(row.units for row in self.rows)

    @property
    def goes(self) -> int:
        """Units that would go."""
        return sum(row.goes for row in self.rows)

    def table(self) -> str:
        """Plain text: one line per target, the total, and what `allocate` would refuse."""
        head = ("target", "units", "threshold", "go", "share", "lowest", "goes to", "stays from",
                "median", "largest")  # fmt: skip
        cells = [head, *map(_cells, self.rows)]
        total = (f"{self.units:,}", "", f"{self.goes:,}", f"{self.goes / self.units:.1%}")
        cells.append(("total", *total, *[""] * 5))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [f"threshold {self.asked}, on scores of {self.criterion}"]
        for row in cells:
            first, *others = map(_padded, row, widths, range(len(row)))
            lines.append("  ".join([first, *others]).rstrip())
        return "\n".join([*lines, *(f"refused: {r.problem}" for r in self.rows if r.problem)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is not finite is None."""
        rows = [{**asdict(row), "share": row.share} for row in self.rows]
        return {
            "asked": self.asked,
            "criterion": self.criterion,
            "units": self.units,
            "goes": self.goes,
            "rows": [{k: _finite(v) for k, v in row.items()} for row in rows],
        }


def _cells(row: PreviewRow) -> Sequence[str]:
    figures = (row.lowest, row.goes_to, row.stays_from, row.median, row.largest)
    return (
        row.target, f"{row.units:,}", f"{row.threshold:.4g}", f"{row.goes:,}", f"{row.share:.1%}",
        *("-" if figure is None else f"{figure:.4g}" for figure in figures),
    )  # fmt: skip


def _padded(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
