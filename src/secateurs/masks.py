"""Masks: make removed entries zero, keep them zero while training, make them permanent.

A mask set is `{tensor name: bool tensor of the dense shape}`, True = keep, as in `Plan.masks`.
Names are those of `named_parameters()` and `named_buffers()`; tied parameters have several names
and any of them works. Masks live beside the model: no module is wrapped, no state-dict key changes.
The verbs, in the order in which a run meets them:

    apply_masks_   zero once
    hold_masks     keep zero while training: gradients, weights and optimizer state
    check_masks    raise if anything leaked
    bake_masks_    zero for good, and checked; nothing is held afterwards
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.errors import ConfigError, SoundnessError

__all__ = [
    "HeldMasks",
    "apply_masks_",
    "bake_masks_",
    "check_masks",
    "combine",
    "hold_masks",
    "model_sparsity",
    "sparsity",
]

Masks = Mapping[str, Tensor]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names (tied ones appear under all)."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def apply_masks_(model: nn.Module, masks: Masks) -> None:
    """Zero the removed entries of parameters and buffers once, in place.

    Args:
        model: changed in place; autograd does not see the change.
        masks: tensor name -> bool tensor of the same shape, True = keep.

    Raises:
        ConfigError: a name, shape or dtype does not fit; all problems are listed, none is applied.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> apply_masks_(layer, {"weight": torch.tensor([[True, False]])})
        >>> layer.weight[0, 1].item()
        0.0
    """
    with torch.no_grad():
        for _, tensor, removed in _matched(model, masks):
            tensor.masked_fill_(removed, 0)


def check_masks(model: nn.Module, masks: Masks) -> None:
    """Raise unless every removed entry is exactly zero (-0.0 counts as zero, NaN does not).

    Raises:
        SoundnessError: names the first tensor that leaked and how many of its entries did.
        ConfigError: as `apply_masks_`.
    """
    tensors = named_tensors(model)
    _validate(tensors, masks)
    for name, mask in masks.items():
        _check_zero(name, tensors[name], ~mask.to(tensors[name].device))


def _check_zero(name: str, tensor: Tensor, removed: Tensor) -> None:
    leaked = tensor.detach()[removed] != 0
    if leaked.any():
        raise SoundnessError(
            f"removed entries must stay zero: {name} {tuple(removed.shape)} has "
            f"{int(leaked.sum())} of {int(removed.sum())} removed entries that are not zero. "
            "Train inside hold_masks(model, optimizer, masks)"
        )


def bake_masks_(model: nn.Module, masks: Masks) -> None:
    """Zero the removed entries for good, and check them: the last verb, after which nothing holds.

    The model is an ordinary dense model with zeros in it. Training it further without
    `hold_masks` moves them away from zero.

    Raises:
        ConfigError, SoundnessError: as `apply_masks_` and `check_masks`.
    """
    apply_masks_(model, masks)
    check_masks(model, masks)


@contextmanager
def hold_masks(model: nn.Module, optimizer: Optimizer | None, masks: Masks) -> Iterator[HeldMasks]:
    """Keep removed entries exactly zero while the model trains.

    On entry: masks are applied, gradients that exist are masked, and optimizer state of the
    parameter's shape (momentum, Adam moments, ...) is zeroed where removed. Inside: a gradient is
    masked as soon as it is accumulated, so clipping sees only what is kept; after each optimizer
    step weights, buffers and state are zeroed again, so weight decay and momentum cannot move them.
    At exit, also after an exception: masks are applied once more and every hook is removed.

    To cut more while training, call `grow` of the value of the `with` statement: see `HeldMasks`.

    Removed entries are overwritten, never multiplied: a NaN in them does not survive. Inside the
    context `state_dict` keys, `copy.deepcopy(model)` and `torch.compile` work as without it; a deep
    copy is a plain model whose masks nobody holds. It costs one integer copy of what is masked.

    Args:
        model: trained in place. Frozen parameters may be masked too.
        optimizer: its steps are followed; None when a caller updates the weights otherwise, then
            gradients are masked and weights only at entry and exit. Parameters that it does not
            hold are fine. State shaped unlike its parameter (factored moments) is left alone.
        masks: tensor name -> bool tensor of the same shape, True = keep. Copied: later changes to
            these tensors have no effect.

    Raises:
        ConfigError: masks do not fit (as `apply_masks_`), or the optimizer holds no parameter of
            the model.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        >>> with hold_masks(layer, sgd, {"weight": torch.tensor([[True, False]])}):
        ...     layer(torch.ones(3, 2)).sum().backward()
        ...     sgd.step()
        >>> layer.weight[0, 1].item()
        0.0
    """
    held = HeldMasks(model, optimizer)
    entries = held._prepared(masks)
    if optimizer is not None:
        _check_optimizer(model, optimizer)
    with ExitStack() as hooks:
        hooks.callback(held._release)
        if optimizer is not None:
            step_hook = optimizer.register_step_post_hook(lambda *_: held._erase())
            hooks.callback(step_hook.remove)
        held._hold(entries)
        try:
            yield held
        finally:
            held._erase()


class HeldMasks:
    """What `hold_masks` yields: the masks that are held now.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> with hold_masks(layer, None, {"weight": torch.tensor([[True, True, False]])}) as held:
        ...     held.grow({"weight": torch.tensor([[True, False, False]])})
        >>> (layer.weight != 0).tolist()
        [[True, False, False]]
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model, self._optimizer = model, optimizer
        self._entries: list[_Entry] = []
        self._hooks = ExitStack()

    def grow(self, masks: Masks) -> None:
        """Hold masks that remove more, from now on.

        Newly removed entries of weights, buffers and optimizer state are zero at once; the rest of
        the state stays as it is. Best called between two optimizer steps.

        Raises:
            ConfigError: masks do not fit, or keep an entry that is removed already. Nothing is
                changed then.
        """
        entries = self._prepared(masks)
        now: dict[int, Tensor] = {}
        for entry in entries:
            known = now.get(id(entry.tensor))
            now[id(entry.tensor)] = entry.removed if known is None else known | entry.removed
        for old in self._entries:
            removed = now.get(id(old.tensor))
            back = old.removed if removed is None else old.removed & ~removed
            if back.any():
                raise ConfigError(
                    f"masks may only grow: {old.name} {tuple(old.tensor.shape)} would get "
                    f"{int(back.sum())} removed entries back. Leave hold_masks and enter it again "
                    "with the new masks"
                )
        self._release()
        self._hold(entries)

    def _prepared(self, masks: Masks) -> list[_Entry]:
        """Masks checked and copied."""
        return [
            _Entry(name, tensor, removed, _eraser(tensor, removed))
            for name, tensor, removed in _matched(self._model, masks)
        ]

    def _hold(self, entries: list[_Entry]) -> None:
        """Hold these entries: gradient hooks, and everything zero once."""
        self._entries = entries
        for entry in entries:
            tensor = entry.tensor
            if tensor.grad is not None:
                entry.erase(tensor.grad)
            if tensor.requires_grad:
                register = tensor.register_post_accumulate_grad_hook
                handle = register(_mask_gradient(entry.erase))  # type: ignore[no-untyped-call]
                self._hooks.callback(handle.remove)
        self._erase()

    def _erase(self) -> None:
        """Zero what is removed, in tensors and in optimizer state."""
        for entry in self._entries:
            tensor = entry.tensor
            entry.erase(tensor)
            if self._optimizer is None or not tensor.dim():  # a step counter has no dimension too
                continue
            for state in self._optimizer.state.get(tensor, {}).values():
                if isinstance(state, Tensor) and state.shape == tensor.shape:
                    entry.erase(state)

    def _release(self) -> None:
        """Remove the gradient hooks."""
        self._hooks.close()

    def check(self) -> None:
        """Raise unless every removed entry of the model is exactly zero, as `check_masks`."""
        tensors = named_tensors(self._model)
        for entry in self._entries:
            _check_zero(entry.name, tensors[entry.name], entry.removed)


