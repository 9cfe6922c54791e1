"""The gate gradients of one pass against those of gates that multiply, and against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.batches import batch_size
from secateurs.errors import ScoringError
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.statistics.gates import Gates, GateSums, probe_gates
from secateurs.statistics.gradients import PART
from secateurs.types import Graph, Inputs, LossFn, WeightTarget


class InPlace(nn.Module):
    """Activations are changed in place: by a module, by an operator, by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.second, self.third = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        y = self.second(x)
        y += x
        y = self.third(y).sigmoid_()
        out: Tensor = self.head(y.mean((2, 3)))
        return out


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4))


def both(
    model: nn.Module, inputs: Inputs, targets: Tensor, loss_fn: LossFn, members: str
) -> list[tuple[Tensor, Tensor]]:
    """For each target, per-sample gate gradients the fast and the slow way."""
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    graph = trace(model, inputs)
    params = dict(model.named_parameters())
    sites, _ = probe_gates(model, (inputs, targets), graph.groups(), members, params)
    n, groups = batch_size(inputs), [t for t in graph.groups() if t.name in sites]
    assert groups
    fast = GateSums(model, sites)
    fast.probe(inputs)
    with torch.enable_grad(), fast.running(n):
        loss_fn(model(inputs), targets).backward(inputs=[fast.anchor])  # type: ignore[no-untyped-call]
    slow = Gates(model, sites)
    with torch.enable_grad(), slow.running(n):
        grads = torch.autograd.grad(loss_fn(model(inputs), targets), slow.leaves)
    return [(fast.per_sample(t), slow.per_sample(t, grads)) for t in groups]


@pytest.mark.parametrize("members", ["removal", "consumers"])
@pytest.mark.parametrize("kind", ["plain", "in place"])
def test_sums_on_the_way_back_equal_gates_that_multiply(kind: str, members: str) -> None:
    torch.manual_seed(0)
    model = (plain() if kind == "plain" else InPlace()).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    if kind == "in place":
        x = torch.randn(7, 3, 6, 5, dtype=torch.float64)
    pairs = both(model, x, torch.randint(4, (7,)), F.cross_entropy, members)
    for fast, slow in pairs:
        assert float(slow.abs().max()) > 0
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-15)


def test_a_large_activation_is_worked_on_in_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten())
    x = torch.randn(9, 2, 96, 96)  # 3 x 96 x 96 elements a sample: four samples in a part
    pairs = both(model, x, torch.randn(9, 2 * 96 * 96), F.mse_loss, "removal")
    for fast, slow in pairs:
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-7)


def test_what_the_probe_did_not_see_is_refused() -> None:
    """An activation that only a later batch changes in place: an error, not another number."""

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spoil = nn.Linear(3, 4), nn.Linear(4, 2), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y.mul_(2) if self.spoil else y * 2
            out: Tensor = self.b(torch.tanh(y))
            return out

    model, x = Later().eval(), torch.randn(3, 3)
    graph = trace(model, x)
    groups = graph.groups()
    sites, _ = probe_gates(model, (x, x), groups, "removal", dict(model.named_parameters()))
    gates = GateSums(model, sites)
    gates.probe(x)
    model.spoil = True
    with gates.running(3), pytest.raises(RuntimeError, match="modified inplace"):
        model(x)


def test_a_batch_of_another_layout_is_refused() -> None:
    model, x = plain().eval(), torch.randn(4, 3)
    graph = trace(model, x)
    params = dict(model.named_parameters())
    sites, _ = probe_gates(model, (x, x), graph.groups(), "removal", params)
    gates = GateSums(model, sites)
    with gates.running(5), pytest.raises(ScoringError, match="does not begin with the 5 samples"):
        model(x)


@pytest.mark.parametrize("criterion", ["taylor_batch", {"name": "taylor", "average": "batch"}])
def test_weights_of_more_than_one_part(criterion: str | dict[str, str]) -> None:
    """(w g)^2 of each batch, weighted by its samples; the slow way over the whole tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PART // 64 + 7, 65, bias=False), nn.Tanh(), nn.Linear(65, 2))
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    batches = [(torch.randn(n, weight.shape[1]), torch.randint(2, (n,))) for n in (4, 3)]
    graph = Graph({"0.weight": WeightTarget("0.weight", tuple(weight.shape))})
    found = score(
        model, batches, F.cross_entropy, criterion=criterion, graph=graph, granularity="weight"
    ).values["0.weight"]
    expected = torch.zeros_like(weight)
    for x, y in batches:
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), [weight])
        expected += len(y) / 7 * (weight.detach() * grad).square()
    torch.testing.assert_close(found, expected.reshape(-1), rtol=1e-5, atol=0.0)
