"""Every rule, in our loop and in a user's own, against a slow training written from its paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from secateurs.finetuning import Finetune, finetune
from secateurs.masks import HeldMasks, check_masks
from secateurs.regrowth import RULES, Regrow, Regrowth, regrow_masks
from secateurs.regrowth.rules import How, Masks, Seen, rigl
from tests.regrowth import textbook
from tests.regrowth.textbook import MASKED, OPTIMIZERS, data, net, some_masks

N_STEPS, EVERY, END = 24, 4, 18.0
CONFIGS = {
    "rigl": Regrow("rigl", EVERY, fraction=0.5),
    "set": Regrow("set", EVERY, fraction=0.5),
    "dns": Regrow("dns", EVERY),
    "dpf": Regrow("dpf", EVERY),
}


def own_loop(config: Regrow, optimizer: str, accumulate: int = 1) -> tuple[nn.Module, Regrowth]:
    """A loop without a line about masks."""
    model, batches = net(), data()
    opt = OPTIMIZERS[optimizer][1](model)
    with regrow_masks(model, opt, some_masks(), config, n_steps=N_STEPS) as regrowth:
        for t in range(N_STEPS):
            opt.zero_grad()
            for i in range(accumulate):
                x, y = batches[(t * accumulate + i) % len(batches)]
                loss = nn.functional.mse_loss(model(x), y) / accumulate
                torch.autograd.backward(loss)
            opt.step()
    return model, regrowth


def our_loop(config: Regrow, optimizer: str, accumulate: int = 1) -> tuple[nn.Module, Regrowth]:
    """`finetune` with the part; dense weights are given by hand."""
    model, n = net(), 5 * accumulate
    dense = {name: model.get_parameter(name).detach().clone() for name in MASKED}
    part = Regrowth(config, dense=dense if RULES[config.rule].dense else None)
    finetune(
        model,
        [data()[i % 5] for i in range(n)],
        nn.functional.mse_loss,
        Finetune(steps=N_STEPS, accumulate=accumulate),
        masks=some_masks(),
        optimizer=OPTIMIZERS[optimizer][1](model),
        parts=[part],
    )
    return model, part


def compare(model: nn.Module, part: Regrowth, rule: str, optimizer: str, **how: int) -> None:
    """Against the slow training: masks equal, weights to 1e-9, removed ones zero."""
    weights, masks = textbook.train(
        rule, optimizer, some_masks(), n_steps=N_STEPS, every=EVERY, end=END, **how
    )
    for name, mask in masks.items():
        assert torch.equal(part.masks[name], mask), name
    check_masks(model, masks)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_one_of_its_paper(rule: str, optimizer: str) -> None:
    model, regrowth = own_loop(CONFIGS[rule], optimizer)
    compare(model, regrowth, rule, optimizer)
    assert [update.steps for update in regrowth.history] == [4, 8, 12, 16]
    assert sum(update.n_grown for update in regrowth.history) > 0
    assert all(update.dropped == update.grown for update in regrowth.history)
    assert {update.n_kept for update in regrowth.history} == {17}


@pytest.mark.parametrize("rule", RULES)
def test_our_loop_does_the_same_bit_by_bit(rule: str) -> None:
    model, part = our_loop(CONFIGS[rule], "adam")
    other, regrowth = own_loop(CONFIGS[rule], "adam")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert part.history == regrowth.history


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loop", [own_loop, our_loop])
def test_the_gradient_is_that_of_all_accumulated_batches(rule: str, loop: object) -> None:
    assert callable(loop)
    model, part = loop(CONFIGS[rule], "sgd", accumulate=2)
    compare(model, part, rule, "sgd", accumulate=2)


def test_the_comparison_fails_on_other_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    def smallest_gradient(seen: Mapping[str, Seen], how: How) -> Masks:
        return rigl({n: replace(s, gradient=1 / _gradient(s)) for n, s in seen.items()}, how)

    def grow_anew(seen: Mapping[str, Seen], how: How) -> Masks:  # never what was just dropped
        kept = {n: _gradient(s).masked_fill(s.mask, 0) for n, s in seen.items()}
        return rigl({n: replace(s, gradient=kept[n]) for n, s in seen.items()}, how)

    for wrong in (smallest_gradient, grow_anew):
        monkeypatch.setitem(RULES, "rigl", replace(RULES["rigl"], move=wrong))
        model, part = own_loop(CONFIGS["rigl"], "sgd")
        with pytest.raises(AssertionError):
            compare(model, part, "rigl", "sgd")


@pytest.mark.parametrize("field", [{"every": 5}, {"fraction": 0.3}, {"until": 0.5}])
def test_the_comparison_fails_on_other_options(field: dict[str, float]) -> None:
    model, part = own_loop(replace(CONFIGS["set"], **field), "sgd")  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        compare(model, part, "set", "sgd")


@pytest.mark.parametrize("rule", ["dns", "dpf"])
def test_the_comparison_fails_when_removed_weights_do_not_learn(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldMasks, "pause", lambda self: None)
    model, part = own_loop(CONFIGS[rule], "sgd")
    with pytest.raises(AssertionError):
        compare(model, part, rule, "sgd")


def _gradient(seen: Seen) -> Tensor:
    assert seen.gradient is not None
    return seen.gradient
