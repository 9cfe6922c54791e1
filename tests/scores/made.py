"""Scores made by hand, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from secateurs.types import Scores

from ..graphs import units_graph

INF = float("inf")
quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)
some = st.floats(-1000, 1000, width=32)
whole = st.integers(-50, 50).map(float)


def scored(lines: Mapping[str, Sequence[float]], criterion: str = "taylor", **more: Any) -> Scores:
    """Scores of channels, target -> one score for each unit."""
    graph = units_graph({name: len(line) for name, line in lines.items()})
    values = {name: torch.tensor(line, dtype=torch.float32) for name, line in lines.items()}
    return Scores(graph, values, criterion, **more)


def flat(scores: Scores) -> list[float]:
    return torch.cat(list(scores.values.values())).tolist()


def same(a: Scores, b: Scores) -> bool:
    """Bit by bit, and in the same order."""
    facts = [
        (s.criterion, s.notes, s.n_samples, dict(s.not_scored), list(s.values)) for s in (a, b)
    ]
    return facts[0] == facts[1] and all(
        torch.equal(v.view(torch.int32), b.values[n].view(torch.int32)) for n, v in a.values.items()
    )
