"""From a finished run to its `Report`: numbers before and after, plots' data, and plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from secateurs.batches import in_mode
from secateurs.diagnosis import Diagnosis, diagnose
from secateurs.errors import ConfigError, PruningError, ScoringError
from secateurs.measurement import LatencyRow, Measurement, compare_latency, measure, no_gain_reason
from secateurs.report.data import (
    DiagnosisRow,
    MetricRow,
    Report,
    StepRow,
    TargetRow,
    VerificationRow,
)
from secateurs.report.gather import environment, score_histogram, weight_histograms
from secateurs.report.words import budget_words
from secateurs.surgery.shrinking import info_of, slice_masks
from secateurs.surgery.storage import stored_tensors
from secateurs.types import (
    Batches,
    Budget,
    Counts,
    Evaluate,
    Graph,
    GroupTarget,
    Inputs,
    LossFn,
    Plan,
    Scores,
    WeightTarget,
)

__all__ = ["Outcome", "assemble", "metrics_of", "remaining_of", "stored_bytes"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Everything a run leaves behind, before it is described.

    Attributes:
        dense, small: before and after.
        graph, plan: what could be removed and what was.
        scores, counts: of the last step of each stage.
        dense_metrics: validation metrics of the dense model.
        steps: along the schedule.
        evaluate, test: metrics on validation and test data.
        batches, loss_fn: for the diagnosis.
        maximize: whether a larger metric is better.
        example_inputs, latency: for measuring; batch sizes to time.
        seed, notes: as run.
        met: False when a threshold could not be applied as often as asked.
    """

    dense: nn.Module
    small: nn.Module
    graph: Graph
    plan: Plan
    scores: list[Scores]
    counts: list[Counts]
    dense_metrics: Mapping[str, float]
    steps: tuple[StepRow, ...]
    evaluate: Evaluate | None
    test: Evaluate | None
    batches: Batches
    loss_fn: LossFn
    maximize: bool
    example_inputs: Inputs
    latency: tuple[int, ...]
    seed: int
    notes: tuple[str, ...]
    met: bool = True


def metrics_of(model: nn.Module, evaluate: Evaluate | None) -> dict[str, float]:
    """The metrics of a model by name ("metric" for a bare number), checked.

    Raises:
        ConfigError: `evaluate` returns an empty dict.
        ScoringError: `evaluate` fails, or a metric is not a finite number.
    """
    if evaluate is None:
        return {}
    try:
        with in_mode(model, training=False), torch.no_grad():
            answer = evaluate(model)
    except PruningError:
        raise
    except Exception as error:  # the user's function can raise anything
        raise ScoringError(f"evaluate fails: {type(error).__name__}: {error}") from error
    found = dict(answer) if isinstance(answer, Mapping) else {"metric": answer}
    if not found:
        raise ConfigError("evaluate returned an empty dict; its first entry is the main metric")
    return {str(name): _finite(str(name), value) for name, value in found.items()}


def _finite(name: str, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):  # None, an array of several numbers
        number = float("nan")
    if not math.isfinite(number):
        raise ScoringError(f"evaluate returned {name} = {value!r}; expected a finite number")
    return number


def assemble(run: Outcome) -> Report:
    """Measure both models and put the report together."""
    before = measure(run.dense, run.example_inputs, latency=False)
    after = measure(run.small, run.example_inputs, latency=False)
    rows = [*_metric_rows(run), *_size_rows(run, before, after)]
    latency, reasons = _latency_rows(run, before, after)
    info = info_of(run.small)
    reached = _reached(run, before, after)
    asked = [_asked_text(c) for c in run.counts]
    return Report(
        title=type(run.dense).__name__,
        headline=_headline(rows, asked),
        met=run.met,
        asked=_asked(run.counts),
        reached=reached,
        metric=next(iter(run.dense_metrics), "metric"),
        metric_better="higher" if run.maximize else "lower",
        metric_dense=next(iter(run.dense_metrics.values()), None),
        rows=(*rows, *latency),
        verification=VerificationRow(
            error=info.verification.error,
            tolerance=info.verification.tolerance,
            form=info.form,
            dtype=info.verification.dtype,
            comparable=info.verification.comparable,
            text=" ".join(info.notes),
        ),
        steps=run.steps,
        targets=_target_rows(run),
        excluded=run.graph.excluded,
        weights_before=weight_histograms(run.dense),
        weights_after=weight_histograms(run.small),
        diagnosis_before=_diagnosis_rows(diagnose(run.dense, run.batches, run.loss_fn)),
        diagnosis_after=_diagnosis_rows(diagnose(run.small, run.batches, run.loss_fn)),
        notes=(*run.notes, *info.notes, *reasons),
        environment=environment(run.seed),
    )


def remaining_of(graph: Graph, counts: Counts) -> dict[str, float | None]:
    """What remains of the dense model after a step.

    Without MACs where only single weights were removed: a dense runtime multiplies by their zeros.
    """
    sparse = all(isinstance(graph.targets[name], WeightTarget) for name in counts.kept)
    return {k: v for k, v in counts.realised.items() if not (sparse and k == "macs")}


