"""Data-free criteria, against values by hand, enumerated paths, and what they must conserve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.errors import ConfigError, ScoringError
from secateurs.scoring import score
from secateurs.types import Graph, Plan, WeightTarget
from tests.graphs import CASES, build, linear

W1, W2 = [[1.0, -2.0], [3.0, 0.0]], [[-1.0, 2.0]]


def relu_net(*weights: list[list[float]], bias: bool = False) -> tuple[nn.Sequential, Graph]:
    """Linear layers with ReLUs between, and their graph by hand."""
    net = nn.Sequential()
    for w in weights:
        layer = nn.Linear(len(w[0]), len(w), bias=bias)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(w))
        net.extend([layer, nn.ReLU()])
    del net[-1]
    return net, sc.trace(net, torch.randn(2, len(weights[0][0])))


def scored(model: nn.Module, graph: Graph, criterion: Any, **options: Any) -> Mapping[str, Tensor]:
    values: Mapping[str, Tensor] = score(model, graph=graph, criterion=criterion, **options).values
    return values


def conv_net() -> tuple[nn.Sequential, Graph]:
    """Convolutions without biases; a batch norm without a shift, with a mean and a variance."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 4, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3, bias=False),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[1].weight.normal_()  # type: ignore[operator]
        net[1].running_mean.normal_(std=3)  # type: ignore[operator]
        net[1].running_var.uniform_(0.5, 2)  # type: ignore[operator]
    return net, sc.trace(net, torch.randn(2, 2, 8, 8))


# -- values --------------------------------------------------------------------------------------


def test_synflow_by_hand() -> None:
    """|W1| 1 = (3, 3), R = 1 * 3 + 2 * 3 = 9."""
    net, graph = relu_net(W1, W2)
    found = scored(net, graph, "synflow", granularity="weight")
    torch.testing.assert_close(found["0.weight"], torch.tensor([1.0, 2.0, 6.0, 0.0]) / 9)
    torch.testing.assert_close(found["2.weight"], torch.tensor([3.0, 6.0]) / 9)
    units = scored(net, graph, "synflow")
    torch.testing.assert_close(units["0:neuron"], torch.tensor([3.0, 6.0]) / 9)


def test_path_norm_by_hand() -> None:
    """Squares (1, 4; 9, 0) and (1, 4): R = 1 * 5 + 4 * 9 = 41."""
    net, graph = relu_net(W1, W2)
    found = scored(net, graph, "path_norm", granularity="weight")
    torch.testing.assert_close(found["0.weight"], torch.tensor([1.0, 4.0, 36.0, 0.0]) / 41)
    torch.testing.assert_close(found["2.weight"], torch.tensor([5.0, 36.0]) / 41)


def enumerated(weights: list[np.ndarray[Any, Any]], power: int) -> list[np.ndarray[Any, Any]]:
    """Each path from an input to an output adds its product to every weight on it."""
    flow = [np.zeros_like(w) for w in weights]
    widths = [weights[0].shape[1], *(len(w) for w in weights)]
    for path in itertools.product(*map(range, widths)):
        steps = list(itertools.pairwise(path))
        product = math.prod(
            abs(float(w[j, i])) ** power for w, (i, j) in zip(weights, steps, strict=True)
        )
        for part, (i, j) in zip(flow, steps, strict=True):
            part[j, i] += product
    total = flow[0].sum()
    return [part / total if total else part for part in flow]


@pytest.mark.parametrize(("criterion", "power"), [("synflow", 1), ("path_norm", 2)])
def test_against_all_paths(criterion: str, power: int) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s) for s in ((4, 3), (5, 4), (2, 5))]
    net, graph = relu_net(*(w.tolist() for w in weights))
    found = scored(net, graph, criterion, granularity="weight")
    for name, expected in zip(found, enumerated(weights, power), strict=True):
        assert found[name].tolist() == pytest.approx(expected.ravel().tolist(), rel=1e-5)
    wrong = enumerated(weights, 3 - power)
    assert found["0.weight"].tolist() != pytest.approx(wrong[0].ravel().tolist(), rel=1e-5)


# -- what the paper proves -----------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["synflow", "path_norm"])
def test_flow_is_positive_and_conserved(criterion: str) -> None:
    """The same total through every layer, norms included, and through every neuron's two sides."""
    net, graph = conv_net()
    found = scored(net, graph, criterion, granularity="weight")
    assert set(found) == {"0.weight", "3.weight", "7.weight"}
    for values in found.values():
        assert (values >= 0).all()
        assert float(values.double().sum()) == pytest.approx(1, rel=1e-6)
    made = scored(net, graph, {"name": criterion, "members": "removal"})
    read = scored(net, graph, {"name": criterion, "members": "consumers"})
    for name, values in made.items():
        assert float(values.double().sum()) == pytest.approx(1, rel=1e-6)
        torch.testing.assert_close(values, read[name])


