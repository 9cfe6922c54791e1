"""The report of a run: its numbers are those of the models, its words are true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs.diagnosis import diagnose
from secateurs.errors import ConfigError, ScoringError
from secateurs.finetuning import Finetune
from secateurs.graph import trace
from secateurs.measurement import measure
from secateurs.pipeline import PruneResult, Stage, prune, prune_stages
from secateurs.report.assemble import metrics_of, stored_bytes
from secateurs.report.data import MetricRow, Report
from secateurs.schedules import Schedule
from secateurs.surgery.shrinking import info_of
from secateurs.types import Batch, Budget, Threshold

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
BATCHES: list[Batch] = [(X, (X[:, 0] > 0).long())]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 2)
    )


def score_of(model: nn.Module) -> dict[str, float]:
    x, y = BATCHES[0]
    return {"accuracy": float((model(x).argmax(1) == y).float().mean())}


def run(**options: Any) -> PruneResult:
    given: dict[str, Any] = {
        "example_inputs": X, "evaluate": score_of, "finetune": Finetune(steps=2),
        "schedule": Schedule("linear", 2), **options,
    }  # fmt: skip
    if given.get("threshold") is not None:
        del given["schedule"]
    return prune(net(), BATCHES, F.cross_entropy, **given)


def rows(report: Report) -> dict[str, MetricRow]:
    return {row.name: row for row in report.rows}


@pytest.fixture(scope="module")
def structured() -> PruneResult:
    return run(budget=Budget(macs=0.25), test=score_of, latency=[1, 4])


def test_the_table_holds_what_measuring_the_models_gives(structured: PruneResult) -> None:
    found = rows(structured.report)
    assert list(found) == [
        "test accuracy", "validation accuracy", "parameters", "non-zeros", "MACs", "bytes on disk",
        "latency, batch 1", "latency, batch 4",
    ]  # fmt: skip
    dense = net()
    for side, model in (("before", dense), ("after", structured.model)):
        cost = measure(model, X, latency=False)
        assert getattr(found["parameters"], side) == cost.params
        assert getattr(found["non-zeros"], side) == cost.nonzeros
        assert getattr(found["MACs"], side) == cost.macs
        assert getattr(found["test accuracy"], side) == score_of(model)["accuracy"]
        assert getattr(found["validation accuracy"], side) == score_of(model)["accuracy"]
        assert getattr(found["latency, batch 4"], side) > 0
    assert structured.report.reached["macs"] == cost.macs / measure(dense, X, latency=False).macs
    assert (structured.report.reached["macs"] or 1) <= 0.25


def test_the_rest_of_the_report(structured: PruneResult) -> None:
    report, dense = structured.report, net()
    graph = trace(dense, X)
    assert report.excluded == graph.excluded
    assert report.excluded[0].reason == "it is part of the model's output"
    assert {t.name: (t.n_units, t.n_kept) for t in report.targets} == {
        name: (graph.units[name], kept) for name, kept in structured.counts.kept.items()
    }
    for target in report.targets:
        gone = structured.plan.removed[target.name]
        assert target.n_units - target.n_kept == len(gone)
        assert target.reason == structured.plan.reasons[target.name]
        assert target.histogram is not None
        assert target.histogram.ignored + target.histogram.total == target.n_units
        assert "0.weight" in target.members or "2.weight" in target.members
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.form == info_of(structured.model).form == "module"
    before = diagnose(dense, BATCHES, F.cross_entropy).layers
    assert [d.layer for d in report.diagnosis_before] == [layer.name for layer in before]
    assert [d.gradient_norm for d in report.diagnosis_before] == [x.grad_norm for x in before]
    assert (
        report.weights_after["0.weight"].total == structured.model.get_parameter("0.weight").numel()
    )
    assert report.metric_dense == score_of(dense)["accuracy"]
    last = report.steps[-1]
    assert last.metric_healed == rows(report)["validation accuracy"].after
    assert last.remaining == structured.counts.realised
    assert report.environment["seed"] == 0


def test_json_is_strict_and_reads_back(structured: PruneResult, tmp_path: Path) -> None:
    out = structured.save(tmp_path / "out")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    data = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert Report.from_dict(data) == structured.report


def test_the_headline_of_structure(structured: PruneResult) -> None:
    found = rows(structured.report)
    macs, weights, main = found["MACs"], found["non-zeros"], found["test accuracy"]
    assert structured.report.headline == (
        "Asked: at most 25.0% of the MACs may remain. Reached: "
        f"{(macs.before or 0) / (macs.after or 1):.1f}x fewer MACs and "
        f"{(weights.before or 0) / (weights.after or 1):.1f}x fewer weights, "
        f"for test accuracy {main.before:.4g} -> {main.after:.4g}."
    )


def test_the_headline_of_weights_claims_no_fewer_macs() -> None:
    report = run(budget=Budget(units=0.1), granularity="weight").report
    row = rows(report)["non-zeros"]
    assert rows(report)["MACs"].before == rows(report)["MACs"].after
    assert report.headline.startswith(
        "Asked: at most 10.0% of the units may remain. Reached: "
        f"{(row.before or 0) / (row.after or 1):.1f}x fewer weights, for validation accuracy"
    )
    assert report.reached["macs"] == 1
    assert all(step.remaining.keys() == {"units", "params", "bytes"} for step in report.steps)


def test_the_headline_of_a_threshold_without_a_metric() -> None:
    report = run(threshold=Threshold("k_std", k=0.5), evaluate=None).report
    assert report.headline.startswith("Asked: threshold k_std (k=0.5, scope=target). Reached: ")
    assert report.headline.endswith("x fewer weights.")
    assert report.metric_dense is None
    assert report.rows[0].name == "parameters"
    assert all(step.metric_masked is None for step in report.steps)


def test_the_headline_of_a_small_gain_and_of_stages() -> None:
    report = run(budget=Budget(macs=0.97), evaluate=None).report
    row = rows(report)["MACs"]
    ratio = (row.before or 0) / (row.after or 1)
    assert 1 < ratio < 1.1
    assert f"{ratio:.2f}x fewer MACs" in report.headline
    stages = [
        Stage(Budget(units=50), granularity="weight", schedule=Schedule("linear", 1)),
        Stage(threshold=Threshold("mean")),
    ]
    two = prune_stages(net(), BATCHES, F.cross_entropy, stages, example_inputs=X).report
    assert two.headline.startswith(
        "Asked: at most 50 of the units may remain; then threshold mean (scope=target). Reached: "
    )
    assert list(two.asked) == ["stage 1", "stage 2"]


def test_the_direction_of_the_metric() -> None:
    def loss(model: nn.Module) -> float:
        return float(F.cross_entropy(model(X), BATCHES[0][1]))

    report = run(budget=Budget(units=0.5), evaluate=loss, maximize=False).report
    assert (report.metric_better, report.rows[0].better) == ("lower", "lower")
    assert (report.metric, report.rows[0].name) == ("metric", "validation metric")
    assert report.rows[0].after == pytest.approx(report.steps[-1].metric_healed, rel=1e-4)


def test_a_metric_that_the_small_model_does_not_report_is_not_available() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        extra = {"only dense": 1.0} if model.get_parameter("0.weight").shape[0] == 40 else {}
        return {**score_of(model), **extra}

    found = rows(run(budget=Budget(units=0.5), evaluate=evaluate).report)
    assert (found["validation only dense"].before, found["validation only dense"].after) == (
        1,
        None,
    )


# --- parts ---------------------------------------------------------------------------------------


def test_metrics() -> None:
    model = net().train()
    modes: list[bool] = []

    def evaluate(m: nn.Module) -> Any:
        modes.append(m.training or torch.is_grad_enabled())
        return {"a": torch.tensor(0.5), "b": 1}

    assert metrics_of(model, evaluate) == {"a": 0.5, "b": 1.0}
    assert modes == [False]
    assert model.training
    assert metrics_of(model, None) == {}
    assert metrics_of(model, lambda m: 3) == {"metric": 3.0}


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), float("inf"), torch.ones(2), [0.5]])
def test_what_is_no_metric(value: Any) -> None:
    with pytest.raises(ScoringError, match=r"evaluate returned metric = .*; expected a finite num"):
        metrics_of(net(), lambda m: value)


def test_an_evaluate_that_fails() -> None:
    with pytest.raises(ConfigError, match="empty dict"):
        metrics_of(net(), lambda m: {})
    with pytest.raises(ScoringError, match=r"evaluate fails: ZeroDivisionError: division by zero"):
        metrics_of(net(), lambda m: 1 / 0)

    def refuses(_: nn.Module) -> float:
        raise ConfigError("as it was said")

    with pytest.raises(ConfigError, match=r"^as it was said$"):
        metrics_of(net(), refuses)


def test_bytes_count_values_and_masks() -> None:
    model = nn.Linear(64, 64, bias=False)
    dense = stored_bytes(model, {})
    assert 64 * 64 * 4 < dense < 64 * 64 * 4 + 200
    with torch.no_grad():
        model.weight[:, 8:] = 0  # an eighth is left: 512 values and one bit for each of 4096
    assert 2048 + 512 < stored_bytes(model, {}) < 2048 + 512 + 400
    mask = {"weight": model.weight != 0}
    assert 512 <= stored_bytes(model, mask) - stored_bytes(model, {}) < 512 + 100
