"""Attention modules of users that write down their number of heads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.surgery.patching import patch_sizes
from secateurs.surgery.shrinking import info_of
from tests.graph.nets import outputs, plan_of, randomized, sequence


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.unrelated = 2, 4, 2
        self.qkv, self.proj = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        out: Tensor = self.proj(mixed)
        return out


def test_heads_follow_their_projection_and_come_back_from_a_file(tmp_path: Path) -> None:
    net = randomized(Attention())
    plan = plan_of(net, sc.trace(net, sequence()))
    small = sc.shrink(net, plan, sequence())
    info = info_of(small)
    assert info.form == "module"
    assert info.attributes[""] == {"num_heads": 1}
    assert small.unrelated == 2
    loaded = sc.load(sc.save(small, plan, tmp_path / "out"), Attention)
    assert torch.equal(outputs(small, sequence())[0], outputs(loaded, sequence())[0])


def test_only_known_names_that_fit_are_scaled() -> None:
    dense, small = Attention(), Attention()
    assert patch_sizes(small, dense) == {}
    small.qkv = nn.Linear(4, 10)  # no whole number of heads
    assert patch_sizes(small, dense) == {}
    small.qkv = nn.Linear(4, 12)
    assert patch_sizes(small, dense) == {"": {"num_heads": 1}}
