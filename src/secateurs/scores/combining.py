"""One score from several: rank fusion, weighted sums, products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from secateurs.errors import ConfigError, ScoringError, choose
from secateurs.scores.units import GONE, aligned, labelled, ranks
from secateurs.types import Scores

__all__ = ["combine"]


def _rank_term(line: Tensor) -> Tensor:
    return ranks(line) / len(line)


def _sum_term(line: Tensor) -> Tensor:
    return line.double() / line.double().abs().mean()


def _product_term(line: Tensor) -> Tensor:
    return line.double().log()


_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": _rank_term,
    "sum": _sum_term,
    "product": _product_term,
}


def combine(
    scores: Sequence[Scores] | Mapping[str, Scores],
    how: Literal["rank", "sum", "product"] = "rank",
    weights: Sequence[float] | None = None,
) -> Scores:
    """One score from several of the same units: larger = keep.

        rank:    sum_c w_c rank_c(unit) / (n_units sum_c w_c)      in (0, 1]
        sum:     sum_c w_c s_c(unit) / mean |s_c|
        product: (prod_c s_c(unit)^w_c)^(1 / sum_c w_c)

    Ranks run from 1 (goes first) to n_units over all targets together, as allocation "global"
    compares them; equal scores share the mean of their ranks. The mean of `sum` is one figure for
    the whole network, so that the differences between targets stay those of each criterion. A
    product needs no normalisation: a factor changes nothing but the scale.

    A unit removed earlier in any of the scores is `-inf`. Choose "rank" for criteria of different
    units and tails, "sum" when the distances mean something, "product" when a unit must matter to
    all of them: one zero makes the product zero.

    Args:
        scores: two or more, with the same targets; the keys of a mapping, as from `score` with
            several criteria, are the labels.
        how: "rank", "sum" or "product".
        weights: one for each of the scores, finite, not negative, not all zero; None for equal.

    Returns:
        `Scores` with a label such as "sum(0.7*taylor, 0.3*magnitude)"; `n_samples` is the smallest
        of those criteria that saw data.

    Raises:
        ConfigError: fewer than two scores, other targets, wrong weights, a negative score in a
            product, or a score that is zero for every unit in a sum or product.
        ScoringError: a score is nan or inf, or would become it.

    Example:
        >>> from secateurs.types import Graph, WeightTarget
        >>> graph = Graph({"fc.weight": WeightTarget("fc.weight", (1, 3))})
        >>> lines = {"taylor": [1.0, 2.0, 3.0], "magnitude": [9.0, 1.0, 5.0]}
        >>> given = [Scores(graph, {"fc.weight": torch.tensor(x)}, n) for n, x in lines.items()]
        >>> both = combine(given, "product")
        >>> both.criterion, both.values["fc.weight"]
        ('product(taylor, magnitude)', tensor([3.0000, 1.4142, 3.8730]))
    """
    choose(how, _TERMS, "how")
    labels, parts = labelled(scores, "combine")
    factors = _weights(weights, len(parts))
    found = aligned(labels, parts)
    notes = [f"{label}: {note}" for label, s in zip(labels, parts, strict=True) for note in s.notes]
    total = torch.zeros(len(found.lines[0]), dtype=torch.float64)
    for label, factor, line in zip(labels, factors, found.lines, strict=True):
        _check_part(label, line, how)
        if bool((line == line[0]).all()):
            notes.append(f"{label}: the same score for every unit, it decides nothing")
        if factor:
            total += factor * _TERMS[how](line)
    if how != "sum":
        total /= sum(factors)
    result = torch.full((len(found.alive),), GONE)
    result[found.alive] = (total.exp() if how == "product" else total).float()
    if not bool(result[found.alive].isfinite().all()):
        raise ScoringError("the combined score leaves the range of float32; use smaller weights")
    named = [f"{w:g}*{label}" for w, label in zip(factors, labels, strict=True)]
    return Scores(
        graph=parts[0].graph,
        values=dict(zip(found.names, torch.split(result, list(found.sizes)), strict=True)),
        criterion=f"{how}({', '.join(labels if weights is None else named)})",
        notes=tuple(dict.fromkeys([*found.notes, *notes])),
        n_samples=min((s.n_samples for s in parts if s.n_samples), default=0),
        not_scored={name: why for s in reversed(parts) for name, why in s.not_scored.items()},
    )


def _weights(weights: Sequence[float] | None, n: int) -> list[float]:
    if weights is None:
        return [1.0] * n
    given = [float(w) for w in weights]
    if len(given) != n:
        raise ConfigError(f"weights must be one for each of the {n} scores, got {len(given)}")
    if not all(math.isfinite(w) and w >= 0 for w in given) or not any(given):
        shown = ", ".join(f"{w:g}" for w in given)
        raise ConfigError(f"weights must be finite, not negative and not all zero, got {shown}")
    return given


def _check_part(label: str, line: Tensor, how: str) -> None:
    if how == "product" and bool((line < 0).any()):
        raise ConfigError(
            f"a product needs scores that are not negative; {label} goes down to "
            f'{float(line.min()):.4g}. Use how="rank" or "sum", or a criterion that ends in an '
            "absolute value or a square"
        )
    if how != "rank" and not bool(line.any()):
        raise ConfigError(f"{label} scores every unit 0, so a {how} says nothing; leave it out")
