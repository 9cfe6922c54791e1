"""The report as data: round trip, missing numbers, histograms that a reader can count."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from secateurs.errors import ConfigError, FileFormatError
from secateurs.report import (
    DiagnosisRow,
    Histogram,
    MetricRow,
    Report,
    VerificationRow,
    environment,
    score_histogram,
    weight_histograms,
)
from secateurs.report.data import plain

from .fake import fake_report, hostile_report


def test_json_round_trip() -> None:
    report = fake_report()
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = Report.from_dict(json.loads(text))
    assert again == report
    assert json.loads(text)["format"] == 1
    assert again != replace(report, met=False)


def test_empty_report_round_trip() -> None:
    report = Report(title="t", headline="h", met=False)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.version
    assert report.created[:2] == "20"


def test_numbers_that_are_not_finite_become_null() -> None:
    row = MetricRow("x", "", math.nan, math.inf, spread_before=(math.nan, 1.0))
    body = Report("t", "h", True, rows=(row,), recipe={"lr": -math.inf}).to_dict()
    assert body["rows"][0]["before"] is None
    assert body["rows"][0]["after"] is None
    assert body["rows"][0]["spread_before"] == [None, 1.0]
    assert body["recipe"] == {"lr": None}
    assert Report.from_dict(body).rows[0].before is None


def test_hostile_report_survives_json() -> None:
    body = json.loads(json.dumps(hostile_report().to_dict(), allow_nan=False))
    assert Report.from_dict(body).to_dict() == body


def test_plain_converts_numbers_of_other_libraries() -> None:
    values = {"a": torch.tensor([1.0, math.nan]), "b": torch.tensor(3), "c": torch.float32}
    assert plain(values) == {"a": [1.0, None], "b": 3, "c": "torch.float32"}


def test_plain_names_what_json_cannot_hold() -> None:
    with pytest.raises(ConfigError, match=r"report\.recipe\.model is a Linear"):
        Report("t", "h", True, recipe={"model": nn.Linear(1, 1)}).to_dict()


def test_other_format_is_refused() -> None:
    body = fake_report().to_dict()
    with pytest.raises(FileFormatError, match="needs format 1, got 2"):
        Report.from_dict(body | {"format": 2})
    with pytest.raises(FileFormatError, match="needs format 1, got None"):
        Report.from_dict({})


def test_faults_are_listed_together() -> None:
    body = fake_report().to_dict()
    body["met"] = "perhaps"
    body["rows"][1]["before"] = "many"
    body["rows"][2]["extra"] = 1
    with pytest.raises(FileFormatError) as caught:
        Report.from_dict(body)
    for where in ("met:", "rows.1.before:", "rows.2.extra:"):
        assert where in str(caught.value)


def test_histogram_needs_matching_edges() -> None:
    with pytest.raises(ConfigError, match="2 bins"):
        Histogram((0.0, 1.0), (1, 2))
    body = fake_report().to_dict()
    body["targets"][0]["histogram"]["edges"].pop()
    with pytest.raises(FileFormatError, match="one edge more"):
        Report.from_dict(body)


def test_score_histogram_counts_by_hand() -> None:
    scores = torch.tensor([-1.0, 0.0, 0.0, 2.0, 3.0, -torch.inf, -torch.inf])
    h = score_histogram(scores, bins=4)
    assert h.edges == (-1.0, 0.0, 1.0, 2.0, 3.0)
    assert h.counts == (1, 2, 0, 2)
    assert (h.zeros, h.ignored, h.scale, h.total) == (0, 2, "linear", 5)


def test_score_histogram_of_a_long_tail_is_logarithmic() -> None:
    scores = torch.tensor([0.0, 1e-3, 1e-3, 1e-3, 1e-2, 1.0, 1e-12])
    h = score_histogram(scores, bins=3)
    assert h.scale == "log"
    assert (h.zeros, h.total) == (1, 7)
    assert h.edges == pytest.approx((1e-6, 1e-4, 1e-2, 1.0))
    assert sum(h.counts) == 6
    assert h.counts[0] == 1  # 1e-12 lies below six decades and is counted in the first bin


@pytest.mark.parametrize("value", [3.0, 0.0, -2e-9, 1e30])
def test_score_histogram_of_one_value(value: float) -> None:
    h = score_histogram(torch.full((5,), value), bins=7)
    assert sum(h.counts) == 5
    assert h.edges[0] < value < h.edges[-1]


def test_score_histogram_without_values() -> None:
    assert score_histogram(torch.full((3,), -torch.inf)) == Histogram((), (), 0, 3)
    assert score_histogram(torch.empty(0)) == Histogram((), ())
    with pytest.raises(ConfigError, match="bins"):
        score_histogram(torch.ones(2), bins=0)


def test_score_histogram_of_a_range_too_narrow_for_its_bins() -> None:
    scores = torch.tensor([1.0, 1.0 + 2**-52], dtype=torch.float64)
    h = score_histogram(scores, bins=30)
    assert sum(h.counts) == 2
    assert all(a < b for a, b in zip(h.edges, h.edges[1:], strict=False))


def test_weight_histograms_count_zeros_apart_and_skip_vectors() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))  # type: ignore[operator]
    found = weight_histograms(model, bins=2)
    assert found == {"0.weight": Histogram((1.0, 1.5, 2.0), (1, 1), zeros=2)}


def test_weight_histogram_of_a_tensor_that_is_all_zero() -> None:
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    assert weight_histograms(model) == {"weight": Histogram((), (), zeros=6)}


def test_weight_histograms_leave_the_model_alone() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    weight_histograms(model.eval())
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_environment_is_json_and_complete() -> None:
    found = environment(7)
    assert set(found) >= {"python", "torch", "numpy", "platform", "cpu", "threads", "seed"}
    assert found["seed"] == 7
    assert found["torch"] == torch.__version__
    json.dumps(found)


@pytest.mark.parametrize(
    ("error", "tolerance", "comparable", "passed"),
    [
        (1e-6, 1e-5, True, True),
        (1e-4, 1e-5, True, False),
        (None, 1e-5, True, False),
        (0.0, 1e-5, False, False),
        (math.nan, 1e-5, True, False),
    ],
)
def test_verification_passes_only_with_a_number(
    error: float | None, tolerance: float, comparable: bool, passed: bool
) -> None:
    assert VerificationRow(error, tolerance, comparable=comparable).passed is passed


def test_diagnosis_flag() -> None:
    assert not DiagnosisRow("a").flagged
    assert not DiagnosisRow("a", flag="ok").flagged
    assert DiagnosisRow("a", flag="vanishing").flagged
