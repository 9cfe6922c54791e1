"""Criteria from activations, against values by hand and slow computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateurs as sc
from secateurs.errors import ConfigError, ScoringError
from secateurs.scoring import score
from secateurs.statistics import activations
from secateurs.statistics.activations import moments
from secateurs.statistics.feature_maps import independence, map_ranks
from secateurs.statistics.influence import cosine
from secateurs.types import Batch, Graph, Scores, WeightTarget
from tests.graphs import CASES, Case, build, linear, mlp


def scored(case: Case, criterion: Any, **options: Any) -> Scores:
    found: Scores = score(
        case.model, case.batches, case.loss_fn, criterion=criterion, graph=case.graph, **options
    )
    return found


def inputs(case: Case) -> Tensor:
    return torch.cat([x for x, _ in case.batches])


def relu_net(rows: list[list[float]], x: list[list[float]]) -> Case:
    """Neurons without bias, a ReLU, one reader; all data in one batch."""
    net = nn.Sequential(nn.Linear(len(rows[0]), len(rows), bias=False), nn.ReLU())
    net.append(nn.Linear(len(rows), 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(rows))  # type: ignore[operator]
    group = linear("0", len(rows), ["2"], "producers")
    members = tuple(m for m in group.members if m.tensor != "0.bias")
    graph = build(net, [type(group)(group.name, group.kind, len(rows), members, group.sites)], {})
    data = torch.tensor(x, dtype=torch.float64)
    return Case(net, graph, [(data, torch.zeros(len(x), dtype=torch.int64))], _loss)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


# -- moments -------------------------------------------------------------------------------------

HAND = relu_net([[1.0], [-1.0], [0.0]], [[2.0], [-4.0], [0.0], [6.0]])
"""Three units see (2, 0, 0, 6), (0, 4, 0, 0) and nothing."""


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("activation_mean", [2.0, 1.0, 0.0]),
        ("apoz", [0.5, 0.25, 0.0]),
        ("activation_variance", [(4 + 36) / 4 - 4, 16 / 4 - 1, 0.0]),
    ],
)
def test_by_hand(criterion: str, expected: list[float]) -> None:
    assert scored(HAND, criterion).values["0:neuron"].tolist() == expected


def readers(case: Case) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Target -> what each reader sees: (n_units, everything), by running layer by layer."""
    net, x = case.model.eval(), inputs(case)
    with torch.no_grad():
        if isinstance(net, nn.Sequential):
            ends = {"0:neuron": 2, "2:neuron": 4, "0:channel": 5}
            seen = {name: [net[: ends[name]](x)] for name in case.graph.units}
        else:
            stream = net.stem(x)  # type: ignore[operator]
            inner = torch.relu(net.fc1(stream))  # type: ignore[operator]
            after = torch.relu(stream + net.fc2(inner))  # type: ignore[operator]
            seen = {"stem:neuron": [stream, after], "fc1:neuron": [inner]}
    sizes = case.graph.units
    return {
        name: [v.numpy().reshape(len(v), sizes[name], -1).swapaxes(0, 1) for v in values]
        for name, values in seen.items()
    }


SLOW: dict[str, Callable[[np.ndarray[Any, Any]], float]] = {
    "activation_mean": lambda v: float(np.abs(v).mean()),
    "apoz": lambda v: 1 - float((v == 0).mean()),
    "activation_variance": lambda v: float(v.var()),
}


@pytest.mark.parametrize("criterion", SLOW)
@pytest.mark.parametrize("name", ["mlp", "sigmoid_mlp", "conv", "residual"])
def test_moments_against_numpy(criterion: str, name: str) -> None:
    case = CASES[name]()
    found = scored(case, criterion).values
    assert found.keys() == readers(case).keys()
    for target, seen in readers(case).items():
        expected = [np.mean([SLOW[criterion](v[u]) for v in seen]) for u in range(len(seen[0]))]
        assert found[target].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_moment_oracle_sees_other_data() -> None:
    case = mlp()
    found = scored(case, "activation_variance").values["2:neuron"]
    other = Case(case.model, case.graph, case.batches[1:], case.loss_fn)
    values = readers(other)["2:neuron"][0]
    assert found.tolist() != pytest.approx(values.var(axis=(1, 2)).tolist(), rel=1e-6)


