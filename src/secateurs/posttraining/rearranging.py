"""Which units of a target go, when how many do is settled: those that make up for each other.

The diagonal of the Fisher information looks at every unit by itself. Its block for one target also
knows that two units that do the same are both needed a little, and one of them a lot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateurs.errors import ConfigError, choose
from secateurs.posttraining.fisher_gates import GateFisher

__all__ = ["check_shrink", "rearrange", "shrinkage"]

GAIN = 1e-9
"""A swap must win more than this share of the importance of what it swaps: no endless rounding."""


def rearrange(
    fisher: GateFisher,
    kept: Mapping[str, int],
    *,
    shrink: float | None = None,
    max_rounds: int = 20,
) -> dict[str, Tensor]:
    """For each target (n_units,) bool, True = keep, with as many kept units as asked.

    Begins with the units of the largest diagonal. Then each removed unit in turn changes places
    with the kept unit that makes gone' I gone smallest, until no such swap wins anything (Kwon et
    al., 2022, arXiv:2204.09656, minimise the same; their greedy pass stops earlier).

    Args:
        fisher: from `gate_fisher`.
        kept: target -> units that stay; other targets are left out.
        shrink: in [0, 1]: how much of what is beside the diagonal of I is taken away; 1 leaves the
            diagonal, and so nothing to rearrange. With fewer samples than units I has no full rank,
            and what it says beyond its diagonal is partly chance. None: see `shrinkage`.
        max_rounds: passes over the removed units at most.

    Raises:
        ConfigError: an option or a count out of range, or an unknown target.

    Example:
        >>> rows = torch.tensor([[1.0, -1.1, 0.5], [1.0, -1.1, 0.6]])
        >>> rearrange(GateFisher({"fc": rows}), {"fc": 1}, shrink=0.0)  # the first two cancel
        {'fc': tensor([False, False,  True])}
    """
    check_shrink(shrink)
    found = {}
    for name, count in kept.items():
        choose(name, fisher.rows, "target of the Fisher information")
        n = fisher.rows[name].shape[1]
        if not 0 <= count <= n:
            raise ConfigError(f"{name} has {n} units, it cannot keep {count}")
        stays = torch.zeros(n, dtype=torch.bool)
        best_first = torch.sort(fisher.diagonal(name), descending=True, stable=True).indices
        stays[best_first[:count]] = True
        share = shrinkage(fisher.rows[name]) if shrink is None else shrink
        found[name] = _swapped(fisher.block(name), stays, share, max_rounds)
    return found


def check_shrink(shrink: float | None) -> None:
    """Raise unless it is None or a share.

    Raises:
        ConfigError: it is out of range.
    """
    if shrink is not None and (
        isinstance(shrink, bool) or not isinstance(shrink, (int, float)) or not 0 <= shrink <= 1
    ):
        raise ConfigError(f"shrink must be in [0, 1], got {shrink!r}")


def shrinkage(rows: Tensor) -> float:
    """The share by which the products of a block are best shrunk to 0, from how much they vary.

    Sum of the variances of the products i != j over the sum of their squares, at most 1 (Schäfer
    and Strimmer, A Shrinkage Approach to Large-Scale Covariance Matrix Estimation, 2005).

    Args:
        rows: (n_samples, n_units).

    Example:
        >>> shrinkage(torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]))  # no sample differs
        0.0
        >>> shrinkage(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))  # nothing in common but chance
        1.0
    """
    rows = rows.double()
    n, squares = len(rows), rows.square()
    if n < 2:
        return 1.0
    block = rows.T @ rows / n
    beside = float(block.square().sum() - block.diagonal().square().sum())
    both = float((squares.sum(1).square() - squares.square().sum(1)).mean())
    if beside <= 0.0:
        return 1.0
    return min(1.0, max(0.0, (both - beside) / ((n - 1) * beside)))


def _swapped(block: Tensor, stays: Tensor, shrink: float, max_rounds: int) -> Tensor:
    """The same number of kept units, at a minimum in which no single swap wins."""
    if stays.all() or not stays.any():
        return stays
    diagonal = block.diagonal().clone()
    block = (1.0 - shrink) * block
    stays = stays.clone()
    for _ in range(max_rounds):
        swapped = False
        total = block[:, ~stays].sum(1)  # (n_units,) anew in each round: no rounding piles up
        for unit in (~stays).nonzero().reshape(-1).tolist():
            total -= block[unit]
            # What each unit would add, were it to go in the place of this one.
            adds = 2.0 * total + diagonal
            other = int(adds.masked_fill(~stays, float("inf")).argmin())
            if adds[other] < adds[unit] - GAIN * (diagonal[other] + diagonal[unit]):
                stays[unit], stays[other] = True, False
                swapped, unit = True, other
            total += block[unit]
        if not swapped:
            break
    return stays
