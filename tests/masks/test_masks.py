"""Masks: what is removed is zero, stays zero, and training is otherwise the textbook one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.errors import ConfigError, SoundnessError
from secateurs.masks import (
    apply_masks_,
    bake_masks_,
    check_masks,
    combine,
    hold_masks,
    model_sparsity,
    sparsity,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def net_masks() -> dict[str, Tensor]:
    """Half of the first weight, one unit of the norm, a column of the last weight."""
    first = torch.rand(8, 6) > 0.5
    unit = torch.ones(8, dtype=torch.bool)
    unit[2] = False
    last = torch.ones(3, 8, dtype=torch.bool)
    last[:, 2] = False
    return {
        "0.weight": first,
        "1.weight": unit,
        "1.bias": unit.clone(),
        "1.running_mean": unit.clone(),
        "3.weight": last,
    }


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def train_step(model: nn.Module, optimizer: Optimizer | None, clip: float | None = None) -> None:
    x, y = data()
    if optimizer is not None:
        optimizer.zero_grad()
    torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    if optimizer is not None:
        optimizer.step()


def n_hooks(model: nn.Module, optimizer: Optimizer) -> int:
    on_tensors = sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())
    return on_tensors + len(optimizer._optimizer_step_post_hooks)


# --- zero once -------------------------------------------------------------------------------


def test_apply_zeroes_parameters_and_buffers_and_nothing_else() -> None:
    model = nn.BatchNorm1d(3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        assert model.running_mean is not None
        model.running_mean.copy_(torch.tensor([4.0, 5.0, 6.0]))
    keep = torch.tensor([True, False, True])
    apply_masks_(model, {"weight": keep, "running_mean": keep})
    assert model.weight.tolist() == [1.0, 0.0, 3.0]
    assert model.running_mean.tolist() == [4.0, 0.0, 6.0]
    assert model.bias.tolist() == [0.0, 0.0, 0.0]


def test_apply_writes_positive_zero_over_anything() -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[math.nan, math.inf, -0.0, -1.0]]))
    apply_masks_(layer, {"weight": torch.zeros(1, 4, dtype=torch.bool)})
    assert [math.copysign(1, w) for w in layer.weight[0].tolist()] == [1.0] * 4
    assert layer.weight.tolist() == [[0.0] * 4]


def test_every_misfit_is_listed_and_nothing_is_applied() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    masks = {
        "0.weight": torch.zeros(8, 6, dtype=torch.bool),
        "0.weigth": torch.ones(8, 6, dtype=torch.bool),
        "3.weight": torch.ones(8, 3, dtype=torch.bool),
        "3.bias": torch.ones(3),
        "1.num_batches_tracked": torch.tensor(True),
    }
    with pytest.raises(ConfigError) as caught:
        apply_masks_(model, masks)
    text = str(caught.value)
    assert "0.weigth: the model has no such parameter or buffer. Did you mean '0.weight'?" in text
    assert "3.weight: mask (8, 3), tensor (3, 8)" in text
    assert "3.bias: a mask is a bool tensor (True = keep), got torch.float32" in text
    assert "1.num_batches_tracked: only floating-point tensors" in text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x))
        return out


@pytest.mark.parametrize(
    "names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]]
)
def test_tied_parameters_may_be_named_either_way(names: list[str]) -> None:
    model = Tied()
    mask = torch.rand(4, 3) > 0.5
    masks = dict.fromkeys(names, mask)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with hold_masks(model, sgd, masks):
        for _ in range(3):
            sgd.zero_grad()
            torch.autograd.backward(
                nn.functional.cross_entropy(model(torch.arange(4)), torch.arange(4))
            )
            sgd.step()
    check_masks(model, masks)
    assert (model.embed.weight[~mask] == 0).all()
    assert (model.head.weight[mask] != 0).all()


# --- check and bake --------------------------------------------------------------------------


def test_check_fails_on_a_leak_and_names_it() -> None:
    model, masks = small_net(), net_masks()
    apply_masks_(model, masks)
    check_masks(model, masks)
    with torch.no_grad():
        model.get_parameter("3.weight")[0, 2] = 1e-30
        model.get_parameter("3.weight")[1, 2] = math.nan
    with pytest.raises(SoundnessError, match=r"3\.weight \(3, 8\) has 2 of 3 removed entries"):
        check_masks(model, masks)


def test_check_counts_negative_zero_as_zero() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(-0.0)
    check_masks(layer, {"weight": torch.tensor([[False]])})


def test_after_bake_nothing_holds() -> None:
    model, masks = small_net(), net_masks()
    bake_masks_(model, masks)
    check_masks(model, masks)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, sgd)
    with pytest.raises(SoundnessError):
        check_masks(model, masks)


# --- hold ------------------------------------------------------------------------------------

MakeOptimizer = Callable[[nn.Module], Optimizer]


def _sgd(**options: object) -> MakeOptimizer:
    return lambda m: torch.optim.SGD(m.parameters(), lr=0.05, **options)  # type: ignore[arg-type]


def _adam(**options: object) -> MakeOptimizer:
    return lambda m: torch.optim.Adam(m.parameters(), lr=0.05, **options)  # type: ignore[arg-type]


def _adamw(**options: object) -> MakeOptimizer:
    return lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, **options)  # type: ignore[arg-type]


def _rms(**options: object) -> MakeOptimizer:
    return lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, **options)  # type: ignore[arg-type]


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": _sgd(),
    "sgd decay": _sgd(weight_decay=0.1),
    "sgd momentum": _sgd(momentum=0.9, weight_decay=0.1, dampening=0.1),
    "sgd nesterov": _sgd(momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd foreach": _sgd(momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd loop": _sgd(momentum=0.9, weight_decay=0.1, foreach=False),
    "sgd fused": _sgd(momentum=0.9, weight_decay=0.1, fused=True),
    "adam": _adam(),
    "adam amsgrad decay": _adam(amsgrad=True, weight_decay=0.1),
    "adam foreach": _adam(foreach=True),
    "adam loop": _adam(foreach=False),
    "adam fused": _adam(fused=True, weight_decay=0.1),
    "adamw": _adamw(weight_decay=0.1),
    "adamw foreach": _adamw(weight_decay=0.1, foreach=True),
    "rmsprop": _rms(momentum=0.9, centered=True, weight_decay=0.1),
    "rmsprop foreach": _rms(momentum=0.9, foreach=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("clip", [None, 0.1], ids=["no clip", "clip"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_removed_entries_stay_zero_through_dense_warm_up_and_masked_steps(
    name: str, clip: float | None
) -> None:
    model, masks = small_net(), net_masks()
    optimizer = OPTIMIZERS[name](model)
    for _ in range(3):  # fills momentum and moments of entries that are removed later
        train_step(model, optimizer)
    kept = masks["0.weight"].clone()
    kept[2] = False  # behind the removed unit: no gradient
    before = model.get_parameter("0.weight").detach()[kept].clone()
    parameters = dict(model.named_parameters())
    with hold_masks(model, optimizer, masks):
        _assert_state_masked(optimizer, parameters, masks)
        for _ in range(20):
            train_step(model, optimizer, clip)
            check_masks(model, masks)
            _assert_state_masked(optimizer, parameters, masks)
    check_masks(model, masks)
    assert (model.get_parameter("0.weight").detach()[kept] != before).all()
    assert n_hooks(model, optimizer) == 0


def _assert_state_masked(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter], masks: dict[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        for value in optimizer.state[parameter].values():
            if name in masks and isinstance(value, Tensor) and value.shape == parameter.shape:
                assert (value[~masks[name]] == 0).all()


@pytest.mark.parametrize("name", ["sgd momentum", "adam", "adamw", "rmsprop"])
def test_without_holding_the_same_run_leaks(name: str) -> None:
    model, masks = small_net(), net_masks()
    optimizer = OPTIMIZERS[name](model)
    apply_masks_(model, masks)
    train_step(model, optimizer)
    with pytest.raises(SoundnessError):
        check_masks(model, masks)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_a_textbook_loop_with_multiplied_masks(nesterov: bool) -> None:
    x = torch.randn(16, 5, dtype=torch.float64)
    y = torch.randn(16, 2, dtype=torch.float64)
    model = nn.Linear(5, 2).double()
    mask = torch.rand(2, 5) > 0.4
    lr, mu, decay = 0.05, 0.9, 0.02

    weight, bias = model.weight.detach().clone() * mask, model.bias.detach().clone()
    velocity: list[Tensor | None] = [None, None]
    for _ in range(25):
        error = (x @ weight.T + bias - y) * (2 / y.numel())
        gradients = [(error.T @ x) * mask, error.sum(0)]
        for i, (w, g) in enumerate(zip((weight, bias), gradients, strict=True)):
            g = g + decay * w
            old = velocity[i]
            velocity[i] = v = g if old is None else mu * old + g
            w -= lr * (g + mu * v if nesterov else v)
        weight *= mask

    sgd = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=mu, weight_decay=decay, nesterov=nesterov
    )
    with hold_masks(model, sgd, {"weight": mask}):
        for _ in range(25):
            sgd.zero_grad()
            torch.autograd.backward(nn.functional.mse_loss(model(x), y))
            sgd.step()
    assert torch.allclose(model.weight, weight, rtol=0, atol=1e-12)
    assert torch.allclose(model.bias, bias, rtol=0, atol=1e-12)


def test_masked_adam_equals_adam_on_a_model_that_never_had_the_weights() -> None:
    """Removing input columns and holding = training a narrower layer on the kept inputs."""
    x = torch.randn(16, 6, dtype=torch.float64)
    y = torch.randn(16, 2, dtype=torch.float64)
    wide, narrow = nn.Linear(6, 2).double(), nn.Linear(4, 2).double()
    columns = torch.tensor([0, 1, 3, 5])
    with torch.no_grad():
        narrow.weight.copy_(wide.weight[:, columns])
        narrow.bias.copy_(wide.bias)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, columns] = True

    def run(model: nn.Module, inputs: Tensor, masks: dict[str, Tensor]) -> None:
        adam = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        with hold_masks(model, adam, masks):
            for _ in range(20):
                adam.zero_grad()
                torch.autograd.backward(nn.functional.mse_loss(model(inputs), y))
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                adam.step()

    run(wide, x, {"weight": mask})
    run(narrow, x[:, columns], {})
    assert torch.allclose(wide.weight[:, columns], narrow.weight, rtol=0, atol=1e-10)
    assert torch.allclose(wide.bias, narrow.bias, rtol=0, atol=1e-10)


def test_clipping_sees_only_kept_gradients() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with hold_masks(layer, None, {"weight": torch.tensor([[True, False]])}):
        torch.autograd.backward(layer(torch.tensor([[3.0, 1000.0]])).sum())
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 10.0)
    assert norm.item() == pytest.approx(3.0)
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[3.0, 0.0]]


def test_a_nan_gradient_of_a_removed_entry_does_not_leak() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    poison = layer.weight.register_hook(  # type: ignore[no-untyped-call]
        lambda g: torch.stack([g[:, 0], torch.full_like(g[:, 1], math.nan)], dim=1)
    )
    with hold_masks(layer, sgd, {"weight": torch.tensor([[True, False]])}):
        torch.autograd.backward(layer(torch.ones(1, 2)).sum())
        assert layer.weight.grad is not None
        assert layer.weight.grad.tolist() == [[1.0, 0.0]]
        sgd.step()
        layer.weight.grad.fill_(math.nan)  # set by hand: no backward, so only the step is followed
        layer.weight.grad[0, 0] = 0.0
        sgd.step()
    poison.remove()
    assert torch.isfinite(layer.weight).all()
    assert layer.weight[0, 1].item() == 0
    assert torch.isfinite(sgd.state[layer.weight]["momentum_buffer"]).all()


def test_gradients_that_exist_at_entry_are_masked() -> None:
    layer = nn.Linear(2, 1, bias=False)
    torch.autograd.backward(layer(torch.ones(1, 2)).sum())
    with hold_masks(layer, None, {"weight": torch.tensor([[True, False]])}):
        assert layer.weight.grad is not None
        assert layer.weight.grad.tolist() == [[1.0, 0.0]]
        torch.autograd.backward(layer(torch.ones(1, 2)).sum())  # accumulates
        assert layer.weight.grad.tolist() == [[2.0, 0.0]]


def test_frozen_and_absent_parameters() -> None:
    model, masks = small_net(), net_masks()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)  # no Linear in it
    with hold_masks(model, optimizer, masks):
        for _ in range(3):
            train_step(model, optimizer)
        check_masks(model, masks)
    check_masks(model, masks)
    assert n_hooks(model, optimizer) == 0


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = small_net()
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with (
        pytest.raises(ConfigError, match="holds no parameter of this model"),
        hold_masks(model, other, net_masks()),
    ):
        pass


def test_hooks_go_and_masks_stay_applied_after_an_exception() -> None:
    model, masks = small_net(), net_masks()
    optimizer = torch.optim.Adam(model.parameters())
    with hold_masks(model, optimizer, masks):
        assert n_hooks(model, optimizer) == 4 + 1  # four masked parameters, one step hook
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with hold_masks(model, optimizer, masks):
            train_step(model, optimizer)
            nn.init.ones_(model.get_parameter("0.weight"))
            raise KeyboardInterrupt
        raise KeyboardInterrupt
    assert n_hooks(model, optimizer) == 0
    check_masks(model, masks)


def test_buffers_that_drift_in_the_forward_pass_are_zero_again_at_exit() -> None:
    norm = nn.BatchNorm1d(2)
    masks = {"running_mean": torch.tensor([True, False])}
    with hold_masks(norm, None, masks):
        norm(torch.ones(4, 2))
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == pytest.approx([0.1, 0.0])


def test_state_dict_and_deepcopy_are_unaffected_inside() -> None:
    model, masks = small_net(), net_masks()
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold_masks(model, optimizer, masks):
        assert list(model.state_dict()) == keys
        twin = copy.deepcopy(model)
        assert all(not p._post_accumulate_grad_hooks for p in twin.parameters())
        assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
        free = torch.optim.SGD(twin.parameters(), lr=0.1)
        train_step(twin, free)  # nobody holds the copy's masks
        with pytest.raises(SoundnessError):
            check_masks(twin, masks)
        check_masks(model, masks)


def test_torch_compile_inside_and_outside_gives_the_same_training() -> None:
    plain, masks = small_net(), net_masks()
    compiled_inside, compiled_before = copy.deepcopy(plain), copy.deepcopy(plain)

    def run(model: nn.Module, compile_when: str) -> None:
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run_with: nn.Module = model
        if compile_when == "before":
            run_with = torch.compile(model, backend="eager")  # type: ignore[assignment]
        with hold_masks(model, sgd, masks):
            if compile_when == "inside":
                run_with = torch.compile(model, backend="eager")  # type: ignore[assignment]
            for _ in range(3):
                train_step(run_with, sgd)
        check_masks(model, masks)

    run(plain, "never")
    run(compiled_inside, "inside")
    run(compiled_before, "before")
    for other in (compiled_inside, compiled_before):
        for a, b in zip(plain.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_sparse_gradients() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    mask = torch.rand(5, 3) > 0.5
    sgd = torch.optim.SGD(table.parameters(), lr=0.1)
    before = table.weight.detach().clone()
    with hold_masks(table, sgd, {"weight": mask}):
        for _ in range(3):
            sgd.zero_grad()
            torch.autograd.backward(table(torch.tensor([1, 1, 4])).square().sum())
            assert table.weight.grad is not None
            assert (table.weight.grad.to_dense()[~mask] == 0).all()
            sgd.step()
    check_masks(table, {"weight": mask})
    touched = mask.clone()
    touched[[0, 2, 3]] = False
    assert (table.weight[touched] != before[touched]).all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_dtype_and_memory_layout(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Removed entries become +0 whatever they held; kept ones keep their bits, NaN included."""
    values = torch.randn(2, 3, 4, 4).to(dtype)
    values[0, 0, 0, 0] = values[1, 1, 1, 1] = math.nan
    model = nn.Module()
    model.kernel = nn.Parameter(values.to(memory_format=layout))
    mask = torch.rand(2, 3, 4, 4) > 0.5
    mask[0, 0, 0, 0], mask[1, 1, 1, 1] = True, False
    with hold_masks(model, None, {"kernel": mask}):
        expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
        assert torch.allclose(model.kernel.detach(), expected, rtol=0, atol=0, equal_nan=True)
        gradient = torch.randn(2, 3, 4, 4).to(dtype)
        torch.autograd.backward(model.kernel, gradient)
        assert model.kernel.grad is not None
        assert torch.equal(model.kernel.grad, torch.where(mask, gradient, expected[~mask][0]))


