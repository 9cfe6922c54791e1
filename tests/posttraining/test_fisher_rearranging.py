"""Rearranged masks, against all masks with as many units."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from secateurs.errors import ConfigError
from secateurs.posttraining.fisher_gates import GateFisher
from secateurs.posttraining.rearranging import rearrange, shrinkage


def random_rows(seed: int, n: int = 40, units: int = 10) -> Tensor:
    """Units that share three causes."""
    draw = torch.Generator().manual_seed(seed)
    causes = torch.randn(n, 3, generator=draw, dtype=torch.float64)
    mixed = causes @ torch.randn(3, units, generator=draw, dtype=torch.float64)
    return mixed + 0.2 * torch.randn(n, units, generator=draw, dtype=torch.float64)


def lost_by_all(rows: Tensor, n_gone: int, shrink: float) -> list[float]:
    """The objective of every mask with so many removed units, from the block itself."""
    block = rows.T @ rows / len(rows)
    block = (1 - shrink) * block + shrink * torch.diag(block.diagonal())
    return [
        float(block[list(g)][:, list(g)].sum()) for g in combinations(range(len(block)), n_gone)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_near_the_best_of_all_masks_and_no_swap_wins(seed: int, shrink: float) -> None:
    rows = random_rows(seed)
    fisher = GateFisher({"fc": rows})
    keep = rearrange(fisher, {"fc": 6}, shrink=shrink)["fc"]
    assert int(keep.sum()) == 6
    block = fisher.block("fc")
    block = (1 - shrink) * block + shrink * torch.diag(block.diagonal())

    def lost(mask: Tensor) -> float:
        gone = (~mask).double()
        return float(gone @ block @ gone)

    every = lost_by_all(rows, 4, shrink)
    diagonal = torch.ones(10, dtype=torch.bool)
    diagonal[fisher.diagonal("fc").argsort()[:4]] = False
    assert min(every) - 1e-12 <= lost(keep) <= lost(diagonal)
    # Within a twentieth of the way from the best mask to the average one.
    assert lost(keep) - min(every) <= 0.05 * (sum(every) / len(every) - min(every))
    for out in keep.nonzero().reshape(-1).tolist():
        for back in (~keep).nonzero().reshape(-1).tolist():
            swapped = keep.clone()
            swapped[out], swapped[back] = False, True
            assert lost(swapped) >= lost(keep) - 1e-9


def test_the_diagonal_alone_is_far_from_the_best() -> None:
    """The check above is not empty: without swaps some seed is beyond its gap."""
    far = []
    for seed in range(5):
        rows = random_rows(seed)
        fisher = GateFisher({"fc": rows})
        gone = torch.zeros(10, dtype=torch.bool)
        gone[fisher.diagonal("fc").argsort()[:4]] = True
        every = lost_by_all(rows, 4, 0.0)
        gap = fisher.lost("fc", gone) - min(every)
        far.append(gap > 0.05 * (sum(every) / len(every) - min(every)))
    assert any(far)


def test_full_shrinkage_keeps_the_diagonal() -> None:
    rows = random_rows(1)
    fisher = GateFisher({"fc": rows})
    keep = rearrange(fisher, {"fc": 4}, shrink=1.0)["fc"]
    assert set(keep.nonzero().reshape(-1).tolist()) == set(
        fisher.diagonal("fc").argsort(descending=True)[:4].tolist()
    )


def test_shrinkage_is_the_textbook_sum_of_variances() -> None:
    rows = random_rows(3, n=30, units=4)
    products = rows[:, :, None] * rows[:, None, :]  # (n, units, units)
    beside = ~torch.eye(4, dtype=torch.bool)
    variance = products.var(0, unbiased=True) / len(rows)
    expected = float(variance[beside].sum() / products.mean(0)[beside].square().sum())
    assert shrinkage(rows) == pytest.approx(min(1.0, expected))
    assert shrinkage(torch.randn(1, 3)) == 1.0
    assert shrinkage(torch.zeros(4, 3)) == 1.0


def test_extremes_and_misfits() -> None:
    fisher = GateFisher({"fc": random_rows(0)})
    assert rearrange(fisher, {"fc": 10})["fc"].all()
    assert not rearrange(fisher, {"fc": 0})["fc"].any()
    with pytest.raises(ConfigError, match="has 10 units, it cannot keep 11"):
        rearrange(fisher, {"fc": 11})
    with pytest.raises(ConfigError, match="shrink must be in"):
        rearrange(fisher, {"fc": 1}, shrink=1.5)
    with pytest.raises(ConfigError, match="target of the Fisher information"):
        rearrange(fisher, {"fx": 1})
