"""Schedules: values by hand, laws over the registry, errors."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from secateurs.errors import ConfigError
from secateurs.schedules import CURVES, Schedule


@pytest.mark.parametrize(
    ("curve", "progress", "expected"),
    [
        ("one_shot", 1.0, 1.0),
        ("one_shot", 0.25, 1.0),
        ("linear", 0.25, 0.25),
        ("cubic", 0.5, 0.875),  # 1 - 1/8
        ("cubic", 0.2, 0.488),  # 1 - 0.8^3
    ],
)
def test_curve_values(curve: str, progress: float, expected: float) -> None:
    assert CURVES[curve](progress) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", sorted(CURVES))
def test_curves_go_from_zero_to_one_without_falling(name: str) -> None:
    values = [CURVES[name](i / 50) for i in range(51)]
    assert values[0] == 0
    assert values[-1] == 1
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("one_shot", steps=1), [0.2]),
        (Schedule("linear", steps=4), [0.8, 0.6, 0.4, 0.2]),
        (Schedule("cubic", steps=2), [1 - 0.875 * 0.8, 0.2]),
    ],
)
def test_remaining(schedule: Schedule, expected: list[float]) -> None:
    got = [schedule.remaining(step, 0.2) for step in range(1, schedule.steps + 1)]
    assert got == pytest.approx(expected, abs=1e-12)
    by_formula = [1 - fraction * (1 - 0.2) for fraction in schedule.fractions()]
    assert got == pytest.approx(by_formula, abs=1e-12)


def test_the_last_step_is_exactly_the_budget() -> None:
    for final in (0.1, 0.3, 0.7, 1.0):
        assert Schedule("cubic", steps=7).remaining(7, final) == final


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curve": "cubik"}, "Did you mean 'cubic'"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"curve": "one_shot", "steps": 3}, "steps=1"),
        ({"curve": "one_shot"}, "single step"),
    ],
)
def test_bad_schedules(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**options)  # type: ignore[arg-type]


def test_bad_arguments_of_remaining() -> None:
    schedule = Schedule("linear", steps=3)
    for step in (0, 4):
        with pytest.raises(ConfigError, match="from 1 to 3"):
            schedule.remaining(step, 0.5)
    with pytest.raises(ConfigError, match="fraction"):
        schedule.remaining(1, 90)


def test_a_recipe_block_becomes_a_schedule() -> None:
    adapter = TypeAdapter(Schedule)
    assert adapter.validate_python({"curve": "linear", "steps": 2}) == Schedule("linear", 2)
    with pytest.raises(ValidationError, match="step"):
        adapter.validate_python({"step": 2})