def test_a_masked_lstm_learns() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2)
    masks = {name: torch.rand_like(p) > 0.5 for name, p in lstm.named_parameters()}
    adam = torch.optim.Adam(lstm.parameters(), lr=0.02, weight_decay=0.01)
    x, losses = torch.randn(7, 5, 3), []
    with hold_masks(lstm, adam, masks):
        for _ in range(30):
            adam.zero_grad()
            loss = (lstm(x)[0] - 0.5).square().mean()
            torch.autograd.backward(loss)
            adam.step()
            losses.append(loss.item())
        check_masks(lstm, masks)
    assert losses[-1] < 0.7 * losses[0]


def test_a_scalar_parameter_keeps_the_step_counter() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    adam = torch.optim.Adam(model.parameters())
    with hold_masks(model, adam, {"scale": torch.tensor(False)}):
        for _ in range(2):
            adam.zero_grad()
            torch.autograd.backward(model.scale * 3)
            adam.step()
    assert model.scale.item() == 0
    assert adam.state[model.scale]["step"].item() == 2


def test_changing_the_given_masks_later_changes_nothing() -> None:
    layer = nn.Linear(2, 1, bias=False)
    mask = torch.tensor([[True, False]])
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    with hold_masks(layer, sgd, {"weight": mask}):
        mask.fill_(True)
        torch.autograd.backward(layer(torch.ones(1, 2)).sum())
        sgd.step()
    assert layer.weight[0, 1].item() == 0


