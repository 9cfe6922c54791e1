"""Any optimizer, any masks, any order of events: removed entries are exactly zero, and what is kept
trains as in a dense textbook loop that masks by hand."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from secateurs.masks import HeldMasks, combine, hold_masks
from tests.masks.trainings import (
    OPTIMIZERS,
    Masks,
    Net,
    Textbook,
    assert_removed_are_zero,
    assert_same,
    averages_of,
    loss_of,
    step_of,
)

SHAPES = {name: tuple(p.shape) for name, p in Net().named_parameters()}


@st.composite
def mask_sets(draw: st.DrawFn) -> Masks:
    """For some parameters: everything kept, nothing, or a random part."""
    masks = {}
    for name, shape in SHAPES.items():
        kept = draw(st.sampled_from([None, 0.0, 0.2, 0.5, 0.5, 0.8, 1.0]))
        if kept is not None:
            generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
            masks[name] = torch.rand(shape, generator=generator) < kept
    return masks


ACTIONS = st.one_of(
    st.sampled_from("step step step accumulate clip_norm clip_value lr average".split()),
    st.sampled_from("step average save_and_load".split()),
    st.tuples(st.sampled_from(["grow", "replace"]), mask_sets()),
)


class Pair:
    """The training that is held, and the textbook beside it."""

    def __init__(self, name: str, masks: Masks, nan: bool) -> None:
        torch.manual_seed(0)
        self.model = Net(sparse=name == "sparse adam")
        self.optimizers = OPTIMIZERS[name](self.model)
        self.step(9)  # moments of the dense model
        self.averages = averages_of(self.model)
        self.zero_grad()
        self.book = Textbook(self.model, OPTIMIZERS[name], self.optimizers, masks)
        if nan:
            with torch.no_grad():
                for key, mask in masks.items():
                    self.model.get_parameter(key)[~mask] = math.nan

    def backward(self, seed: int) -> Tensor:
        loss = loss_of(self.model, seed)
        torch.autograd.backward(loss)
        return loss

    def step(self, seed: int) -> None:
        for optimizer in self.optimizers:
            lbfgs = isinstance(optimizer, optim.LBFGS)
            if not lbfgs and all(p.grad is None for p in self.model.parameters()):
                self.backward(seed)
            step_of(optimizer, lambda: self.backward(seed))

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def act(self, action: str | tuple[str, Masks], held: HeldMasks, seed: int) -> None:
        """One event, in both trainings."""
        both = (self.model, self.book.model)
        dense = [[p for n, p in m.named_parameters() if n != "table.weight"] for m in both]
        match action:
            case ("grow", masks):
                wanted = combine(self.book.masks, masks)
                held.grow(wanted)
                self.book.hold(wanted, anew=False)
            case ("replace", masks):
                held.replace(masks)
                self.book.hold(masks, anew=True)
            case "accumulate":
                self.backward(seed)
                self.book.backward(seed)
            case "step":
                self.backward(seed)
                self.book.backward(seed)
                self.step(seed)
                self.book.step(seed)
                self.zero_grad()
                self.book.model.zero_grad()
            case "clip_norm":  # sparse gradients have no norm
                norms = [nn.utils.clip_grad_norm_(ps, 0.01) for ps in dense]
                assert torch.allclose(norms[0], norms[1], rtol=1e-9, atol=1e-12)
            case "clip_value":
                for parameters in dense:
                    if parameters[0].grad is not None:  # of nothing torch makes an error
                        nn.utils.clip_grad_value_(parameters, 0.001)
            case "lr":
                for optimizer in (*self.optimizers, *self.book.optimizers):
                    for group in optimizer.param_groups:
                        group["lr"] *= 0.7
            case "average":
                for average in self.averages:
                    average.update_parameters(self.model)
                self.book.average()
            case "save_and_load":
                self.save_and_load()
                for optimizer in self.book.optimizers:  # some state changes its dtype by loading
                    optimizer.load_state_dict(optimizer.state_dict())

    def save_and_load(self) -> None:
        """As a loop of one's own does it."""
        file = io.BytesIO()
        things: list[Any] = [self.model, *self.optimizers]
        torch.save([thing.state_dict() for thing in things], file)
        file.seek(0)
        for thing, state in zip(things, torch.load(file), strict=True):
            thing.load_state_dict(state)

    def check(self) -> None:
        assert_removed_are_zero(self.model, self.optimizers, self.averages, self.book.masks)
        assert_same(self.model, self.optimizers, self.averages, self.book)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),  # shrinking would take minutes for each optimizer that fails
)
@given(
    masks=mask_sets(),
    nan=st.booleans(),
    actions=st.lists(ACTIONS, min_size=2, max_size=9),
    check_every=st.sampled_from([None, 1, 3]),
)
def test_any_training(
    name: str,
    masks: Masks,
    nan: bool,
    actions: list[str | tuple[str, Masks]],
    check_every: int | None,
) -> None:
    torch.set_num_threads(1)
    pair = Pair(name, masks, nan)
    with hold_masks(
        pair.model, pair.optimizers, masks, averaged=pair.averages, check_every=check_every
    ) as held:
        pair.check()
        for seed, action in enumerate([*actions, "step"]):
            pair.act(action, held, seed)
            pair.check()
        held.check()
    pair.check()


# --- each check fails on a holding that is wrong ----------------------------------------------


def _some_masks() -> Masks:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(shape, generator=generator) < 0.5
        for name, shape in SHAPES.items()
        if len(shape) == 2
    }


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ("weights only", r"gradient table\.weight"),
        ("weights and gradients", r"state momentum_buffer table\.weight"),
        ("never the average", r"average 0 table\.weight"),
        ("nothing", r"weight table\.weight"),
    ],
)
def test_the_zeros_are_really_looked_at(wrong: str, where: str) -> None:
    masks = _some_masks()
    pair = Pair("sgd", masks, nan=False)
    pair.act("average", None, 0)  # type: ignore[arg-type]  # of the dense model
    for mask, parameter in ((m, pair.model.get_parameter(n)) for n, m in masks.items()):
        if wrong != "nothing":
            parameter.data[~mask] = 0
    if wrong == "never the average":
        with hold_masks(pair.model, pair.optimizers, masks):
            pair.step(0)
    else:
        for average in pair.averages:
            average.module.load_state_dict(pair.model.state_dict())
        pair.backward(0)
        for name, mask in masks.items():
            gradient = pair.model.get_parameter(name).grad
            assert gradient is not None
            if wrong != "weights only":
                gradient[~mask] = 0
        pair.step(0)
        for name, mask in masks.items():
            if wrong != "nothing":
                pair.model.get_parameter(name).data[~mask] = 0
    with pytest.raises(AssertionError, match=where):
        assert_removed_are_zero(pair.model, pair.optimizers, pair.averages, masks)


def test_the_kept_entries_are_really_compared() -> None:
    """Clipping that sees removed gradients changes what is kept."""
    masks = _some_masks()
    pair = Pair("sgd", masks, nan=False)
    with hold_masks(pair.model, pair.optimizers, masks, averaged=pair.averages) as held:
        pair.check()
        pair.act("step", held, 0)
        pair.check()
        pair.backward(1)
        nn.utils.clip_grad_norm_(pair.model.parameters(), 0.01)
        pair.step(1)
        pair.book.backward(1)
        nn.utils.clip_grad_norm_(pair.book.model.parameters(), 0.0101)
        pair.book.step(1)
        assert_removed_are_zero(pair.model, pair.optimizers, pair.averages, masks)
        with pytest.raises(AssertionError, match="weight"):
            pair.check()
