"""Means of removed inputs in biases: the mean of what a layer makes is the dense one again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs import shrink
from secateurs.errors import ConfigError, DataError, ScoringError
from secateurs.graph import trace
from secateurs.masks import apply_masks_
from secateurs.posttraining import compensate_bias, prune_layerwise, reconstruct
from secateurs.posttraining.inputs import quiet, watch_calls
from secateurs.posttraining.layers import Call
from secateurs.testing.nets import case
from secateurs.types import Batch
from tests.posttraining.plans import Mixed, random_plan, same, tensors_of


def output_mean(model: nn.Module, path: str, batches: list[Batch]) -> Tensor:
    """Mean output of one module over samples and positions, channels last."""
    rows: list[Tensor] = []

    def look(_: str, call: Call) -> None:
        out = call.output
        out = out.movedim(1, -1) if out.dim() == 4 else out
        rows.append(out.reshape(-1, out.shape[-1]).clone())

    with quiet(model):
        for x, _ in batches:
            watch_calls(model, x, {path: 1}, look)
    return torch.cat(rows).mean(0)


def test_one_hidden_layer_has_exactly_the_dense_mean_output() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches: list[Batch] = [(torch.randn(n, 4).double(), None) for n in (5, 2)]
    plan = random_plan(trace(dense, batches[0][0]))
    model = copy.deepcopy(dense)
    won = compensate_bias(model, dense, plan, batches)
    wanted = output_mean(dense, "2", batches)
    torch.testing.assert_close(output_mean(model, "2", batches), wanted)
    assert won.changed == ("2.bias",)
    assert won.after["outputs"] < won.before["outputs"]
    cut = copy.deepcopy(dense)
    apply_masks_(cut, plan.masks)  # the checker fails without the repair
    assert (output_mean(cut, "2", batches) - wanted).abs().max() > 0.01


def test_by_hand() -> None:
    dense = nn.Linear(2, 1)
    with torch.no_grad():
        dense.weight.copy_(torch.tensor([[2.0, 3.0]]))
        dense.bias.fill_(1.0)
    model = copy.deepcopy(dense)
    masks = {"weight": torch.tensor([[True, False]])}
    batches: list[Batch] = [
        (torch.tensor([[0.0, 5.0], [0.0, 6.0]]), None),
        (torch.ones(1, 2), None),
    ]
    compensate_bias(model, dense, masks, batches)
    assert model.weight.tolist() == [[2.0, 0.0]]
    assert model.bias.tolist() == [1.0 + 3.0 * 4.0]  # the mean of 5, 6, 1 is 4


class Padded(nn.Module):
    """A convolution with padding, read by a padded, grouped, transposed or plain one."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), second

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


@pytest.mark.parametrize(
    "second",
    [
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Conv2d(4, 6, 3, padding=2, stride=2, groups=2),
        nn.ConvTranspose2d(4, 3, 3, stride=2),
        nn.Conv2d(4, 3, 1),
    ],
)
def test_convolutions_keep_their_mean_over_all_positions(second: nn.Module) -> None:
    torch.manual_seed(0)
    dense = Padded(second).double()
    batches: list[Batch] = [(torch.randn(n, 2, 6, 6).double(), None) for n in (3, 2)]
    masks = {"second.weight": torch.rand_like(dense.second.weight) > 0.5}  # type: ignore[arg-type]
    model = copy.deepcopy(dense)
    compensate_bias(model, dense, masks, batches)
    wanted = output_mean(dense, "second", batches)
    torch.testing.assert_close(output_mean(model, "second", batches), wanted)


def test_a_batch_norm_takes_the_mean_where_there_is_no_bias() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 5, 5).double()
    dense = Mixed().double()
    graph = trace(dense, x)
    plan = random_plan(graph)
    model = copy.deepcopy(dense)
    won = compensate_bias(model, dense, plan, [(x, None)])
    assert "norm2.running_mean" in won.changed
    assert "point.weight: no bias; norm2.running_mean took its mean" in won.notes
    theirs, ours = (dict(m.named_buffers())["norm2.running_mean"] for m in (dense, model))
    kept = plan.masks["norm2.running_mean"]
    # What point loses: the mean of its removed inputs in the dense model, through its weights.
    with torch.no_grad():
        inputs = torch.relu(dense.depth(torch.relu(dense.norm.eval()(dense.stem(x)))))
    lost = dense.point.weight[:, :, 0, 0] * ~plan.masks["point.weight"][:, :, 0, 0]
    delta = (lost @ inputs.mean((0, 2, 3))).detach()
    torch.testing.assert_close(ours[kept], (theirs - delta)[kept])
    assert not ours[~kept].any()


def test_without_a_graph_the_layer_without_a_bias_is_told_of() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 5, 5).double()
    dense = Mixed().double()
    graph = trace(dense, x)
    loaded = replace(random_plan(graph), detail=None)  # as from a file
    model = copy.deepcopy(dense)
    won = compensate_bias(model, dense, loaded, [(x, None)])
    assert "norm2.running_mean" not in won.changed
    assert any(n.startswith("point.weight: no bias, and no batch norm") for n in won.notes)
    again = compensate_bias(copy.deepcopy(dense), dense, loaded, [(x, None)], graph=graph)
    assert "norm2.running_mean" in again.changed


