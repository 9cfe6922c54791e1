"""Which of the searched settings mattered: how much of the differences each one explains."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateurs.searching.results import Standing

__all__ = ["Effect", "effects"]

BINS = 4
"""A setting with more values than groups can hold is divided into this many, by rank."""
MANY = 8


@dataclass(frozen=True)
class Effect:
    """What one setting explains.

    Attributes:
        key: of the recipe.
        share: in [0, 1], of the variance of the drops between candidates: the variance between the
            mean drops of its groups, weighted by their sizes, over that of all candidates.
        groups: (value or range in words, mean drop, candidates), by ascending drop.
    """

    key: str
    share: float
    groups: tuple[tuple[str, float, int], ...]


def effects(standings: Sequence[Standing]) -> list[Effect]:
    """Settings by how much they explain, the most first; those with one value are left out.

    Each setting is looked at alone. In a grid the shares add up to at most one; where settings
    were drawn at random, few candidates can make one look important by chance.

    Example:
        >>> from secateurs.searching.results import Candidate
        >>> rows = [Standing(Candidate(i, {"a": a, "b": b}), drop=d) for i, (a, b, d) in
        ...         enumerate([(1, "x", 0.0), (1, "y", 0.0), (2, "x", 0.4), (2, "y", 0.4)])]
        >>> [(e.key, e.share) for e in effects(rows)]
        [('a', 1.0), ('b', 0.0)]
    """
    known = [s for s in standings if s.judged and s.drop is not None]
    drops = [s.drop or 0.0 for s in known]
    if len(known) < 3:
        return []
    mean, total = statistics.fmean(drops), statistics.pvariance(drops)
    found = []
    for key in dict.fromkeys(k for s in known for k in s.candidate.values):
        groups = _groups([s.candidate.values.get(key) for s in known], drops)
        if len(groups) < 2:
            continue
        means = [(name, statistics.fmean(part), len(part)) for name, part in groups]
        between = sum(n * (m - mean) ** 2 for _, m, n in means) / len(drops)
        share = min(1.0, between / total) if total > 0 else 0.0
        found.append(Effect(key, share, tuple(sorted(means, key=lambda g: g[1]))))
    return sorted(found, key=lambda e: -e.share)


def _groups(values: Sequence[Any], drops: Sequence[float]) -> list[tuple[str, list[float]]]:
    """The drops by value; by quarters of the values where these are many numbers."""
    texts = {json.dumps(v, sort_keys=True): v for v in values}
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if numeric and len(texts) > MANY:
        order = sorted(range(len(values)), key=lambda i: values[i])
        size = len(order) / BINS
        parts = [order[round(i * size) : round((i + 1) * size)] for i in range(BINS)]
        return [
            (f"{values[p[0]]:.3g} to {values[p[-1]]:.3g}", [drops[i] for i in p])
            for p in parts if p
        ]  # fmt: skip
    by: dict[str, list[float]] = {}
    for value, drop in zip(values, drops, strict=True):
        by.setdefault(json.dumps(value, sort_keys=True), []).append(drop)
    return [(_text(texts[k]), part) for k, part in by.items()]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
