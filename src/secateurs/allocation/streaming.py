"""A ranking of single weights without sorting them: one cut through all scores.

Gives what `by_rank` gives where a limit counts weights one by one; see `secateurs.kth`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secateurs.allocation.demand import OnDemand
from secateurs.allocation.problem import Allocation, Limit, Problem
from secateurs.allocation.shares import by_share
from secateurs.errors import ConfigError
from secateurs.kth import about_kth_largest, kth_largest

__all__ = ["by_cut", "normalized", "streams"]

PIECE = 1 << 20


def streams(p: Problem) -> bool:
    """Whether every decision is about single weights and every limit counts them one by one.

    Raises:
        ConfigError: not so, and a sample was asked for.
    """
    rounded = any(p.rounding[name].multiple > 1 for name in p.names)
    one_by_one = bool(p.scores) and not rounded and all(_counts(p, x) for x in p.limits)
    if p.sample is not None and not one_by_one:
        raise ConfigError(
            "sample= is for a ranking of single weights with a budget in units or params, without "
            "round_to and homogeneous; leave it away here"
        )
    return one_by_one


def _counts(p: Problem, limit: Limit) -> bool:
    """Whether each weight of any target adds one to a limit."""
    if limit.quantity not in ("units", "params"):
        return False
    least = limit.cost(p.low)
    return all(
        limit.cost({**p.low, name: p.high[name]}) - least == p.high[name] - p.low[name]
        for name in p.names
    )


def by_cut(p: Problem, scores: Mapping[str, Tensor]) -> Allocation:
    """The largest scores of all targets, as many as the limits allow; of each at least its fewest.

    Of equal scores the earlier target's stay. A target whose fewest weights are more than its share
    leaves the ranking with them, and the rest is ranked again. With a sample the cut is an
    estimate, and the counts that it gives are stretched to the limits, so that they still are met
    exactly.

    Args:
        p: a problem that `streams`.
        scores: (n_units,) of each name.
    """
    total = sum(p.low.values()) + math.floor(
        min(limit.most - limit.cost(p.low) for limit in p.limits)
    )
    if p.sample is not None:
        return _about(p, scores, total, p.sample)
    kept = dict(p.low)
    ranked = list(p.names)
    while True:
        count = total - sum(kept[name] for name in p.names if name not in ranked)
        found = kth_largest(OnDemand(ranked, scores.__getitem__), count).kept
        short = [name for name in ranked if found[name] < p.low[name]]
        if not short:
            return {**kept, **found}
        ranked = [name for name in ranked if name not in short]


def _about(p: Problem, scores: Mapping[str, Tensor], total: int, sample: int) -> Allocation:
    """The counts of an estimated cut, stretched until the limits are met."""
    found = about_kth_largest(scores, total, sample=sample).kept

    def share(name: str, t: float) -> float:
        if t <= 0.5:
            return 2 * t * found[name]
        return found[name] + (2 * t - 1) * (p.high[name] - found[name])

    return by_share(p, share)


def normalized(scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Scores over the root mean square of those that are left, made when they are read."""
    scales = {name: _root_mean_square(line) or 1.0 for name, line in scores.items()}

    def over_scale(name: str) -> Tensor:
        tiny = scales[name] < torch.finfo(torch.float32).tiny  # would be 0 in single precision
        line = scores[name].double() if tiny else scores[name].float()
        return (line / scales[name]).float()

    return OnDemand(scores, over_scale)


def _root_mean_square(line: Tensor) -> float:
    total, n = 0.0, 0
    for piece in torch.split(line, PIECE):
        left = piece[piece > -math.inf].double()
        total += float(left.square().sum())
        n += len(left)
    return math.sqrt(total / n)
