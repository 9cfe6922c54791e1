"""`allocate`: from scores and what is asked to counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateurs.allocation.cuts import Found, find_cuts, null_lines
from secateurs.allocation.frame import Frame, make_frame
from secateurs.allocation.previews import Preview, PreviewRow
from secateurs.allocation.problem import ALLOCATORS, Allocation
from secateurs.allocation.rounding import RoundTo
from secateurs.allocation.spending import spend
from secateurs.allocation.thresholds import Line
from secateurs.cost import dense_cost
from secateurs.errors import BudgetError, ConfigError, choose
from secateurs.types import Budget, Counts, Scores, Threshold

__all__ = ["allocate", "preview"]


def allocate(
    scores: Scores,
    asked: Budget | Threshold,
    *,
    method: str = "uniform",
    min_keep: int = 1,
    round_to: RoundTo = "auto",
    homogeneous: bool = False,
    null: Sequence[Scores] = (),
) -> Counts:
    """Units that each target keeps.

    A budget in `units` is met exactly: the total is the limit rounded down (unless `round_to` or
    `homogeneous` forbid it). One in `params` or `macs` gives a model within the limit to which no
    single next step of any target can be added. Units removed earlier (score `-inf`) are never
    kept.

    Args:
        scores: larger = keep.
        asked: what may remain, or the rule of the cut.
        method: how a budget is distributed: "uniform" (the same fraction of every target), "global"
            (the lowest scores go, wherever they are) or "global_normalized" (the same after
            dividing by the root mean square of each target's scores).
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

    Returns:
        `Counts` with what they leave of the dense model.

    Raises:
        ConfigError: an option out of range, weights and structure mixed, or a budget in MACs for
            single weights.
        BudgetError: the budget cannot be reached, or the threshold would leave too little.
    """
    choose(method, ALLOCATORS, "allocation method")
    if isinstance(asked, Threshold) and method != "uniform":
        raise ConfigError(
            f"method={method!r} distributes a budget; a threshold takes scope='target' or 'global'"
        )
    frame = make_frame(scores, min_keep, round_to, homogeneous)
    if isinstance(asked, Threshold):
        decided, cuts = _cut(frame, asked, null_lines(scores, asked, null))
    elif null:
        raise ConfigError("null scores are for a threshold; a budget takes none: leave null away")
    else:
        decided = spend(frame, asked, method)
        cuts = {}
    kept = frame.expand(decided)
    if isinstance(asked, Budget):
        cuts = {name: float(frame.lines[name][kept[name] - 1]) for name in kept}
    multiples = {n: frame.rounding[n].multiple for n in kept if frame.rounding[n].multiple > 1}
    return Counts(kept, asked, _realised(frame, kept), cuts, multiples)


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


def _realised(frame: Frame, kept: Mapping[str, int]) -> dict[str, float]:
    dense, cost = dense_cost(frame.graph), frame.curve(kept)
    realised = {"units": sum(kept.values()) / sum(len(o) for o in frame.orders.values())}
    if dense.params:
        realised["params"] = cost.params / dense.params
    if dense.macs:
        realised["macs"] = cost.macs / dense.macs
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
    return decided, {name: found[name].cut for name in frame.orders}


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
