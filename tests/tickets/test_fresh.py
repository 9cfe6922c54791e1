"""A sparse network that starts anew: variances, what is left alone, errors before changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from secateurs.errors import ConfigError
from secateurs.tickets import reinitialise_sparse_


def random_mask(shape: torch.Size, share: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def variance(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        out = model(x)
    return float((out[0] if isinstance(out, tuple) else out).var())


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(200, 300, bias=False), (50, 200)),
    "conv": (nn.Conv2d(32, 64, 3, bias=False), (4, 32, 9, 9)),
    "groups": (nn.Conv1d(64, 64, 3, groups=4, bias=False), (8, 64, 30)),
    "transposed": (nn.ConvTranspose1d(64, 64, 3, groups=4, bias=False), (8, 64, 30)),
}


@pytest.mark.parametrize("init", ["module", "kaiming_normal", "kaiming_uniform"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_vary_as_in_the_dense_layer(name: str, init: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert reinitialise_sparse_(layer, {}, 3, init=init)[0].done == "scaled"
    dense = variance(layer, x)
    mask = random_mask(layer.get_parameter("weight").shape, 0.1, 99)
    reinitialise_sparse_(layer, {"weight": mask}, 3, init=init)
    sparse = variance(layer, x)
    assert abs(sparse / dense - 1) < 0.1
    with torch.no_grad():  # what a dense initialisation would give: a tenth
        layer.reset_parameters()  # type: ignore[operator]
        layer.get_parameter("weight").mul_(mask)
    if init == "module":
        assert variance(layer, x) / dense < 0.2


def test_each_row_by_its_own_inputs_and_an_empty_row_stays_zero() -> None:
    layer = nn.Linear(4, 3)
    mask = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    reinitialise_sparse_(layer, {"weight": mask}, 5)
    scaled = layer.weight.detach().clone()
    reinitialise_sparse_(layer, {}, 5)
    dense = layer.weight.detach()
    torch.testing.assert_close(scaled[0], dense[0])
    torch.testing.assert_close(scaled[1, 0], 2 * dense[1, 0])
    assert not scaled[2].any()


def test_the_signal_survives_a_deep_sparse_network() -> None:
    net = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(256, 256), nn.ReLU())])
    masks = {n: random_mask(p.shape, 0.05, i) for i, (n, p) in enumerate(net.named_parameters())
             if p.dim() > 1}  # fmt: skip
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    reinitialise_sparse_(net, masks, init="kaiming_normal")
    assert 0.1 < variance(net, x) < 10


def test_recurrent_inputs_and_hidden_units_are_scaled_on_their_own() -> None:
    gru = nn.GRU(6, 5)
    masks = {"weight_ih_l0": torch.ones(15, 6, dtype=torch.bool)}
    masks["weight_ih_l0"][:, 3:] = False
    reinitialise_sparse_(gru, masks, 2, init="kaiming_normal")
    scaled = {n: p.detach().clone() for n, p in gru.named_parameters()}
    reinitialise_sparse_(gru, {}, 2)
    dense = {n: p.detach() for n, p in gru.named_parameters()}
    ih = dense["weight_ih_l0"] * masks["weight_ih_l0"]
    torch.testing.assert_close(scaled["weight_ih_l0"], ih * 2**0.5)
    torch.testing.assert_close(scaled["weight_hh_l0"], dense["weight_hh_l0"])


class Bare(nn.Module):
    """A parameter that nobody knows how to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 7.0))


def test_every_parameter_is_told_about() -> None:
    net = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), Bare(), weight_norm(nn.Linear(3, 3)),
        nn.MultiheadAttention(4, 2), nn.Embedding(5, 4),
    )  # fmt: skip
    normed = net[3].state_dict()["parametrizations.weight.original1"].clone()
    rows = {row.tensor: row for row in reinitialise_sparse_(net, {})}
    assert list(rows) == [name for name, _ in net.named_parameters()]
    assert {n for n, r in rows.items() if r.done == "scaled"} == {
        "0.weight", "4.in_proj_weight", "4.out_proj.weight",
    }  # fmt: skip
    assert {n for n, r in rows.items() if r.done == "left"} == {
        "2.scale", "3.bias", "3.parametrizations.weight.original0",
        "3.parametrizations.weight.original1",
    }  # fmt: skip
    assert rows["2.scale"].why == "Bare has no reset_parameters()"
    assert "computes it from other parameters" in rows["3.bias"].why
    assert rows["5.weight"].done == "drawn"
    assert net.get_parameter("2.scale").tolist() == [7.0] * 3
    assert torch.equal(net[3].state_dict()["parametrizations.weight.original1"], normed)


def test_tied_weights_are_scaled_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, 0] = True
    reinitialise_sparse_(net, {"1.weight": mask}, 4)
    scaled = net.get_parameter("0.weight").detach().clone()
    reinitialise_sparse_(net, {}, 4)
    torch.testing.assert_close(scaled, 2 * net.get_parameter("0.weight").detach() * mask)


def test_a_seed_decides_and_the_random_state_of_the_caller_stays() -> None:
    layer = nn.Linear(4, 3)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    reinitialise_sparse_(layer, {}, 1)
    first = layer.weight.detach().clone()
    assert torch.equal(torch.rand(1), expected)
    reinitialise_sparse_(layer, {}, 1)
    assert torch.equal(layer.weight, first)
    reinitialise_sparse_(layer, {}, 2)
    assert not torch.equal(layer.weight, first)


def test_errors_come_before_changes() -> None:
    layer = nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    with pytest.raises(ConfigError, match="masks do not fit"):
        reinitialise_sparse_(layer, {"weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ConfigError, match="unknown init"):
        reinitialise_sparse_(layer, {}, init="xavier")
    assert torch.equal(layer.weight, before)


def test_a_wrapped_model_takes_the_names_of_the_plain_one() -> None:
    net, mask = nn.Linear(4, 3), torch.eye(3, 4, dtype=torch.bool)
    rows = reinitialise_sparse_(nn.DataParallel(net), {"weight": mask}, 5)
    assert [row.done for row in rows] == ["scaled", "drawn"]
    wrapped = net.weight.detach().clone()
    reinitialise_sparse_(net, {"weight": mask}, 5)
    assert wrapped.equal(net.weight)
