"""The check finds what came back, whoever did it, and names the first parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from secateurs.errors import ConfigError, SoundnessError
from secateurs.masks import apply_masks_, check_masks, hold_masks
from tests.masks.nets import TwoLayers

MASKS = {"first.weight": torch.tensor([[True, False], [False, True]])}


def net() -> TwoLayers:
    return TwoLayers(2, 2, 1)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(model(torch.tensor([[1.0, 2.0]])).sum())
    optimizer.step()


LEAK = r"first\.weight \(2, 2\) has 1 of 2 removed entries that are not zero"


@pytest.mark.parametrize("write", ["in place", "data", "load", "other optimizer"])
def test_a_leak_between_two_steps_is_named_at_the_next(write: str) -> None:
    model = net()
    optimizer = sgd(model)
    dense = copy.deepcopy(model.state_dict())
    dense["first.weight"] = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    other = torch.optim.SGD([model.first.weight], lr=0.1)
    with hold_masks(model, optimizer, MASKS, check_every=1):
        train(model, optimizer)
        if write == "in place":
            with torch.no_grad():
                model.first.weight[0, 1] += 1.0
        elif write == "data":
            model.first.weight.data[0, 1] = 1.0
        elif write == "load":
            model.load_state_dict(dense)
        else:
            model.first.weight.grad = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # not by a backward
            other.step()
        with pytest.raises(SoundnessError, match=LEAK):
            optimizer.step()
    check_masks(model, MASKS)


def test_in_between_only_counted_writes_are_seen() -> None:
    """Every third step is looked at whole; before the others, what autograd saw being written."""
    model = net()
    optimizer = sgd(model)
    weight = model.first.weight
    with hold_masks(model, optimizer, MASKS, check_every=3):
        train(model, optimizer)  # looked at
        weight.data[0, 1] = 1.0
        train(model, optimizer)  # not seen, and zero again
        check_masks(model, MASKS)
        with torch.no_grad():
            weight[0, 1] = 1.0
        with pytest.raises(SoundnessError, match=LEAK):
            train(model, optimizer)
    model = net()
    optimizer = sgd(model)
    with hold_masks(model, optimizer, MASKS, check_every=3):
        for _ in range(3):
            train(model, optimizer)
        model.first.weight.data[0, 1] = 1.0
        with pytest.raises(SoundnessError, match=LEAK):
            train(model, optimizer)


def test_a_masked_state_that_is_loaded_is_no_leak() -> None:
    model = net()
    optimizer = sgd(model)
    with hold_masks(model, optimizer, MASKS, check_every=2):
        train(model, optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        for _ in range(3):
            train(model, optimizer)


def test_without_the_check_a_dense_state_is_masked_after_the_next_step() -> None:
    model, trained = net(), net()
    optimizer, free = sgd(model), sgd(trained)
    train(trained, free)
    with hold_masks(model, optimizer, MASKS):
        train(model, optimizer)
        model.load_state_dict(trained.state_dict())
        optimizer.load_state_dict(free.state_dict())
        moment = optimizer.state[model.first.weight]["momentum_buffer"]
        assert (moment[~MASKS["first.weight"]] == 0).all()  # at once: it would move what is kept
        assert (moment[MASKS["first.weight"]] != 0).all()
        assert (model.first.weight != 0).all()
        train(model, optimizer)
        check_masks(model, MASKS)


@pytest.mark.parametrize("kind", ["state", "average", "history"])
def test_state_and_averages_are_checked_too(kind: str) -> None:
    model = net()
    average = AveragedModel(model)
    optimizer: torch.optim.Optimizer = sgd(model)
    if kind == "history":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def loss() -> float:
        optimizer.zero_grad()
        out = model(torch.tensor([[1.0, 2.0]])).square().sum()
        torch.autograd.backward(out)
        return float(out.detach())

    with hold_masks(model, optimizer, MASKS, averaged=average, check_every=1) as held:
        optimizer.step(loss)
        held.check()
        state = optimizer.state[model.first.weight]
        if kind == "state":
            state["momentum_buffer"][0, 1] = 1.0
            expected = r"optimizer state 'momentum_buffer' of first\.weight .2, 2. has 1 of 2"
        elif kind == "history":
            state["prev_flat_grad"][1] = 1.0
            expected = "optimizer state 'prev_flat_grad' of L-BFGS"
        else:
            average.module.get_parameter("first.weight").data[0, 1] = 1.0
            expected = r"the average of first\.weight .2, 2. has 1 of 2"
        with pytest.raises(SoundnessError, match=expected):
            held.check()
        with pytest.raises(SoundnessError, match=expected):
            optimizer.step(loss)


def test_the_end_of_a_step_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eraser that erases nothing is found out by the step that needed it."""
    model = net()
    optimizer = sgd(model)
    with hold_masks(model, optimizer, MASKS, check_every=1):
        train(model, optimizer)
        monkeypatch.setattr("secateurs.masks.erasing.Eraser.erase", lambda *_: None)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
        with pytest.raises(SoundnessError, match=r"first\.weight \(2, 2\) has 2 of 2"):
            optimizer.step()


