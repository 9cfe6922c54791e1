"""Mask sets: which tensors they name, whether they fit, how much they remove."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError

__all__ = [
    "Masks",
    "by_tensor",
    "combine",
    "model_sparsity",
    "named_tensors",
    "plain_names",
    "sparsity",
    "validate",
]

Masks = Mapping[str, Tensor]

WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and averaged models, and torch.compile, put before every name."""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names (tied ones appear under all)."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def plain_names(model: nn.Module) -> dict[str, str]:
    """Name -> the same without what wrappers put before it, for every parameter and buffer."""
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    prefix = ""
    while parameters:
        wider = [prefix + w for w in WRAPPERS]
        prefix_now = next((w for w in wider if all(n.startswith(w) for n in parameters)), None)
        if prefix_now is None:
            break
        prefix = prefix_now
    return {name: name.removeprefix(prefix) for name in named_tensors(model)}


def validate(model: nn.Module, masks: Masks) -> dict[str, str]:
    """Name of each mask -> full name of its tensor in the model.

    Raises:
        ConfigError: lists every mask that does not fit its tensor.
    """
    tensors, plain = named_tensors(model), plain_names(model)
    full = {short: name for name, short in plain.items()} | {name: name for name in plain}
    problems = [
        text for name in sorted(masks) if (text := _misfit(name, masks[name], tensors, full))
    ]
    if problems:
        raise ConfigError("masks do not fit the model:\n  " + "\n  ".join(problems))
    return {name: full[name] for name in masks}


def by_tensor(model: nn.Module, masks: Masks) -> dict[int, Tensor]:
    """Id of a tensor -> what the masks of all its names keep, on its device.

    Raises:
        ConfigError: as `validate`.
    """
    tensors, found = named_tensors(model), dict[int, Tensor]()
    for name, full in validate(model, masks).items():
        key, mask = id(tensors[full]), masks[name].to(tensors[full].device)
        found[key] = found[key] & mask if key in found else mask
    return found


def _misfit(name: str, mask: Any, tensors: Mapping[str, Tensor], full: Mapping[str, str]) -> str:
    """What is wrong with one mask; empty when it fits."""
    if name not in full:
        near = get_close_matches(name, full, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{name}: the model has no such parameter or buffer.{hint}"
    tensor = tensors[full[name]]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        return f"{name}: a mask is a bool tensor (True = keep), got {got}"
    if mask.shape != tensor.shape:
        return f"{name}: mask {tuple(mask.shape)}, tensor {tuple(tensor.shape)}"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"{name}: only floating-point tensors can be masked, this is {tensor.dtype}"
    return ""


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
        >>> nn.init.zeros_(layer.weight[:, :1]).numel()
        1
        >>> model_sparsity(layer)
        0.5
    """
    total = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    return zeros / total if total else 0.0
