"""Gradient health against slow independent gradients, and flags on networks whose fate is known."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateurs.diagnosis import Diagnosis, LayerHealth, compare, diagnose
from secateurs.errors import CaptureError, ConfigError, DataError, ScoringError
from secateurs.types import Batch

Init = Callable[[Tensor], object]


def _batches(width: int = 20, classes: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, width, generator=generator)
    y = torch.randint(0, classes, (60,), generator=generator)
    return [(x[:40], y[:40]), (x[40:], y[40:])]


def _mlp(activation: type[nn.Module], init: Init | None = None, depth: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(64 if i else 20, 64)
        if init is not None:
            init(linear.weight)
            nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers, nn.Linear(64, 5))


def _he(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


def _gain(gain: float) -> Init:
    return lambda weight: nn.init.normal_(weight, std=gain / math.sqrt(weight.shape[1]))


def _flags(d: Diagnosis) -> list[str]:
    return [layer.flag for layer in d.layers]


def _diagnose(model: nn.Module) -> Diagnosis:
    return diagnose(model, _batches(), nn.functional.cross_entropy)


# --- the numbers ---------------------------------------------------------------------------------


def test_numbers_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        model.get_parameter("1.weight").copy_(torch.tensor([[3.0, 4.0]]))
    d = diagnose(model, [(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 1))], lambda o, t: o.sum())
    first, last = d.layers  # hidden = (1, 2), output = 3 + 8
    assert (first.n_weights, first.zero_fraction) == (4, 0.5)
    assert first.weight_norm == pytest.approx(math.sqrt(5))
    assert first.activation_rms == pytest.approx(math.sqrt((1 + 4) / 2))
    assert first.activation_grad_norm == pytest.approx(5)  # (3, 4)
    assert first.activation_grad_rms == pytest.approx(5 / math.sqrt(2))
    assert first.grad_norm == pytest.approx(math.sqrt(2 * (9 + 16)))  # (3, 4) x (1, 1)
    assert first.grad_rms == pytest.approx(math.sqrt(50) / 2)
    assert (last.activation_rms, last.activation_grad_norm) == (11, 1)
    assert last.grad_norm == pytest.approx(math.sqrt(5))
    assert first.relative == pytest.approx(math.sqrt(50 / 5))
    assert (d.loss, d.samples) == (11, 1)


@pytest.mark.parametrize("max_batches", [None, 1])
def test_full_batch_gradient_does_not_depend_on_the_partition(max_batches: int | None) -> None:
    model = _mlp(nn.ReLU, _he, depth=3)
    d = diagnose(model, _batches(), nn.functional.cross_entropy, max_batches=max_batches)
    n = 60 if max_batches is None else 40
    x = torch.cat([b[0] for b in _batches()])[:n]
    y = torch.cat([b[1] for b in _batches()])[:n]
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    assert d.samples == n
    assert d.loss == pytest.approx(loss.item(), rel=1e-5)
    for layer in d.layers:
        weight = model.get_parameter(f"{layer.name}.weight")
        assert weight.grad is not None
        assert layer.grad_norm == pytest.approx(weight.grad.norm().item(), rel=1e-5)


def test_activation_gradients_are_per_sample() -> None:
    model = _mlp(nn.Tanh, depth=2)
    d = _diagnose(model)
    squares = 0.0
    for x, y in _batches():
        for i in range(len(x)):  # one at a time
            hidden = model[0](x[i : i + 1]).detach().requires_grad_()
            loss = nn.functional.cross_entropy(model[1:](hidden), y[i : i + 1])
            (grad,) = torch.autograd.grad(loss, hidden)
            squares += grad.square().sum().item()
    assert d.layers[0].activation_grad_norm == pytest.approx(math.sqrt(squares / 60), rel=1e-5)
    assert d.layers[0].activation_grad_rms == pytest.approx(math.sqrt(squares / 60 / 64), rel=1e-5)


class Backwards(nn.Module):
    """Registers its layers in the opposite order of their use; one is only a parameter store."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.inner = nn.ModuleDict({"store": nn.Linear(4, 4)})
        self.norm = nn.LayerNorm(4)
        self.first = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x).mean(1))
        store = self.inner["store"]
        assert isinstance(store, nn.Linear)
        y = nn.functional.linear(y, store.weight, store.bias)
        return torch.as_tensor(self.last(y))


def test_layers_come_in_execution_order() -> None:
    torch.manual_seed(0)
    batch = (torch.arange(12).reshape(6, 2) % 6, torch.arange(6) % 2)
    d = diagnose(Backwards(), [batch], nn.functional.cross_entropy)
    assert [layer.name for layer in d.layers] == ["inner.store", "first", "norm", "last"]
    store = d.layers[0]  # never called: stands with the model, without activations
    assert (store.activation_rms, store.activation_grad_norm, store.flag) == (None, None, "ok")
    assert store.grad_norm > 0
    assert d.layers[2].n_weights == 4  # the scale; the shift is a bias


