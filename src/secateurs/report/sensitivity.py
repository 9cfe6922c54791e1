"""Pictures of sensitivity: what cutting each target alone costs.

`plot_sensitivity(found, path)` returns a matplotlib figure and writes it to `path` if there is one;
`sensitivity_svg` is the same inside a page. Few targets are curves with their names at the end,
many are the rows of a map. Both say at which cut a tolerable drop is passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs.errors import ConfigError
from secateurs.report.scores import BLUE, GRID, INK, MUTED, _drawing, _figure, _written
from secateurs.report.words import finite, number, shorten
from secateurs.sensitivities import MeasuredSensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FEW", "plot_sensitivity", "sensitivity_svg"]

FEW = 8
"""Curves that one panel holds with their names."""
PAGE_WIDTH = 440
"""Of the picture in a page, in points: narrower, so that its text is as large as that around it."""
COLUMNS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Cuts that the map shows."""
STEPS = (0.3, 1.0, 3.0, 10.0)
"""Where the classes of the map end, in tolerable drops."""
ORANGE, PAPER = "#b84a00", "#ffffff"
COLOURS = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "kept": BLUE,
    "flag": ORANGE,
    "card": PAPER,
}
SHADES = (("kept", 0.75), ("kept", 0.3), ("flag", 0.25), ("flag", 0.55), ("flag", 0.9))
"""Colour role and strength of each class: blue is within the tolerable drop."""


def plot_sensitivity(
    found: MeasuredSensitivity, path: str | Path | None = None, *, drop: float | None = None
) -> Figure:
    """A figure of all curves: how much worse the model gets as each target alone is cut.

    Up to eight targets are curves in one panel, on a scale that is even up to the tolerable drop
    (a dashed line) and logarithmic above; bars are two standard errors. More targets are rows of a
    map, from the input of the network to its output: blue is within the tolerable drop, orange
    above, a dot was not measured; at the right stands how far each can be cut.

    Args:
        found: from `sensitivity`.
        path: where to write it (.png, .svg or .pdf); folders are made.
        drop: the tolerable drop, above 0; None takes `found.tolerable`.

    Raises:
        ConfigError: another ending, or `drop` is not above 0.
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> from secateurs.allocation.curves import Curve
        >>> found = MeasuredSensitivity({"fc1:neuron": Curve((0, 0.5), (0, 0.02))}, "drop of f1")
        >>> [text.get_text() for text in plot_sensitivity(found).axes[0].texts]
        ['tolerable: 0.01', 'fc1:neuron']
    """
    at = found.tolerable if drop is None else drop
    if not finite(at) or at <= 0:
        raise ConfigError(f"drop must be above 0 and finite, got {drop!r}")
    with _drawing(path):
        figure = _figure(*_size(found))
        _draw(figure, found, at, COLOURS)
        figure.suptitle(_title(found), x=0.01, ha="left", fontsize=11)
        return _written(figure, path)


def sensitivity_svg(found: MeasuredSensitivity, *, drop: float, key: str, label: str) -> str:
    """The same as an inline SVG for a page, in the colours of its style sheet."""
    from secateurs.report import drawing

    @drawing.plain_style
    def draw() -> str:
        height = _size(found)[1]
        figure = drawing.make_figure(PAGE_WIDTH, 66 * height)
        figure.patch.set_visible(False)
        titles = _draw(figure, found, drop, drawing.ROLES)
        return drawing.to_svg(figure, key, label, titles)

    text: str = draw()
    return text


def _size(found: MeasuredSensitivity) -> tuple[float, float]:
    n = len(found.curves)
    return (7.2, 4.0) if n <= FEW else (7.2, 1.3 + 0.2 * n)


def _title(found: MeasuredSensitivity) -> str:
    by = f", lowest {shorten(found.criterion, 40)} first" if found.criterion else ""
    return f"{found.measure.capitalize()} when one target alone is cut{by}"


def _draw(
    figure: Figure, found: MeasuredSensitivity, at: float, colours: Mapping[str, str]
) -> dict[str, str]:
    """Draw it; return element ids with the full names of shortened targets."""
    axes: Axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["muted"], labelcolor=colours["ink"], labelsize=9, length=0)
    if len(found.curves) <= FEW:
        _curves(axes, found, at, colours)
        return {}
    return _map(axes, found, at, colours)


