"""What people train with: mixed precision, checkpointing, compilation, averages, wrappers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.checkpoint import checkpoint

from secateurs.masks import check_masks, hold_masks
from tests.masks.nets import TwoLayers, adam


def net() -> TwoLayers:
    return TwoLayers(4, 6, 2)


def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "first.weight": torch.rand(6, 4, generator=generator) < 0.5,
        "last.weight": torch.rand(2, 6, generator=generator) < 0.5,
    }


X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
Y = torch.tensor([0, 1, 1])


def loss_of(model: Callable[[Tensor], Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def step(model: Callable[[Tensor], Tensor], optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss_of(model))
    optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs)


def trained_plainly(n_steps: int = 3) -> nn.Module:
    model = net()
    optimizer = adam(model)
    with hold_masks(model, optimizer, masks()):
        for _ in range(n_steps):
            step(model, optimizer)
    return model


# --- mixed precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_with_a_scaler_and_a_step_that_is_skipped(fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with hold_masks(model, optimizer, masks(), check_every=1) as held:
        for i in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model)
            torch.autograd.backward(scaler.scale(loss))
            weight = model.first.weight
            assert weight.grad is not None
            before = weight.detach().clone()
            if i == 2:  # an overflow in a kept entry
                weight.grad[masks()["first.weight"]] = torch.inf
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, weight) == (i == 2)
            held.check()
    assert scaler.get_scale() == 2.0**9
    check_masks(model, masks())


def test_an_overflow_in_removed_entries_skips_no_step() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    removed = ~masks()["first.weight"]
    poison = model.first.weight.register_hook(  # type: ignore[no-untyped-call]
        lambda g: g.masked_fill(removed, torch.inf)
    )
    before = model.first.bias.detach().clone()
    with hold_masks(model, sgd, masks()):
        torch.autograd.backward(scaler.scale(loss_of(model)))
        scaler.step(sgd)
        scaler.update()
    poison.remove()
    assert scaler.get_scale() == 4.0
    assert not torch.equal(model.first.bias, before)


# --- gradient checkpointing, functional calls, double backward ---------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = net()
    optimizer = adam(model)

    def forward(x: Tensor) -> Tensor:
        hidden = checkpoint(
            lambda y: torch.tanh(model.first(y)), x.requires_grad_(), use_reentrant=use_reentrant
        )
        out: Tensor = checkpoint(model.last, hidden, use_reentrant=use_reentrant)
        return out

    with hold_masks(model, optimizer, masks(), check_every=1) as held:
        for _ in range(3):
            step(lambda x: forward(x.clone()), optimizer)
            assert model.first.weight.grad is not None
            assert (model.first.weight.grad[~masks()["first.weight"]] == 0).all()
        held.check()
    assert same(model, trained_plainly())


def test_functional_calls_with_the_weights_of_the_model() -> None:
    model = net()
    optimizer = adam(model)

    def twice(x: Tensor) -> Tensor:
        weights: dict[str, Tensor] = dict(model.named_parameters())
        one: Tensor = torch.func.functional_call(model, weights, (x,))
        two: Tensor = torch.func.functional_call(model, weights, (x,))
        return (one + two) / 2

    with hold_masks(model, optimizer, masks(), check_every=1):
        for _ in range(3):
            step(twice, optimizer)
    assert same(model, trained_plainly())


def test_a_gradient_that_is_differentiated_again() -> None:
    """Penalty on the squared gradient of w**3: with respect to w its derivative is 36 w**3."""
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    with hold_masks(model, None, {"w": torch.tensor([True, True, False])}):
        with pytest.warns(UserWarning, match="create_graph=True will create a reference cycle"):
            torch.autograd.backward(model.w.pow(3).sum(), create_graph=True)
        first = model.w.grad
        assert first is not None
        assert first.tolist() == [3.0, 12.0, 0.0]
        model.zero_grad()
        torch.autograd.backward(first.square().sum())
        assert model.w.grad is not None
        assert model.w.grad.tolist() == [36.0, 288.0, 0.0]


def test_gradients_that_are_views_of_a_buffer_stay_in_it() -> None:
    """Loops that reduce all gradients at once keep them in one flat tensor."""
    model = net()
    flat = torch.zeros(sum(p.numel() for p in model.parameters()))
    at = 0
    for parameter in model.parameters():
        parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    with hold_masks(model, None, masks()):
        for _ in range(2):
            torch.autograd.backward(loss_of(model))
    at = 0
    for name, parameter in model.named_parameters():
        mask = masks().get(name, torch.ones_like(parameter, dtype=torch.bool)).reshape(-1)
        part = flat[at : at + parameter.numel()]
        assert part.count_nonzero()
        assert not part[~mask].count_nonzero()
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == part.data_ptr()
        at += parameter.numel()


# --- torch.compile ------------------------------------------------------------------------------


OWN_WARNING = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_with_the_names_of_the_plain_one(backend: str) -> None:
    model = net()
    compiled = torch.compile(model, backend=backend)
    optimizer = adam(model)
    with hold_masks(compiled, optimizer, masks(), check_every=1) as held:  # type: ignore[arg-type]
        for _ in range(3):
            step(compiled, optimizer)
        held.check()
    assert same(model, trained_plainly())


@pytest.mark.filterwarnings(OWN_WARNING)
def test_a_compiled_step() -> None:
    model = net()
    optimizer = adam(model)
    compiled_step = torch.compile(lambda: optimizer.step(), backend="eager")
    with hold_masks(model, optimizer, masks()) as held:
        for _ in range(3):
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(model))
            compiled_step()
            held.check()
    assert torch.allclose(
        model.first.weight, trained_plainly().get_parameter("first.weight"), atol=1e-6
    )


# --- averages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ema", "swa", "own"])
def test_averages_of_the_dense_model_are_zeroed_and_follow(kind: str) -> None:
    model = net()
    average: nn.Module
    if kind == "ema":
        decay = get_ema_avg_fn(0.5)  # type: ignore[no-untyped-call]
        average = AveragedModel(model, avg_fn=decay)
    elif kind == "swa":
        average = AveragedModel(model)
    else:
        average = copy.deepcopy(model)
    follower = average.module if isinstance(average, AveragedModel) else average
    optimizer = adam(model)
    for _ in range(2):
        step(model, optimizer)
        if isinstance(average, AveragedModel):
            average.update_parameters(model)
    kept, removed = masks()["first.weight"], ~masks()["first.weight"]
    with hold_masks(model, optimizer, masks(), averaged=[average], check_every=1) as held:
        check_masks(follower, masks())
        check_masks(average, masks())  # under the plain names too
        for i in range(4):
            step(model, optimizer)
            if isinstance(average, AveragedModel):
                average.update_parameters(model)
            else:
                with torch.no_grad():
                    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                        mean.mul_(0.5).add_(now, alpha=0.5)
            held.check()
            if i == 1:
                smaller = {**masks(), "last.weight": torch.zeros(2, 6, dtype=torch.bool)}
                held.grow(smaller)
                check_masks(follower, smaller)
            if i == 2:
                held.replace(masks())
    check_masks(follower, masks())
    weight = follower.get_parameter("first.weight")
    assert (weight[kept] != 0).all()
    assert (weight[removed] == 0).all()


# --- copies and files ---------------------------------------------------------------------------


def test_copies_and_files_made_inside_are_plain() -> None:
    model = net()
    optimizer = adam(model)
    keys = list(model.state_dict())
    with hold_masks(model, optimizer, masks(), check_every=1):
        step(model, optimizer)
        assert list(model.state_dict()) == keys
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert same(twin, model)
            assert all(not p._post_accumulate_grad_hooks for p in twin.parameters())
        other = copy.deepcopy(optimizer)
        assert not other._optimizer_step_pre_hooks
        assert not other._optimizer_step_post_hooks
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
    fresh = net()
    again = adam(fresh)
    things: list[Any] = [fresh, again]
    for thing, state in zip(things, torch.load(file), strict=True):
        thing.load_state_dict(state)
    with hold_masks(fresh, again, masks(), check_every=1):
        for _ in range(2):
            step(fresh, again)
    assert same(fresh, trained_plainly())


# --- wrappers -----------------------------------------------------------------------------------


def test_an_optimizer_inside_another_is_followed() -> None:
    class Around(torch.optim.Optimizer):
        """As Accelerate does it: an optimizer by class, without anything of one."""

        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.optimizer.step()

    model = net()
    around = Around(adam(model))
    with hold_masks(model, around, masks(), check_every=1) as held:
        torch.autograd.backward(loss_of(model))
        around.step()
        held.check()
    assert same(model, trained_plainly(1))


def test_the_names_of_a_wrapped_model_work_too() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = Wrapper(Wrapper(net()))
    plain = masks()
    full = {f"module.module.{name}": mask for name, mask in plain.items()}
    for given in (plain, full):
        with hold_masks(model, None, given) as held:
            assert held.masks.keys() == given.keys()
            check_masks(model, plain)


def test_weights_for_two_optimizers_are_masked_by_the_one_that_moves_them() -> None:
    model = net()
    optimizers = [
        torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.Adam(model.last.parameters(), lr=0.1, weight_decay=0.1),
    ]
    with hold_masks(model, optimizers, masks(), check_every=1) as held:
        for i in range(4):
            optimizers[i % 2].zero_grad()
            torch.autograd.backward(loss_of(model))
            optimizers[i % 2].step()
            held.check()


def test_a_group_that_is_added_later_is_held() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.last.parameters(), lr=0.05, weight_decay=0.1)
    with hold_masks(model, optimizer, masks(), check_every=1) as held:
        step(model, optimizer)
        optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 0.5})
        for _ in range(2):
            step(model, optimizer)
            held.check()
        assert (optimizer.state[model.first.weight]["exp_avg"][~masks()["first.weight"]] == 0).all()
