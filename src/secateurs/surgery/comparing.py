"""How far two lists of tensors are apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["relative_error"]


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    """max|a - b| / (1 + max|a|) over pairs of tensors; infinity where one is not finite alone."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel() == 0:
            continue
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return float("inf")
            continue
        both = (torch.isfinite(x) & torch.isfinite(y)) | (x == y) | (x.isnan() & y.isnan())
        if not bool(both.all()):
            return float("inf")
        finite = torch.isfinite(x)
        if finite.any():
            gap = (x[finite] - y[finite]).abs().max() / (1 + x[finite].abs().max())
            worst = max(worst, float(gap))
    return worst
