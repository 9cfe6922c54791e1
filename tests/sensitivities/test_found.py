"""What follows from curves, in words."""

from __future__ import annotations

from typing import Any

import pytest

from secateurs.allocation.curves import Curve
from secateurs.errors import ConfigError
from secateurs.sensitivities import MeasuredSensitivity

CURVES = {
    "conv1": Curve((0, 0.1, 0.5, 0.9), (0, 0.05, 0.2, 0.6)),
    "conv2": Curve((0, 0.1, 0.5, 0.9), (0, 0.0, 0.02, 0.3)),
    "fc": Curve((0, 0.1, 0.5, 0.9), (0, 0.0, -0.002, 0.005)),
}


def made(**more: Any) -> MeasuredSensitivity:
    given = {"dense": 0.9, "units": {"conv1": 10, "conv2": 10, "fc": 20}, **more}
    return MeasuredSensitivity(CURVES, "drop of accuracy", "taylor", **given)


def test_reach_is_read_off_the_rising_curve() -> None:
    found = made()
    assert found.reach("conv1", 0.025) == pytest.approx(0.05)
    assert found.reach("conv2", 0.01) == pytest.approx(0.3)
    assert found.reach("conv2", 0.16) == pytest.approx(0.7)
    assert found.reach("fc", 0.01) == 0.9  # the last cut that was measured, not more
    assert found.reach("conv1", 0.0) == 0.0


def test_a_recommendation_names_all_that_matters() -> None:
    found = made(errors={"conv1": (0, 0.01, 0.02, 0.03)}, left_out={"head": "it has one unit"})
    assert found.fragile(0.01) == ["conv1"]
    assert found.nearly_free(0.01) == ["fc"]
    text = found.recommendation(0.01)
    assert text.splitlines()[:4] == [
        "3 targets, each cut alone and not trained afterwards; uncut metric 0.9. What can go at a "
        "drop of accuracy of at most 0.01:",
        "Nearly free: fc (even 90 % removed costs 0.005).",
        "Up to a point: conv2 (about 30 %).",
        'Fragile: conv1 (10 % removed costs 0.05 ± 0.01). To leave them whole: exclude=["conv1"].',
    ]
    # 10 * 0.02 + 10 * 0.3 + 20 * 0.9 of 40
    assert "would remove about 53 % of their units" in text
    assert 'method="sensitivity"' in text
    assert "fc first; it spares conv1" in text
    assert text.endswith("Not measured: head (it has one unit).")


def test_the_drop_to_speak_of_depends_on_the_measure() -> None:
    assert made().tolerable == pytest.approx(0.009)
    assert "a hundredth of the metric of the uncut model" in made().recommendation()
    of_loss = MeasuredSensitivity(CURVES, "rise of the loss", dense=0.2)
    assert of_loss.tolerable == pytest.approx(0.02)
    assert "a tenth of the loss of the uncut model" in of_loss.recommendation()
    assert MeasuredSensitivity(CURVES, "rise of the loss").tolerable == 0.01


def test_all_fragile_and_very_many() -> None:
    all_bad = MeasuredSensitivity({"a": CURVES["conv1"]}, "drop of f1", dense=1.0)
    assert "All are: leave the smallest cuts to training" in all_bad.recommendation()
    many = MeasuredSensitivity({f"layer{i}": CURVES["fc"] for i in range(60)}, "drop of f1")
    assert "and 52 more" in many.recommendation(0.01)


@pytest.mark.parametrize("drop", [-0.1, float("nan"), float("inf")])
def test_a_drop_below_zero_is_refused(drop: float) -> None:
    with pytest.raises(ConfigError, match="drop must be at least 0"):
        made().recommendation(drop)
