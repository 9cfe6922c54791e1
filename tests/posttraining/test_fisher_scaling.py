"""Scales of kept units, against least squares by numpy over every position."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateurs as sc
from secateurs.errors import ConfigError
from secateurs.masks import apply_masks_, check_masks
from secateurs.posttraining import scaling
from secateurs.posttraining.scaling import tune_scales_
from secateurs.tasks.models import RecurrentClassifier
from secateurs.types import Counts, Graph, Plan, Scores
from tests.posttraining.plans import random_plan, same, tensors_of
from tests.posttraining.test_fisher_gates import CASES, texts, tiny

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class TwoLayers(nn.Module):
    """A product behind a ReLU; units 0 and 1 are equal, so that one can stand for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)
        with torch.no_grad():
            self.fc1.weight[1], self.fc1.bias[1] = self.fc1.weight[0], self.fc1.bias[0]
            self.fc2.weight[:, 1] = 2.0 * self.fc2.weight[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return out


def cut(net: nn.Module, gone: dict[str, list[int]], x: Tensor) -> tuple[nn.Module, Plan, Graph]:
    """A masked copy, its plan, and the graph of the dense model."""
    graph = sc.trace(net, x)
    values = {n: torch.ones(graph.targets[n].n_units) for n in gone}
    for name, units in gone.items():
        values[name][units] = 0.0
    counts = {n: graph.targets[n].n_units - len(units) for n, units in gone.items()}
    plan = sc.select(Scores(graph, values, "given"), Counts(counts, sc.Budget(units=0.5)))
    model = copy.deepcopy(net)
    apply_masks_(model, plan.masks)
    return model, plan, graph


def test_a_twin_that_goes_is_made_up_for_exactly() -> None:
    net, x = TwoLayers().double(), torch.randn(40, 3, dtype=torch.float64)
    name = "fc1:neuron"
    model, plan, graph = cut(net, {name: [1]}, x)
    won, scales = tune_scales_(model, net, plan, [(x, None)], graph=graph, damping=0.0)
    # Twice itself beside the one it was: three times; all others are right as they are.
    torch.testing.assert_close(
        scales["fc2.weight"][[0, 2, 3, 4]], torch.tensor([3.0, 1, 1, 1]).double()
    )
    torch.testing.assert_close(model(x), net(x))
    assert won.after["error"] < 1e-6 < won.before["error"]
    assert won.changed == ("fc2.weight",)
    check_masks(model, plan.masks)
    sc.verify(model, sc.shrink(model, plan, x), plan, x)


def numpy_scales(
    model: nn.Module, dense: nn.Module, x: Tensor, keep: list[int], damping: float
) -> FloatArray:
    """One row for each output of each sample, one column for each kept unit."""
    assert isinstance(model, TwoLayers)
    assert isinstance(dense, TwoLayers)
    h = torch.relu(model.fc1(x)).detach().numpy()
    w = model.fc2.weight.detach().numpy()
    a = np.stack([(h[:, [u]] * w[:, u]).reshape(-1) for u in keep], axis=1)
    b = (dense(x) - model.fc2.bias).detach().numpy().reshape(-1)
    m = float(np.mean(np.sum(a**2, axis=0)))
    pull = np.sqrt(damping * m)
    rows = np.vstack([a, pull * np.eye(len(keep))])
    found: FloatArray = np.linalg.lstsq(rows, np.append(b, pull * np.ones(len(keep))), rcond=None)[
        0
    ]
    return found


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_equals_least_squares_of_numpy(damping: float) -> None:
    net, x = TwoLayers().double(), torch.randn(40, 3, dtype=torch.float64)
    model, plan, graph = cut(net, {"fc1:neuron": [1, 3]}, x)
    expected = numpy_scales(model, net, x, [0, 2, 4], damping)
    batches = [(part, None) for part in torch.split(x, 16)]
    _, scales = tune_scales_(model, net, plan, batches, graph=graph, damping=damping)
    np.testing.assert_allclose(scales["fc2.weight"][[0, 2, 4]].numpy(), expected, atol=1e-6)


def test_the_oracle_finds_a_planted_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = TwoLayers().double(), torch.randn(40, 3, dtype=torch.float64)
    model, plan, graph = cut(net, {"fc1:neuron": [1, 3]}, x)
    expected = numpy_scales(model, net, x, [0, 2, 4], 0.01)
    honest = scaling._least_squares
    monkeypatch.setattr(scaling, "_least_squares", lambda g, c, d: honest(g, 1.1 * c, d))
    _, scales = tune_scales_(model, net, plan, [(x, None)], graph=graph)
    assert np.abs(scales["fc2.weight"][[0, 2, 4]].numpy() - expected).max() > 1e-3


def test_layers_are_solved_one_behind_the_other_and_none_becomes_worse() -> None:
    net, batches = tiny(), texts(30)
    graph = sc.trace(net, batches[0][0])
    plan = random_plan(graph)
    model = copy.deepcopy(net)
    apply_masks_(model, plan.masks)
    won, scales = tune_scales_(
        model, net, plan, batches, graph=graph, loss_fn=functional.cross_entropy
    )
    assert sorted(scales) == sorted(
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("out", "fc2")
    )
    assert won.after["error"] < won.before["error"]
    assert set(won.before) == set(won.after)
    check_masks(model, plan.masks)
    # One scale for a whole head: its positions share it.
    line = scales["blocks.0.out.weight"].view(2, 4)
    assert torch.equal(line, line[:, :1].expand(2, 4))
    assert model.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", ["encoder-post-norm", "hf_bert", "hf_llama_gqa", "hf_gpt2"])
def test_attention_of_every_kind_is_tuned_and_shrinks(name: str) -> None:
    net, inputs = CASES[name].build()
    graph = sc.trace(net, inputs, outputs=CASES[name].outputs)
    plan = random_plan(graph)
    model = copy.deepcopy(net)
    apply_masks_(model, plan.masks)
    won, scales = tune_scales_(model, net, plan, [(inputs, None)], graph=graph)
    assert won.after["error"] < won.before["error"]
    assert won.notes == ()
    readers = {
        m.tensor
        for t in graph.groups()
        for m in t.members
        if m.role == "consumer" and dict(net.named_parameters())[m.tensor].dim() > 1
    }
    assert set(scales) == readers
    sc.verify(model, sc.shrink(model, plan, inputs), plan, inputs)


def test_a_scale_beyond_the_bound_is_not_taken() -> None:
    net, x = TwoLayers().double(), torch.randn(40, 3, dtype=torch.float64)
    model, plan, graph = cut(net, {"fc1:neuron": [1]}, x)
    before = tensors_of(model)
    won, scales = tune_scales_(model, net, plan, [(x, None)], graph=graph, damping=0.0, bound=2.5)
    assert scales == {}
    assert "fc2.weight: a scale of 3 is beyond 2.5, left" in won.notes[0]
    assert same(before, tensors_of(model))


def test_a_recurrent_layer_that_reads_its_own_states_is_left() -> None:
    net = RecurrentClassifier(nn.GRU, n_features=3, hidden=4, n_classes=2)
    x = torch.randn(8, 5, 3)
    graph = sc.trace(net, x)
    plan = random_plan(graph)
    model = copy.deepcopy(net)
    apply_masks_(model, plan.masks)
    won, scales = tune_scales_(model, net, plan, [(x, None)], graph=graph)
    assert set(scales) == {"head.weight"}
    assert won.notes == ("rnn.weight_hh_l0: what it reads depends on its own scales, left",)


def test_the_model_is_put_back_when_it_fails() -> None:
    net, x = TwoLayers().double(), torch.randn(40, 3, dtype=torch.float64)
    model, plan, graph = cut(net, {"fc1:neuron": [1]}, x)
    before, asked = tensors_of(model), []

    def fails_later(_: nn.Module) -> float:
        asked.append(1)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        tune_scales_(model, net, plan, [(x, None)], graph=graph, evaluate=fails_later)
    assert same(before, tensors_of(model))


def test_misfits_are_named() -> None:
    net, x = TwoLayers().double(), torch.randn(4, 3, dtype=torch.float64)
    model, plan, graph = cut(net, {"fc1:neuron": [1]}, x)
    with pytest.raises(ConfigError, match="damping must be at least 0"):
        tune_scales_(model, net, plan, [(x, None)], graph=graph, damping=-1.0)
    small = sc.shrink(model, plan, x)
    with pytest.raises(ConfigError, match="tune scales, then shrink"):
        tune_scales_(small, net, plan, [(x, None)], graph=graph)
    other = sc.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double(), x)
    with pytest.raises(ConfigError, match="the graph has no target fc1:neuron"):
        tune_scales_(model, net, plan, [(x, None)], graph=other)


def test_no_error_is_told_where_nothing_was_tuned() -> None:
    net, x = TwoLayers(), torch.randn(40, 3)
    model, plan, graph = cut(net, {"fc1:neuron": [1]}, x)
    won, scales = tune_scales_(model, net, plan, [(x, None)], graph=graph, bound=0.5)
    assert not scales
    assert "error" not in won.before
    assert "error" not in won.after
    assert any("is beyond 0.5, left" in note for note in won.notes)
