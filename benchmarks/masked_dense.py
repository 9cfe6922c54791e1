"""Is a pruned model the dense model with zeros where something was removed? For any tool.

Nothing is asked of the tool: which elements it removed is read off the weights. `distinct_` makes
the elements of every parameter different from each other, so an element of the smaller tensor can
be found in the dense one. What is not found again is set to zero in a copy of the dense model, and
the outputs of the two must be equal.

A normalisation over units counts the zeros that a mask leaves, and a smaller one does not; the
usual scale of attention, one over the root of the head's width, does the same. That is a choice,
not a mistake, so `compare` makes a second reference in which both count the kept entries only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.batches import call_model, clone_inputs, named_outputs, tensors
from secateurs.types import Inputs

__all__ = ["Comparison", "compare", "distinct_", "outputs_of", "relative_error", "survivors"]

TOLERANCE = 1e-4
"""Largest difference of two outputs in single precision, relative to one plus the largest value."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        error: relative difference from the masked dense model, NaN when there is no reference.
        rescaled_error: the same when normalisations and attention count the kept entries only; None
            when it was not needed.
        changed: relative difference between the masked and the whole dense model.
        unclear: tensors of which it cannot be said what was removed.
    """

    error: float
    rescaled_error: float | None
    changed: float
    unclear: tuple[str, ...]


def distinct_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make the elements of each floating-point tensor differ, by as little as possible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            if not p.is_floating_point() or p.dim() == 0:
                continue
            flat = p.detach().reshape(-1).clone()
            for _ in range(8):
                _, inverse, counts = torch.unique(flat, return_inverse=True, return_counts=True)
                same = counts[inverse] > 1
                if not bool(same.any()):
                    break
                noise = torch.randn(int(same.sum()), generator=generator).to(flat.dtype)
                held = flat[same]
                flat[same] = torch.where(held == 0, 0.02 * noise, held * (1 + 1e-3 * noise))
            p.copy_(flat.view_as(p))
    return model


def survivors(dense: Tensor, small: Tensor) -> Tensor | None:
    """Which elements of `dense` the smaller tensor still holds: a mask, or None if unclear.

    Example:
        >>> survivors(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0], [4.0]]))
        tensor([[False,  True],
                [False,  True]])
    """
    if dense.dim() != small.dim() or small.numel() == 0:
        return None
    flat, held = dense.detach().reshape(-1).numpy(), small.detach().reshape(-1).numpy()
    values, first, counts = np.unique(flat, return_index=True, return_counts=True)
    slot = np.searchsorted(values, held).clip(max=len(values) - 1)
    if not (values[slot] == held).all():
        return None  # a value that the dense tensor does not have
    found = first[slot][counts[slot] == 1]
    if len(np.unique(found)) != len(found):
        return None  # an element was copied
    coordinates = np.unravel_index(found, tuple(dense.shape))
    block = torch.ones(dense.shape, dtype=torch.bool)
    for dim, line in enumerate(coordinates):
        kept = torch.zeros(dense.shape[dim], dtype=torch.bool)
        kept[torch.from_numpy(np.unique(line))] = True
        block &= kept.view([-1 if d == dim else 1 for d in range(dense.dim())])
    if int(block.sum()) == small.numel():  # whole slices: a few equal values do no harm
        return block
    if len(found) < small.numel():
        return None
    mask = torch.zeros(dense.numel(), dtype=torch.bool)
    mask[torch.from_numpy(found)] = True
    return mask.view(dense.shape)


def outputs_of(model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    """The tensors that matter, as the model returns them in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = call_model(model.eval(), clone_inputs(inputs))
    return tensors(named_outputs(found, names) if names else found)


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest `max |a - b| / (1 + max |a|)`; infinite for other shapes or numbers not finite."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.numel():
            continue
        gap = (x.double() - y.double()).abs().max() / (1 + x.double().abs().max())
        worst = max(worst, float(gap) if bool(gap.isfinite()) else float("inf"))
    return worst


def compare(
    dense: nn.Module, small: nn.Module, inputs: Inputs, names: tuple[str, ...] = ()
) -> Comparison:
    """Compare a pruned model with the dense model whose removed elements are zero.

    A difference above the tolerance is measured again in double precision.

    Args:
        dense: with distinct elements, from `distinct_`.
        small: what a tool made of a copy of it.
        inputs: what both are called with.
        names: outputs that matter; all if empty.
    """
    masks, unclear = _masks(dense, small)
    masked = _masked(dense, masks)
    reference = outputs_of(masked, inputs, names)
    changed = relative_error(outputs_of(dense, inputs, names), reference)
    error = _error(masked, small, inputs, names)
    if error <= TOLERANCE:
        return Comparison(error, None, changed, unclear)
    for path, mask in _norm_masks(dense, small, masks).items():
        _count_kept_only_(masked.get_submodule(path), small.get_submodule(path), mask)
    try:
        with _attention_counts_kept_only(masked, small):
            rescaled = _error(masked, small, inputs, names)
    except Exception:  # a normalisation of an unknown form: the first figure stands
        rescaled = float("inf")
    return Comparison(error, rescaled, changed, unclear)


