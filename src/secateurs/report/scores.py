"""Pictures of scores: how they are distributed, and how far criteria agree.

`plot_scores(scores, path)` and `plot_agreement(agreement, path)` return a matplotlib figure and
write it to `path` if there is one: the ending says how (.png, .svg, .pdf). Colours are those of the
report on white, and can be told apart by people who see fewer of them. No pyplot: nothing global
is left behind, and the user's own matplotlib settings do not reach a picture.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from secateurs.errors import ConfigError, MissingDependencyError, choose
from secateurs.report.html import MAX_PANELS
from secateurs.report.words import number, shorten
from secateurs.scores import Agreement, check_scores
from secateurs.types import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_agreement", "plot_scores"]

INK, MUTED, GRID = "#1b1f24", "#5d6670", "#dfe3e7"
BLUE = "#0072b2"
PALE_BLUE, PALE_ORANGE = "#6cb2dd", "#ec9f6b"
"""Ends of the colour scales: as strong as dark text on them allows."""
UNDEFINED = GRID
ENDINGS = ("pdf", "png", "svg")
POINTS = 400
"""Points of one curve: more than a small panel can show."""
HEAVY = 0.05
"""Median over maximum, under which a scale is logarithmic."""
FLOOR = 1e-6
"""Of the largest score: where a logarithmic axis ends, smaller scores are drawn there."""

Matrix = tuple[tuple[float, ...], ...]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateurs",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
}


def plot_scores(scores: Scores, path: str | Path | None = None) -> Figure:
    """A figure with one small panel for each target: its scores in the order they would go.

    From left to right stand the units of a target, those that matter least first; the height is
    their score. All panels share one scale, which is logarithmic when no score is negative and the
    largest are far above the rest, so that targets can be compared. Of more than 24 targets the
    first 24 are drawn, and the figure says how many are not; `subset` shows others.

    Args:
        scores: from `score`, or made of such.
        path: where to write it (.png, .svg or .pdf); folders are made.

    Raises:
        ConfigError: another ending, or nothing to draw.
        ScoringError: a score is nan or inf.
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> from secateurs.types import Graph, WeightTarget
        >>> graph = Graph({"fc.weight": WeightTarget("fc.weight", (1, 3))})
        >>> import torch
        >>> scores = Scores(graph, {"fc.weight": torch.tensor([3.0, 1.0, 2.0])}, "magnitude")
        >>> plot_scores(scores).axes[0].lines[0].get_ydata().tolist()
        [1.0, 2.0, 3.0]
    """
    check_scores(scores)
    lines = {name: _sorted(line) for name, line in scores.values.items()}
    shown = dict(list(lines.items())[:MAX_PANELS])
    if not any(len(line) for line in shown.values()):
        raise ConfigError("there is nothing to draw: no unit has a score")
    n_columns = min(4, len(shown))
    n_rows = math.ceil(len(shown) / n_columns)
    with _drawing(path):
        figure = _figure(max(2.3 * n_columns + 0.6, 5.2), 1.5 * n_rows + 0.9)
        grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        scale = _set_scale(grid[0, 0], [line for line in shown.values() if len(line)])
        for i, axes in enumerate(grid.flat):
            if i < len(shown):
                name = list(shown)[i]
                _panel(axes, name, shown[name], scores.values[name], scale)
                axes.tick_params(labelbottom=i + n_columns >= len(shown))
            else:
                axes.set_axis_off()
        figure.suptitle(_title(scores), x=0.01, ha="left", fontsize=11)
        foot = _foot(scores, scale, len(lines) - len(shown))
        figure.supxlabel(foot, x=0.01, ha="left", fontsize=9)
        figure.supylabel("score", fontsize=9)
        return _written(figure, path)


@dataclass(frozen=True)
class _Scale:
    """What to say about the axis, and where the filling of a curve starts."""

    words: str
    base: float


def _sorted(line: Tensor) -> FloatArray:
    """Scores of the units that are left, ascending; evenly thinned out where there are many."""
    left = np.sort(line[line.isfinite()].numpy()).astype(np.float64)
    if len(left) <= POINTS:
        return left
    return left[np.linspace(0, len(left) - 1, POINTS).round().astype(np.int64)]


def _set_scale(axes: Axes, lines: Sequence[FloatArray]) -> _Scale:
    """Set the scale that all panels share."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    every = np.concatenate(list(lines))
    low, high = float(every.min()), float(every.max())
    size = np.abs(every[every != 0])
    heavy = len(size) > 1 and float(np.median(size)) < HEAVY * float(size.max())
    if heavy and low >= 0:
        bottom = max(float(size.min()), FLOOR * high) / 1.5
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom, high * 1.5)
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        scale = _Scale(f"score is logarithmic, from {number(bottom)}", bottom)
    elif heavy:
        power = 10.0 ** math.floor(math.log10(float(size.max())))
        axes.set_yscale("symlog", linthresh=float(np.median(size)))
        axes.yaxis.set_major_locator(FixedLocator([-power, 0, power]))
        scale = _Scale("score is logarithmic on both sides of 0", 0.0)
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin if low < 0 else 0.0, max(high, 0.0) + margin)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        scale = _Scale("", 0.0)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(float(f"{v:.6g}"))))
    axes.xaxis.set_major_locator(FixedLocator([0, 50, 100]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} %"))
    return scale


def _panel(axes: Axes, name: str, line: FloatArray, values: Tensor, scale: _Scale) -> None:
    """One target: its scores as a filled curve, its name and units above."""
    facts = [_counted(len(values), "unit")]
    for count, words in ((int(values.isinf().sum()), "removed earlier"),
                         (int((values == 0).sum()), "with score 0")):  # fmt: skip
        facts += [f"{count:,} {words}"] if count else []
    axes.set_title(shorten(name, 30), loc="left", pad=14)
    axes.text(0, 1.04, ", ".join(facts), transform=axes.transAxes, fontsize=7.5, color=MUTED)
    axes.grid(axis="y", linewidth=0.8)
    axes.tick_params(length=2)
    share = np.linspace(0, 100, len(line)) if len(line) > 1 else np.full(len(line), 50.0)
    axes.fill_between(share, line, scale.base, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(share, line, color=BLUE, linewidth=1.6, marker="o" if len(line) == 1 else "")


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _title(scores: Scores) -> str:
    seen = f", {scores.n_samples:,} samples" if scores.n_samples else ""
    return f"Scores by {shorten(scores.criterion, 60)}{seen} (larger = keep)"


def _foot(scores: Scores, scale: _Scale, left_out: int) -> str:
    lines = ["units of each target, from those that matter least to those that matter most"]
    lines += [scale.words] if scale.words else []
    if left_out:
        lines.append(f"not drawn: {_counted(left_out, 'target')} more")
    if scores.not_scored:
        lines.append(
            f"without scores by this criterion: {_counted(len(scores.not_scored), 'target')}"
        )
    return "\n".join(lines)


def plot_agreement(agreement: Agreement, path: str | Path | None = None) -> Figure:
    """A figure with two heat maps: rank correlation of criteria, and overlap of what would go.

    Every cell holds its figure; one that is undefined is grey with a "-". Blue is agreement, orange
    the opposite order.

    Args:
        agreement: from `secateurs.agreement`.
        path: where to write it (.png, .svg or .pdf); folders are made.

    Raises:
        ConfigError: another ending.
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> row = (1.0, 0.4), (0.4, 1.0)
        >>> found = Agreement(("taylor", "magnitude"), row, row, "network", 0.5, 4)
        >>> [text.get_text() for text in plot_agreement(found).axes[0].texts]
        ['+1.00', '+0.40', '+0.40', '+1.00']
    """
    where = "over the network" if agreement.within == "network" else "inside each target"
    chance = agreement.sparsity / (2 - agreement.sparsity)
    titles = (
        f"Spearman rank correlation\n{where}",
        f"Overlap of the {100 * agreement.sparsity:.3g} %\nthat would go first\n"
        f"(Jaccard, by chance {chance:.2f})",
    )
    names = [shorten(label, 30) for label in agreement.labels]
    panel = max(0.52 * len(names), 2.0)
    words = 0.075 * max(map(len, names))
    with _drawing(path):
        figure = _figure(words + 2 * panel + 0.6, panel + 0.65 * words + 0.8, "compressed")
        left, right = figure.subplots(1, 2, sharey=True)
        _heat_map(left, agreement.correlation, names, signed=True)
        _heat_map(right, agreement.overlap, names, signed=False)
        for axes, title in zip((left, right), titles, strict=True):
            axes.set_title(title, loc="left", pad=6)
        return _written(figure, path)


def _heat_map(axes: Axes, matrix: Matrix, names: Sequence[str], *, signed: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ends = [PALE_ORANGE, "#ffffff", PALE_BLUE] if signed else ["#ffffff", PALE_BLUE]
    colours = LinearSegmentedColormap.from_list("agreement", ends).with_extremes(bad=UNDEFINED)
    axes.imshow(np.array(matrix), cmap=colours, vmin=-1 if signed else 0, vmax=1)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            text = f"{value:+.2f}" if signed else f"{value:.2f}"
            axes.text(j, i, "-" if math.isnan(value) else text, ha="center", va="center")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="#ffffff", linewidth=2)
    axes.tick_params(which="minor", length=0)


@contextmanager
def _drawing(path: str | Path | None) -> Iterator[None]:
    """Fail early, then draw with our own settings and leave the user's as they were."""
    if path is not None:
        choose(Path(path).suffix.removeprefix("."), ENDINGS, "ending of a picture")
    try:
        from matplotlib import style
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib: pip install 'secateurs[report]'"
        ) from error
    with style.context(["default", _STYLE]):
        yield


def _figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def _written(figure: Figure, path: str | Path | None) -> Figure:
    if path is None:
        return figure
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix, {})
    with warnings.catch_warnings():
        # a name may use characters that our font lacks: an empty box is better than no picture
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, dpi=160, metadata=dates, bbox_inches="tight", pad_inches=0.1)
    return figure
