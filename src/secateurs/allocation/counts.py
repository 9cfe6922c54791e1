"""`allocate`: from scores and what is asked to counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateurs.allocation.curves import Sensitivity
from secateurs.allocation.cuts import Found, find_cuts, null_lines
from secateurs.allocation.frame import Frame, check_options, make_frame
from secateurs.allocation.marginal import NEEDS_CURVES
from secateurs.allocation.previews import Preview, PreviewRow
from secateurs.allocation.problem import ALLOCATORS, Allocation, Latency
from secateurs.allocation.rounding import RoundTo
from secateurs.allocation.scales import allocate_scales, mixes_scales
from secateurs.allocation.spending import dense_sizes, spend
from secateurs.allocation.thresholds import Line
from secateurs.errors import BudgetError, ConfigError, choose
from secateurs.types import Budget, Counts, Plan, Scores, Threshold, WeightTarget

__all__ = ["allocate", "preview"]

SCALES = (
    "these are scores of single weights and of structure: give a budget in params, macs or both "
    'and method="multi_scale", which decides them together; or prune in two stages, each with its '
    "own budget or threshold"
)


def allocate(
    scores: Scores,
    asked: Budget | Threshold,
    *,
    method: str = "uniform",
    min_keep: int = 1,
    round_to: RoundTo = "auto",
    homogeneous: bool = False,
    null: Sequence[Scores] = (),
    sensitivity: Sensitivity | None = None,
    latency: Latency | None = None,
    sample: int | None = None,
    previous: Plan | None = None,
) -> Counts:
    """Units that each target keeps.

    A budget in `units` is met exactly: the total is the limit rounded down (unless `round_to` or
    `homogeneous` forbid it). One in `params`, `macs`, `bytes` or `latency_ms`, or in several of
    them, gives a model within all limits to which no single next step of any target can be added.
    Units removed earlier (score `-inf`) are never kept.

    Args:
        scores: larger = keep.
        asked: what may remain, or the rule of the cut.
        method: how a budget is distributed: "uniform" (the same fraction of every target),
            "uniform_plus" (the first layer whole, of the last at least 20 %), "erk" (densities from
            the shapes alone), "global" (the lowest scores go, wherever they are),
            "global_normalized" (the same after dividing by the root mean square of each target's
            scores), "lamp" (by s^2 over the squares that are not smaller), "density" (the same
            share of each target's total score stays), "sensitivity" (the smallest sum of measured
            drops) or "multi_scale" (scores of single weights and of structure under one budget in
            params, macs or both: the smallest sum of what is lost at all scales; for these the
            counts of weights are those kept in what remains, see `scales.allocate_scales`).
        min_keep: units that each target keeps at least, >= 1.
        round_to: keep multiples of this many units (or all that are left); an int for all targets,
            a mapping for some kinds. "auto": of 16 for families of at least 128 channels of a model
            on the CPU (below 16 any count), no rounding elsewhere. A budget stays a limit; counts
            of a threshold are rounded up.
        homogeneous: targets in the same place of repeated blocks (see `same_place`) keep equal
            counts, so that one configured size fits all blocks. Which units stay is still decided
            for each target. A ranking compares the mean of their best scores, of their second
            best, and so on; with a threshold the largest count of a class holds for all of it.
        null: scores on shuffled labels, from `secateurs.controls.null_scores`; for
            Threshold("permutation") only.
        sensitivity: measured curves of all targets, from `secateurs.sensitivity`; for
            method="sensitivity" only.
        latency: what widths cost on this machine, from `secateurs.latency.measure_table`; needed
            for Budget(latency_ms=...), and otherwise only for what is predicted.
        sample: rank by this many randomly drawn scores instead of all (always the same ones); for
            single weights with method "global" or "global_normalized" and a budget in units or
            params. Totals stay exact, but how they are spread over the targets is an estimate: the
            fraction f that the cut leaves has a standard error of sqrt(f (1 - f) / sample) before
            the total is put right. The result says so in `notes`.
        previous: what earlier cuts removed, as in `score` and `select`: structural units of targets
            that are not scored now cost nothing any more.

    Returns:
        `Counts` with what they leave of the dense model, and the predicted latency.

    Raises:
        ConfigError: an option out of range, weights and structure mixed, a budget in MACs or time
            for single weights, in time without a table, or in `metric_drop`, which must be tried.
        BudgetError: the budget cannot be reached (the least that can is named for each limit), or
            the threshold would leave too little.
    """
    choose(method, ALLOCATORS, "allocation method")
    if (method == "sensitivity") != (sensitivity is not None):
        raise ConfigError(
            NEEDS_CURVES
            if sensitivity is None
            else f"sensitivity= holds curves for method='sensitivity'; method={method!r} uses none"
        )
    if isinstance(asked, Threshold) and method != "uniform":
        raise ConfigError(
            f"method={method!r} distributes a budget; a threshold takes scope='target' or 'global'"
        )
    if mixes_scales(scores) and sample is None:
        check_options(min_keep, round_to, homogeneous)
        if method != "multi_scale" or null or not isinstance(asked, Budget):
            raise ConfigError(SCALES)
        return allocate_scales(
            scores, asked, min_keep=min_keep, round_to=round_to, homogeneous=homogeneous
        )
    notes = () if sample is None else (_check_sample(scores, asked, method, sample),)
    frame = make_frame(scores, min_keep, round_to, homogeneous, previous)
    if isinstance(asked, Threshold):
        decided, cuts = _cut(frame, asked, null_lines(scores, asked, null))
    elif null:
        raise ConfigError("null scores are for a threshold; a budget takes none: leave null away")
    else:
        decided = spend(
            frame, asked, method, sensitivity=sensitivity, latency=latency, sample=sample
        )
        cuts = {}
    kept = frame.expand(decided)
    if isinstance(asked, Budget):
        cuts = {name: frame.worst_kept(name, kept[name]) for name in kept}
    multiples = {n: frame.rounding[n].multiple for n in kept if frame.rounding[n].multiple > 1}
    return Counts(kept, asked, _realised(frame, kept, latency), cuts, multiples, notes)


def preview(
    scores: Scores,
    asked: Threshold,
    *,
    min_keep: int = 1,
    round_to: RoundTo = "auto",
    homogeneous: bool = False,
    null: Sequence[Scores] = (),
) -> Preview:
    """What a threshold would remove from each target, and where its cut lies among the scores.

    Nothing is removed, and what `allocate` would refuse is a row with a `problem` instead of an
    error.

    Args:
        scores, asked, min_keep, round_to, homogeneous, null: as in `allocate`.

    Returns:
        A `Preview`: `table()` for people, `to_dict()` for JSON.

    Raises:
        ConfigError: an option out of range, or a rule that cannot be applied to these scores.

    Example:
        >>> import torch
        >>> from secateurs.types import Graph, WeightTarget
        >>> graph = Graph({"fc.weight": WeightTarget("fc.weight", (1, 5))})
        >>> line = torch.tensor([1.0, 9.0, 2.0, 10.0, 11.0])
        >>> scores = Scores(graph, {"fc.weight": line}, "mine")
        >>> print(preview(scores, Threshold("otsu")).table())
        threshold otsu(log=False) per target, on scores of mine
        target     units  threshold  go  share  lowest  goes to  stays from  median  largest
        fc.weight      5          9   2  40.0%       1        2           9       9       11
        total          5              2  40.0%
    """
    frame = make_frame(scores, min_keep, round_to, homogeneous)
    found = find_cuts(frame.lines, asked, null_lines(scores, asked, null))
    decided, problems = _reached(frame, found)
    kept = frame.expand(decided)
    rows = []
    for name, line in frame.lines.items():
        n, stay = len(line), kept[name]
        rows.append(
            PreviewRow(
                target=name,
                kind=frame.graph.targets[name].kind,
                units=n,
                threshold=found[name].cut,
                goes=n - stay,
                lowest=float(line[-1]),
                median=float(np.median(line.astype(np.float64))),
                largest=float(line[0]),
                goes_to=float(line[stay]) if stay < n else None,
                stays_from=float(line[stay - 1]) if stay else None,
                problem=problems.get(name, ""),
            )
        )
    return Preview(asked.text, scores.criterion, tuple(rows))


def _check_sample(scores: Scores, asked: Budget | Threshold, method: str, sample: int) -> str:
    """What to say about a ranking by a sample.

    Raises:
        ConfigError: there is nothing to rank by a sample.
    """
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 1:
        raise ConfigError(f"sample must be a whole number of scores, at least 1, got {sample!r}")
    targets = [scores.graph.targets[n] for n in scores.values if n in scores.graph.targets]
    structure = [t.name for t in targets if not isinstance(t, WeightTarget)]
    if structure or not isinstance(asked, Budget) or not method.startswith("global"):
        raise ConfigError(
            'sample= is for single weights, a budget and method="global" or "global_normalized", '
            f"got method={method!r}"
            + (f" and units of {structure[0]}" if structure else "")
            + "; leave it away, everything else goes by all scores"
        )
    return f"how much each target keeps was estimated from a sample of {sample} scores"


def _realised(frame: Frame, kept: Mapping[str, int], latency: Latency | None) -> dict[str, float]:
    dense, cost = dense_sizes(frame), frame.curve(kept)
    left = {
        "units": sum(kept.values()),
        "params": cost.params,
        "macs": cost.macs,
        "bytes": cost.bytes,
    }
    realised = {q: left[q] / whole for q, whole in dense.items() if whole}
    if latency is not None:
        realised["latency_ms"] = latency.curve(frame.graph, frame.orders)(kept)
    return realised


def _cut(
    frame: Frame, asked: Threshold, nulls: Mapping[str, Line]
) -> tuple[Allocation, dict[str, float]]:
    """Counts of the scores that are not below the threshold, and the threshold of each target."""
    found = find_cuts(frame.lines, asked, nulls)
    decided, problems = _reached(frame, found)
    if problems:
        raise BudgetError(
            f"threshold {asked.rule!r} would leave too little. "
            + "; ".join(dict.fromkeys(problems.values()))
            + (". Raise fdr" if asked.needs_null else ". Lower the threshold")
            + ", or use a budget"
            + (" or scope='target'" if asked.scope == "global" else "")
        )
    return decided, {name: found[name].cut for name in frame.scores}


def _reached(frame: Frame, found: Mapping[str, Found]) -> tuple[Allocation, dict[str, str]]:
    """Counts of the scores that reach their cut, and what is wrong with those that are too few."""
    decided, problems = {}, {}
    for name, members in frame.classes.items():
        best = max(members, key=lambda t: found[t].reach)
        decided[name] = min(frame.high[name], frame.rounding[name].up(found[best].reach))
        if found[best].reach < frame.low[name]:
            line = frame.lines[best]
            problems[best] = found[best].why or (
                f"{best}: {found[best].reach} of {len(line)} units reach the threshold "
                f"{found[best].cut:.6g}, its largest score is {line[0]:.6g}, at least "
                f"{frame.low[name]} must stay"
            )
    return decided, problems