def test_in_place_activations_and_frozen_layers_are_measured() -> None:
    free = _diagnose(_mlp(nn.ReLU, _he, depth=2))
    model = nn.Sequential(
        *(nn.ReLU(inplace=True) if isinstance(m, nn.ReLU) else m for m in _mlp(nn.ReLU, _he, 2))
    )
    model[0].requires_grad_(False)
    assert _diagnose(model).to_dict() == free.to_dict()
    assert not model.get_parameter("0.weight").requires_grad


# --- the flags -----------------------------------------------------------------------------------


def test_deep_sigmoid_net_vanishes_towards_the_input() -> None:
    d = _diagnose(_mlp(nn.Sigmoid))
    flags = _flags(d)
    assert flags[:8] == ["vanishing"] * 8
    assert flags[-3:] == ["ok"] * 3
    assert "vanishing, worst '0'" in d.verdict
    assert "He initialisation" in d.verdict


def test_gradients_that_underflow_are_vanishing_not_dead() -> None:
    d = _diagnose(_mlp(nn.Sigmoid, depth=60))
    assert d.layers[0].grad_norm == 0
    assert (d.layers[0].flag, d.layers[0].reason) == ("vanishing", "weight gradient underflows")


@pytest.mark.parametrize("depth", [4, 12, 30])
def test_relu_net_with_he_initialisation_is_healthy(depth: int) -> None:
    d = _diagnose(_mlp(nn.ReLU, _he, depth))
    assert set(_flags(d)) == {"ok"}
    assert d.flagged == ()
    assert d.verdict == f"All {depth + 1} layers carry a healthy signal."


@pytest.mark.parametrize(
    ("activation", "gain", "depth"), [(nn.Tanh, 5.0, 24), (nn.Identity, 4.0, 12)]
)
def test_large_initialisation_explodes_towards_the_input(
    activation: type[nn.Module], gain: float, depth: int
) -> None:
    d = _diagnose(_mlp(activation, _gain(gain), depth))
    assert d.layers[0].flag == "exploding"
    assert d.layers[-1].flag == "ok"
    assert "vanishing" not in _flags(d)
    assert "clip gradients" in d.verdict


def test_linear_net_of_small_gain_is_caught_by_its_activations() -> None:
    d = _diagnose(_mlp(nn.Identity, _gain(0.2)))
    norms = [layer.grad_norm for layer in d.layers]
    assert max(norms) / min(norms) < 10  # the weights alone would say nothing
    assert d.layers[0].flag == "vanishing"
    assert d.layers[0].reason.startswith("output gradient")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_ordinary_architectures_are_healthy() -> None:
    torch.manual_seed(0)
    convolutions: list[nn.Module] = []
    for i, o in ((3, 8), (8, 16), (16, 32)):
        convolutions += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    cnn = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    transformer = nn.Sequential(
        nn.Embedding(50, 16),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3),
        nn.Flatten(),
        nn.Linear(16 * 6, 5),
    )
    y = torch.randint(0, 5, (16,))
    for model, x in [
        (cnn, torch.randn(16, 3, 32, 32)),
        (transformer, torch.randint(0, 50, (16, 6))),
    ]:
        d = diagnose(model, [(x, y)], nn.functional.cross_entropy)
        assert d.flagged == ()


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.lstm(x)[0][:, -1]))


def test_recurrent_layer_is_one_layer_with_all_its_weights() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 10, 4), torch.arange(8) % 5
    lstm, head = diagnose(Lstm(), [(x, y)], nn.functional.cross_entropy).layers
    assert lstm.n_weights == 4 * 8 * (4 + 8) + 4 * 8 * (8 + 8)
    assert (lstm.flag, head.flag) == ("ok", "ok")


def test_not_finite_is_reported_with_its_origin() -> None:
    d = _diagnose(_mlp(nn.Identity, _gain(1e6)))
    assert set(_flags(d)) == {"exploding"}
    assert math.isnan(d.loss)
    assert "first output that is not finite is that of '12'" in d.verdict
    data = json.dumps(d.to_dict(), allow_nan=False)
    assert '"loss": "nan"' in data


def test_not_finite_weight_is_named() -> None:
    model = _mlp(nn.ReLU, _he, depth=3)
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = math.inf
    d = _diagnose(model)
    assert [x.name for x in d.layers if x.reason == "weights not finite"] == ["2"]


def test_masked_layer_is_dead_and_so_is_everything_before_it() -> None:
    model = _mlp(nn.ReLU, _he, depth=3)
    with torch.no_grad():
        model.get_parameter("2.weight").zero_()
    d = _diagnose(model)
    assert _flags(d)[:2] == ["dead", "dead"]
    assert d.layers[0].reason == "weight gradient zero everywhere"
    assert (d.layers[1].reason, d.layers[1].zero_fraction) == ("weights all zero", 1.0)
    assert "keep a minimum per layer" in d.verdict


