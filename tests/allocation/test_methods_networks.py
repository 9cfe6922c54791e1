"""Allocation methods on traced networks: exact budgets, and what first and last mean there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.allocation import ALLOCATORS, Curve, Problem, Sensitivity, allocate
from secateurs.allocation.frame import make_frame
from secateurs.allocation.shares import densities, first_and_last
from secateurs.tasks.models import DigitsCNN, RecurrentClassifier
from secateurs.types import Budget, Graph, Scores

METHODS = pytest.mark.parametrize("method", [m for m in ALLOCATORS if m != "multi_scale"])


class ResBlock(nn.Module):
    """A stem, a block with a skip, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.conv2(torch.relu(self.conv1(x))))
        scores: Tensor = self.head(torch.relu(self.conv3(x)).mean(dim=(2, 3)))
        return scores


class Encoder(nn.Module):
    """Words, one Transformer layer, a head: the residual stream couples nearly everything."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(self.words(x)).mean(dim=1))
        return scores


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "digits-cnn": (DigitsCNN, lambda: torch.randn(2, 1, 8, 8), "channel"),
    "resnet": (ResBlock, lambda: torch.randn(2, 3, 8, 8), "channel"),
    "gru": (
        functools.partial(RecurrentClassifier, nn.GRU, n_features=6, hidden=12, n_classes=4),
        lambda: torch.randn(2, 7, 6),
        "hidden",
    ),
    "transformer": (
        Encoder, lambda: torch.randint(20, (2, 7)), "embedding neuron head channel"
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def scored(name: str, granularity: str = "") -> Scores:
    """Magnitudes of a small network with fixed weights."""
    build, inputs, kinds = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, x = build().eval(), inputs()
    graph: Graph = sc.trace(model, x)
    wanted = [k for k in (granularity or kinds).split() if graph.select(k)]
    scores: Scores = sc.score(model, graph=graph, criterion="magnitude", granularity=wanted)
    return scores


def curves_of(scores: Scores) -> Sensitivity:
    """Made up, and different for each target."""
    fractions = (0.0, 0.3, 0.6, 0.9)
    return Sensitivity(
        {
            n: Curve(fractions, tuple(r ** (1 + i % 3) * (1 + i) for r in fractions))
            for i, n in enumerate(scores.values)
        },
        "rise of the loss",
    )


def problem_of(scores: Scores) -> Problem:
    frame = make_frame(scores, 1, 1, False)
    names = tuple(frame.classes)
    return Problem(
        names=names, n_units=frame.n_units, values={}, low=frame.low, high=frame.high,
        rounding={}, repeats=dict.fromkeys(names, 1), limits=(), graph=scores.graph,
    )  # fmt: skip


@METHODS
@EACH
@pytest.mark.parametrize("keep", [0.7, 0.3])
def test_macs_of_the_smaller_network(method: str, name: str, keep: float) -> None:
    """Counted on the network that `shrink` makes; no single next unit would fit."""
    scores = scored(name)
    curves = curves_of(scores) if method == "sensitivity" else None
    budget = Budget(macs=keep)
    counts = allocate(scores, budget, method=method, round_to=1, sensitivity=curves)
    graph = scores.graph
    dense = sc.cost.dense_cost(graph).macs
    limit = budget.limit("macs", dense)
    orders = {n: torch.sort(v, descending=True, stable=True).indices.numpy()
              for n, v in scores.values.items()}  # fmt: skip
    cost = sc.cost.CostCurve(graph, orders)
    assert cost(counts.kept).macs <= limit
    for n, count in counts.kept.items():
        if count < graph.targets[n].n_units:
            assert cost({**counts.kept, n: count + 1}).macs > limit
    assert counts.realised["macs"] * dense == pytest.approx(cost(counts.kept).macs)


@METHODS
@EACH
def test_weights_of_the_network(method: str, name: str) -> None:
    scores = scored(name, "weight")
    curves = curves_of(scores) if method == "sensitivity" else None
    total = sum(t.n_units for n, t in scores.graph.targets.items() if n in scores.values)
    for keep in (0.5, 0.05):
        counts = allocate(scores, Budget(units=keep), method=method, sensitivity=curves)
        assert sum(counts.kept.values()) == int(keep * total)
        assert min(counts.kept.values()) >= 1


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("digits-cnn", {"conv1:channel"}, {"conv3:channel"}),
        ("resnet", {"stem:channel"}, {"conv3:channel"}),
        ("gru", {"rnn:hidden"}, set()),  # the only family is both
        # the first layer that multiplies reads the residual stream, as does the head
        ("transformer", {"words:embedding", "layer.self_attn:head"}, set()),
    ],
)
def test_first_and_last_families(name: str, first: set[str], last: set[str]) -> None:
    assert first_and_last(problem_of(scored(name))) == (first, last)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("digits-cnn", "conv1.weight", "head.weight"),
        ("resnet", "stem.weight", "head.weight"),
        ("gru", "rnn.weight_ih_l0", "head.weight"),
        ("transformer", "layer.self_attn.in_proj_weight", "head.weight"),
    ],
)
def test_first_and_last_weights(name: str, first: str, last: str) -> None:
    assert first_and_last(problem_of(scored(name, "weight"))) == ({first}, {last})


@EACH
def test_uniform_plus_starves_nothing(name: str) -> None:
    """Also where the first layer is most of the model."""
    scores = scored(name, "weight")
    for keep in (0.5, 0.1):
        counts = allocate(scores, Budget(units=keep), method="uniform_plus").kept
        targets = scores.graph.targets
        first, _ = first_and_last(problem_of(scores))
        for n, count in counts.items():
            assert count >= keep / 2 * targets[n].n_units - 1
            if n in first:
                assert count >= keep * targets[n].n_units - 1


def test_erk_of_a_family_by_hand() -> None:
    """The stem's family owns rows of stem and conv2, columns of conv1 and conv3."""
    found = densities(problem_of(scored("resnet")))
    sums = (8 + 3 + 6) + (12 + 8 + 6) + (8 + 12 + 6) + (16 + 8 + 6)
    products = 9 * (8 * 3 + 12 * 8 + 8 * 12 + 16 * 8)
    assert found["stem:channel"] == pytest.approx((sums / products) ** 0.5)


def test_raw_global_collapses_a_family_and_others_do_not() -> None:
    """Magnitudes of one family a thousand times smaller: the trap that lamp and density avoid."""
    scores = scored("resnet")
    values = {n: v * (1e-3 if n == "conv1:channel" else 1.0) for n, v in scores.values.items()}
    trapped = Scores(scores.graph, values, "magnitude")
    least = {
        m: allocate(trapped, Budget(macs=0.3), method=m, round_to=1).kept["conv1:channel"]
        for m in ("global", "global_normalized", "lamp", "density", "uniform", "erk")
    }
    assert least.pop("global") == 1
    assert min(least.values()) >= 3
