"""Plots of scores and agreement: what is drawn, what is said, and nothing left behind."""

from __future__ import annotations

import math
import re
import sys
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from secateurs.errors import ConfigError, MissingDependencyError, ScoringError
from secateurs.report import scores as drawing
from secateurs.report.scores import plot_agreement, plot_scores
from secateurs.scores import Agreement
from secateurs.types import Scores

from ..scores.made import INF, scored

SCORES = scored({"conv:channel": [3.0, 1.0, -INF, 2.0], "fc:neuron": [0.5]}, n_samples=1200)
FOUND = Agreement(
    ("taylor", "flat", "opposite"),
    ((1.0, math.nan, -1.0), (math.nan, math.nan, math.nan), (-1.0, math.nan, 1.0)),
    ((1.0, math.nan, 0.25), (math.nan, math.nan, math.nan), (0.25, math.nan, 1.0)),
    "target", 0.7, 64,
)  # fmt: skip


def texts(figure: Figure) -> list[str]:
    """Every text of a figure, panel by panel, then around them."""
    inside = [t.get_text() for a in figure.axes for t in (a.title, *a.texts, a._left_title)]  # type: ignore[attr-defined]
    around = [t.get_text() for t in (figure._suptitle, figure._supxlabel) if t is not None]  # type: ignore[attr-defined]
    return [text for text in [*inside, *around] if text]


def ys(axes: Axes) -> list[float]:
    """Heights of the curve of a panel."""
    return [float(y) for y in np.asarray(axes.lines[0].get_ydata())]


def test_units_stand_in_the_order_in_which_they_go() -> None:
    figure = plot_scores(SCORES)
    left, right = figure.axes
    assert ys(left) == [1.0, 2.0, 3.0]
    assert np.asarray(left.lines[0].get_xdata()).tolist() == [0.0, 50.0, 100.0]
    assert ys(right) == [0.5]
    assert right.lines[0].get_marker() == "o"  # one point has no line
    assert left.get_ylim() == right.get_ylim()
    assert texts(figure) == [
        "4 units, 1 removed earlier",
        "conv:channel",
        "1 unit",
        "fc:neuron",
        "Scores by taylor, 1,200 samples (larger = keep)",
        "units of each target, from those that matter least to those that matter most",
    ]


@pytest.mark.parametrize(
    ("line", "scale", "words"),
    [
        ([1.0, 2.0, 3.0], "linear", None),
        ([-1.0, 2.0, 3.0], "linear", None),
        ([2.0, 2.0, 2.0], "linear", None),
        ([0.0, 0.0, 0.0], "linear", None),
        ([0.0, 1e-9, 1.0, 1.0, 1000.0], "log", "score is logarithmic, from 0.000667"),
        ([-1000.0, 0.0, 1.0, 1.0], "symlog", "score is logarithmic on both sides of 0"),
    ],
)
def test_the_scale_follows_the_scores(line: list[float], scale: str, words: str | None) -> None:
    figure = plot_scores(scored({"a": line}))
    assert figure.axes[0].get_yscale() == scale
    assert texts(figure)[-1].splitlines()[1:] == ([] if words is None else [words])
    low, high = figure.axes[0].get_ylim()
    assert low < high
    assert high >= max(line)


def test_targets_and_scores_that_are_not_drawn_are_counted() -> None:
    many = scored({f"layer{i}": [0.0, 1.0] for i in range(30)})
    silent = {"layer29": "no site"}
    values = {name: v for name, v in many.values.items() if name not in silent}
    figure = plot_scores(Scores(many.graph, values, "taylor", not_scored=silent))
    assert len([a for a in figure.axes if a.axison]) == 24
    assert texts(figure)[-1].splitlines()[1:] == [
        "not drawn: 5 targets more",
        "without scores by this criterion: 1 target",
    ]
    assert "2 units, 1 with score 0" in texts(figure)