def test_variance_survives_a_large_mean() -> None:
    """In float32 the squares of 1000 +- 0.01 hold nothing of the deviation."""
    g = torch.Generator().manual_seed(0)
    x = 1000 + 0.01 * torch.randn(4, 3, 500, generator=g)
    found = moments(x, 1, frozenset(["sum", "square"]))
    variance = found["square"] / 2000 - (found["sum"] / 2000).square()
    assert variance.tolist() == pytest.approx(x.double().var((0, 2), correction=0), rel=1e-3)
    naive = (x * x).mean((0, 2)) - x.mean((0, 2)).square()
    assert naive.tolist() != pytest.approx(x.double().var((0, 2), correction=0), rel=1e-1)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 3, 3)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_moments_of_any_layout(shape: tuple[int, ...], dim: int) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.relu(torch.randn(shape, generator=g, dtype=torch.float64))
    dim %= len(shape)
    rows = x.movedim(dim, 0).flatten(1)
    names = ["abs", "nonzero", "sum", "square"]
    found = moments(x, dim, frozenset(names))
    slow = [rows.abs().sum(1), (rows != 0).sum(1).double(), rows.sum(1), rows.square().sum(1)]
    for name, expected in zip(names, slow, strict=True):
        torch.testing.assert_close(found[name], expected)


