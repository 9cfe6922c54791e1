"""Sensitivity curves: checked, never falling, linear between points, through JSON and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.allocation import Curve, Sensitivity
from secateurs.allocation.curves import isotonic
from secateurs.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ()),
        ([1.0, 2.0, 3.0], (1.0, 2.0, 3.0)),
        ([3.0, 1.0], (2.0, 2.0)),
        ([1.0, 4.0, 2.0, 3.0, 9.0], (1.0, 3.0, 3.0, 3.0, 9.0)),
        ([5.0, 4.0, 0.0], (3.0, 3.0, 3.0)),
    ],
)
def test_isotonic_by_hand(values: list[float], expected: tuple[float, ...]) -> None:
    assert isotonic(values) == expected


def squared_error(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_isotonic_is_the_nearest_line_that_never_falls(values: list[int]) -> None:
    """Brute force: the best line is made of means of neighbours, so a multiple of 1/12."""
    found = isotonic(values)
    assert all(a <= b for a, b in itertools.pairwise(found))
    levels = sorted({sum(values[i:j]) / (j - i) for i in range(5) for j in range(i + 1, 5)
                     if values[i:j] and j <= len(values)})  # fmt: skip
    best = min(
        squared_error(line, values)
        for line in itertools.combinations_with_replacement(levels, len(values))
    )
    assert squared_error(found, values) == pytest.approx(best, abs=1e-12)


def test_noise_that_helps_counts_as_nothing() -> None:
    curve = Curve((0.0, 0.25, 0.5, 1.0), (0.0, -0.2, 0.1, 0.3))
    assert curve.rising == (0.0, 0.0, 0.1, 0.3)
    assert [curve.at(r) for r in (0.0, 0.25, 0.375, 1.0)] == [0.0, 0.0, 0.05, 0.3]


def test_beyond_the_last_point_it_rises_as_steeply_as_ever() -> None:
    curve = Curve((0.0, 0.25, 0.5), (0.0, 1.0, 1.5))  # slopes 4, 2
    assert curve.at(1.0) == pytest.approx(1.5 + 0.5 * 4)
    assert Curve((0.0, 0.5), (0.0, -1.0)).at(1.0) == 0.0


@settings(deadline=None)
@given(
    drops=st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    where=st.lists(st.floats(0, 1), min_size=2, max_size=20),
)
def test_it_never_falls(drops: list[float], where: list[float]) -> None:
    removed = [0.0, *((i + 1) / (len(drops) + 1) for i in range(len(drops)))]
    curve = Curve(tuple(removed), (0.0, *drops))
    found = curve.all_at(np.array(sorted(where)))
    assert (np.diff(found) >= -1e-12).all()
    assert found[0] >= 0.0


@pytest.mark.parametrize(
    ("removed", "drop", "message"),
    [
        ((0.0,), (0.0,), "at least one cut, got 1 points"),
        ((0.0, 0.5), (0.0,), "one drop for each removed fraction, got 1 for 2"),
        ((0.1, 0.5), (0.0, 1.0), "starts with drop 0 at removed 0 .* at removed 0.1"),
        ((0.0, 0.5), (0.2, 1.0), "got drop 0.2 at removed 0"),
        ((0.0, 50.0), (0.0, 1.0), "fractions up to 1, got 50"),
        ((0.0, 0.5, 0.5), (0.0, 1.0, 2.0), "ascending removed fractions, got 0.5 and then 0.5"),
        ((0.0, 0.5), (0.0, float("nan")), "drop of a sensitivity curve must be finite, got nan"),
        ((0.0, "x"), (0.0, 1.0), "removed of a sensitivity curve must be finite, got 'x'"),
        ("0.5", (0.0, 1.0), "removed of a sensitivity curve must be numbers"),
    ],
)
def test_curves_that_are_refused(removed: Any, drop: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Curve(removed, drop)


def test_fractions_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lies in \[0, 1\], got \[1.5\]"):
        Curve((0.0, 1.0), (0.0, 1.0)).at(1.5)


def test_through_json_and_back() -> None:
    curves = {"a": Curve((0.0, 0.1, 0.7), (0.0, 0.3, 0.2)), "b": Curve((0.0, 1.0), (0.0, 1e-9))}
    found = Sensitivity(curves, "drop of accuracy", "taylor")
    again = Sensitivity.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert again.curves["a"].drop == (0.0, 0.3, 0.2)  # as measured


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "write {'measure': text, 'curves'"),
        ({"curves": {}}, "write {'measure': text, 'curves'"),
        ({"measure": "loss", "curves": [1]}, "write {'measure': text, 'curves'"),
        ({"measure": "loss", "curves": {}}, "at least one target, got none"),
        ({"measure": "loss", "curves": {"a": {"drop": [0]}}}, "a: a curve has removed and drop"),
        (
            {"measure": "loss", "curves": {"a": {"removed": [0, 2], "drop": [0, 1]}}},
            "a: a sensitivity curve takes removed fractions up to 1, got 2",
        ),
    ],
)
def test_dicts_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sensitivity.from_dict(data)


def test_missing_targets_are_named() -> None:
    found = Sensitivity({"a": Curve((0.0, 1.0), (0.0, 1.0))}, "rise of the loss")
    found.check_covers(["a"])
    with pytest.raises(ConfigError, match=r"no sensitivity curve for b, c \(curves: a\)"):
        found.check_covers(["b", "a", "c"])