@dataclass(frozen=True, eq=False)
class _Entry:
    """One mask that is held."""

    name: str
    tensor: Tensor
    removed: Tensor
    erase: Callable[[Tensor], None]


def _matched(model: nn.Module, masks: Masks) -> list[tuple[str, Tensor, Tensor]]:
    """(name, tensor, removed entries on its device) of every mask that removes something."""
    tensors = named_tensors(model)
    _validate(tensors, masks)
    found = [(n, tensors[n], ~mask.to(tensors[n].device)) for n, mask in masks.items()]
    return [entry for entry in found if entry[2].any()]


def _validate(tensors: Mapping[str, Tensor], masks: Masks) -> None:
    """Raise one error that lists every mask that does not fit its tensor."""
    problems = [text for name in sorted(masks) if (text := _misfit(name, masks[name], tensors))]
    if problems:
        raise ConfigError("masks do not fit the model:\n  " + "\n  ".join(problems))


def _misfit(name: str, mask: Any, tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with one mask; empty when it fits."""
    if name not in tensors:
        near = get_close_matches(name, tensors, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{name}: the model has no such parameter or buffer.{hint}"
    tensor = tensors[name]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        return f"{name}: a mask is a bool tensor (True = keep), got {got}"
    if mask.shape != tensor.shape:
        return f"{name}: mask {tuple(mask.shape)}, tensor {tuple(tensor.shape)}"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"{name}: only floating-point tensors can be masked, this is {tensor.dtype}"
    return ""


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise when the optimizer was built for another model (usually: before a copy)."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ConfigError(
            "the optimizer holds no parameter of this model. "
            "Build it from model.parameters() after copying or moving the model"
        )


BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def _eraser(like: Tensor, removed: Tensor) -> Callable[[Tensor], None]:
    """A function that overwrites removed entries of tensors shaped like `like` with +0, in place.

    Clearing all bits is as exact as `masked_fill_`, also for NaN, and on a CPU ten times as fast:
    it runs several times per parameter in each training step.
    """
    whole = BITS.get(like.dtype)
    bits = None if whole is None else (~removed).to(whole).neg_()  # keep: all ones; removed: 0

    @torch.no_grad()
    def erase(tensor: Tensor) -> None:
        if tensor.is_sparse:  # stores some rows only: look the same ones up in the mask
            rows = removed[tuple(tensor._indices())]  # dense shape -> (rows, *dense dims)
            tensor._values().masked_fill_(rows, 0)
        elif (
            whole
            and bits is not None
            and (tensor.dtype, tensor.device) == (like.dtype, bits.device)
        ):
            tensor.detach().view(whole).bitwise_and_(bits)
        else:
            tensor.masked_fill_(removed.to(tensor.device), 0)

    return erase


def _mask_gradient(erase: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that masks the gradient just accumulated in a parameter."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            erase(parameter.grad)

    return hook


def combine(first: Masks, second: Masks) -> dict[str, Tensor]:
    """Masks that keep what both keep; a tensor named in only one is taken as it is.

    Raises:
        ConfigError: the two masks of a tensor differ in shape.

    Example:
        >>> a = {"w": torch.tensor([True, True, False])}
        >>> b = {"w": torch.tensor([True, False, True]), "b": torch.tensor([True])}
        >>> combine(a, b)
        {'w': tensor([ True, False, False]), 'b': tensor([True])}
    """
    both = [name for name in first if name in second]
    problems = [
        f"{name}: {tuple(first[name].shape)} and {tuple(second[name].shape)}"
        for name in sorted(both)
        if first[name].shape != second[name].shape
    ]
    if problems:
        raise ConfigError("masks of one tensor must have one shape:\n  " + "\n  ".join(problems))
    return {**first, **second, **{name: first[name] & second[name] for name in both}}


def sparsity(masks: Masks) -> float:
    """Fraction in [0, 1] of entries removed among the masked tensors; 0 for no masks.

    Example:
        >>> sparsity({"w": torch.tensor([True, False, False, True])})
        0.5
    """
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    return 1 - kept / total if total else 0.0


def model_sparsity(model: nn.Module) -> float:
    """Fraction in [0, 1] of zeros over all parameters; tied parameters count once.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> apply_masks_(layer, {"weight": torch.tensor([[True, False]])})
        >>> model_sparsity(layer)
        0.5
    """
    total = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    return zeros / total if total else 0.0