def test_one_visit_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three criteria and two readers of one tensor: each moment of it is computed once."""
    asked: list[frozenset[str]] = []

    def counted(value: Tensor, dim: int, wanted: frozenset[str]) -> dict[str, Tensor]:
        asked.append(wanted)
        return moments(value, dim, wanted)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            out: Tensor = self.b(h) * self.c(h)
            return out

    model, x = Two(), torch.randn(5, 4)
    graph = sc.trace(model, x)
    monkeypatch.setattr(activations, "moments", counted)
    both = score(
        model, [(x, None), (x, None)], graph=graph,
        criterion=["activation_mean", "apoz", "activation_variance"],
    )  # fmt: skip
    assert asked == [frozenset(["abs", "nonzero", "square", "sum"])] * 2  # one for each batch
    hidden = torch.relu(model.a(x)).detach()
    torch.testing.assert_close(both["activation_mean"].values["a:neuron"], hidden.abs().mean(0))


def test_values_are_seen_before_they_are_overwritten() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            y = self.b(h)
            h.mul_(0)  # after b has read it
            out: Tensor = self.c(torch.relu_(y))
            return out

    model, x = Overwrites(), torch.randn(6, 4)
    graph = build(
        model, [linear("a", 3, ["b"], "producers"), linear("b", 3, ["c"], "producers")], {}
    )
    found = score(model, [(x, None)], graph=graph, criterion=["activation_mean", "apoz"])
    h = model.a(x).detach()
    torch.testing.assert_close(found["activation_mean"].values["a:neuron"], h.abs().mean(0))
    on = torch.relu(model.b(h)) > 0
    torch.testing.assert_close(found["apoz"].values["b:neuron"], on.float().mean(0))


def test_apoz_says_so_where_nothing_is_ever_zero() -> None:
    found = scored(mlp(), "apoz")
    assert found.values["0:neuron"].tolist() == [1.0] * 6  # tanh
    assert found.values["2:neuron"].min() < 1  # relu
    assert found.notes == (
        "0:neuron: no activation is ever exactly zero, so all its units score 1",
    )


def test_apoz_needs_a_reader() -> None:
    case = CASES["conv"]()
    (group,) = case.graph.groups()
    made = tuple(s for s in group.sites if s.role == "producer")
    only = type(group)(group.name, group.kind, 4, group.members, made)
    blind = Case(case.model, build(case.model, [only], {}), case.batches, case.loss_fn)
    with pytest.raises(ConfigError, match="only before the activation function"):
        scored(blind, "apoz")
    assert scored(blind, "activation_mean").values["0:channel"].min() > 0


def test_what_is_not_finite_is_named() -> None:
    case = mlp()
    with torch.no_grad():
        case.model.get_parameter("2.bias")[1] = math.inf
    with pytest.raises(ScoringError, match="batch 0: the input of 4 holds values that are not"):
        scored(case, "apoz")


# -- wanda ---------------------------------------------------------------------------------------


def weights_only(model: nn.Module, batches: list[Batch], **options: Any) -> Scores:
    """Wanda of every matrix."""
    named = dict(model.named_parameters()).items()
    graph = Graph({n: WeightTarget(n, tuple(p.shape)) for n, p in named if p.dim() > 1})
    found: Scores = score(
        model, batches, graph=graph, criterion="wanda", granularity="weight", **options
    )
    return found


def test_wanda_by_hand() -> None:
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -4.0]]))
    batches: list[Batch] = [
        (torch.tensor([[1.0, 2.0]]), None), (torch.tensor([[3.0, 0.0]]), None)
    ]  # fmt: skip
    found = weights_only(net, batches).values["weight"]
    torch.testing.assert_close(found, torch.tensor([3 * math.sqrt(5), 4 * math.sqrt(2)]))


def test_wanda_of_units_sums_weights_and_leaves_out_biases() -> None:
    case = relu_net([[1.0, -2.0], [0.5, 0.0]], [[3.0, 4.0], [0.0, 0.0]])
    norms = [math.sqrt(4.5), math.sqrt(8.0)]
    found = scored(case, "wanda").values["0:neuron"].tolist()
    assert found == pytest.approx([norms[0] + 2 * norms[1], 0.5 * norms[0]])


@pytest.mark.parametrize("groups", [1, 2])
def test_wanda_of_convolutions(groups: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 5, generator=g)
    down, up = nn.Conv2d(4, 6, 3, groups=groups), nn.ConvTranspose2d(6, 4, 2, groups=groups)
    net = nn.Sequential(down, up)
    found = weights_only(net, [(x[:2], None), (x[2:], None)]).values
    norm = [math.sqrt(float(x[:, i].square().sum()) / 3) for i in range(4)]
    expected = down.weight.detach().abs().clone()
    for o in range(6):
        for i in range(4 // groups):
            expected[o, i] *= norm[o // (6 // groups) * (4 // groups) + i]
    torch.testing.assert_close(found["0.weight"], expected.reshape(-1))
    y = down(x).detach()
    norms = (y.square().sum((0, 2, 3)) / 3).sqrt()
    expected = up.weight.detach().abs() * norms[:, None, None, None]
    torch.testing.assert_close(found["1.weight"], expected.reshape(-1))


class Tied(nn.Module):
    """A table that is looked up, and read again as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.table(ids)))
        return out


def test_wanda_of_a_tied_table_adds_both_uses() -> None:
    """A lookup is a linear layer on one-hot inputs."""
    model, ids = Tied(), torch.tensor([[0, 1, 1], [4, 1, 0]])
    found = weights_only(model, [(ids, None)]).values["table.weight"].reshape(5, 3)
    x = torch.tanh(model.table(ids)).detach()
    hot = functional.one_hot(ids, 5).float()
    squares = hot.square().sum((0, 1))[:, None] + x.square().sum((0, 1))[None]
    torch.testing.assert_close(found, model.table.weight.detach().abs() * (squares / 2).sqrt())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("packed", [False, True])
