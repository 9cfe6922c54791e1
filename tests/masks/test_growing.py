"""Masks that grow while they are held: state of new cuts is zeroed, nothing comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.errors import ConfigError, SoundnessError
from secateurs.masks import check_masks, hold_masks
from tests.masks.nets import row as layer
from tests.masks.nets import row_masks as masks
from tests.masks.nets import train_row as train


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_growing_zeroes_weight_and_state_of_what_is_cut_and_nothing_else(name: str) -> None:
    model = layer()
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
        if name == "adam"
        else torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=0.1)
    )
    with hold_masks(model, optimizer, masks(0, 1, 2)) as held:
        train(model, optimizer)
        state = optimizer.state[model.weight]
        moments = {k: v for k, v in state.items() if v is not None and v.shape == (1, 4)}
        assert moments
        before = {k: v.clone() for k, v in moments.items()}
        weight = model.weight.detach().clone()
        held.grow(masks(0, 2))
        for key, moment in moments.items():
            assert moment[0, [1, 3]].tolist() == [0, 0]
            assert torch.equal(moment[0, [0, 2]], before[key][0, [0, 2]])
        assert model.weight[0, [1, 3]].tolist() == [0, 0]
        assert torch.equal(model.weight[0, [0, 2]], weight[0, [0, 2]])
        train(model, optimizer)
        assert model.weight.grad is not None
        assert model.weight.grad[0, [1, 3]].tolist() == [0, 0]
        held.check()
    check_masks(model, masks(0, 2))
    assert not model.weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_tensor_may_be_masked_later() -> None:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    with hold_masks(model, optimizer, {}) as held:
        train(model, optimizer)
        held.grow({**masks(0), "bias": torch.tensor([False])})
        train(model, optimizer)
    assert model.weight[0, 1:].tolist() == [0, 0, 0]
    assert model.bias.tolist() == [0]


def test_what_is_cut_does_not_come_back() -> None:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    with hold_masks(model, optimizer, masks(0, 1)) as held:
        for wrong in (masks(0, 2), {}, {"bias": torch.tensor([False])}):
            with pytest.raises(ConfigError, match=r"masks may only grow: weight .1, 4. would get"):
                held.grow(wrong)
        with pytest.raises(ConfigError, match="masks do not fit"):
            held.grow({"wieght": masks(0)["weight"]})
        train(model, optimizer)
        check_masks(model, masks(0, 1))  # the first masks are held on
        assert model.bias.item() != 0


def test_tied_names_count_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 1, bias=False)
            self.two = nn.Linear(4, 1, bias=False)
            self.two.weight = self.one.weight

    model = Tied()
    first = {"one.weight": masks(0, 1, 2)["weight"], "two.weight": masks(0, 1, 3)["weight"]}
    with hold_masks(model, None, first) as held:
        held.grow({"two.weight": masks(0)["weight"]})
        with pytest.raises(ConfigError, match="only grow"):
            held.grow({"one.weight": masks(0, 3)["weight"]})
    assert (model.one.weight != 0).tolist() == [[True, False, False, False]]


def test_the_check_sees_a_leak() -> None:
    model = layer()
    with hold_masks(model, None, masks(0)) as held:
        held.grow(masks(0))
        held.check()
        with torch.no_grad():
            model.weight[0, 3] = 1.0
        with pytest.raises(SoundnessError, match="1 of 3 removed entries"):
            held.check()
