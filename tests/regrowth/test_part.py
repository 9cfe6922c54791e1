"""The part around a training: what moves and what does not, errors, gradual cuts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from secateurs.errors import BudgetError, ConfigError, ScoringError
from secateurs.finetuning import Finetune, finetune
from secateurs.masks import check_masks
from secateurs.regrowth import RULES, Regrow, Regrowth, regrow_masks
from tests.regrowth.loops import N_STEPS, by, own, steps
from tests.regrowth.textbook import MASKED, data, net, some_masks


@pytest.mark.parametrize("rule", RULES)
def test_between_steps_the_model_is_masked_and_afterwards_nothing_holds(rule: str) -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with regrow_masks(model, sgd, some_masks(), by(rule), n_steps=N_STEPS) as part:
        for t in range(N_STEPS):
            steps(model, sgd, t, t + 1)
            check_masks(model, part.masks)
            if t + 1 >= 9:  # frozen: 0.75 x 12 steps
                buffer = sgd.state[model.get_parameter("0.weight")]["momentum_buffer"]
                assert not buffer[~part.masks["0.weight"]].any()
    assert [u.steps for u in part.history] == [2, 4, 6, 8]
    check_masks(model, part.masks)
    steps(model, sgd, 0, 1)
    assert sum(int((model.get_parameter(name) != 0).sum()) for name in MASKED) > 17


@pytest.mark.parametrize("rule", RULES)
def test_an_exception_leaves_a_masked_model_without_hooks(rule: str) -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = []

    def interrupted() -> None:
        with regrow_masks(model, sgd, some_masks(), by(rule), n_steps=N_STEPS) as part:
            parts.append(part)
            steps(model, sgd, 0, 3)
            part.gradients(3)  # dense weights are in place
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (part,) = parts
    check_masks(model, part.masks)
    assert not sgd._optimizer_step_pre_hooks
    assert not sgd._optimizer_step_post_hooks


@pytest.mark.parametrize("rule", RULES)
def test_masks_of_nothing_and_of_everything(rule: str) -> None:
    masks = {n: torch.full(m.shape, n == "0.weight") for n, m in some_masks().items()}
    model, part = own(by(rule), masks=masks)
    assert {n: int(m.sum()) for n, m in part.masks.items()} == {"0.weight": 24, "2.weight": 0}
    assert [(u.n_dropped, u.n_grown, u.overlap) for u in part.history] == [(0, 0, 1.0)] * 4
    assert not model.get_parameter("2.weight").any()


@pytest.mark.parametrize("rule", RULES)
def test_frozen_tensors_and_buffers_keep_their_masks(rule: str) -> None:
    model: nn.Module = net()
    model.get_parameter("0.weight").requires_grad_(False)
    model.register_buffer("table", torch.ones(2))
    masks = {**some_masks(), "table": torch.tensor([True, False])}
    model, part = own(by(rule), model, masks=masks)
    assert part.still == {"0.weight": "frozen", "table": "a buffer"}
    assert torch.equal(part.masks["0.weight"], masks["0.weight"])
    assert not torch.equal(part.masks["2.weight"], masks["2.weight"])
    assert all(list(update.grown) == ["2.weight"] for update in part.history)
    check_masks(model, part.masks)


@pytest.mark.parametrize("rule", ["rigl", "dpf"])
def test_a_wrapped_model_has_the_names_of_the_plain_one(rule: str) -> None:
    class Wrapped(nn.Module):  # as DDP does it
        def __init__(self) -> None:
            super().__init__()
            self.module = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)  # type: ignore[no-any-return]

    plain, wrapped = own(by(rule)), own(by(rule), Wrapped())
    assert plain[1].history == wrapped[1].history
    for p, q in zip(plain[0].parameters(), wrapped[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_nothing_that_can_move_is_an_error() -> None:
    model = net()
    for name in MASKED:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"no mask can move \(0.weight: frozen; 2.weight: fro"):
        own(by("set"), model)
    with pytest.raises(ConfigError, match="there are no masks"):
        own(by("set"), masks={})
    model = net()
    sgd = torch.optim.SGD([model.get_parameter("0.bias")], lr=0.1)
    with (
        pytest.raises(ConfigError, match=r"0.weight: the optimizer does not train it"),
        regrow_masks(model, sgd, some_masks(), by("set"), n_steps=N_STEPS),
    ):
        pass


class Tied(nn.Module):
    """One square matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4).double()
        self.b = nn.Linear(4, 4).double()
        self.b.weight = self.a.weight
        self.out = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", RULES)