class Shared(nn.Module):
    """What the second layer makes goes to a norm, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4, bias=False)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        out: Tensor = self.head(self.norm(y) + y)
        return out


def test_a_norm_that_is_not_alone_behind_the_layer_takes_nothing() -> None:
    torch.manual_seed(0)
    dense, x = Shared().eval(), torch.randn(8, 3)
    plan = random_plan(trace(dense, x).only("first"))
    model = copy.deepcopy(dense)
    before = dict(model.named_buffers())["norm.running_mean"].clone()
    won = compensate_bias(model, dense, plan, [(x, None)])
    assert torch.equal(dict(model.named_buffers())["norm.running_mean"], before)
    assert won.changed == ()
    assert "second.weight: no bias, and no batch norm alone behind it" in won.notes[0]


@pytest.mark.parametrize("net", ["mlp", "cnn", "transformer", "heads", "recurrent"])
def test_the_smaller_model_gets_the_same_repair_in_either_form(net: str) -> None:
    held = case(net)
    plan = random_plan(held.graph, 0.6)
    masked, small = copy.deepcopy(held.model), shrink(held.model, plan, held.batches[0][0])
    compensate_bias(masked, held.model, plan, held.batches)
    compensate_bias(small, held.model, plan, held.batches)
    for x, _ in held.batches:
        torch.testing.assert_close(small(x), masked(x), atol=1e-9, rtol=1e-9)


def test_the_dense_model_and_the_surroundings_stay() -> None:
    held = case("cnn")
    plan = random_plan(held.graph)
    dense, model = copy.deepcopy(held.model), held.model.train()
    before, state = tensors_of(dense), torch.random.get_rng_state()
    won = compensate_bias(model, dense, plan, held.batches, loss_fn=held.loss_fn, max_batches=2)
    assert same(tensors_of(dense), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert won.samples == 8
    now = tensors_of(model)
    masked = copy.deepcopy(dense)
    apply_masks_(masked, plan.masks)
    differs = {n for n, t in tensors_of(masked).items() if not torch.equal(t, now[n])}
    assert differs == set(won.changed)
    for name, mask in plan.masks.items():
        assert not now[name][~mask].any()


def test_states_of_a_recurrent_layer_are_left_and_told_of() -> None:
    held = case("recurrent")
    model = copy.deepcopy(held.model)
    won = compensate_bias(model, held.model, random_plan(held.graph), held.batches)
    assert set(won.changed) == {"gru.bias_ih_l0", "head.bias"}
    assert [n.split(":")[0] for n in won.notes] == ["lstm.weight_hh_l0", "gru.weight_hh_l0"]


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    held = case("mlp")
    plan = random_plan(held.graph)
    model = copy.deepcopy(held.model)
    before = tensors_of(model)
    with pytest.raises(ConfigError, match="one object"):
        compensate_bias(held.model, held.model, plan, held.batches)
    with pytest.raises(ConfigError, match=r"mask \(2, 2\), the dense tensor \(8, 6\)"):
        compensate_bias(model, held.model, {"a.weight": torch.ones(2, 2) > 0}, held.batches)
    with pytest.raises(ConfigError, match="no layer that has lost inputs"):
        compensate_bias(model, held.model, {"a.weight": torch.ones(8, 6) > 0}, held.batches)
    bad = [*held.batches, (torch.full((2, 6), float("inf")).double(), None)]
    with pytest.raises(ScoringError, match="not finite"):
        compensate_bias(model, held.model, plan, bad)
    assert same(tensors_of(model), before)


def test_a_plan_of_tied_weights_is_about_all_layers_that_read_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).relu())
            return out

    dense, batches = Tied(), [(torch.randn(40, 6) + 1, None)]
    masks = {"a.weight": torch.rand(6, 6) < 0.5}
    model = copy.deepcopy(dense)
    won = compensate_bias(model, dense, masks, batches)
    assert won.changed == ("a.bias", "b.bias")
    lost = dense.a.weight.detach().masked_fill(masks["a.weight"], 0)
    seen = dense.a(batches[0][0]).relu().mean(0)
    torch.testing.assert_close(model.b.bias, dense.b.bias + lost @ seen)


def test_an_output_that_lost_all_its_inputs_gets_their_mean() -> None:
    dense, x = nn.Linear(3, 2), torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    model = copy.deepcopy(dense)
    masks = {"weight": torch.tensor([[False] * 3, [True] * 3])}
    won = compensate_bias(model, dense, masks, [(x, None)])
    assert won.changed == ("bias",)
    torch.testing.assert_close(model(x)[:, 0].mean(), dense(x)[:, 0].mean())
    gone = masks | {"bias": torch.tensor([False, True])}  # a unit that is removed gets nothing
    with pytest.raises(ConfigError, match="no layer that has lost inputs"):
        compensate_bias(copy.deepcopy(dense), dense, gone, [(x, None)])


class Routed(nn.Module):
    """An expert that no sample reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.cat([self.first(x), self.idle(x[:0])])
        return out


def test_layers_that_no_sample_reaches_are_named() -> None:
    dense = Routed()
    masks = {f"{name}.weight": torch.rand(3, 4) < 0.5 for name in ("first", "idle")}
    batches: list[Batch] = [(torch.randn(30, 4), None)]
    repairs: tuple[Any, ...] = (compensate_bias, reconstruct)
    for repair in repairs:
        won = repair(copy.deepcopy(dense), dense, masks, batches)
        assert "idle.weight: no sample reaches it, left" in won.notes
        assert "idle.bias" not in won.changed
    plan, won = prune_layerwise(copy.deepcopy(dense), batches, density=0.5)
    assert "idle.weight: no sample reaches it, cut by size only" in won.notes
    assert plan.masks["idle.weight"].sum() == 6
    for repair in repairs:
        with pytest.raises(DataError, match="no sample"):
            repair(copy.deepcopy(dense), dense, masks, [(torch.ones(0, 4), None)])
