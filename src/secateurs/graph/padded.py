"""Operators in which removed entries still count, as the zeros that they are in the masked model.

A layer norm over 64 features of which 16 were removed divides by 64: with `n` entries present,
`N = n_dense` and x zero where removed,

    mean = sum(x) / N        var = (sum((x - mean)^2) + (N - n) mean^2) / N

which is what the masked model computes, exactly. The operators are registered as
`torch.ops.secateurs.*`, composed of plain ones: a capture sees them whole, autograd and exporters
see what they are made of. The captured graph of a shrunk model calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = [
    "kept_share",
    "padded_group_norm",
    "padded_layer_norm",
    "padded_rms_norm",
    "padded_var",
    "padded_var_mean",
]


def _moments(x: Tensor, dims: list[int], n_dense: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations over `dims`, as if there were `n_dense` entries."""
    n = prod(x.shape[d] for d in dims)
    mean = x.sum(dims, keepdim=True) / n_dense
    squares = (x - mean).square().sum(dims, keepdim=True) + (n_dense - n) * mean.square()
    return mean, squares


def _wide(x: Tensor) -> Tensor:
    """Low precisions are summed in float32, as the plain norms do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def padded_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    n_dense: int,
) -> Tensor:
    """Layer norm over the last dims, whose dense size was `n_dense` entries.

    Example:
        >>> x, zero = torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 1)
        >>> dense = torch.nn.functional.layer_norm(torch.cat([x, zero], 1), [4])
        >>> torch.allclose(padded_layer_norm(x, [3], None, None, 1e-5, 4), dense[:, :3])
        True
    """
    wide = _wide(x)
    mean, squares = _moments(wide, list(range(-len(normalized_shape), 0)), n_dense)
    out = ((wide - mean) * torch.rsqrt(squares / n_dense + eps)).to(x.dtype)
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def padded_rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    n_dense: int,
) -> Tensor:
    """RMS norm over the last dims, whose dense size was `n_dense` entries."""
    wide = _wide(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    squares = wide.square().sum(list(range(-len(normalized_shape), 0)), keepdim=True)
    out = (wide * torch.rsqrt(squares / n_dense + eps)).to(x.dtype)
    return out if weight is None else out * weight


def padded_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    n_dense: int,
) -> Tensor:
    """Group norm in which each group had `n_dense` channels."""
    wide = _wide(x).reshape(x.shape[0], num_groups, x.shape[1] // num_groups, -1)  # (b, g, c, s)
    mean, squares = _moments(wide, [2, 3], n_dense * wide.shape[3])
    scale = torch.rsqrt(squares / (n_dense * wide.shape[3]) + eps)
    out = ((wide - mean) * scale).reshape(x.shape).to(x.dtype)
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    if weight is not None:
        out = out * weight.reshape(per_channel)
    return out if bias is None else out + bias.reshape(per_channel)


def padded_var(
    x: Tensor, dim: Sequence[int], correction: float, keepdim: bool, n_kept: int, n_dense: int
) -> Tensor:
    """Variance over `dim`, of whose entries `n_kept` in `n_dense` stayed."""
    return padded_var_mean(x, dim, correction, keepdim, n_kept, n_dense)[0]


def padded_var_mean(
    x: Tensor, dim: Sequence[int], correction: float, keepdim: bool, n_kept: int, n_dense: int
) -> tuple[Tensor, Tensor]:
    """Variance and mean over `dim`, of whose entries `n_kept` in `n_dense` stayed."""
    dims = [d % x.dim() for d in dim]
    dense = prod(x.shape[d] for d in dims) * n_dense // n_kept
    mean, squares = _moments(x, dims, dense)
    var = squares / (dense - correction)
    for d in sorted(dims, reverse=True) if not keepdim else ():
        var, mean = var.squeeze(d), mean.squeeze(d)
    return var, mean


def kept_share(x: Tensor, share: float) -> Tensor:
    """A mean over the entries that stayed, as a mean over all: times n / n_dense."""
    return x * share


_LIBRARY = torch.library.Library("secateurs", "DEF")  # type: ignore[no-untyped-call]
for _signature, _fn, _tags in (
    ("padded_layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, "
     "float eps, int n_dense) -> Tensor", padded_layer_norm, ()),
    ("padded_rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, float? eps, "
     "int n_dense) -> Tensor", padded_rms_norm, ()),
    ("padded_group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
     "int n_dense) -> Tensor", padded_group_norm, ()),
    ("padded_var(Tensor x, int[] dim, float correction, bool keepdim, int n_kept, "
     "int n_dense) -> Tensor", padded_var, ()),
    ("padded_var_mean(Tensor x, int[] dim, float correction, bool keepdim, int n_kept, "
     "int n_dense) -> (Tensor, Tensor)", padded_var_mean, ()),
    ("kept_share(Tensor x, float share) -> Tensor", kept_share, (torch.Tag.pointwise,)),
):  # fmt: skip
    _LIBRARY.define(_signature, tags=_tags)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(  # type: ignore[no-untyped-call]
        _signature.split("(")[0], _fn, "CompositeImplicitAutograd"
    )
