"""Trainings that go on from a state end bit by bit where the others do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.checkpoints import Checkpoints
from secateurs.errors import ConfigError
from secateurs.finetuning import EpochRow, Finetune, finetune
from secateurs.regrowth import RULES, Regrowth, regrow_masks
from tests.regrowth.loops import N_STEPS, by, own, steps
from tests.regrowth.textbook import OPTIMIZERS, data, net, some_masks


@pytest.mark.parametrize(("optimizer", "cut"), [("sgd", 5), ("adam", 4), ("adam", 10)])
@pytest.mark.parametrize("rule", RULES)
def test_a_training_that_goes_on_is_bit_identical(rule: str, optimizer: str, cut: int) -> None:
    build = OPTIMIZERS[optimizer][1]
    whole = net()
    opt = build(whole)
    with regrow_masks(whole, opt, some_masks(), by(rule), n_steps=N_STEPS, seed=3) as part:
        steps(whole, opt, 0, N_STEPS)

    first = net()
    opt = build(first)
    with regrow_masks(first, opt, some_masks(), by(rule), n_steps=N_STEPS, seed=3) as begun:
        steps(first, opt, 0, cut)
        saved = copy.deepcopy((first.state_dict(), opt.state_dict(), begun.state()))

    again = net()
    opt = build(again)
    with regrow_masks(again, opt, some_masks(), by(rule), n_steps=N_STEPS, seed=99) as gone_on:
        gone_on.load(saved[2])
        again.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        steps(again, opt, cut, N_STEPS)

    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert gone_on.history == part.history
    for name, mask in part.masks.items():
        assert torch.equal(mask, gone_on.masks[name])


def test_resuming_needs_the_state() -> None:
    """The check above fails when the part forgets its dense weights."""
    whole, _ = own(by("dpf"))
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with regrow_masks(model, sgd, some_masks(), by("dpf"), n_steps=N_STEPS) as begun:
        steps(model, sgd, 0, 5)
        state = begun.state()
        begun.load({k: v * 0 if k.startswith("dense/") else v for k, v in state.items()})
        steps(model, sgd, 5, N_STEPS)
    assert not torch.equal(whole.get_parameter("0.weight"), model.get_parameter("0.weight"))


@pytest.mark.parametrize("rule", RULES)
def test_going_back_gives_the_same_again(rule: str) -> None:
    """Masks are frozen when the state of step 4, an update of "rigl" to come, is taken back."""
    model = net()
    adam = torch.optim.Adam(model.parameters(), lr=0.03)
    ends = []
    with regrow_masks(model, adam, some_masks(), by(rule), n_steps=N_STEPS) as part:
        steps(model, adam, 0, 4)
        saved = copy.deepcopy((part.state(), model.state_dict(), adam.state_dict()))
        for _ in range(2):
            part.load(saved[0])
            model.load_state_dict(saved[1])
            adam.load_state_dict(copy.deepcopy(saved[2]))
            steps(model, adam, 4, N_STEPS)
            ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_finetune_goes_on_from_a_checkpoint_bit_by_bit(rule: str, tmp_path: Path) -> None:
    def run(stop_after: int = 0, **how: Any) -> tuple[nn.Module, Regrowth]:
        def progress(row: EpochRow) -> None:
            if row.epoch == stop_after:
                raise KeyboardInterrupt

        model, part = net(), Regrowth(by(rule))
        finetune(
            model, data(), nn.functional.mse_loss, Finetune(epochs=4, lr=0.03),
            masks=some_masks(), parts=[part], progress=progress, seed=0, **how,
        )  # fmt: skip
        return model, part

    with pytest.raises(KeyboardInterrupt):
        run(2, checkpoint=Checkpoints(tmp_path, every=1))
    model, part = run(checkpoint=Checkpoints(tmp_path, every=1), resume=True)
    whole, other = run()
    assert part.history == other.history
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", RULES)
def test_state_is_tensors_and_plain_values(rule: str) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(plain(v) for v in value)
        return isinstance(value, (int, float, str))

    _, part = own(by(rule))
    assert part.history
    assert all(isinstance(v, Tensor) or plain(v) for v in part.state().values())


def test_a_state_of_other_masks_is_refused() -> None:
    _, part = own(by("set"))
    saved = part.state()
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    less = {"0.weight": some_masks()["0.weight"]}
    with (
        pytest.raises(
            ConfigError, match=r"of 0.weight, 2.weight, here are held those of 0.weight:"
        ),
        regrow_masks(model, sgd, less, by("set"), n_steps=N_STEPS) as other,
    ):
        other.load(saved)
    model.get_parameter("2.weight").requires_grad_(False)
    with (
        pytest.raises(ConfigError, match=r"of 0.weight, 2.weight, here move those of 0.weight:"),
        regrow_masks(model, sgd, some_masks(), by("set"), n_steps=N_STEPS) as other,
    ):
        other.load(saved)
    with (
        pytest.raises(ConfigError, match="state is of rule='set', this is 'rigl'"),
        regrow_masks(model, sgd, some_masks(), by("rigl"), n_steps=N_STEPS) as other,
    ):
        other.load(saved)
