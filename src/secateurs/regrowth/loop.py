"""Moving masks in a user's own loop, by optimizer hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.errors import ConfigError
from secateurs.finetuning import Training
from secateurs.masks import hold_masks
from secateurs.masks.states import skips, unwrapped
from secateurs.regrowth.config import Regrow
from secateurs.regrowth.part import Regrowth, tensors_of
from secateurs.regrowth.rules import RULES

__all__ = ["regrow_masks"]


@contextmanager
def regrow_masks(
    model: nn.Module,
    optimizer: Optimizer,
    masks: Mapping[str, Tensor],
    config: Regrow,
    *,
    n_steps: int,
    seed: int = 0,
    averaged: nn.Module | Sequence[nn.Module] = (),
    check_every: int | None = None,
) -> Iterator[Regrowth]:
    """Hold masks and let them move while a loop of your own trains; the loop needs no extra line.

    Everything happens before and after `optimizer.step()`: see `Regrowth`, which is what the `with`
    statement gives (`history`, `masks`). With "dns" and "dpf" the weights that the masks remove go
    on from the values that they have on entry. Gradient accumulation, clipping, schedulers and
    gradient scalers work as ever; a step that a scaler skips does not count. At exit the removed
    entries are exactly zero and no hook is left.

    To go on after an interruption, enter it with masks of the same tensors and inside give back
    what was saved: first `regrowth.load(state)`, then the states of model and optimizer.

    Args:
        model, optimizer, masks, averaged, check_every: as in `hold_masks`, with one optimizer.
            What "dns" and "dpf" let through is no leak.
        config: the rule.
        n_steps: optimizer steps of the whole training.
        seed: of random growth.

    Raises:
        ConfigError: as `hold_masks` and `Regrowth`; from `step`, when it is called with a closure:
            the gradient must be there before.
        ScoringError, BudgetError: from `step`, as in `Regrowth`.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 1)
        >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> masks = {"weight": torch.tensor([[True, True, False, False]])}
        >>> config = Regrow("rigl", every=5, fraction=0.5)
        >>> with regrow_masks(layer, sgd, masks, config, n_steps=20) as regrowth:
        ...     for _ in range(20):
        ...         sgd.zero_grad()
        ...         (layer(torch.eye(4)) - 1).square().mean().backward()
        ...         sgd.step()
        >>> int((layer.weight != 0).sum()), [update.steps for update in regrowth.history]
        (2, [5, 10])
    """
    dense = None
    if RULES[config.rule].dense:
        tensors = tensors_of(model)
        dense = {n: tensors[n].detach().clone() for n in masks if n in tensors}
    regrowth, optimizer = Regrowth(config, seed, dense=dense), unwrapped(optimizer)
    with ExitStack() as hooks:
        held = hooks.enter_context(
            hold_masks(model, optimizer, masks, averaged=averaged, check_every=check_every)
        )
        regrowth.start(Training(model, optimizer, held, n_steps))
        before = optimizer.register_step_pre_hook(
            lambda opt, args, kwargs: _before(regrowth, opt, args, kwargs)
        )
        hooks.callback(before.remove)
        after = optimizer.register_step_post_hook(lambda opt, *_: _after(regrowth, opt))
        hooks.callback(after.remove)
        regrowth.begin(regrowth.steps)
        yield regrowth


def _before(
    regrowth: Regrowth, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]
) -> None:
    if any(value is not None for value in (*args[1:], *kwargs.values())):
        raise ConfigError(
            "regrow_masks needs the gradient before the step: call optimizer.step() without a "
            "closure, after backward()"
        )
    if not skips(optimizer):
        regrowth.gradients(regrowth.steps)


def _after(regrowth: Regrowth, optimizer: Optimizer) -> None:
    if not skips(optimizer):
        regrowth.stepped(regrowth.steps + 1)
        regrowth.begin(regrowth.steps)
