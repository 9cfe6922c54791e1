"""One convention for batches, and checks that leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.batches import (
    batch_size,
    call_model,
    check_batches,
    checked_loss,
    clone_inputs,
    in_mode,
    iterate,
    model_device,
    preserve,
    tensors,
    to_device,
)
from secateurs.errors import CaptureError, DataError, ScoringError

CPU = torch.device("cpu")
X, Y = torch.ones(4, 2), torch.zeros(4).long()


class Sum(nn.Module):
    """a + b, by position or by name."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


@pytest.mark.parametrize(
    "inputs", [(X, 2 * X), [X, 2 * X], {"b": 2 * X, "a": X}], ids=["tuple", "list", "dict"]
)
def test_a_model_is_called_by_the_type_of_its_inputs(inputs: Any) -> None:
    assert torch.equal(call_model(Sum(), inputs), 3 * X)
    assert batch_size(inputs) == 4


def test_small_helpers() -> None:
    assert call_model(nn.Identity(), X) is X
    assert tensors({"a": [X], "b": (1, Y)}) == [X, Y]
    assert batch_size((torch.tensor(3), X)) == 4
    with pytest.raises(DataError, match="no tensor with a batch dimension"):
        batch_size((torch.tensor(3), "x"))
    assert to_device({"a": X, "n": 3}, CPU)["n"] == 3
    twice: Any = clone_inputs((X, X))
    assert twice[0].data_ptr() != twice[1].data_ptr()
    assert model_device(nn.ReLU()) == CPU


def test_iterate_stops_and_names_what_is_no_pair() -> None:
    assert len(list(iterate([(X, Y)] * 3, CPU, max_batches=2))) == 2
    with pytest.raises(DataError, match=r"batch 1 is a tuple of length 3; expected a pair"):
        list(iterate([(X, Y), (X, Y, Y)], CPU))  # type: ignore[list-item]
    with pytest.raises(DataError, match="batch 0 is a Tensor; expected a pair"):
        list(iterate([X], CPU))  # type: ignore[list-item]
    with pytest.raises(DataError, match="batches is empty"):
        list(iterate([], CPU))


class Text(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "text"


@pytest.mark.parametrize(
    ("model", "batch", "loss", "kind", "text"),
    [
        (nn.Linear(3, 2), (X, Y), F.cross_entropy, CaptureError, "refuses the inputs"),
        (Text(), (X, Y), F.cross_entropy, CaptureError, "returns str, no tensor"),
        (nn.Linear(2, 2), (X, Y + 2), F.cross_entropy, DataError,
         r"\(4, 2\) float32 with targets \(4,\) int64"),
        (nn.Linear(2, 2), (X, "y"), F.cross_entropy, DataError, "with targets 'y'"),
        (nn.Linear(2, 2), (X, Y), lambda o, t: o.sum(1), ScoringError, r"got shape \(4,\)"),
        (nn.Linear(2, 2), (X, Y), lambda o, t: 1.0, ScoringError, "got float"),
        (nn.Linear(2, 2), (X, Y), lambda o, t: o.sum() * float("inf"), ScoringError, "loss is"),
    ],
)  # fmt: skip
def test_a_loss_that_is_no_finite_scalar(
    model: nn.Module, batch: Any, loss: Any, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        checked_loss(model, batch, loss, "batch 0")
    with pytest.raises(kind, match=f"^batch 0: .*{text}"):
        check_batches(model, [batch], loss)


def test_a_loss_of_one_element_becomes_a_scalar() -> None:
    loss = checked_loss(nn.Linear(2, 2), (X, Y), lambda o, t: o.sum().reshape(1, 1))
    assert loss.shape == ()


def _generator() -> Iterator[Any]:
    yield X, Y


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (_generator(), "read only once"),
        (iter([(X, Y)]), "read only once"),
        (5, "batches is a int; expected an iterable"),
        (None, "batches is a NoneType"),
        ([], "batches is empty"),
    ],
)
def test_what_are_no_batches(batches: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        check_batches(nn.Linear(2, 2), batches, F.cross_entropy)


def test_a_model_without_a_loss_is_checked_too() -> None:
    check_batches(nn.Linear(2, 2), [(X, None)], None)
    with pytest.raises(CaptureError, match="batch 0: the model refuses the inputs"):
        check_batches(nn.Linear(3, 2), [(X, None)], None)


@pytest.mark.parametrize("fails", [False, True])
def test_a_check_leaves_model_and_random_state(fails: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    model[1].eval()
    model[0].weight.grad = torch.full((2, 2), 7.0)
    loader: Any = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), batch_size=2, shuffle=True
    )
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    if fails:
        with pytest.raises(ScoringError):
            check_batches(model, loader, lambda o, t: o.sum() * float("nan"))
    else:
        check_batches(model, loader, F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert (model[0].weight.grad == 7).all()
    assert all(map(torch.equal, buffers, model.buffers()))


def test_modes_and_state_come_back_after_an_exception() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model[0].eval()
    with pytest.raises(KeyError), in_mode(model, training=True):  # noqa: PT012
        assert model[0].training
        raise KeyError
    assert [m.training for m in model.modules()] == [True, False, True]
    state = torch.get_rng_state()
    with pytest.raises(KeyError), preserve(model):  # noqa: PT012
        model.train()(torch.randn(4, 2))
        model[0].weight.grad = torch.ones(2)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].weight.grad is None
    assert (model.get_buffer("0.running_mean") == 0).all()