def test_a_tied_tensor_moves_once_whatever_its_names(rule: str) -> None:
    mask = torch.eye(4) == 0
    either = torch.ones(4, 4, dtype=torch.bool)
    either[0] = False
    both = {"a.weight": mask, "b.weight": either}  # together: 9 entries
    one, two = (
        own(by(rule), Tied(), masks={"a.weight": mask & either}),
        own(by(rule), Tied(), masks=both),
    )
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert two[1].history == one[1].history
    assert two[1].history[-1].n_kept == 9
    assert torch.equal(two[1].masks["a.weight"], two[1].masks["b.weight"])


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_named(rule: str) -> None:
    """The gradient is NaN in step 2, before which "rigl" looks at it; the others see the weight."""
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    at = 2 if rule == "rigl" else 1
    done: list[int] = []

    def spoil(gradient: Tensor) -> Tensor:
        done.append(1)
        return gradient * float("nan") if len(done) == at + 1 else gradient

    model.get_parameter("2.weight").register_hook(spoil)  # type: ignore[no-untyped-call]
    what = "gradient" if rule == "rigl" else "weight"
    with (
        pytest.raises(ScoringError, match=f"step 2: the {what} of 2.weight"),
        regrow_masks(model, sgd, some_masks(), by(rule), n_steps=N_STEPS),
    ):
        steps(model, sgd, 0, 3)


def test_an_update_of_rigl_takes_the_place_of_the_step() -> None:
    model = net()
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    with regrow_masks(model, adam, some_masks(), by("rigl"), n_steps=N_STEPS) as part:
        steps(model, adam, 0, 2)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        steps(model, adam, 2, 3)
        for name, parameter in model.named_parameters():
            mask = part.masks.get(name, torch.tensor(True))
            assert torch.equal(parameter, before[name] * mask)
        assert [float(s["step"]) for s in adam.state.values()] == [2.0] * 4
        moments = adam.state[model.get_parameter("0.weight")]
        grown = part.masks["0.weight"] & ~some_masks()["0.weight"]
        assert grown.any()
        assert not moments["exp_avg"][grown].any()
        assert not moments["exp_avg_sq"][grown].any()


def test_a_tensor_without_gradient_stays_as_it_is() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 6).double(), nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)[:, :3]  # type: ignore[no-any-return]

    masks = {"used.weight": some_masks()["0.weight"], "idle.weight": torch.eye(3) > 0}
    _, part = own(by("rigl"), Half(), masks=masks)
    assert torch.equal(part.masks["idle.weight"], masks["idle.weight"])
    assert all(update.dropped["idle.weight"] == 0 for update in part.history)