def test_many_units_are_thinned_out_and_the_ends_stay() -> None:
    line = torch.arange(100_000.0).flip(0)
    (axes,) = plot_scores(scored({"a": line.tolist()})).axes
    drawn = ys(axes)
    assert (len(drawn), drawn[0], drawn[-1]) == (400, 0.0, 99_999.0)
    assert drawn == sorted(drawn)


def test_heat_maps_hold_every_figure() -> None:
    figure = plot_agreement(FOUND)
    left, right = figure.axes
    undefined = ["-"] * 3
    cells = [[t.get_text() for t in axes.texts] for axes in (left, right)]
    assert cells[0] == ["+1.00", "-", "-1.00", *undefined, "-1.00", "-", "+1.00"]
    assert cells[1] == ["1.00", "-", "0.25", *undefined, "0.25", "-", "1.00"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["taylor", "flat", "opposite"]
    assert [t.get_text() for t in right.get_xticklabels()] == ["taylor", "flat", "opposite"]
    assert "Spearman rank correlation\ninside each target" in texts(figure)
    assert "Overlap of the 70 %\nthat would go first\n(Jaccard, by chance 0.54)" in texts(figure)


def _light(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_text_can_be_read_on_every_colour_and_colours_are_those_of_the_report() -> None:
    for colour in (drawing.PALE_BLUE, drawing.PALE_ORANGE, drawing.UNDEFINED, "#ffffff"):
        assert (_light(colour) + 0.05) / (_light(drawing.INK) + 0.05) > 7
    css = (files("secateurs.report") / "style.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#\w+);", css.partition("@media")[0]))
    assert [light[role] for role in ("ink", "muted", "grid", "kept")] == [
        drawing.INK, drawing.MUTED, drawing.GRID, drawing.BLUE,
    ]  # fmt: skip


NAMES = scored({"a.$x_{1$.漢字<&>": [1.0, 2.0], "b" * 80: [1.0, 3.0]}, "sum(0.5*$a, 0.5*b^)")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_files_of_every_kind_are_written(tmp_path: Path, ending: str) -> None:
    first = tmp_path / "new" / f"scores.{ending}"
    second = tmp_path / f"agreement.{ending}"
    plot_scores(NAMES, first)
    plot_agreement(FOUND, str(second))
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert first.read_bytes().startswith(start)
    assert second.read_bytes().startswith(start)
    again = tmp_path / f"again.{ending}"
    plot_scores(NAMES, again)
    assert again.read_bytes() == first.read_bytes()


def test_an_svg_holds_its_words_as_text(tmp_path: Path) -> None:
    plot_scores(NAMES, tmp_path / "s.svg")
    words = "".join(ElementTree.parse(tmp_path / "s.svg").getroot().itertext())
    assert "a.$x_{1$.漢字<&>" in words
    assert "Scores by sum(0.5*$a, 0.5*b^)" in words


def test_nothing_global_is_read_or_changed(tmp_path: Path) -> None:
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "red", "font.size": 40}):
        before = dict(mpl.rcParams)
        figure = plot_scores(SCORES, tmp_path / "s.png")
        plot_agreement(FOUND, tmp_path / "a.png")
        assert dict(mpl.rcParams) == before
        assert figure.axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize("path", ["scores.bmp", "scores"])
def test_another_ending_is_an_error_before_anything_is_drawn(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown ending of a picture .*choices: pdf, png, svg"):
        plot_scores(SCORES, tmp_path / path)
    with pytest.raises(ConfigError, match="unknown ending of a picture"):
        plot_agreement(FOUND, tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn() -> None:
    for nothing in (scored({}), scored({"a": [-INF, -INF]})):
        with pytest.raises(ConfigError, match="nothing to draw: no unit has a score"):
            plot_scores(nothing)
    with pytest.raises(ScoringError, match="nan or inf in a"):
        plot_scores(scored({"a": [math.nan]}))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'secateurs\[report\]'"):
        plot_scores(SCORES)
    with pytest.raises(MissingDependencyError, match="plots need matplotlib"):
        plot_agreement(FOUND)
