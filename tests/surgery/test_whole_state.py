"""What a saved result must bring back beside its weights, and what verify says of odd models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.errors import ConfigError, SoundnessError
from secateurs.surgery.files import load_plan
from secateurs.surgery.shrinking import info_of
from secateurs.types import Plan

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two linear layers; `kind` changes what happens between or after them."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("shift", torch.randn(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.kind == "centred" and self.training:
            h = h - h.mean(1, keepdim=True)
        y: Tensor = self.b(h) + self.shift
        if self.kind == "noisy":
            y = y + 1e-6 * torch.randn_like(y)
        return y


def halved(net: nn.Module, granularity: str = "structured") -> Plan:
    graph = sc.trace(net, X)
    scores = sc.score(net, criterion="magnitude", graph=graph, granularity=granularity)
    return sc.select(scores, sc.allocate(scores, sc.Budget(units=0.5)))


def test_a_wrong_model_is_found_behind_small_noise() -> None:
    net = Net("noisy")
    plan = halved(net)
    small = sc.shrink(net, plan, X)
    found = sc.verify(net, small, plan, X)
    assert found.ok
    with torch.no_grad():
        small.get_parameter("b.weight").add_(5.0)
    with pytest.raises(SoundnessError, match="does NOT equal"):
        sc.verify(net, small, plan, X)


def test_buffers_modes_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    net = Net()
    net.a.weight.requires_grad_(False)
    net.train()
    net.a.eval()
    plan = halved(net)
    small = sc.shrink(net, plan, X)
    sc.save(small, plan, tmp_path)
    loaded = sc.load(tmp_path, Net)  # another draw of the buffer
    assert torch.equal(loaded(X), small(X))
    assert loaded.training
    assert not loaded.get_submodule("a").training
    assert not loaded.get_parameter("a.weight").requires_grad
    assert loaded.get_parameter("b.weight").requires_grad


def test_a_train_mode_that_does_something_else_is_noted() -> None:
    net = Net("centred")
    notes = info_of(sc.shrink(net, halved(net), X)).notes
    assert any("equal in eval mode only" in note for note in notes)
    plain = Net()
    assert info_of(sc.shrink(plain, halved(plain), X)).notes == ()


def test_a_loaded_plan_knows_which_weights_went(tmp_path: Path) -> None:
    net = Net()
    plan = halved(net, "weight")
    sc.save(sc.shrink(net, plan, X), plan, tmp_path)
    loaded = load_plan(tmp_path)
    assert loaded.n_removed == plan.n_removed
    for name, gone in plan.removed.items():
        assert torch.equal(loaded.removed[name], gone)


def test_weights_of_removed_units_cannot_be_kept() -> None:
    net = Net()
    plan = halved(net)
    graph = sc.trace(net, X)
    scores = sc.score(net, criterion="magnitude", graph=graph, granularity="weight")
    counts = sc.allocate(scores, sc.Budget(units=0.75))
    with pytest.raises(ConfigError, match="cannot keep"):
        sc.select(scores, counts, previous=plan)