def test_a_wrong_cut_comes_back_with_feedback() -> None:
    """The only useful weight was cut: the dense rules and rigl find it, a static mask does not."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = 3 * x[:, :1]
    rules = {
        "static": None,
        "dpf": Regrow("dpf", every=5),
        "dns": Regrow("dns", every=5),
        "rigl": Regrow("rigl", every=5, fraction=1.0, curve="constant"),
    }
    for rule, config in rules.items():
        torch.manual_seed(0)
        layer = nn.Linear(4, 1)
        finetune(
            layer, [(x, y)], nn.functional.mse_loss, Finetune(epochs=60, optimizer="sgd", lr=0.1),
            masks={"weight": torch.tensor([[False, True, False, False]])},
            parts=[] if config is None else [Regrowth(config)],
        )  # fmt: skip
        assert (layer.weight != 0).sum() == 1
        assert bool(layer.weight[0, 0] != 0) == (rule != "static")


def test_gradual_cuts_go_with_feedback() -> None:
    """`recut` cuts while the rule moves: counts follow, values of what is cut live on."""
    model, first = net(), some_masks()
    open_ = {name: torch.ones_like(mask) for name, mask in first.items()}
    part = Regrowth(by("dpf"), dense=dict(model.named_parameters()))
    finetune(
        model, data(), nn.functional.mse_loss, Finetune(steps=N_STEPS, optimizer="sgd", lr=0.1),
        masks=open_, parts=[part], recut=lambda t: first if t == 3 else None,
    )  # fmt: skip
    assert [u.n_kept for u in part.history] == [42, 17, 17, 17]
    assert part.history[1].n_grown > 0  # the cut was not by magnitude: the largest come back
    size = (part.masks["0.weight"] & ~first["0.weight"]).sum()
    assert size > 0
    check_masks(model, part.masks)


def test_thresholds_of_mean_and_deviation_choose_their_own_density() -> None:
    masks = {name: torch.ones_like(mask) for name, mask in some_masks().items()}
    kept = []
    for spread in (-1.0, 0.0, 1.0):
        model, part = own(Regrow("dns", 2, spread=spread), masks=masks)
        kept.append(sum(int(mask.sum()) for mask in part.masks.values()))
        check_masks(model, part.masks)
    assert 42 > kept[0] > kept[1] > kept[2] > 0
    with pytest.raises(BudgetError, match="would lose all its weights"):
        own(Regrow("dns", 2, spread=9), masks=masks)


def test_an_own_loop_with_clipping_scaler_and_scheduler() -> None:
    model = net().float()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    decay = torch.optim.lr_scheduler.StepLR(sgd, 4)
    with regrow_masks(model, sgd, some_masks(), by("rigl"), n_steps=N_STEPS) as part:
        for t in range(N_STEPS + 1):
            x, y = (tensor.float() for tensor in data()[t % 5])
            sgd.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            torch.autograd.backward(scaler.scale(loss * float("inf") if t == 2 else loss))
            scaler.step(sgd)  # skipped at t = 2, which would have been an update
            scaler.update()
            decay.step()
        assert part.steps == N_STEPS
    assert [u.steps for u in part.history] == [2, 4, 6, 8]
    check_masks(model, part.masks)


def test_arguments_that_do_not_fit() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="dense= has no effect on rule='rigl'"):
        Regrowth(Regrow(), dense={})
    with pytest.raises(ConfigError, match="Regrowth has not started"):
        _ = Regrowth(Regrow()).masks
    with (
        pytest.raises(ConfigError, match=r"no update falls within 12 steps, masks move before ste"),
        regrow_masks(model, sgd, some_masks(), Regrow(), n_steps=N_STEPS),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="without a closure"),
        regrow_masks(model, sgd, some_masks(), by("set"), n_steps=N_STEPS),
    ):
        sgd.step(lambda: 0.0)
    dense = {"0.weight": torch.zeros(2)}
    with pytest.raises(ConfigError) as error:
        finetune(
            model, data(), nn.functional.mse_loss, Finetune(steps=N_STEPS),
            masks=some_masks(), parts=[Regrowth(by("dpf"), dense=dense)],
        )  # fmt: skip
    assert str(error.value) == (
        "dense weights do not fit:\n  0.weight: (6, 4) is needed, got (2,)\n"
        "  2.weight: (3, 6) is needed, got nothing"
    )
    with pytest.raises(ConfigError, match="give steps= instead of epochs="):
        finetune(
            model, iter_once(), nn.functional.mse_loss, Finetune(epochs=1),
            masks=some_masks(), parts=[Regrowth(by("set"))],
        )  # fmt: skip


def test_a_part_is_for_one_training() -> None:
    part = Regrowth(by("set"))
    loss, config = nn.functional.mse_loss, Finetune(steps=N_STEPS)
    finetune(net(), data(), loss, config, masks=some_masks(), parts=[part])
    with pytest.raises(ConfigError, match="one training"):
        finetune(net(), data(), loss, config, masks=some_masks(), parts=[part])


def iter_once() -> Any:
    class Unsized:
        def __iter__(self) -> Any:
            return iter(data())

    return Unsized()


def test_options_are_hashable_and_comparable() -> None:
    assert replace(Regrow(), every=50) == Regrow(every=50)
    assert len({Regrow(), Regrow(), Regrow("set")}) == 2


def test_options_are_a_recipe_block() -> None:
    block = TypeAdapter(Regrow)
    assert block.validate_python({"rule": "set", "every": 50}) == Regrow("set", 50)
    with pytest.raises(ValidationError, match="fractions"):
        block.validate_python({"fractions": 0.1})


def test_an_optimizer_inside_of_another_is_followed() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As Accelerate makes them: nothing of its own, no hooks."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.optimizer = inner

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

    model = net()
    outer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with regrow_masks(model, outer, some_masks(), by("rigl"), n_steps=N_STEPS) as regrowth:
        steps(model, outer, 0, N_STEPS)
    assert [update.steps for update in regrowth.history] == [2, 4, 6, 8]
