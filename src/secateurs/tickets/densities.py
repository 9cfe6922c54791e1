"""How many units stay after each of several cuts that all remove the same share of what is left."""

from __future__ import annotations

from dataclasses import replace

from secateurs.allocation import allocate
from secateurs.types import Budget, Counts, Graph, Plan, Scores, Target, WeightTarget

__all__ = ["COLLAPSE", "counts_at", "emptied"]

COLLAPSE = "layer collapse"
"""What is said of a target that would have lost everything begins with it."""


def counts_at(
    scores: Scores,
    budget: Budget,
    step: int,
    steps: int,
    *,
    method: str = "global",
    min_keep: int = 1,
    previous: Plan | None = None,
) -> Counts:
    """Units to keep at a step of several whose densities fall exponentially to the budget.

    Of n units the budget keeps k; after `step` cuts n (k / n)^(step / steps) stay, rounded. The
    last step meets the budget itself.

    Args:
        scores: larger = keep.
        budget: what may remain in the end.
        step: from 1 to `steps`.
        steps: how many cuts there are.
        method, min_keep, previous: as in `allocate`.

    Raises:
        BudgetError, ConfigError: as `allocate`.

    Example:
        >>> import torch
        >>> graph = Graph({"w": WeightTarget("w", (4, 4))})
        >>> scores = Scores(graph, {"w": torch.arange(16.0)}, "mine")
        >>> [counts_at(scores, Budget(units=1), k, 4).kept["w"] for k in (1, 2, 3, 4)]
        [8, 4, 2, 1]
    """
    last = allocate(scores, budget, method=method, min_keep=min_keep, previous=previous)
    if step == steps:
        return last
    n = sum(line.numel() for line in scores.values.values())
    stay = max(sum(last.kept.values()), round(n * (sum(last.kept.values()) / n) ** (step / steps)))
    counts = allocate(
        scores, Budget(units=stay), method=method, min_keep=min_keep, round_to=1, previous=previous
    )
    return replace(counts, asked=budget)


def emptied(scores: Scores, counts: Counts, min_keep: int) -> dict[str, str]:
    """Targets that keep units only because `min_keep` says so, and what to say about them."""
    graph: Graph = scores.graph
    floor = {n for n, k in counts.kept.items() if k <= min_keep and k < graph.targets[n].n_units}
    cut = min((counts.thresholds[n] for n in counts.kept if n not in floor), default=float("inf"))
    return {
        name: (
            f"{COLLAPSE}: by its scores {_what(graph.targets[name])} would be empty, "
            f"min_keep={min_keep} leaves {counts.kept[name]} of {graph.targets[name].n_units}"
        )
        for name in floor
        if counts.thresholds[name] < cut
    }


def _what(target: Target) -> str:
    return "the layer" if isinstance(target, WeightTarget) else "the family"
