"""Pictures of sensitivity: every target has its curve or row, and the verdict its colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from secateurs.allocation.curves import Curve
from secateurs.errors import ConfigError
from secateurs.report.sensitivity import _apart, _class, plot_sensitivity, sensitivity_svg
from secateurs.sensitivities import MeasuredSensitivity

CUTS = (0, 0.1, 0.5, 0.9)


def made(n: int, last: float = 0.9) -> MeasuredSensitivity:
    curves = {
        f"stage.{i}.conv:channel": Curve((*CUTS[:-1], last), (0, 0.001 * i, 0.01 * i, 0.1 * i))
        for i in range(n)
    }
    return MeasuredSensitivity(curves, "drop of accuracy", "taylor", dense=0.9)


def test_few_targets_are_curves_with_names() -> None:
    found = made(3)
    with_errors = MeasuredSensitivity(
        found.curves, found.measure, "taylor", dense=0.9,
        errors=dict.fromkeys(found.curves, (0.0, 0.01, 0.01, 0.01)),
    )  # fmt: skip
    figure = plot_sensitivity(with_errors, drop=0.0015)
    (axes,) = figure.axes
    names = {t.get_text() for t in axes.texts}
    assert set(found.curves) <= names
    assert "tolerable: 0.0015" in names
    lines = [line for line in axes.lines if len(np.asarray(line.get_xdata())) == 4]
    assert np.asarray(lines[1].get_ydata()).tolist() == [0, 0.001, 0.01, 0.1]
    assert lines[1].get_color() != lines[2].get_color()  # only the last is fragile
    assert len(axes.containers) == 3  # the bars


def test_many_targets_are_rows_of_a_map() -> None:
    figure = plot_sensitivity(made(60, last=0.7))
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        f"stage.{i}.conv:channel" for i in range(60)
    ]
    cells = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert len(cells) == 60 * 7  # nothing is drawn beyond what was measured
    texts = [t.get_text() for t in axes.texts]
    assert texts.count("·") == 60 * 2
    assert "70 %" in texts
    assert "goes to" in texts


def test_classes_of_the_map() -> None:
    assert [_class(d, 0.01) for d in (0, 0.003, 0.01, 0.011, 0.03, 0.1, 0.2)] == [
        0, 0, 1, 2, 2, 3, 4,
    ]  # fmt: skip


def test_names_are_moved_apart_in_order() -> None:
    places = _apart([0.5, 0.5, 0.5, 0.9], 0.1)
    assert places == pytest.approx([0.4, 0.5, 0.6, 0.9])


@pytest.mark.parametrize("n", [2, 12])
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_it_is_written(tmp_path: Path, n: int, ending: str) -> None:
    file = tmp_path / "new" / f"curves.{ending}"
    plot_sensitivity(made(n), file)
    assert file.stat().st_size > 1000


def test_a_page_gets_it_in_its_own_colours() -> None:
    for n in (2, 12):
        svg = sensitivity_svg(made(n), drop=0.01, key="s", label="Curves <&>")
        assert 'aria-label="Curves &lt;&amp;&gt;"' in svg
        assert "var(--kept)" in svg
        assert "#0" not in svg.replace('"#', "")


@pytest.mark.parametrize("drop", [0.0, -1.0, float("nan")])
def test_a_drop_must_be_above_zero(drop: float) -> None:
    with pytest.raises(ConfigError, match="drop must be above 0"):
        plot_sensitivity(made(2), drop=drop)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ending of a picture"):
        plot_sensitivity(made(2), tmp_path / "curves.bmp")
