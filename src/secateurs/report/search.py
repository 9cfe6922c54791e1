"""The picture of a search: what each candidate loses against how large it is.

    candidates_plot([Point, ...], x=..., y=..., limit=...) -> inline SVG for a page

Only plain numbers: the words and the page are made where results of searches live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from secateurs.report.drawing import ROLES, make_axes, make_figure, plain_style, tick_text, to_svg
from secateurs.report.words import number, shorten

__all__ = ["Point", "candidates_plot"]

Role = Literal["chosen", "passed", "failed", "other"]
SHAPES: dict[Role, tuple[str, float, str]] = {
    "chosen": ("o", 11, "kept"),
    "passed": ("o", 6.5, "kept"),
    "failed": ("X", 7, "flag"),
    "other": ("o", 6.5, "muted"),
}


@dataclass(frozen=True)
class Point:
    """One candidate in the picture.

    Attributes:
        name: for the label of the chosen one.
        size: on the x axis, in the unit of the axis.
        change: of the metric against the dense network, mean of the folds; below 0 is worse.
        low, high: ends of the interval around it; None where there is none.
        folds: (size, change) of each fold.
        role: "chosen", "passed" and "failed" the test of the limit, or "other".
        front: whether no other candidate beats it.
    """

    name: str
    size: float
    change: float
    low: float | None
    high: float | None
    folds: tuple[tuple[float, float], ...]
    role: Role
    front: bool


@plain_style
def candidates_plot(
    points: Sequence[Point], *, x: str, y: str, percent: bool, limit: float | None, key: str,
    label: str,
) -> str:  # fmt: skip
    """Change of the metric against size: folds pale, means strong, what was chosen large.

    Args:
        points: at least one.
        x, y: names of the axes.
        percent: whether sizes are percentages.
        limit: how far down the change may go; None draws no line.
        key, label: as in `plots`.
    """
    points = _side_by_side(points)
    figure = make_figure(460, 330)
    axes = make_axes(figure)
    axes.axhline(0, color=ROLES["muted"], linestyle=(0, (4, 3)), linewidth=1.2)
    _line_word(axes, "dense", 0, "ink", above=True)
    if limit is not None:
        axes.axhline(limit, color=ROLES["flag"], linestyle=(0, (6, 2)), linewidth=1.6)
        _line_word(axes, f"limit {number(float(f'{limit:.4g}'))}", limit, "flag", above=False)
    front = sorted((p.size, p.change) for p in points if p.front)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=ROLES["muted"], linewidth=1.0, zorder=1)
    for p in points:
        shape, size, colour = SHAPES[p.role]
        strong = p.role == "chosen"
        if p.folds:
            axes.plot(*zip(*p.folds, strict=True), ".", color=ROLES[colour], markersize=5,
                      alpha=0.7 if strong else 0.35, zorder=2)  # fmt: skip
        if p.low is not None and p.high is not None:
            axes.plot([p.size] * 2, [p.low, p.high], color=ROLES[colour], zorder=3,
                      linewidth=2.4 if strong else 1.3)  # fmt: skip
        axes.plot([p.size], [p.change], shape, color=ROLES[colour], markersize=size, zorder=4,
                  markerfacecolor=ROLES[colour if p.front or strong else "card"],
                  markeredgewidth=1.5)  # fmt: skip
    _frame(axes, points, limit, percent)
    for p in [p for p in points if p.role == "chosen"]:
        low, high = sorted(axes.get_xlim())
        left = p.size > (low + high) / 2  # the axis runs from right to left
        axes.annotate(
            shorten(p.name, 44), (p.size, p.change), xytext=(12 if left else -12, 12),
            textcoords="offset points", ha="left" if left else "right", color=ROLES["kept"],
            fontsize=11, fontweight="bold", zorder=5,
        )  # fmt: skip
    axes.set_xlabel(x, color=ROLES["ink"], fontsize=12)
    axes.set_ylabel(y, color=ROLES["ink"], fontsize=12)
    return to_svg(figure, key, label)


def _side_by_side(points: Sequence[Point]) -> list[Point]:
    """Points of nearly one size, moved apart a little."""
    sizes = [p.size for p in points]
    step = 0.022 * (max(sizes) - min(sizes))
    groups: dict[int, list[Point]] = {}
    for p in sorted(points, key=lambda p: (p.size, -p.change)):
        near = round((p.size - min(sizes)) / step / 2) if step else 0
        groups.setdefault(near, []).append(p)
    moved = []
    for group in groups.values():
        for i, p in enumerate(group):
            by = (i - (len(group) - 1) / 2) * min(step, 3 * step / len(group))
            folds = tuple((x + by, y) for x, y in p.folds)
            moved.append(replace(p, size=p.size + by, folds=folds))
    return moved


def _line_word(axes: Axes, text: str, at: float, role: str, *, above: bool) -> None:
    axes.annotate(
        text, (0, at), xycoords=("axes fraction", "data"), xytext=(2, 3 if above else -3),
        textcoords="offset points", va="bottom" if above else "top", color=ROLES[role],
        fontsize=11,
    )  # fmt: skip


def _frame(axes: Axes, points: Sequence[Point], limit: float | None, percent: bool) -> None:
    """Limits that show every mean and most folds, and ticks in plain numbers."""
    sizes = [p.size for p in points]
    low, high = min(sizes), max(sizes)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_xlim(high + margin, low - margin)
    changes = [0.0, *(p.change for p in points), *(c for p in points for _, c in p.folds)]
    ends = [e for p in points if p.role in ("chosen", "passed") for e in (p.low, p.high)]
    changes += [e for e in ends if e is not None] + ([] if limit is None else [limit])
    bottom, top = min(changes), max(changes)
    room = 0.1 * (top - bottom) or 0.1
    axes.set_ylim(bottom - room, top + room)
    axes.xaxis.set_major_formatter(
        FuncFormatter((lambda v, _: f"{v:.3g} %") if percent else tick_text)
    )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color=ROLES["grid"], linewidth=1)
    axes.tick_params(axis="y", length=0)
