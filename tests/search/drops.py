"""Trials with given drops, for the tests of the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateurs.searching.config import Candidate, Search
from secateurs.searching.results import FoldResult, Trial


def trial(
    number: int, drops: Sequence[float], macs: float, *, dense: float = 0.9, samples: int = 0,
    share: bool = False, latency: float | None = None, problem: str = "", **values: Any,
) -> Trial:  # fmt: skip
    """A candidate whose networks lose `drops` against `dense`, fold by fold."""
    folds = tuple(
        FoldResult(i, dense, dense - d, {"macs": macs, "bytes": macs}, latency, 1.0, samples, share)
        for i, d in enumerate(drops)
    )
    return Trial(Candidate(number, {"budget.macs": macs, **values}), folds, problem)


def asked(**options: Any) -> Search:
    """A search of some size; its space does not matter here."""
    return Search({"budget.macs": [0.5, 0.25]}, **{"max_drop": 0.02, "confidence": 0.9, **options})
