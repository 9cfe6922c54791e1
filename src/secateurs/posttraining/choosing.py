"""Which weights of one layer stay, by its weights and the second moments of its inputs.

    cutter(weight, gram, left, keep) -> new weight, mask

All are (groups, out, in), in float64 on the CPU. `left` is what may be kept, `keep` how many stay
in all; counts are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from secateurs.errors import ConfigError, choose
from secateurs.selection import order_of

__all__ = [
    "BLOCK",
    "DAMPING",
    "Cutter",
    "Method",
    "by_magnitude",
    "check_layerwise",
    "cutter_of",
    "sparsegpt",
    "split",
    "wanda_mask",
]

Method = Literal["sparsegpt", "wanda", "magnitude"]
BLOCK = 128
"""Columns of which "sparsegpt" chooses together."""
DAMPING = 0.01
"""Added to the diagonal of the second moments, in units of its mean."""


def check_layerwise(method: str, block: int, damping: float) -> None:
    """Raise unless the options of `prune_layerwise` are in range, and each of them is read.

    Raises:
        ConfigError: what is wrong.
    """
    choose(method, get_args(Method), "method of prune_layerwise")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ConfigError(f"block must be a whole number, at least 1, got {block!r}")
    number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if not number or not 0 < damping < math.inf:
        raise ConfigError(f"damping must be a number above 0, got {damping!r}")
    for name, value, default in (("block", block, BLOCK), ("damping", damping, DAMPING)):
        if method != "sparsegpt" and value != default:
            raise ConfigError(
                f"{name}= is of method='sparsegpt', and method={method!r}: leave it away"
            )


Cutter = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(weight, gram, left, how many to keep) -> new weight and mask; all by groups, float64."""


def cutter_of(method: Method, block: int, damping: float) -> Cutter:
    """The function of a method."""

    def by_sparsegpt(w: Tensor, h: Tensor, left: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        return sparsegpt(w, h, left, keep, block=block, damping=damping)

    def by_wanda(w: Tensor, h: Tensor, left: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        mask = wanda_mask(w, h, left, keep)
        return w.masked_fill(~mask, 0), mask

    return {"sparsegpt": by_sparsegpt, "wanda": by_wanda, "magnitude": by_magnitude}[method]


def by_magnitude(w: Tensor, h: Tensor, left: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The largest |w| of the layer; nothing is changed that stays."""
    mask = _best(w.abs().masked_fill(~left, -1), keep)
    return w.masked_fill(~mask, 0), mask


def _best(scores: Tensor, keep: int) -> Tensor:
    """Bool: the `keep` largest of all; of equal ones the first."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order_of(scores.reshape(-1))[:keep]] = True
    return mask.view(scores.shape)


def split(count: int, left: Sequence[int]) -> list[int]:
    """Shares of a count in proportion to what is left; where it suffices none gets nothing.

    Example:
        >>> split(5, [4, 4, 4]), split(3, [90, 5, 5]), split(1, [2, 2])
        ([2, 2, 1], [1, 1, 1], [1, 0])
    """
    total = sum(left)
    if not 0 <= count <= total:
        raise ConfigError(f"{count} weights cannot stay of {total} that are left")
    shares = [count * n // max(1, total) for n in left]
    order = sorted(range(len(left)), key=lambda i: -(count * left[i] % max(1, total)))
    for i in order[: count - sum(shares)]:
        shares[i] += 1
    for i, n in enumerate(left):
        most = max(range(len(left)), key=lambda j: shares[j])
        if n and not shares[i] and shares[most] > 1:
            shares[i], shares[most] = 1, shares[most] - 1
    return shares


def wanda_mask(weight: Tensor, gram: Tensor, left: Tensor, keep: int) -> Tensor:
    """(groups, out, in) bool: in each row the largest |w| ||x_j||, `keep` in all.

    Every row keeps the same share of what it has left, rounded down; what the rounding leaves over
    goes to the rows whose next weight scores highest.

    Args:
        weight: (groups, out, in) float64.
        gram: (groups, in, in), sum of x x'.
        left: (groups, out, in) bool, what may be kept.
        keep: weights that stay, in all.

    Example:
        >>> w, eye = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]]), torch.eye(3)[None]
        >>> wanda_mask(w, eye, torch.ones(1, 2, 3, dtype=torch.bool), 3).int().tolist()
        [[[0, 1, 1], [1, 0, 0]]]
    """
    norm = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # (groups, in)
    scores = (weight.abs() * norm[:, None]).masked_fill(~left, -1).flatten(0, 1)  # (rows, in)
    n_left = left.flatten(0, 1).sum(1)
    share = n_left * keep // max(1, int(n_left.sum()))
    ordered = torch.sort(scores, dim=1, descending=True, stable=True)
    more = keep - int(share.sum())
    if more:
        at = share.clamp(max=scores.shape[1] - 1)[:, None]
        following = ordered.values.gather(1, at)[:, 0].masked_fill(share >= n_left, -2)
        share = share + _best(following, more)
    ranks = torch.arange(scores.shape[1])[None] < share[:, None]
    return torch.zeros_like(left.flatten(0, 1)).scatter_(1, ordered.indices, ranks).view(left.shape)


def sparsegpt(
    weight: Tensor, gram: Tensor, left: Tensor, keep: int, *, block: int, damping: float
) -> tuple[Tensor, Tensor]:
    """New weights and their mask: columns in order, errors fed to those on the right.

    Args:
        weight: (groups, out, in) float64.
        gram: (groups, in, in) float64, sum of x x'.
        left: (groups, out, in) bool, what may be kept; weights elsewhere are zero.
        keep: weights that stay, in all; each block keeps its share.
        block: columns of which masks are chosen together.
        damping: in units of the mean diagonal.

    Example:
        >>> h = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]).double()
        >>> w, whole = torch.tensor([[[1.0, 5.0]]]).double(), torch.ones(1, 1, 2, dtype=torch.bool)
        >>> new, mask = sparsegpt(w, h, whole, 1, block=2, damping=1e-12)
        >>> new.round().tolist(), mask.tolist()
        ([[[0.0, 6.0]]], [[[False, True]]])
    """
    n_in = weight.shape[2]
    level = gram.diagonal(dim1=1, dim2=2).mean(1)  # (groups,)
    level = torch.where(level > 0, level * damping, 1.0)
    damped = gram + torch.diag_embed(level[:, None].expand(-1, n_in))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(
        inverse, upper=True
    )  # row j: the inverse once j is the first left
    work, mask = weight.clone(), torch.zeros_like(left)
    total, seen, kept = int(left.sum()), 0, 0
    for low in range(0, n_in, block):
        high = min(low + block, n_in)
        scale = upper.diagonal(dim1=1, dim2=2)[:, None, low:high]
        mine = left[:, :, low:high]
        seen += int(mine.sum())
        share = (keep * seen + total // 2) // max(1, total) - kept
        kept += share
        score = (work[:, :, low:high] / scale).square().masked_fill(~mine, -1)
        mask[:, :, low:high] = _best(score, share)
        errors = torch.zeros_like(score)
        for j in range(low, high):
            lost = work[:, :, j].masked_fill(mask[:, :, j], 0) / upper[:, j, j, None]
            work[:, :, j:high] -= lost[:, :, None] * upper[:, j, None, j:high]
            errors[:, :, j - low] = lost
        work[:, :, high:] -= errors @ upper[:, low:high, high:]
    return work.masked_fill(~mask, 0), mask
