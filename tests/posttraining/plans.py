"""Random plans, and networks with a convolution of every kind, for the tests of repairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateurs.selection import select
from secateurs.types import Budget, Counts, Graph, Plan, Scores


def random_plan(graph: Graph, share: float = 0.5, seed: int = 0) -> Plan:
    """A plan that keeps a share of each structural target, at random."""
    draw = torch.Generator().manual_seed(seed)
    groups = graph.groups()
    values = {t.name: torch.rand(t.n_units, generator=draw) for t in groups}
    counts = {t.name: max(1, round(share * t.n_units)) for t in groups}
    scores = Scores(graph, values, "random")
    return select(scores, Counts(counts, Budget(units=share)))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {
        name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Mixed(nn.Module):
    """Grouped, depthwise, pointwise, strided and transposed convolutions with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 6, 3, padding="same", groups=2, padding_mode="replicate")
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 2, 5, 5) -> (n, 3)"""
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.depth(x))
        x = torch.relu(self.norm2(self.point(x)))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out
