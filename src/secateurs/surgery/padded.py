"""Norms of torch.nn that go on to count what was removed, and how to make them plain.

A `LayerNorm(64)` of which 16 features were removed becomes a `PaddedLayerNorm` over 48 with
`n_dense = 64`: exactly what the masked model computes (`graph.padded` has the formula). Parameters
keep their names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import secateurs.graph.padded  # noqa: F401  (registers the operators)

__all__ = ["PADDED", "PLAIN", "PaddedGroupNorm", "PaddedLayerNorm", "PaddedRMSNorm"]

operators = torch.ops.secateurs


class PaddedLayerNorm(nn.LayerNorm):
    """A layer norm over what is left of `n_dense` features."""

    n_dense: int

    def forward(self, input: Tensor) -> Tensor:
        shape = list(self.normalized_shape)
        out: Tensor = operators.padded_layer_norm(
            input, shape, self.weight, self.bias, self.eps, self.n_dense
        )
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_dense={self.n_dense}"


class PaddedRMSNorm(nn.RMSNorm):
    """An RMS norm over what is left of `n_dense` features."""

    n_dense: int

    def forward(self, x: Tensor) -> Tensor:
        shape = list(self.normalized_shape)
        out: Tensor = operators.padded_rms_norm(x, shape, self.weight, self.eps, self.n_dense)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_dense={self.n_dense}"


class PaddedGroupNorm(nn.GroupNorm):
    """A group norm over what is left of `n_dense` channels in each group."""

    n_dense: int

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = operators.padded_group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, self.n_dense
        )
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_dense={self.n_dense}"


PADDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: PaddedLayerNorm,
    nn.RMSNorm: PaddedRMSNorm,
    nn.GroupNorm: PaddedGroupNorm,
}
"""Norms that can be padded -> what they become; only these classes themselves, no subclasses."""
PLAIN = {padded: plain for plain, padded in PADDED.items()}
