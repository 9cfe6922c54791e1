"""Holding that lets through: what a rule that needs dense gradients stands on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from secateurs.errors import SoundnessError
from secateurs.masks import check_masks, hold_masks

MASK = {"weight": torch.tensor([[True, False, False]])}
OTHER = {"weight": torch.tensor([[False, True, False]])}


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def step(model: nn.Linear, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    torch.autograd.backward(model(torch.tensor([[1.0, 2.0, 3.0]])).square().sum())
    assert model.weight.grad is not None
    gradient = model.weight.grad.clone()
    optimizer.step()
    return gradient


def test_while_paused_gradients_state_and_weights_are_dense() -> None:
    model = layer()
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    with hold_masks(model, adam, MASK, check_every=1) as held:
        assert (step(model, adam) != 0).tolist() == [[True, False, False]]
        held.pause()
        assert (step(model, adam) != 0).all()
        assert (model.weight != 0).all()
        assert (adam.state[model.weight]["exp_avg"] != 0).all()
        held.resume()
        check_masks(model, MASK)
        assert not adam.state[model.weight]["exp_avg"][0, 1:].any()
        assert model.weight.grad is not None
        assert not model.weight.grad[0, 1:].any()
        assert (step(model, adam) != 0).tolist() == [[True, False, False]]


def test_masks_replaced_while_paused_zero_weights_and_leave_state() -> None:
    model = layer()
    average = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    with hold_masks(model, adam, MASK, averaged=average, check_every=1) as held:
        held.pause()
        step(model, adam)
        held.replace(OTHER)
        assert (model.weight != 0).tolist() == [[False, True, False]]
        assert not average.weight[0, [0, 2]].any()
        assert (adam.state[model.weight]["exp_avg"] != 0).all()
        held.check()  # what is let through is no leak
        loaded = copy.deepcopy(adam.state_dict())
        adam.load_state_dict(loaded)
        assert (adam.state[model.weight]["exp_avg"] != 0).all()
        assert (step(model, adam) != 0).all()
        with pytest.raises(SoundnessError):
            held.check()  # the caller has not taken the weights aside


def test_leaving_resumes() -> None:
    model = layer()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with hold_masks(model, sgd, MASK) as held:
        held.pause()
        step(model, sgd)
    check_masks(model, MASK)
    assert not sgd.state[model.weight]["momentum_buffer"][0, 1:].any()


def test_resuming_what_was_not_paused_changes_nothing() -> None:
    model = layer()
    with hold_masks(model, None, MASK) as held:
        held.resume()
        assert {n: m.tolist() for n, m in held.masks.items()} == {"weight": [[True, False, False]]}
    check_masks(model, MASK)