# --- numbers ---------------------------------------------------------------------------------


def test_combine_keeps_what_both_keep() -> None:
    a = {"w": torch.tensor([True, True, False]), "x": torch.tensor([False])}
    b = {"w": torch.tensor([True, False, False]), "y": torch.tensor([True])}
    joined = combine(a, b)
    assert {name: mask.tolist() for name, mask in joined.items()} == {
        "w": [True, False, False],
        "x": [False],
        "y": [True],
    }
    with pytest.raises(ConfigError, match=r"w: \(3,\) and \(2,\)"):
        combine(a, {"w": torch.tensor([True, True])})


def test_sparsity_counts_removed_entries() -> None:
    masks = {"a": torch.tensor([True, False]), "b": torch.zeros(2, 3, dtype=torch.bool)}
    assert sparsity(masks) == pytest.approx(7 / 8)
    assert sparsity({}) == 0.0


def test_model_sparsity_counts_tied_parameters_once() -> None:
    model = Tied()
    apply_masks_(model, {"head.weight": torch.arange(12).reshape(4, 3) >= 3})
    assert model_sparsity(model) == pytest.approx(3 / 12)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_one_byte(dtype: torch.dtype) -> None:
    model, masks = nn.Module(), {"weight": torch.tensor([True, False, False])}
    model.weight = nn.Parameter(torch.tensor([2.0, -0.0, 3.0]).to(dtype), requires_grad=False)
    with pytest.raises(SoundnessError, match="1 of 2 removed entries"):
        check_masks(model, masks)
    with hold_masks(model, None, masks, check_every=1) as held:
        held.check()
    assert model.weight.tolist() == [2.0, 0.0, 0.0]
