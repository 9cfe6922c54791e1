"""A graph form says no to sizes that are written into it, instead of computing something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.errors import CaptureError
from secateurs.surgery import masked_copy
from secateurs.types import Counts, Plan, Scores


class Steps(nn.Module):
    """A loop over the steps, which a capture unrolls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).relu()
        total: Tensor = self.outer(h[:, 0])
        for t in range(1, x.shape[1]):
            total = total + self.outer(h[:, t])
        return total


class Recurrent(nn.Module):
    """A kernel that takes any number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.outer = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.lstm(x)[0][:, -1])
        return out


def halved(model: nn.Module, x: Tensor) -> tuple[nn.Module, Plan]:
    graph = sc.trace(model, x)
    groups = graph.groups()
    scores = Scores(graph, {t.name: torch.rand(t.n_units) for t in groups}, "random")
    counts = Counts({t.name: t.n_units // 2 for t in groups}, sc.Budget(units=0.5))
    plan = sc.select(scores, counts)
    return sc.shrink(model, plan, x, form="graph"), plan


@pytest.mark.parametrize("length", [5, 9])
def test_an_unrolled_loop_refuses_another_length(length: int, tmp_path: Path) -> None:
    small, plan = halved(Steps().eval(), torch.randn(2, 6, 6))
    assert small(torch.randn(3, 6, 6)).shape == (3, 2)  # the batch is free
    for model in (small, sc.load(sc.save(small, plan, tmp_path / "out"))):
        with pytest.raises(CaptureError, match=f"has size {length} along dimension 1.*with 6"):
            model(torch.randn(3, length, 6))


def test_a_length_that_is_proven_to_work_is_free() -> None:
    model = Recurrent().eval()
    small, plan = halved(model, torch.randn(2, 6, 6))
    x = torch.randn(3, 9, 6)
    torch.testing.assert_close(small(x), masked_copy(model, plan)(x))
