"""`Budget(latency_ms=)` and allocation "sensitivity" inside `prune`: measured, then kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs.allocation import Sensitivity
from secateurs.errors import BudgetError
from secateurs.latency import compare_latency
from secateurs.pipeline import prune
from secateurs.schedules import Schedule
from secateurs.sensitivities import sensitivity
from secateurs.types import Batch, Budget


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 768), nn.ReLU(), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 4)
    )


X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
BATCHES: list[Batch] = [(X, torch.arange(64) % 4)]


def test_the_realised_latency_is_within_the_budget() -> None:
    model = wide()
    dense = compare_latency({"dense": model}, X)["dense"][0].median_ms
    asked = Budget(latency_ms=0.6 * dense)
    result = prune(
        model, BATCHES, F.cross_entropy, example_inputs=X, budget=asked,
        schedule=Schedule("linear", steps=2),
    )  # fmt: skip
    assert asked.latency_ms is not None
    assert 0 < result.counts.realised["latency_ms"] <= asked.latency_ms
    assert result.report.asked == {"latency_ms": asked.latency_ms}
    (told,) = [note for note in result.report.notes if note.startswith("latency: ")]
    assert "asked for" in told
    assert "measured" in told
    first, last = (step.remaining["units"] for step in result.report.steps)
    assert first is not None
    assert last is not None
    assert 1 > first > last


@pytest.mark.parametrize(
    ("milliseconds", "message"),
    [(1e6, "within the budget already"), (1e-6, r"latency_ms")],
)
def test_a_latency_out_of_reach(milliseconds: float, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        prune(wide(), BATCHES, F.cross_entropy, example_inputs=X,
              budget=Budget(latency_ms=milliseconds), schedule=Schedule("one_shot", 1))  # fmt: skip


def test_a_missed_latency_may_be_allowed() -> None:
    result = prune(
        wide(), BATCHES, F.cross_entropy, example_inputs=X, budget=Budget(latency_ms=1e-6),
        schedule=Schedule("one_shot", 1), allow_missed=True,
    )  # fmt: skip
    assert set(result.counts.kept.values()) == {1}
    assert not result.report.met


def test_sensitivity_is_measured_anew_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Any]] = []

    def watched(*args: Any, **options: Any) -> Sensitivity:
        found = sensitivity(*args, **options)
        seen.append(found.curves)
        return found

    monkeypatch.setattr("secateurs.pipeline.run.sensitivity", watched)
    net = nn.Sequential(
        nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    result = prune(
        net, BATCHES, F.cross_entropy, example_inputs=X, budget=Budget(units=0.5),
        allocation="sensitivity", schedule=Schedule("linear", steps=2),
    )  # fmt: skip
    assert [set(curves) for curves in seen] == [set(result.counts.kept)] * 2
    assert seen[0] != seen[1]
    assert sum(result.counts.kept.values()) == 16
