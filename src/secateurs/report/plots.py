"""Plots of a report as inline SVG. Each takes its data, then `key=` and `label=`, and returns text.

`key` makes the ids of one plot differ from those of every other on the page, `label` is read out
in place of the picture. How they look is in `drawing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from secateurs.report.data import ControlRow, DiagnosisRow, Histogram, StepRow
from secateurs.report.drawing import ROLES, make_axes, make_figure, plain_style, tick_text, to_svg
from secateurs.report.words import finite, remaining_words, shorten

__all__ = [
    "control_plot",
    "gradient_plot",
    "schedule_plot",
    "score_plot",
    "weight_plot",
]


def _power(value: float, _position: int | None = None) -> str:
    """A tick of a logarithmic axis: 10 to a power in plain characters."""
    exponent = round(math.log10(value)) if value > 0 else 0
    if -1 <= exponent <= 2:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


Points = list[tuple[float, float]]


@plain_style
def schedule_plot(
    steps: Sequence[StepRow],
    *,
    quantity: str,
    metric: str,
    dense: float | None,
    key: str,
    label: str,
) -> str:
    """Metric against what remains: hollow right after each cut, filled when healed.

    Steps that were rolled back are crosses, and no line goes through them.
    """
    path, cut, healed, undone = _along(steps, quantity, dense)
    figure = make_figure(400, 280)
    axes = make_axes(figure)
    if finite(dense):
        axes.axhline(dense, color=ROLES["muted"], linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(
            "dense", (0, dense), xycoords=("axes fraction", "data"), xytext=(2, 3),
            textcoords="offset points", color=ROLES["ink"], fontsize=11,
        )  # fmt: skip
    if path:
        axes.plot(*zip(*path, strict=True), color=ROLES["muted"], linewidth=0.8)
    looks: list[tuple[Points, dict[str, Any]]] = [
        (cut, {"marker": "o", "linewidth": 0, "color": ROLES["flag"], "markeredgewidth": 2,
               "markerfacecolor": ROLES["card"], "label": "right after the cut"}),
        (healed, {"marker": "o", "linewidth": 2, "color": ROLES["kept"],
                  "label": "after fine-tuning"}),
        (undone, {"marker": "x", "linewidth": 0, "color": ROLES["flag"], "markeredgewidth": 2,
                  "label": "rolled back"}),
    ]  # fmt: skip
    for points, look in looks:
        if points:
            axes.plot(*zip(*points, strict=True), markersize=8, **look)
    axes.set_xlim(104, 0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.margins(y=0.1)
    axes.grid(axis="y", color=ROLES["grid"], linewidth=1)
    axes.tick_params(axis="y", length=0)
    what = f"{remaining_words(quantity)} remaining (pruning goes to the right)"
    axes.set_xlabel(what, color=ROLES["ink"], fontsize=12)
    axes.set_ylabel(shorten(metric, 30), color=ROLES["ink"], fontsize=12)
    if cut or healed or undone:
        figure.legend(
            loc="outside upper left", ncols=2 + bool(undone), frameon=False, fontsize=12,
            columnspacing=0.8 if undone else None, labelcolor=ROLES["ink"], handletextpad=0.4,
        )  # fmt: skip
    return to_svg(figure, key, label)


def _along(
    steps: Sequence[StepRow], quantity: str, dense: float | None
) -> tuple[Points, Points, Points, Points]:
    """(percent that remains, metric): the whole path, after cuts, healed, and rolled back."""
    path: Points = [(100.0, dense)] if finite(dense) else []
    cut: Points = []
    healed: Points = []
    undone: Points = []
    for step in steps:
        remaining = step.remaining.get(quantity)
        if not finite(remaining):
            continue
        if step.rolled_back:
            last = step.metric_masked if step.metric_healed is None else step.metric_healed
            if finite(last):
                undone.append((100 * remaining, last))
            continue
        for value, points in ((step.metric_masked, cut), (step.metric_healed, healed)):
            if finite(value):
                points.append((100 * remaining, value))
                path.append(points[-1])
    return path, cut, healed, undone


@plain_style
def control_plot(rows: Sequence[ControlRow], *, metric: str, key: str, label: str) -> str:
    """Mean and standard error of the method and its controls, one below the other."""
    shown = [r for r in rows if finite(r.mean)]
    figure = make_figure(400, 62 + 30 * len(shown))
    axes = make_axes(figure)
    for i, row in enumerate(shown):
        mean = row.mean or 0.0
        colour = ROLES["kept" if row.role == "method" else "muted"]
        error = row.standard_error if finite(row.standard_error) else 0.0
        axes.plot([mean - error, mean + error], [i, i], color=colour, linewidth=3)
        axes.plot([mean], [i], "o" if row.role == "method" else "s", color=colour, markersize=8)
    titles = _names(axes, [r.name for r in shown], 18)
    axes.grid(axis="x", color=ROLES["grid"], linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.set_xlabel(
        f"{shorten(metric, 22)}, mean ± standard error", color=ROLES["ink"], fontsize=12
    )
    return to_svg(figure, key, label, titles)


def _names(axes: Axes, names: Sequence[str], width: int) -> dict[str, str]:
    """Write shortened names at 0, 1, ... downwards; return element ids with the full names."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.yaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.set_yticklabels([shorten(name, width) for name in names])
    axes.tick_params(axis="y", length=0, labelsize=11)
    titles: dict[str, str] = {}
    for i, tick in enumerate(axes.get_yticklabels()):
        tick.set_gid(f"name{i}")
        titles[f"name{i}"] = names[i]
    return titles