def test_biases_break_conservation() -> None:
    """What enters through a bias does not pass the layers before: the checker sees it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = scored(net, sc.trace(net, torch.randn(2, 3)), "synflow", granularity="weight")
    assert float(found["0.weight"].sum()) < float(found["2.weight"].sum()) < 1


@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_a_gate_on_a_unit_is_the_sum_of_its_weights(name: str) -> None:
    """d/dm of R at m = 1 by central differences, m scaling what alone removes the unit."""
    case = CASES[name]()
    target = case.graph.groups()[-1]
    found = scored(case.model, case.graph, "synflow")[target.name]
    net = case.model.eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.zero_()
        for p in net.parameters():
            p.abs_()
        ones = torch.ones(case.batches[0][0].shape, dtype=torch.float64)
        whole = float(net(ones).sum())
        for unit in range(target.n_units):
            sides = []
            for factor in (1 + 1e-5, 1 - 1e-5):
                held = [(m, net.get_parameter(m.tensor)) for m in target.members
                        if m.role == "producer" and m.outermost and m.learned]  # fmt: skip
                before = [p.clone() for _, p in held]
                for m, p in held:
                    p.index_copy_(m.dim, torch.tensor([unit]), p.narrow(m.dim, unit, 1) * factor)
                sides.append(float(net(ones).sum()))
                for (_, p), old in zip(held, before, strict=True):
                    p.copy_(old)
            slope = (sides[0] - sides[1]) / 2e-5 / whole
            assert float(found[unit]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_the_running_mean_does_not_count() -> None:
    net, graph = conv_net()
    before = scored(net, graph, "synflow")
    net[1].running_mean.add_(100)  # type: ignore[operator]
    after = scored(net, graph, "synflow")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_float32_would_overflow() -> None:
    net, graph = relu_net(*[[[1e15, 1e15], [1e15, 2e15]]] * 4)
    found = scored(net, graph, "synflow", granularity="weight")
    assert all(float(v.sum()) == pytest.approx(1) for v in found.values())


# -- iterations ----------------------------------------------------------------------------------


def eliminated(weights: list[np.ndarray[Any, Any]], n: int) -> list[float]:
    """The paper's loop: a share of what is left goes in every iteration; when each went."""
    kept = [np.ones_like(w) for w in weights]
    sizes = [w.size for w in weights]
    total, ranks, gone, flat = sum(sizes), np.zeros(sum(sizes)), 0, np.zeros(0)
    for k in range(1, n + 1):
        now = [w * m for w, m in zip(weights, kept, strict=True)]
        fresh = np.concatenate([f.ravel() for f in enumerated(now, 1)])
        cut = not fresh.any()  # too little is left for one path
        flat = flat if cut else fresh
        alive = np.flatnonzero(np.concatenate([m.ravel() for m in kept]))
        order = alive[np.argsort(flat[alive], kind="stable")]
        stay = 0 if cut or k == n else max(1, round(total * 0.01 ** (k / n)))
        leaving = order[: len(order) - stay]
        ranks[leaving] = (gone + np.arange(1, len(leaving) + 1)) / total
        gone += len(leaving)
        mask = np.concatenate([m.ravel() for m in kept])
        mask[leaving] = 0
        parts = np.split(mask, np.cumsum(sizes)[:-1])
        kept = [p.reshape(w.shape) for p, w in zip(parts, weights, strict=True)]
        if cut:
            break
    return ranks.tolist()


@pytest.mark.parametrize("n", [2, 7])
def test_iterations_against_the_loop(n: int) -> None:
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=s) for s in ((4, 3), (5, 4), (2, 5))]
    net, graph = relu_net(*(w.tolist() for w in weights))
    asked = {"name": "synflow", "iterations": n}
    found = scored(net, graph, asked, granularity="weight")
    flat = torch.cat(list(found.values())).tolist()
    assert flat == pytest.approx(eliminated(weights, n))
    assert sorted(flat) == pytest.approx([(i + 1) / 42 for i in range(42)])
    assert flat != pytest.approx(eliminated(weights, n + 1))


def test_iterations_empty_no_layer() -> None:
    """A narrow layer behind a wide one: one shot cuts the wide one off, iterations do not."""
    rng = np.random.default_rng(2)
    shapes = ((64, 2), (64, 64), (2, 64))
    net, graph = relu_net(*(rng.normal(size=s).tolist() for s in shapes))

    def emptied(iterations: int) -> bool:
        asked = {"name": "synflow", "iterations": iterations}
        values = scored(net, graph, asked, granularity="weight")
        limit = torch.cat(list(values.values())).sort(descending=True).values[64]
        return any(not bool((v > limit).any()) for v in values.values())

    assert emptied(1)
    assert not emptied(30)


