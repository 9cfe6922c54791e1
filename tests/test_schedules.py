"""Schedules: values by hand, laws over the registry, errors."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from secateurs.errors import ConfigError
from secateurs.schedules import CURVES, Curve, Schedule, Span, span
from secateurs.schedules.curves import check_curve


@pytest.mark.parametrize(
    ("curve", "progress", "expected"),
    [
        ("one_shot", 1.0, 1.0),
        ("one_shot", 0.25, 1.0),
        ("linear", 0.25, 0.25),
        ("cubic", 0.5, 0.875),  # 1 - 1/8
        ("cubic", 0.2, 0.488),  # 1 - 0.8^3
        ("exponential", 0.5, (1 - math.sqrt(0.1)) / 0.9),  # remaining sqrt(0.1) on the way to 0.1
        ("cosine", 0.5, 0.5),
        ("cosine", 1 / 3, 0.25),  # (1 - cos 60 degrees) / 2
        ("stepwise", 0.01, 0.25),
        ("stepwise", 0.25, 0.25),
        ("stepwise", 0.26, 0.5),
        ("stepwise", 0.75, 0.75),
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


# --- rows by hand --------------------------------------------------------------------------------

ROWS: dict[str, list[float]] = {  # fractions after each of four steps, in thousandths
    "linear": [250, 500, 750, 1000],
    "cubic": [578, 875, 984, 1000],  # 1 - 27/64, 1 - 8/64, 1 - 1/64
    "exponential": [486, 760, 914, 1000],  # (1 - 0.5623)/0.9, (1 - 0.3162)/0.9, (1 - 0.1778)/0.9
    "cosine": [146, 500, 854, 1000],  # (1 - 0.7071)/2, ..., (1 + 0.7071)/2
    "stepwise": [250, 500, 750, 1000],
}


@pytest.mark.parametrize("curve", sorted(set(CURVES) - {"one_shot"}))
def test_a_row_of_every_curve(curve: str) -> None:
    found = [round(1000 * f) for f in Schedule(curve, steps=4).fractions()]
    assert found == ROWS[curve]


def test_stepwise_rests_between_its_jumps() -> None:
    assert list(Schedule("stepwise", steps=8).fractions()) == [
        0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0
    ]  # fmt: skip


def test_exponential_leaves_equal_shares_on_the_way_to_a_tenth() -> None:
    schedule = Schedule("exponential", steps=5)
    left = [1.0, *(schedule.remaining(step, 0.1) for step in range(1, 6))]
    shares = [b / a for a, b in pairwise(left)]
    assert shares == pytest.approx([0.1 ** (1 / 5)] * 5)


@given(
    curve=st.sampled_from(sorted(set(CURVES) - {"one_shot"})),
    steps=st.integers(1, 300),
    final=st.floats(0, 1),
)
def test_fractions_never_fall_and_end_at_one(curve: str, steps: int, final: float) -> None:
    schedule = Schedule(curve, steps)
    fractions = [0.0, *schedule.fractions()]
    assert len(fractions) == steps + 1
    assert fractions[-1] == 1.0
    assert all(a <= b for a, b in pairwise(fractions))
    left = [schedule.remaining(step, final) for step in range(1, steps + 1)]
    assert left[-1] == final
    assert all(b <= a + 1e-15 for a, b in pairwise(left))


# --- curves of one's own -------------------------------------------------------------------------


def late(progress: float) -> float:
    return progress**2


def test_a_function_is_a_curve() -> None:
    schedule = Schedule(late, steps=2)
    assert list(schedule.fractions()) == [0.25, 1.0]
    assert schedule.name == "late"
    by_path = Schedule("tests.test_schedules:late", steps=2)
    assert list(by_path.fractions()) == [0.25, 1.0]


def test_a_file_holds_a_curve(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def early(t):\n    return t ** 0.5\n")
    schedule = Schedule(f"{tmp_path}/mine.py:early", steps=4)
    assert list(schedule.fractions()) == pytest.approx([0.5, math.sqrt(0.5), math.sqrt(0.75), 1])


BAD_CURVES: dict[str, tuple[Curve, str]] = {
    "does not start at 0": (lambda t: 0.5 + t / 2, "must be 0 at progress 0, got 0.5"),
    "does not end at 1": (lambda t: t / 2, "must be 1 at progress 1, got 0.5"),
    "falls": (lambda t: abs(math.sin(1.5 * math.pi * t)), "must never fall"),
    "leaves the range": (lambda t: t * (3 - 2 * t), r"in \[0, 1\], got 1.0"),
    "nan": (lambda t: t if t in (0, 1) else math.nan, "got nan"),
    "raises": (lambda t: 1 / (t - t), "ZeroDivisionError"),
    "no number": (lambda t: "much", "ValueError"),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("case", BAD_CURVES)
def test_functions_that_are_no_curve(case: str) -> None:
    function, message = BAD_CURVES[case]
    with pytest.raises(ConfigError, match=message):
        Schedule(function, steps=3)


def test_a_curve_is_checked_at_its_own_steps() -> None:
    def dips(t: float) -> float:
        return 0.0 if abs(t - 2 / 7) < 1e-6 else t

    check_curve(dips, "dips", [0.5])
    with pytest.raises(ConfigError, match="dips: must never fall"):
        Schedule(dips, steps=7)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.test_schedules:lat", "Did you mean 'late'"),
        ("tests.no_such:late", "No module named"),
        ("tests.test_schedules:", "write package.module:function"),
    ],
)
def test_curves_that_cannot_be_imported(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"schedule curve: .*{message}"):
        Schedule(path)


# --- cuts inside one fine-tuning -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100 steps", Span(100, "steps")),
        ("1 step", Span(1, "steps")),
        (" 2  epochs ", Span(2, "epochs")),
        ("epoch", Span(1, "epochs")),
        ("restart", Span(1, "restarts")),
    ],
)
def test_spans(text: str, expected: Span) -> None:
    assert span(text, "every") == expected


@pytest.mark.parametrize("text", ["", "5", "2 weeks", "1.5 epochs", "-1 steps", 100, None])
def test_texts_that_are_no_span(text: str) -> None:
    with pytest.raises(ConfigError, match='every must be a text such as "100 steps"'):
        span(text, "every")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("linear", 3, every="10 steps"), (0, 10, 20)),
        (Schedule("linear", 3, every="10 steps", begin="5 steps"), (5, 15, 25)),
        (Schedule("linear", 3, every="2 epochs", begin="1 epoch"), (7, 21, 35)),
        (Schedule("linear", 3, every="10 steps", begin="1 epoch"), (7, 17, 27)),
        (Schedule("linear", 2, every="2 epochs", begin="3 steps"), (3, 17)),
        (Schedule("one_shot", 1, every="1 step", begin="6 epochs"), (42,)),
        (Schedule("linear", 5, every="restart"), (0, 9, 17, 26, 34)),  # multiples of 42 / 5, up
        (Schedule("linear", 2, every="2 restarts", begin="restart"), (9, 26)),
    ],
)
def test_where_cuts_fall(schedule: Schedule, expected: tuple[int, ...]) -> None:
    n_steps = 43 if expected == (42,) else 42  # six epochs of seven steps, five cycles
    assert schedule.cuts(n_steps, per_epoch=7, cycles=5) == expected


@given(cycles=st.integers(2, 20), steps=st.integers(1, 20), data=st.data())
def test_cuts_at_restarts_fall_where_the_cycle_begins(
    cycles: int, steps: int, data: st.DataObject
) -> None:
    n_steps = data.draw(st.integers(cycles, 500))
    schedule = Schedule("linear", steps, every="restart")
    if steps > cycles:
        with pytest.raises(ConfigError, match="nothing is left to heal"):
            schedule.cuts(n_steps, cycles=cycles)
        return
    for cut in schedule.cuts(n_steps, cycles=cycles)[1:]:
        before, at = (s * cycles % n_steps for s in (cut - 1, cut))
        assert at < before or n_steps == cycles  # the learning rate has started again


@pytest.mark.parametrize(
    ("schedule", "n_steps", "per_epoch", "cycles", "message"),
    [
        (Schedule("linear", 5, every="10 steps"), 40, 10, 1, "after 40 optimizer steps, and the"),
        (Schedule("linear", 1, every="1 step"), 0, 10, 1, "has 0: nothing is left to heal"),
        (Schedule("linear", 3, every="2 epochs"), 99, None, 1, "have no length"),
        (Schedule("linear", 3, every="restart"), 99, None, 1, "never starts again"),
        (Schedule("linear", 9, every="restart"), 5, None, 9, "cuts fall together"),
        (Schedule("linear", 5), 99, None, 1, "give every="),
    ],
)
def test_cuts_that_do_not_fit(
    schedule: Schedule, n_steps: int, per_epoch: int | None, cycles: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule.cuts(n_steps, per_epoch, cycles)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "2 weeks"}, "Schedule: every must be a text"),
        ({"every": "0 steps"}, "every='0 steps'.: at least 1"),
        ({"every": 10}, "Schedule: every must be a text"),
        ({"every": "1 epoch", "begin": "soon"}, "Schedule: begin must be a text"),
        ({"begin": "1 epoch"}, "needs every="),
        ({"rescore": "no"}, "True or False"),
    ],
)
def test_bad_clocks(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**options)  # type: ignore[arg-type]