def stored_bytes(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Size of `model.safetensors` as `save` writes it: weights and masks, bytes."""
    return len(to_bytes(stored_tensors(model, masks)))


def _metric_rows(run: Outcome) -> list[MetricRow]:
    """Metrics of both models; the test split is touched here and nowhere else."""
    rows = []
    for split, evaluate in (("test", run.test), ("validation", run.evaluate)):
        known = split == "validation"
        before = run.dense_metrics if known else metrics_of(run.dense, evaluate)
        after = metrics_of(run.small, evaluate)
        rows += [
            MetricRow(
                f"{split} {name}", "", value, after.get(name),
                better="higher" if run.maximize else "lower",
            )
            for name, value in before.items()
        ]  # fmt: skip
    return rows


def _size_rows(run: Outcome, before: Measurement, after: Measurement) -> list[MetricRow]:
    note = "" if not after.uncounted else f"not counted: {', '.join(after.uncounted)}"
    return [
        MetricRow("parameters", "", before.params, after.params),
        MetricRow("non-zeros", "", before.nonzeros, after.nonzeros),
        MetricRow("MACs", "", before.macs, after.macs, note=note or "for one sample"),
        MetricRow(
            "bytes on disk", "bytes",
            stored_bytes(run.dense, {}), stored_bytes(run.small, slice_masks(run.plan)),
        ),
    ]  # fmt: skip


def _latency_rows(
    run: Outcome, before: Measurement, after: Measurement
) -> tuple[list[MetricRow], list[str]]:
    """Both models timed in turn, and why there is no gain where there is none."""
    if not run.latency:
        return [], []
    timed = compare_latency(
        {"before": run.dense, "after": run.small}, run.example_inputs, run.latency
    )
    rows, reasons = [], []
    for old, new in zip(timed["before"], timed["after"], strict=True):
        why = no_gain_reason(
            old, new, macs_before=before.macs, macs_after=after.macs,
            structural=run.plan.structural,
        )  # fmt: skip
        rows.append(
            MetricRow(
                f"latency, batch {old.batch_size}", "ms", old.median_ms, new.median_ms,
                note=f"median of {old.runs} calls, 1 thread, eager",
                spread_before=_spread(old), spread_after=_spread(new),
            )
        )  # fmt: skip
        if why:
            reasons.append(f"No gain at batch {old.batch_size}: {why}")
    return rows, reasons


def _spread(row: LatencyRow) -> tuple[float, float]:
    return row.p25_ms, row.p75_ms


def _reached(run: Outcome, before: Measurement, after: Measurement) -> dict[str, float | None]:
    reached: dict[str, float | None] = {}
    for counts in run.counts:
        reached.update(remaining_of(run.graph, counts))
    reached["params"] = after.nonzeros / before.params
    if before.macs:
        reached["macs"] = after.macs / before.macs
    return reached


def _asked(stages: list[Counts]) -> dict[str, Any]:
    """What was asked, by quantity for a single stage and by stage for several."""
    if len(stages) > 1:
        return {f"stage {i}": _asked_text(c) for i, c in enumerate(stages, start=1)}
    asked = stages[0].asked
    if isinstance(asked, Budget):
        return {**asked.given, **asked.sizes}
    return {"threshold": _asked_text(stages[0]).removeprefix("threshold ")}


def _asked_text(counts: Counts) -> str:
    asked = counts.asked
    if isinstance(asked, Budget):
        return " and ".join(budget_words(asked.given, asked.sizes))
    given = {k: v for k, v in asdict(asked).items() if v is not None and k != "rule"}
    return f"threshold {asked.rule} ({', '.join(f'{k}={v}' for k, v in given.items())})"


def _headline(rows: list[MetricRow], asked: list[str]) -> str:
    """What was asked and what was reached, in one line."""
    by_name = {r.name: r for r in rows}
    gains = [
        f"{_times(row.before / row.after)}x fewer {what}"
        for what, row in (("MACs", by_name["MACs"]), ("weights", by_name["non-zeros"]))
        if row.before and row.after and row.after < row.before
    ]
    text = f"Asked: {'; then '.join(asked)}. Reached: {' and '.join(gains) or 'nothing smaller'}"
    main = rows[0]
    if main.name == "parameters" or main.before is None or main.after is None:
        return text + "."
    return f"{text}, for {main.name} {main.before:.4g} -> {main.after:.4g}."


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio >= 1.1 else f"{ratio:.2f}"


def _target_rows(run: Outcome) -> tuple[TargetRow, ...]:
    rows = []
    for scores, counts in zip(run.scores, run.counts, strict=True):
        for name, values in scores.values.items():
            target = run.graph.targets[name]
            members: tuple[str, ...] = ()
            if isinstance(target, GroupTarget):
                members = tuple(dict.fromkeys(m.tensor for m in target.members))
            rows.append(
                TargetRow(
                    name=name,
                    kind=target.kind,
                    n_units=target.n_units,
                    n_kept=counts.kept.get(name, target.n_units),
                    members=members,
                    histogram=score_histogram(values) if scores.criterion else None,
                    threshold=counts.thresholds.get(name),
                    reason=run.plan.reasons.get(name, ""),
                )
            )
    return tuple(rows)


def _diagnosis_rows(found: Diagnosis) -> tuple[DiagnosisRow, ...]:
    return tuple(
        DiagnosisRow(layer.name, layer.activation_rms, layer.grad_rms, layer.grad_norm, layer.flag)
        for layer in found.layers
    )
