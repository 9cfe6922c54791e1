"""Masks that give entries back, and the gradient that removed entries would get."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError
from secateurs.masks import check_masks, hold_masks
from tests.masks.nets import row as layer
from tests.masks.nets import row_masks as masks
from tests.masks.nets import train_row as train


def test_masks_are_copies_under_the_given_names() -> None:
    model = layer()
    given = {**masks(0), "bias": torch.tensor([True])}
    with hold_masks(model, None, given) as held:
        given["weight"].fill_(True)
        held.masks["weight"].fill_(True)
        assert {name: mask.tolist() for name, mask in held.masks.items()} == {
            "weight": [[True, False, False, False]],
            "bias": [True],
        }
        held.replace(masks(1, 2))
        assert {name: mask.tolist() for name, mask in held.masks.items()} == {
            "weight": [[False, True, True, False]]
        }


def test_what_is_given_back_starts_at_zero_and_trains() -> None:
    model = layer()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    with hold_masks(model, adam, masks(0, 1)) as held:
        train(model, adam)
        held.replace(masks(1, 2))
        assert model.weight[0, [0, 2, 3]].tolist() == [0, 0, 0]
        moment = adam.state[model.weight]["exp_avg"]
        assert moment[0, [0, 2, 3]].tolist() == [0, 0, 0]
        assert moment[0, 1] != 0
        train(model, adam)
        check_masks(model, masks(1, 2))
        assert model.weight[0, 2] != 0
        assert moment[0, 2] != 0
        assert moment[0, [0, 3]].tolist() == [0, 0]
    check_masks(model, masks(1, 2))
    assert not model.weight._post_accumulate_grad_hooks


def test_misfits_leave_the_masks_held() -> None:
    model = layer()
    sgd = torch.optim.SGD(model.parameters(), lr=0.001)
    with hold_masks(model, sgd, masks(0)) as held:
        with pytest.raises(ConfigError, match="masks do not fit"):
            held.replace({"wieght": masks(0)["weight"]})
        train(model, sgd)
        check_masks(model, masks(0))
        assert held.masks.keys() == {"weight"}


def test_dense_gradients_sum_over_backward_passes_while_grad_stays_masked() -> None:
    model = layer()
    with hold_masks(model, None, masks(0, 3)) as held:
        torch.autograd.backward(model(torch.ones(1, 4)).sum())  # before: not collected
        with held.dense_gradients() as dense:
            assert dict(dense) == {}
            torch.autograd.backward(model(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum())
            model.zero_grad()  # does not clear the sum
            torch.autograd.backward(model(torch.tensor([[10.0, 20.0, 30.0, 40.0]])).sum())
        torch.autograd.backward(model(torch.ones(1, 4)).sum())  # after: not collected
        assert dense.keys() == {"weight"}
        assert dense["weight"].tolist() == [[11.0, 22.0, 33.0, 44.0]]
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[11.0, 0.0, 0.0, 41.0]]
    assert not model.weight._backward_hooks


def test_dense_gradients_of_tied_sparse_and_frozen_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 1, bias=False)
            self.two = nn.Linear(2, 1, bias=False)
            self.two.weight = self.one.weight
            self.table = nn.Embedding(3, 1, sparse=True)
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(x) + 2 * self.two(x) + self.table(torch.tensor([1, 1]))
            return out * self.frozen.sum()

    model = Tied()
    off = torch.zeros(1, 2, dtype=torch.bool)
    given = {
        "one.weight": off,
        "two.weight": off,
        "table.weight": torch.zeros(3, 1, dtype=torch.bool),
        "frozen": torch.tensor([True, False]),
    }
    with hold_masks(model, None, given) as held, held.dense_gradients() as dense:
        x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
        torch.autograd.backward(model(x).sum())
    assert {name: g.tolist() for name, g in dense.items()} == {
        "one.weight": [[6.0, 12.0]],  # 2 rows x (1 + 2) x input
        "two.weight": [[6.0, 12.0]],
        "table.weight": [[0.0], [2.0], [0.0]],  # looked up twice
    }


@pytest.mark.parametrize("when", ["at entry", "inside"])
def test_masking_one_gradient_leaves_the_others_alone(when: str) -> None:
    """Autograd may give two parameters one gradient in the same memory."""
    model = nn.Module()
    one, two = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    model.one, model.two = one, two

    def backward() -> None:
        torch.autograd.backward(((one.view(-1) + two.view(-1)) * 2.0).sum())

    if when == "at entry":
        backward()
        assert one.grad is not None
        assert two.grad is not None
        assert one.grad.data_ptr() == two.grad.data_ptr()
    with hold_masks(model, None, {"one": torch.zeros(2, 2, dtype=torch.bool)}):
        if when == "inside":
            backward()
        assert one.grad is not None
        assert two.grad is not None
        assert one.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert two.grad.tolist() == [[2.0, 2.0], [2.0, 2.0]]
