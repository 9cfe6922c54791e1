"""Gradients of masked parameters: masked as they arrive, or collected whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from secateurs.masks.erasing import Eraser, is_sharded, local

__all__ = ["GradientMask", "collect", "collect_sharded", "hook_after_accumulation"]


def hook_after_accumulation(
    parameter: Tensor, hook: Callable[[Tensor], None]
) -> Callable[[], None]:
    """Call a hook whenever `.grad` of a parameter has grown; what comes back removes it.

    A frozen parameter gets it too: it may be thawed later.
    """
    frozen = not parameter.requires_grad
    if frozen:
        parameter.requires_grad_(True)
    try:
        handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        if frozen:
            parameter.requires_grad_(False)
    remove: Callable[[], None] = handle.remove
    return remove


class GradientMask:
    """A hook that masks the gradient just accumulated in a parameter; what exists is masked too.

    Autograd may put memory into an empty `.grad` that other nodes still read, or that is `.grad`
    of another parameter as well: of `a.view(-1) + b.view(-1)` both have one. So a new gradient is
    masked in a copy. One that is added to in place is masked in place: it may be a view into a
    buffer of the caller.
    """

    def __init__(self, parameter: Tensor, eraser: Eraser) -> None:
        self._eraser = eraser
        self._known: weakref.ref[Tensor] | None = None
        if parameter.grad is not None and parameter.grad._base is not None:
            self._known = weakref.ref(parameter.grad)
        self(parameter)

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if gradient.requires_grad:  # of a backward pass that is differentiated again
            parameter.grad = gradient.masked_fill(self._eraser.removed, 0)
        elif is_sharded(gradient) or (self._known is not None and self._known() is gradient):
            self._eraser.erase(gradient)
        else:
            parameter.grad = masked = self._eraser.erased(gradient)
            self._known = weakref.ref(masked)


def collect(sums: dict[str, Tensor], names: list[str]) -> Callable[[Tensor], None]:
    """A hook on arriving gradients that adds them to the sums under each of these names."""

    def hook(gradient: Tensor) -> None:
        arrived = gradient.detach()
        arrived = arrived.to_dense() if arrived.is_sparse else arrived
        total = sums[names[0]] + arrived if names[0] in sums else arrived.clone()
        sums.update(dict.fromkeys(names, total))

    return hook


def collect_sharded(
    sums: dict[str, Tensor], names: list[str], removed: Tensor | None
) -> Callable[[Tensor], None]:
    """The same for a sharded parameter, after accumulation: nothing arrives at it before.

    Where entries are removed `.grad` was zero before, so what is there has just arrived.
    """

    @torch.no_grad()
    def hook(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        total = parameter.grad.detach().clone()
        if removed is not None and names[0] in sums:
            local(total).add_(local(sums[names[0]]).masked_fill(~removed, 0))
        sums.update(dict.fromkeys(names, total))

    return hook