@contextmanager
def _attention_counts_kept_only(masked: nn.Module, small: nn.Module) -> Iterator[None]:
    """Scale the attention of the masked model by the width that is left of its heads."""
    attend: Any = F.scaled_dot_product_attention
    inside = [0]
    paths = dict(small.named_modules())

    def kept_only(q: Tensor, k: Tensor, *args: Any, scale: float | None = None, **more: Any) -> Any:
        alive = q.flatten(0, -2).any(0) & k.flatten(0, -2).any(0)
        if scale is None and not inside[0] and bool(alive.any()):
            scale = int(alive.sum()) ** -0.5
        more["scale"] = scale
        return attend(q, k, *args, **more)

    for path, module in masked.named_modules():
        other = paths.get(path)
        if not isinstance(module, nn.MultiheadAttention):
            continue
        module.register_forward_pre_hook(lambda *_: inside.__setitem__(0, inside[0] + 1))
        module.register_forward_hook(lambda *_: inside.__setitem__(0, inside[0] - 1))
        if isinstance(other, nn.MultiheadAttention) and other.head_dim != module.head_dim:
            gain = (module.head_dim / other.head_dim) ** 0.5
            with torch.no_grad():
                for part in (module.in_proj_weight, module.in_proj_bias):
                    if part is not None:
                        part[: module.embed_dim].mul_(gain)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    setattr(F, "scaled_dot_product_attention", kept_only)  # noqa: B010
    try:
        yield
    finally:
        setattr(F, "scaled_dot_product_attention", attend)  # noqa: B010
        torch.backends.mha.set_fastpath_enabled(fast)


def _error(masked: nn.Module, small: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> float:
    error = relative_error(outputs_of(masked, inputs, names), outputs_of(small, inputs, names))
    if not TOLERANCE < error < float("inf"):
        return error
    try:
        wide = _wide(inputs)
        pair = [copy.deepcopy(m).double() for m in (masked, small)]
        return relative_error(*[outputs_of(m, wide, names) for m in pair])
    except Exception:  # single precision is written into the model
        return error


def _wide(inputs: Inputs) -> Inputs:
    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    found: Inputs = torch.utils._pytree.tree_map(widen, inputs)
    return found


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _masks(dense: nn.Module, small: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What is left of each tensor that lost something, and tensors that are unclear."""
    left, masks, unclear = _named(small), {}, []
    learned = dict(dense.named_parameters(remove_duplicate=False))
    for name, tensor in _named(dense).items():
        if not tensor.is_floating_point():
            continue
        now = left.get(name)
        if now is not None and now.shape == tensor.shape and torch.equal(now, tensor):
            continue
        mask = None if now is None else survivors(tensor, now)
        if mask is not None:
            masks[name] = mask
        elif name in learned:
            unclear.append(name)
    return masks, tuple(unclear)


def _masked(dense: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with zeros. Tied tensors that lost different elements are tied no more."""
    masked = copy.deepcopy(dense)
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in _named(masked).items():
        by_tensor.setdefault(id(tensor), []).append(name)
    with torch.no_grad():
        for names in by_tensor.values():
            held = [masks.get(n) for n in names]
            tied = all(_equal(m, held[0]) for m in held)
            for name, mask in zip(names[:1] if tied else names, held, strict=False):
                path, _, attribute = name.rpartition(".")
                owner = masked.get_submodule(path)
                tensor = getattr(owner, attribute)
                if not tied:
                    tensor = tensor.clone()
                    wrapped = nn.Parameter(tensor) if tensor.is_floating_point() else tensor
                    setattr(owner, attribute, wrapped)
                    tensor = wrapped
                if mask is not None:
                    tensor.mul_(_divisible(name, mask))
    return masked


def _divisible(name: str, mask: Tensor) -> Tensor:
    """The direction of a weight norm is divided by its own length: where a whole row goes, its
    scale is zero, and the row stays as it is."""
    if not name.endswith(("parametrizations.weight.original1", "weight_v")):
        return mask
    gone = ~mask.flatten(1).any(1)
    return mask | gone.view(-1, *[1] * (mask.dim() - 1))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _norm_masks(dense: nn.Module, small: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Normalisations over units that lost entries: module path -> mask of their scale."""
    found = {}
    paths = dict(small.named_modules())
    for path, module in dense.named_modules():
        kind = type(module).__name__
        mask = masks.get(f"{path}.weight")
        over_units = "Norm" in kind and "Batch" not in kind
        if not over_units or mask is None or mask.dim() != 1:
            continue
        if type(paths.get(path)) is type(module):
            found[path] = mask
    return found


def _count_kept_only_(masked: nn.Module, small: nn.Module, mask: Tensor) -> None:
    """Make a normalisation of the masked model compute what the small one does, and zeros."""
    kept = mask.nonzero().view(-1)
    own = copy.deepcopy(small)
    with torch.no_grad():
        for name, p in own.named_parameters():
            whole = masked.get_parameter(name)
            p.copy_(whole[kept] if whole.shape == mask.shape else whole)
    front = "2d" in type(masked).__name__ or isinstance(masked, nn.GroupNorm)
    front |= "first" in str(getattr(masked, "data_format", ""))

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        fits_last = output.shape[-1] == len(mask)
        dim = 1 if front or not fits_last else output.dim() - 1

        def cut(x: Any) -> Any:
            fits = isinstance(x, Tensor) and x.dim() == output.dim()
            return x.index_select(dim, kept) if fits and x.shape[dim] == len(mask) else x

        value = own(*[cut(a) for a in args], **{k: cut(v) for k, v in kwargs.items()})
        return torch.zeros_like(output).index_copy(dim, kept, value)

    masked.register_forward_hook(hook, with_kwargs=True)