def test_wanda_of_recurrent_layers_follows_the_states(kind: type[nn.RNNBase], packed: bool) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, batch_first=True, bidirectional=True)  # type: ignore[call-arg, arg-type]
    x, lengths = torch.randn(2, 5, 3), [5, 3] if packed else [5, 5]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            if not packed:
                return self.layer(x)[0]  # type: ignore[no-any-return]
            given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True)
            return self.layer(given)[0].data  # type: ignore[no-any-return]

    found = weights_only(Net(), [(x, None)]).values
    read, states = torch.zeros(3), {"": torch.zeros(4), "_reverse": torch.zeros(4)}
    with torch.no_grad():
        for sample, length in zip(x, lengths, strict=True):
            whole = sample[:length]
            read += whole.square().sum(0)
            for t in range(1, length):  # the state that step t reads is that after t steps
                first = layer(whole[None, :t])[0][0, -1, :4]
                last = layer(whole[None, length - t :])[0][0, 0, 4:]
                states[""] += first.square()
                states["_reverse"] += last.square()
    for suffix, squares in states.items():
        for tensor, sums in ((f"weight_ih_l0{suffix}", read), (f"weight_hh_l0{suffix}", squares)):
            weight = layer.get_parameter(tensor).detach()
            expected = weight.abs() * (sums / 2).sqrt()
            torch.testing.assert_close(found[f"layer.{tensor}"], expected.reshape(-1))


def test_wanda_of_attention_tells_query_key_and_value_apart() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attention(x, key=y, value=2 * y)[0]  # type: ignore[no-any-return]

    model, x, y = Net(), torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    found = weights_only(model, [((x, y), None)])
    norms = [(t.square().sum((0, 1)) / 2).sqrt() for t in (x, y, 2 * y)]
    weight = model.attention.in_proj_weight.detach().abs()
    expected = torch.cat([w * n for w, n in zip(weight.chunk(3), norms, strict=True)])
    torch.testing.assert_close(found.values["attention.in_proj_weight"], expected.reshape(-1))
    assert found.not_scored == {
        "attention.out_proj.weight": "the input that attention.out_proj.weight multiplies cannot "
        "be seen from outside"
    }


def test_wanda_needs_a_layer_that_is_called() -> None:
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.fc.weight.T

    with pytest.raises(ScoringError, match=r"fc.weight: its layer was never called"):
        weights_only(Bypassed(), [(torch.randn(2, 3), None)])


def test_wanda_names_what_is_not_finite() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.tensor([[1.0, math.nan]])
    with pytest.raises(ScoringError, match="batch 0: the input of 0 holds values"):
        weights_only(net, [(x, None)])


# -- feature maps --------------------------------------------------------------------------------


