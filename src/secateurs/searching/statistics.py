"""From fold results to statistics: paired drops, their spread, and bounds. Pure functions.

Trial, Design ── standing ──> Standing
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateurs.searching.results import FoldResult, Standing, Trial

__all__ = ["Design", "family", "floor_of", "standing", "student_tail", "student_quantile"]


@dataclass(frozen=True)
class Design:
    """What the statistics must know about the folds.

    Attributes:
        n_folds: folds of every candidate.
        overlap: held-out over training samples of a fold where the folds train networks on
            overlapping samples; 0 where they share one dense network.
        samples: different samples in all held-out parts together.
        maximize: whether a larger metric is better.
        max_drop: the limit; None: there is none.
        level: error level of one bound, in (0, 0.5).
    """

    n_folds: int
    overlap: float
    samples: int
    maximize: bool = True
    max_drop: float | None = None
    level: float = 0.05


def family(values: Mapping[str, Any]) -> dict[str, Any]:
    """The choices that do not decide the size: all but budgets and thresholds.

    Example:
        >>> family({"budget.macs": 0.5, "stages.0.threshold.k": 1.0, "criterion": "taylor"})
        {'criterion': 'taylor'}
    """
    size = {"budget", "threshold"}
    return {key: value for key, value in values.items() if not size & set(key.split("."))}


def standing(trial: Trial, design: Design, least: float = 0.0) -> Standing:
    """The statistics of one candidate.

    With drops d_1 .. d_k (positive where the smaller network is worse than its dense one), mean d
    and standard deviation s (at least `floor_of` and `least`), and t the quantile of Student's
    distribution with k - 1 degrees of freedom at 1 - level:

        se = s sqrt(1/k + overlap)
        upper_mean = d + t se                        bounds the expected drop
        upper = d + t s sqrt(1 + 1/k + overlap)      bounds the drop of one more network

    A user gets one network, so `upper` is the one that is held against the limit; it counts the
    spread from network to network, and that of a test set as large as a fold.

    References:
        Nadeau and Bengio, Inference for the generalization error, Machine Learning 52, 2003: the
        term `overlap`. Hahn, Factors for calculating two-sided prediction intervals, JASA 64, 1969:
        the 1 for one more observation.
    """
    kind = family(trial.candidate.values)
    problem = trial.problem or _unfinished(trial.folds, design)
    if problem:
        return Standing(trial.candidate, kind, len(trial.folds), problem=problem)
    sign, k = (1.0 if design.maximize else -1.0), design.n_folds
    drops = [sign * (f.dense - f.metric) for f in trial.folds]
    drop, floor = statistics.fmean(drops), max(least, floor_of(trial.folds, design))
    spread = max(statistics.stdev(drops), floor)
    metrics = [f.metric for f in trial.folds]
    t = student_quantile(1 - design.level, k - 1)
    for_mean = spread * math.sqrt(1 / k + design.overlap)
    for_one = spread * math.sqrt(1 + 1 / k + design.overlap)
    upper, limit = drop + t * for_one, design.max_drop
    times = [f.latency_ms for f in trial.folds if f.latency_ms is not None]
    return Standing(
        candidate=trial.candidate,
        family=kind,
        n_folds=k,
        dense=statistics.fmean(f.dense for f in trial.folds),
        metric=statistics.fmean(metrics),
        metric_se=statistics.stdev(metrics) / math.sqrt(k),
        drop=drop,
        spread=spread,
        floor=floor,
        se=for_mean,
        upper_mean=drop + t * for_mean,
        upper=upper,
        p=None if limit is None else _tail(limit - drop, for_one, k - 1),
        remaining={
            name: statistics.fmean(f.remaining[name] for f in trial.folds)
            for name in trial.folds[0].remaining
        },
        latency_ms=statistics.median(times) if len(times) == k else None,
        within=limit is not None and upper <= limit,
    )


def _unfinished(folds: Sequence[FoldResult], design: Design) -> str:
    there = sorted(f.fold for f in folds)
    if there == list(range(design.n_folds)):
        return ""
    return f"not finished: {len(there)} of {design.n_folds} folds"


def floor_of(folds: Sequence[FoldResult], design: Design) -> float:
    """The least spread of the drop from fold to fold that so few samples can show.

    Where the metric is a share of N samples in all (accuracy), a drop d_i of a fold needs |d_i| n_i
    samples on which the networks disagree. If none was seen, their rate is still unknown up to
    about 1/N. With q = (sum |d_i| n_i + 1) / (N + 2), the drop of a fold with n samples has at
    least the variance (q - d^2) / n. Other metrics: 0, since a count says nothing about them.

    Example:
        >>> same = [FoldResult(i, 0.9, 0.9, {}, None, 1.0, samples=100, share=True) for i in (0, 1)]
        >>> round(floor_of(same, Design(2, 0.0, 200)), 6)  # sqrt((1 / 202) / 100)
        0.007036

    References:
        Agresti and Min, Simple improved confidence intervals for comparing matched proportions,
        Statistics in Medicine 24, 2005: the added counts.
    """
    drops = [f.dense - f.metric for f in folds]
    if not design.samples or not all(f.share and f.samples for f in folds):
        return 0.0
    held = sum(f.samples for f in folds)
    changed = sum(abs(d) * f.samples for d, f in zip(drops, folds, strict=True)) / held
    rate = (changed * design.samples + 1) / (design.samples + 2)
    mean = statistics.fmean(drops)
    return math.sqrt(max(rate - mean * mean, 0.0) * len(folds) / held)


def student_quantile(share: float, freedom: int) -> float:
    """The value that Student's t with `freedom` degrees stays below with probability `share`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


def student_tail(value: float, freedom: int) -> float:
    """The probability that Student's t with `freedom` degrees is above `value`."""
    from scipy.special import stdtr

    return float(stdtr(freedom, -value))


def _tail(room: float, scale: float, freedom: int) -> float:
    """p-value of "the drop is above the limit", with that much room below the limit."""
    if scale == 0:
        return 0.0 if room >= 0 else 1.0
    return student_tail(room / scale, freedom)