def _positive(rows: Mapping[str, DiagnosisRow], layer: str) -> float | None:
    value = rows[layer].gradient_norm if layer in rows else None
    return value if finite(value) and value > 0 else None


@plain_style
def gradient_plot(
    before: Sequence[DiagnosisRow], after: Sequence[DiagnosisRow], *, key: str, label: str
) -> str:
    """Gradient norm of each layer before (hollow) and after (filled), flagged layers marked."""
    first, last = {r.layer: r for r in before}, {r.layer: r for r in after}
    layers = list(dict.fromkeys([*first, *last]))
    figure = make_figure(400, 80 + 22 * len(layers))
    axes = make_axes(figure)
    axes.set_xscale("log")
    spots: dict[str, tuple[list[float], list[int]]] = {"before": ([], []), "after": ([], [])}
    for i, layer in enumerate(layers):
        pair = {"before": _positive(first, layer), "after": _positive(last, layer)}
        known = [v for v in pair.values() if v is not None]
        if len(known) == 2:
            axes.plot(known, [i, i], color=ROLES["muted"], linewidth=1.2, zorder=1)
        for when, value in pair.items():
            if value is not None:
                spots[when][0].append(value)
                spots[when][1].append(i)
        row = last.get(layer) or first[layer]
        words = [row.flag] if row.flagged else []
        if row.gradient_norm == 0:
            words.append("gradient is zero")
        elif layer in last and not finite(row.gradient_norm):
            words.append("not available")
        if words:
            axes.annotate(
                f"⚑ {shorten(', '.join(words), 20)}",
                (1, i),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=ROLES["flag"],
                fontsize=12,
                fontweight="bold",
            )
    axes.plot(
        *spots["before"],
        "o",
        markersize=8,
        color=ROLES["muted"],
        markerfacecolor=ROLES["card"],
        markeredgewidth=2,
        label="before",
    )
    axes.plot(*spots["after"], "o", markersize=7, color=ROLES["kept"], label="after")
    titles = _names(axes, layers, 23)
    _log_axis(axes, [v for x, _ in spots.values() for v in x], 5)
    axes.grid(axis="x", color=ROLES["grid"], linewidth=1)
    axes.set_xlabel("gradient norm (logarithmic)", color=ROLES["ink"], fontsize=12)
    figure.legend(
        loc="outside upper left",
        ncols=2,
        frameon=False,
        fontsize=12,
        labelcolor=ROLES["ink"],
        handletextpad=0.2,
    )
    return to_svg(figure, key, label, titles)


def _log_axis(axes: Axes, values: Sequence[float], n_ticks: int) -> None:
    """Limits around the values that hold at least two powers of ten, and plain tick texts."""
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    low, high = math.log10(low) - 0.15, math.log10(high) + 0.15
    if math.floor(high) - math.ceil(low) < 1:
        low, high = min(low, math.floor(low) - 0.05), max(high, math.ceil(high) + 0.05)
    axes.set_xlim(10**low, 10**high)
    axes.xaxis.set_major_locator(LogLocator(numticks=n_ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_power))


def _panel() -> tuple[Figure, Axes]:
    figure = make_figure(260, 130)
    axes = make_axes(figure)
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=ROLES["grid"], linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    return figure, axes


@plain_style
def score_plot(histogram: Histogram, threshold: float | None, *, key: str, label: str) -> str:
    """Scores of one target: what is below the threshold in grey, the rest in colour."""
    figure, axes = _panel()
    edges, counts = np.array(histogram.edges), np.array(histogram.counts)
    log = histogram.scale == "log"
    if log:
        axes.set_xscale("log")
    inside = finite(threshold) and (threshold > 0 or not log)
    limit = threshold if inside and threshold is not None else -math.inf
    centres = np.sqrt(edges[:-1] * edges[1:]) if log else (edges[:-1] + edges[1:]) / 2
    for role, chosen in (("removed", centres < limit), ("kept", centres >= limit)):
        if (counts * chosen).any():
            axes.stairs(counts * chosen, edges, fill=True, color=ROLES[role], linewidth=0)
    low, high = float(edges[0]), float(edges[-1])
    if inside and threshold is not None:
        axes.axvline(threshold, color=ROLES["flag"], linewidth=2, linestyle=(0, (4, 2)))
        low, high = min(low, threshold), max(high, threshold)
    if log:
        _log_axis(axes, [low, high], 4)
    else:
        axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_ylim(bottom=0)
    return to_svg(figure, key, label)


@plain_style
def weight_plot(before: Histogram | None, after: Histogram | None, *, key: str, label: str) -> str:
    """Non-zero weights per unit of weight: before as a grey area, after as a line."""
    figure, axes = _panel()
    for histogram, fill in ((before, True), (after, False)):
        if histogram is None or not histogram.counts:
            continue
        edges = np.array(histogram.edges)
        density = np.array(histogram.counts) / np.diff(edges)
        if fill:
            axes.stairs(density, edges, fill=True, color=ROLES["removed"], linewidth=0)
        else:
            axes.stairs(density, edges, color=ROLES["kept"], linewidth=1.8)
    axes.yaxis.set_major_locator(NullLocator())
    axes.set_ylim(bottom=0)
    return to_svg(figure, key, label)