class Maps(nn.Module):
    """Two channels that copy the input, ReLU, a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 1, 1)
        with torch.no_grad():
            self.make.weight.copy_(torch.eye(2)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(torch.relu(self.make(x))).sum((1, 2, 3))
        return out


def test_hrank_by_hand() -> None:
    """Ranks 3 and 1 in the first sample, 1 and 0 in the second."""
    ones, zeros = torch.ones(3, 3), torch.zeros(3, 3)
    x = torch.stack([torch.stack([torch.eye(3), ones]), torch.stack([ones, -ones])])
    model = Maps()
    graph = sc.trace(model, x)
    batches: list[Batch] = [(x, None), (torch.stack([zeros, zeros])[None], None)]
    found = score(model, batches, graph=graph, criterion="hrank")
    torch.testing.assert_close(found.values["make:channel"], torch.tensor([4 / 3, 1 / 3]))
    assert found.notes == ()
    first = score(model, batches, graph=graph, criterion={"name": "hrank", "samples": 1})
    assert first.values["make:channel"].tolist() == [3.0, 1.0]


@pytest.mark.parametrize("samples", [3, 6, 100])
def test_hrank_against_numpy(samples: int) -> None:
    """The only reader is a linear layer: maps are seen after the norm, where they are made."""
    case = CASES["conv"]()
    found = scored(case, {"name": "hrank", "samples": samples})
    assert isinstance(case.model, nn.Sequential)
    x = inputs(case)[:samples]
    maps = case.model.eval()[1](case.model[0](x)).detach().numpy()
    expected = np.linalg.matrix_rank(maps).mean(0)
    assert found.values["0:channel"].tolist() == pytest.approx(expected.tolist())
    assert found.notes == (
        "0:channel: seen where it is made, before an activation function, because no reader sees "
        "maps of height and width",
    )


def test_ranks_do_not_count_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, 2, generator=g), torch.randn(2, 8, generator=g)
    maps = (left @ right)[None, None]
    assert map_ranks(maps).tolist() == map_ranks(maps.double()).tolist() == [[2.0]]
    assert map_ranks(maps + torch.randn(8, 8, generator=g)).tolist() == [[8.0]]


def slow_independence(a: np.ndarray[Any, Any]) -> list[float]:
    """The textbook: singular values of the matrix, and of it with one row set to zero."""
    out = []
    for i in range(len(a)):
        less = a.copy()
        less[i] = 0
        out.append(float(np.linalg.norm(a, "nuc") - np.linalg.norm(less, "nuc")))
    return out


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)])
def test_independence_against_singular_values(shape: tuple[int, int]) -> None:
    a = np.random.default_rng(0).normal(size=shape)
    assert independence(torch.tensor(a)).tolist() == pytest.approx(slow_independence(a))
    assert independence(torch.tensor(a), [1]).tolist()[::2][0] == 0
    a[0] *= 2
    assert independence(torch.tensor(a)).tolist() != pytest.approx(slow_independence(a / 2))


def test_a_row_that_the_others_span_adds_little() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.7, 0.7, 0.0], [0.0, 0.0, 1.0]])
    found = independence(a)
    assert found.argmin() == 2
    assert found.argmax() == 3


@pytest.mark.parametrize("samples", [2, 5, 64])
def test_chip_against_singular_values(samples: int) -> None:
    """The flattened map that the linear layer reads is a matrix of 4 channels x 4 positions."""
    case = CASES["conv"]()
    found = scored(case, {"name": "chip", "samples": samples}).values["0:channel"]
    assert isinstance(case.model, nn.Sequential)
    maps = case.model.eval()[:4](inputs(case)[:samples]).detach().flatten(2).numpy()
    expected = np.mean([slow_independence(a) for a in maps], axis=0)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_chip_of_a_sequence_has_steps_as_positions() -> None:
    case = CASES["lstm"]()
    found = scored(case, "chip").values["lstm:hidden"]
    with torch.no_grad():
        states = case.model.lstm(inputs(case))[0].transpose(1, 2).numpy()  # type: ignore[operator]
    expected = np.mean([slow_independence(a) for a in states], axis=0)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_chip_needs_positions() -> None:
    with pytest.raises(ConfigError, match="cannot be seen as a matrix of units x positions"):
        scored(mlp(), "chip")


@pytest.mark.parametrize("criterion", ["hrank", "chip"])
def test_what_would_take_too_long_is_refused(criterion: str) -> None:
    with pytest.raises(ConfigError, match=r"samples would take about .*option samples"):
        scored(CASES["conv"](), criterion, max_seconds=1e-9)


# -- block_influence -----------------------------------------------------------------------------


class Blocks(nn.Module):
    """Two residual branches, the second added in place to features in the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        self.extra = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x) + 1.0
        h = h + self.b(torch.relu(self.a(h)))
        if self.extra:
            h = h + torch.ones_like(h)
        h += self.c(torch.tanh(h))
        out: Tensor = self.head(h).mean(1)
        return out