# --- parameters that are other tensors now -----------------------------------------------------


@pytest.mark.parametrize("how", ["assigned", "module", "shape"])
def test_a_replaced_parameter_is_always_named(how: str) -> None:
    model = net()
    optimizer = sgd(model)
    message = r"first\.weight \(2, 2\) is no longer the tensor whose mask is held"

    def replace() -> None:
        if how == "assigned":
            model.first.weight = nn.Parameter(torch.ones(2, 2))
        elif how == "module":
            model.first = nn.Linear(2, 2)
        else:
            model.first.weight.data = torch.ones(3, 2)

    def held_through() -> None:
        with hold_masks(model, optimizer, MASKS) as held:
            train(model, optimizer)
            replace()
            with pytest.raises(SoundnessError, match=message):
                optimizer.step()
            with pytest.raises(SoundnessError, match=message):
                held.check()

    with pytest.raises(SoundnessError, match=message):  # at exit too
        held_through()
    model = net()

    def ended_by_another_error() -> None:
        with hold_masks(model, None, MASKS):
            replace()
            raise KeyError

    with pytest.raises(KeyError):
        ended_by_another_error()


def test_a_buffer_may_be_replaced_and_is_held_on() -> None:
    class Running(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("total", torch.ones(2))

        def forward(self) -> Tensor:
            self.total = self.total + 1.0
            return (self.weight * self.total).sum()

    model = Running()
    optimizer = sgd(model)
    with hold_masks(model, optimizer, {"total": torch.tensor([True, False])}):
        for _ in range(2):
            torch.autograd.backward(model())
            optimizer.step()
            assert model.total[1] == 0
    assert model.total.tolist() == [3.0, 0.0]


def test_conversion_in_place_is_followed() -> None:
    """`model.to(dtype)` keeps the parameter objects, so nothing is lost."""
    model = net()
    optimizer = sgd(model)
    with hold_masks(model, optimizer, MASKS, check_every=1) as held:
        model.double()
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.ones(1, 2, dtype=torch.float64)).sum())
        gradient = model.first.weight.grad
        assert gradient is not None
        assert (gradient[~MASKS["first.weight"]] == 0).all()
        optimizer.step()
        held.check()
    assert model.first.weight.dtype == torch.float64


def test_thawed_parameters_are_held() -> None:
    model = net()
    model.first.requires_grad_(False)
    optimizer = sgd(model)
    with hold_masks(model, optimizer, MASKS, check_every=1):
        assert not model.first.weight.requires_grad
        train(model, optimizer)
        model.first.requires_grad_(True)
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.tensor([[1.0, 2.0]])).sum())
        gradient = model.first.weight.grad
        assert gradient is not None
        assert ((gradient == 0) == ~MASKS["first.weight"]).all()
        optimizer.step()
    assert ((model.first.weight == 0) == ~MASKS["first.weight"]).all()


# --- arguments ---------------------------------------------------------------------------------


def test_what_cannot_be_held_is_refused() -> None:
    model = net()
    with pytest.raises(ConfigError, match="check_every counts steps, at least 1; got 0"):
        hold_masks(model, None, MASKS, check_every=0).__enter__()
    graph = torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ConfigError, match=r"SGD\(differentiable=True\) cannot be held"):
        hold_masks(model, graph, MASKS).__enter__()
    with pytest.raises(ConfigError, match=r"a torch\.optim\.Optimizer, got Linear"):
        hold_masks(model, [model.first], MASKS).__enter__()  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"averaged model 0 has no first\.weight \(2, 2\)"):
        hold_masks(model, None, MASKS, averaged=nn.Linear(2, 2)).__enter__()
    of_another = sgd(net())
    with pytest.raises(ConfigError, match="holds no parameter of this model"):
        hold_masks(model, [sgd(model), of_another], MASKS).__enter__()
    assert not of_another._optimizer_step_post_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_nothing_stays_behind() -> None:
    model = net()
    optimizers = [
        torch.optim.SGD(model.first.parameters(), lr=0.1),
        torch.optim.Adam(model.last.parameters(), lr=0.1),
    ]
    with hold_masks(model, optimizers, MASKS, check_every=1):
        for optimizer in optimizers:
            train(model, optimizer)
        optimizers[1].add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        train(model, optimizers[1])
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_load_state_dict_post_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    apply_masks_(model, MASKS)