def test_iterations_of_units() -> None:
    net, graph = conv_net()
    found = scored(net, graph, {"name": "synflow", "iterations": 5})
    flat = torch.cat(list(found.values())).sort().values
    assert flat.tolist() == pytest.approx([(i + 1) / 9 for i in range(9)])


def test_too_many_iterations_are_refused() -> None:
    net, graph = relu_net(W1, W2)
    asked = {"name": "synflow", "iterations": 50}
    with pytest.raises(ConfigError, match=r"50 iterations would take about .* fewer iterations"):
        scored(net, graph, asked, granularity="weight", max_seconds=1e-9)


def test_what_was_removed_carries_nothing() -> None:
    """Without the second neuron R is 3, and all of it goes through the first."""
    net, graph = relu_net(W1, W2)
    plan = Plan({}, {}, {"0:neuron": torch.tensor([1])}, {})
    found = scored(net, graph, "synflow", previous=plan)["0:neuron"]
    assert found.tolist() == [1.0, -math.inf]


# -- models that are not made of ReLU ------------------------------------------------------------


class Tokens(nn.Module):
    """Words and a mask, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3)
        self.inner, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        h = self.inner(self.words(ids)).relu() * mask[..., None]
        return {"logits": self.head(h.sum(1)), "states": -100 * h}


def test_an_embedding_reads_all_its_rows() -> None:
    """Its input of ones is every word in equal parts, so that it conserves the flow, too."""
    torch.manual_seed(0)
    model = Tokens()
    example = {"ids": torch.tensor([[6, 5], [0, 3]]), "mask": torch.tensor([[1, 0], [1, 1]])}
    graph = sc.trace(model, example, outputs=["logits"])
    table = WeightTarget("words.weight", (7, 3))
    graph = replace(graph, targets={**graph.targets, table.name: table})
    found = scored(model, graph, "synflow", granularity="weight")
    assert {n: float(v.sum()) for n, v in found.items()} == pytest.approx(
        dict.fromkeys(["words.weight", "inner.weight", "head.weight"], 1.0)
    )
    words = model.words.weight.detach().abs()
    through = model.inner.weight.detach().abs().T @ model.head.weight.detach().abs().sum(0)
    expected = words * through
    torch.testing.assert_close(
        found["words.weight"].reshape(7, 3), expected / expected.sum(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("name", "bent"), [("mlp", "tanh"), ("lstm", "lstm")])
def test_a_note_where_r_is_no_sum_over_paths(name: str, bent: str) -> None:
    case = CASES[name]()
    found = score(case.model, graph=case.graph, criterion="synflow")
    assert found.n_samples == 0
    assert found.notes == (
        f"the network is not positively homogeneous ({bent}): R is no sum over paths, and the "
        "score only says how R reacts to a weight",
    )


def test_no_note_for_relu() -> None:
    net, graph = conv_net()
    assert score(net, graph=graph, criterion="synflow").notes == ()


def test_a_transformer_can_be_scored() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 2))
    graph = sc.trace(model, torch.randn(2, 3, 8))
    found = score(model, graph=graph, criterion=["synflow", "path_norm"])
    for one in found.values():
        assert "layer_norm" in one.notes[0]
        assert all(torch.isfinite(v).all() and (v >= 0).all() for v in one.values.values())
        assert max(float(v.max()) for v in one.values.values()) > 0


# -- what is refused -----------------------------------------------------------------------------


def test_the_graph_must_know_the_inputs() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = build(net, [linear("0", 3, ["2"], "producers")], {})
    with pytest.raises(ConfigError, match="does not say what the model is called with"):
        scored(net, graph, "synflow")
    known = replace(graph, inputs=torch.empty(1, 2, device="meta"))
    assert scored(net, known, "synflow")["0:neuron"].shape == (3,)


def test_a_softmax_at_the_end_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(1))
    with pytest.raises(ScoringError, match="does not depend on the weights"):
        scored(net, sc.trace(net, torch.randn(2, 2)), "synflow")


@pytest.mark.parametrize("size", [0.0, 1e200])
def test_nothing_or_too_much_is_refused(size: float) -> None:
    net, graph = relu_net(W1, W2)
    net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(size)
    with pytest.raises(ScoringError, match="for inputs of ones and absolute weights is"):
        scored(net, graph, "path_norm")


def test_a_model_that_insists_on_its_type_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.relu(self.a(x.float())))
            return out

    model = Fixed()
    with pytest.raises(ScoringError, match="cannot be run in float64 on inputs of ones"):
        scored(model, sc.trace(model, torch.randn(2, 2)), "synflow")
    assert torch.get_default_dtype() == torch.float32
    assert model.a.weight.dtype == torch.float32