def _curves(axes: Axes, found: MeasuredSensitivity, at: float, colours: Mapping[str, str]) -> None:
    """One line for each target, its name at the end, in the colour of its verdict."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    fragile = set(found.fragile(at))
    drops = [d for c in found.curves.values() for d in c.drop]
    low, high = min(0.0, *drops), max(at, *drops)
    axes.set_yscale("symlog", linthresh=at, linscale=1.0)
    margin = 1.6 if high > at else 1.15
    axes.set_ylim(1.3 * low - 0.04 * at, high * margin)
    axes.yaxis.set_major_locator(FixedLocator(_ticks(low, high, at)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(float(f"{v:.2g}"))))
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_locator(FixedLocator(range(0, 101, 25)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} %"))
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.axhline(at, color=colours["flag"], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"tolerable: {number(float(f'{at:.2g}'))}", (99, at), xytext=(0, 3), ha="right",
        textcoords="offset points", color=colours["flag"], fontsize=8.5,
    )  # fmt: skip
    ends = []
    for name, curve in found.curves.items():
        colour = colours["flag"] if name in fragile else colours["kept"]
        xs = [100 * x for x in curve.removed]
        axes.plot(xs, curve.drop, color=colour, linewidth=1.6, marker="o", markersize=3.5)
        if name in found.errors:
            axes.errorbar(
                xs, curve.drop, [2 * e for e in found.errors[name]], fmt="none",
                ecolor=colour, elinewidth=0.8, alpha=0.6,
            )  # fmt: skip
        ends.append((curve.drop[-1], xs[-1], name, colour))
    axes.set_xlabel(_cut_words(found), color=colours["ink"], fontsize=9, loc="left")
    axes.set_ylabel(f"{found.measure}, logarithmic above the line", color=colours["ink"],
                    fontsize=9)  # fmt: skip
    _name_ends(axes, ends, colours)


def _name_ends(
    axes: Axes, ends: Sequence[tuple[float, float, str, str]], colours: Mapping[str, str]
) -> None:
    """Names right of the panel at the height of their ends, moved apart where they would touch."""
    figure = axes.get_figure()
    assert figure is not None
    forward = axes.transScale.transform
    low, high = (float(forward((0, y))[1]) for y in axes.get_ylim())
    spots = sorted(((float(forward((0, y))[1]) - low) / (high - low), x, n, c)
                   for y, x, n, c in ends)  # fmt: skip
    places = _apart([s[0] for s in spots], 0.055)
    for (height, x, name, colour), place in zip(spots, places, strict=True):
        axes.annotate(
            shorten(name, 30), (x / 100, height), (1.03, place), fontsize=9, va="center",
            xycoords="axes fraction", textcoords="axes fraction", color=colour,
            arrowprops={"arrowstyle": "-", "color": colours["grid"], "linewidth": 0.8,
                        "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def _apart(places: Sequence[float], least: float) -> list[float]:
    """Ascending places moved as little as it takes to lie `least` apart.

    Example:
        >>> _apart([0.0, 0.0, 1.0], 0.2)
        [-0.1, 0.1, 1.0]
    """
    from secateurs.allocation.curves import isotonic

    level = isotonic([p - least * i for i, p in enumerate(places)])
    return [round(v + least * i, 9) for i, v in enumerate(level)]


def _ticks(low: float, high: float, at: float) -> list[float]:
    """0, the tolerable drop, and some multiples of it as far as the curves go."""
    ticks, step = [0.0, at], 10 * at
    while step < high:
        ticks.append(step)
        step *= 10
    if high > 3 * ticks[-1]:
        ticks.append(high)
    return ([low] if low < -0.5 * at else []) + ticks


def _map(
    axes: Axes, found: MeasuredSensitivity, at: float, colours: Mapping[str, str]
) -> dict[str, str]:
    """One row for each target, one column for each cut; the last column says how far it goes."""
    from matplotlib.patches import Rectangle

    names = list(found.curves)
    for row, name in enumerate(names):
        curve = found.curves[name]
        for column, share in enumerate(COLUMNS):
            if share > curve.removed[-1] + 1e-9 and share - curve.removed[-1] > 0.05:
                axes.text(column, row, "·", ha="center", va="center", color=colours["muted"])
                continue
            role, strength = SHADES[_class(curve.at(min(share, curve.removed[-1])), at)]
            axes.add_patch(Rectangle((column - 0.47, row - 0.43), 0.94, 0.86, linewidth=0,
                                     facecolor=colours[role], alpha=strength))  # fmt: skip
        reach = f"{100 * found.reach(name, at):.0f} %"
        axes.text(len(COLUMNS) + 0.6, row, reach, ha="right", va="center", fontsize=8.5,
                  color=colours["ink"])  # fmt: skip
    axes.text(len(COLUMNS) + 0.6, -0.85, "goes to", ha="right", va="bottom", fontsize=8.5,
              color=colours["muted"])  # fmt: skip
    axes.set_xlim(-0.5, len(COLUMNS) + 0.65)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_xticks(range(len(COLUMNS)), [f"{100 * c:.0f} %" for c in COLUMNS])
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), [shorten(name, 34) for name in names])
    _legend(axes, at, colours)
    axes.set_xlabel(_cut_words(found), color=colours["ink"], fontsize=9, loc="left")
    axes.xaxis.set_label_position("bottom")
    titles = {}
    for i, tick in enumerate(axes.get_yticklabels()):
        tick.set_gid(f"target{i}")
        titles[f"target{i}"] = names[i]
    return titles


def _class(value: float, at: float) -> int:
    """Which class of the map a drop belongs to."""
    return sum(value > step * at * (1 + 1e-9) for step in STEPS)


def _legend(axes: Axes, at: float, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    ends = [number(float(f"{step * at:.2g}")) for step in STEPS]
    words = [f"up to {end}" for end in ends] + [f"above {ends[-1]}"]
    words[1] += " (tolerable)"
    patches: list[Any] = [
        Patch(facecolor=colours[role], alpha=strength, linewidth=0) for role, strength in SHADES
    ]
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(
        patches, words, loc="outside lower left", ncols=5, frameon=False, fontsize=8,
        labelcolor=colours["ink"], handlelength=1.2, handletextpad=0.4, columnspacing=1.0,
    )  # fmt: skip


def _cut_words(found: MeasuredSensitivity) -> str:
    seen = f", {found.n_samples:,} samples" if found.n_samples else ""
    out = len(found.left_out)
    rest = f"; {out} target{'s' * (out != 1)} without a curve" if out else ""
    return f"units of the target that are removed, not trained afterwards{seen}{rest}"