def blocks(seed: int = 0) -> tuple[Blocks, list[Batch], Graph]:
    torch.manual_seed(seed)
    model, x = Blocks().double(), torch.randn(7, 5, 4, dtype=torch.float64)
    batches: list[Batch] = [(x[:4], torch.tensor([0, 1, 2, 0])), (x[4:], torch.tensor([0, 1, 2]))]
    return model, batches, sc.trace(model, x[:2])


def slow_influence(model: Blocks, x: Tensor) -> list[float]:
    with torch.no_grad():
        first = model.stem(x) + 1.0
        second = first + model.b(torch.relu(model.a(first)))
        third = second + model.c(torch.tanh(second))
    pairs = ((first, second), (second, third))
    return [1 - float(functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]


def test_block_influence_against_the_textbook() -> None:
    model, batches, graph = blocks()
    found = score(model, batches, graph=graph, criterion="block_influence", granularity="layer")
    expected = slow_influence(model, torch.cat([x for x, _ in batches]))
    assert found.values["layers:layer"].tolist() == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(slow_influence(model, batches[0][0]), rel=1e-6)


def test_sums_of_other_collectors_are_not_counted() -> None:
    model, batches, graph = blocks()
    alone = score(model, batches, graph=graph, criterion="block_influence", granularity="layer")
    many = score(
        model, batches, functional.cross_entropy, graph=graph, granularity="layer",
        criterion=["taylor", "block_influence", "activation_variance", "gradient"],
    )  # fmt: skip
    torch.testing.assert_close(
        many["block_influence"].values["layers:layer"], alone.values["layers:layer"]
    )


def test_a_model_that_adds_otherwise_is_refused() -> None:
    model, batches, graph = blocks()
    model.extra = True
    with pytest.raises(ScoringError, match=r"the model made 3 sums .*, and 2 when the model was"):
        score(model, batches, graph=graph, criterion="block_influence", granularity="layer")


def test_block_influence_is_not_for_other_units() -> None:
    with pytest.raises(ConfigError, match="block_influence is not defined for neuron units"):
        scored(mlp(), "block_influence")


def test_cosines_of_zeros() -> None:
    zero, one = torch.zeros(2), torch.tensor([1.0, 0.0])
    found = cosine(torch.stack([zero, zero, one, one]), torch.stack([zero, one, one, -one]), 1)
    assert found.tolist() == [1.0, 0.0, 1.0, -1.0]


class Encoder(nn.Module):
    """Post-norm transformer blocks of torch, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).mean(1))
        return out


def test_block_influence_of_an_encoder() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(3, 5, 8)
    graph = sc.trace(model, x)
    found = score(model, [(x, None)], graph=graph, criterion="block_influence", granularity="layer")
    expected = []
    with torch.no_grad():
        h = x
        for layer in model.encoder.layers:
            for branch, norm in ((layer._sa_block, layer.norm1), (layer._ff_block, layer.norm2)):
                more = branch(h, None, None) if norm is layer.norm1 else branch(h)
                expected.append(1 - float(functional.cosine_similarity(h, h + more, -1).mean()))
                h = norm(h + more)
    assert found.values["layers:layer"].tolist() == pytest.approx(expected, rel=1e-4)


class Squeeze(nn.Module):
    """A convolutional branch: features are channels, also where the map is as wide as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        h = h + self.norm(self.conv(h))
        out: Tensor = self.head(h.mean((2, 3)))
        return out


@pytest.mark.parametrize("size", [3, 4])
def test_features_of_a_map_are_its_channels(size: int) -> None:
    torch.manual_seed(0)
    model, x = Squeeze().eval(), torch.randn(3, 1, size, size)
    graph = sc.trace(model, x)
    found = score(model, [(x, None)], graph=graph, criterion="block_influence", granularity="layer")
    with torch.no_grad():
        h = torch.relu(model.stem(x))
        expected = 1 - cosine(h, h + model.norm(model.conv(h)), 1).mean()
    torch.testing.assert_close(found.values["layers:layer"], expected.reshape(1), rtol=1e-4, atol=0)