def test_dead_units_and_unused_layers_are_dead() -> None:
    model = _mlp(nn.ReLU, _he, depth=2)
    with torch.no_grad():
        model.get_parameter("2.bias").fill_(-1e4)  # no unit ever activates
    assert _flags(_diagnose(model))[:2] == ["dead", "dead"]

    model = _mlp(nn.ReLU, _he, depth=2)
    model.add_module("spare", nn.ModuleList([nn.Linear(3, 3)]))
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)  # type: ignore[method-assign]
    spare = next(x for x in _diagnose(model).layers if x.name == "spare.0")
    assert (spare.flag, spare.reason) == ("dead", "no path to the loss")


# --- what pruning did ----------------------------------------------------------------------------


def test_compare_rows() -> None:
    model = _mlp(nn.ReLU, _he, depth=2)
    before = _diagnose(model)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.get_parameter("2.weight").zero_()
    rows = {row.name: row for row in compare(before, _diagnose(pruned))}
    assert {row.status for row in rows.values()} == {"kept"}
    assert (rows["0"].grad_ratio, rows["0"].weights_ratio) == (0.0, 1.0)
    assert (rows["0"].flag_before, rows["0"].flag_after) == ("ok", "dead")
    assert (rows["2"].weights_ratio, rows["2"].activation_ratio) == (0.0, 0.0)

    back = {row.name: row for row in compare(_diagnose(pruned), before)}
    assert back["0"].grad_ratio is None  # from nothing

    other = _diagnose(nn.Sequential(model[0], nn.ReLU(), nn.Identity(), nn.Linear(64, 5)))
    status = {row.name: row.status for row in compare(before, other)}
    assert status == {"0": "kept", "2": "removed", "4": "removed", "3": "added"}


def test_dict_and_table() -> None:
    d = _diagnose(_mlp(nn.ReLU, _he, depth=2))
    data = json.loads(json.dumps(d.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == ["0", "2", "4"]
    assert set(data["layers"][0]) == set(LayerHealth.__dataclass_fields__)
    table = d.table()
    assert [row["layer"] for row in table] == ["0", "2", "4"]
    assert table[0]["weights"] == str(20 * 64)
    assert table[0]["flag"] == "ok"


# --- nothing left changed, errors ----------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert not self.training
        return torch.as_tensor(self.drop(self.frozen(self.layer(x + torch.rand_like(x)))))


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_changed(fail: bool) -> None:
    torch.manual_seed(0)
    model = Noisy().train()
    model.drop.eval()
    model.layer.weight.grad = torch.ones(5, 20)
    grad = model.layer.weight.grad
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    accumulated: list[Tensor] = []
    weight: Tensor = model.layer.weight
    weight.register_post_accumulate_grad_hook(accumulated.append)  # type: ignore[no-untyped-call]
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if fail and calls == 2:
            raise ValueError("refused on purpose")
        return nn.functional.cross_entropy(outputs, targets)

    if fail:
        with pytest.raises(DataError, match=r"batch 1.*refused on purpose"):
            diagnose(model, _batches(), loss)
    else:
        with torch.no_grad():
            diagnose(model, _batches(), loss)
    assert calls == 2
    assert (model.training, model.drop.training) == (True, False)
    assert model.layer.weight.grad is grad
    assert model.layer.bias.grad is None
    assert torch.equal(grad, torch.ones(5, 20))
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert accumulated == []  # an optimizer that steps inside backward is not woken


def test_exported_graph_can_be_diagnosed() -> None:
    model = _mlp(nn.ReLU, _he, depth=2).eval()
    x = _batches()[0][0]
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    graph = program.module(check_guards=False)
    norms = [layer.grad_norm for layer in _diagnose(graph).layers]
    assert norms == pytest.approx([layer.grad_norm for layer in _diagnose(model).layers])


def test_errors_name_what_is_wrong() -> None:
    model, batches = _mlp(nn.ReLU, depth=1), _batches()
    ce = nn.functional.cross_entropy
    with pytest.raises(ConfigError, match="ReLU has no parameters"):
        diagnose(nn.ReLU(), batches, ce)
    with pytest.raises(ConfigError, match="max_batches must be at least 1"):
        diagnose(model, batches, ce, max_batches=0)
    with pytest.raises(DataError, match="batches is empty"):
        diagnose(model, [], ce)
    with pytest.raises(DataError, match="batch 0 has no samples"):
        diagnose(model, [(torch.zeros(0, 20), torch.zeros(0))], ce)
    with pytest.raises(CaptureError, match="batch 0: the model refuses"):
        diagnose(model, [(torch.zeros(2, 3), torch.zeros(2))], ce)
    with pytest.raises(ScoringError, match="scalar tensor that has a gradient"):
        diagnose(model, batches, lambda o, t: o)
    with pytest.raises(ScoringError, match="scalar tensor that has a gradient"):
        diagnose(model, batches, lambda o, t: o.detach().sum())
