"""Steps in the report: what was rolled back is drawn apart, and old files still load."""

from __future__ import annotations

import pytest

from secateurs.report import Report, StepRow
from secateurs.report.html import render

pytest.importorskip("matplotlib")


def step(number: int, remaining: float, metric: float, *, rolled_back: bool = False) -> StepRow:
    return StepRow(number, None, {"macs": remaining}, metric - 0.1, metric, rolled_back=rolled_back)


def report(*steps: StepRow) -> Report:
    return Report(
        title="net", headline="as asked", met=True, metric_dense=0.97, steps=steps,
        asked={"metric_drop": 0.01},
    )  # fmt: skip


def test_a_step_that_was_rolled_back_is_marked() -> None:
    page = render(report(step(1, 0.8, 0.97), step(2, 0.64, 0.9, rolled_back=True)))
    assert "rolled back" in page
    assert "for 2 steps, 1 of them rolled back" in page


def test_without_such_a_step_nothing_is_marked() -> None:
    page = render(report(step(1, 0.8, 0.97), step(2, 0.64, 0.96)))
    assert "rolled back" not in page
    assert "for 2 steps" in page


def test_only_steps_that_were_rolled_back() -> None:
    assert "1 of them rolled back" in render(report(step(1, 0.8, 0.9, rolled_back=True)))


def test_the_rows_survive_json() -> None:
    inside = StepRow(1, 0.5, {"macs": 0.8}, optimizer_step=40)
    full = report(inside, step(2, 0.64, 0.9, rolled_back=True))
    assert Report.from_dict(full.to_dict()) == full
    old = full.to_dict()
    for row in old["steps"]:  # written before these two existed
        del row["rolled_back"], row["optimizer_step"]
    assert [s.rolled_back for s in Report.from_dict(old).steps] == [False, False]
