"""Slice the parameters and buffers of a module to the kept positions, and fix recorded sizes.

Works on any module tree that has the dense names: the user's class or a captured graph. Tied
tensors stay tied; `requires_grad` and dtype stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import SoundnessError
from secateurs.masks import named_tensors

__all__ = ["Kept", "fix_sizes", "owner_of", "set_tensor_", "slice_module_"]

Kept = Mapping[str, Mapping[int, Tensor]]
"""Tensor name -> {dim: (n,) int64 kept positions, ascending}."""

SIZES = frozenset(
    "in_features out_features in_channels out_channels groups num_features hidden_size input_size "
    "embedding_dim num_parameters".split()
)
"""Attributes of modules of torch.nn that follow their weights."""


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the attribute under which it does."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def sliced(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The kept positions of a tensor, as a copy of its own."""
    out = tensor.detach()
    for dim, index in sorted(dims.items()):
        out = out.index_select(dim, index.to(out.device))
    return out.clone()


def set_tensor_(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Put a parameter or buffer in place of the old one, registered as before, in its place."""
    if isinstance(tensor, nn.Parameter):
        setattr(module, attribute, tensor)
    else:
        module._buffers[attribute] = tensor


def slice_module_(model: nn.Module, kept: Kept) -> None:
    """Slice every tensor named in `kept`, in place; all names of a tied tensor follow.

    Raises:
        SoundnessError: a name or position does not exist in this model.
    """
    tensors = named_tensors(model)
    missing = sorted(set(kept) - set(tensors))
    if missing:
        raise SoundnessError(f"the plan names tensors that the model does not have: {missing}")
    new: dict[int, Tensor] = {}
    for name, dims in kept.items():
        old = tensors[name]
        for dim, index in dims.items():
            inside = 0 <= dim < old.dim() and len(index) > 0
            if not inside or int(index.max()) >= old.shape[dim] or int(index.min()) < 0:
                raise SoundnessError(
                    f"the plan keeps positions {index.tolist()} of dimension {dim} of {name}, "
                    f"which has shape {tuple(old.shape)}"
                )
        small = sliced(old, dims)
        if isinstance(old, nn.Parameter):
            small = nn.Parameter(small, requires_grad=old.requires_grad)
        new[id(old)] = small
    for name, old in tensors.items():
        if id(old) in new:
            set_tensor_(*owner_of(model, name), new[id(old)])


def fix_sizes(model: nn.Module, dense: nn.Module, kept: Kept) -> dict[str, dict[str, int]]:
    """Set the size attributes of well-known modules to those of their sliced weights.

    Args:
        model: sliced module; changed in place.
        dense: the same tree before slicing.
        kept: what was kept, for the number of groups of grouped convolutions.

    Returns:
        {module path: {attribute: new value}}, only those that changed.
    """
    changed: dict[str, dict[str, int]] = {}
    before = dict(dense.named_modules())
    tensors = named_tensors(dense)
    rows = {id(tensors[name]): dims[0] for name, dims in kept.items() if 0 in dims}
    for path, module in model.named_modules():
        sizes = _sizes(module, before.get(path), rows)
        differ = {k: v for k, v in sizes.items() if getattr(module, k) != v}
        for attribute, value in differ.items():
            setattr(module, attribute, value)
        if differ:
            changed[path] = differ
    return changed


def _sizes(
    module: nn.Module, dense: nn.Module | None, kept_rows: Mapping[int, Tensor]
) -> dict[str, int]:
    """Size attributes implied by the weights of a module of torch.nn."""
    if isinstance(module, nn.Linear):
        return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    if isinstance(module, nn.modules.conv._ConvNd) and dense is not None:
        groups = module.groups
        assert isinstance(dense, nn.modules.conv._ConvNd)
        rows = kept_rows.get(id(dense.weight))
        if groups > 1 and rows is not None and not module.transposed:
            groups = kept_groups(rows, dense.weight.shape[0], groups)
        out, into = (1, 0) if module.transposed else (0, 1)
        shape = module.weight.shape
        return {
            "out_channels": shape[out] * (groups if module.transposed else 1),
            "in_channels": shape[into] * (1 if module.transposed else groups),
            "groups": groups,
        }
    if isinstance(module, nn.modules.batchnorm._NormBase):
        held = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        return {} if held is None else {"num_features": held.shape[0]}
    if isinstance(module, nn.RNNBase):
        recurrent, first = (
            module.get_parameter("weight_hh_l0"),
            module.get_parameter("weight_ih_l0"),
        )
        return {"hidden_size": recurrent.shape[1], "input_size": first.shape[1]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": module.weight.shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.shape[0]}
    return {}


def observe_sizes(model: nn.Module, run: Callable[[], object]) -> dict[str, dict[str, int]]:
    """Set the size of normalisations without any tensor to what they meet in one run.

    Returns:
        as `fix_sizes`.
    """
    changed: dict[str, dict[str, int]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not [*module.parameters()]:

            def note(norm: Any, inputs: tuple[Tensor, ...], path: str = path) -> None:
                channels = inputs[0].shape[inputs[0].dim() - norm._get_no_batch_dim()]
                if norm.num_features != channels:
                    changed[path] = {"num_features": channels}
                    norm.num_features = channels

            if hasattr(module, "_get_no_batch_dim") and module.running_mean is None:
                handles.append(module.register_forward_pre_hook(note))
    try:
        if handles:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return changed


def kept_groups(rows: Tensor, dense_rows: int, groups: int) -> int:
    """Groups of a convolution that are left: fewer if whole groups went, else the same.

    Example:
        >>> kept_groups(torch.tensor([0, 1]), 4, 2)  # the second group went
        1
        >>> kept_groups(torch.tensor([0, 2]), 4, 2)  # one channel of each
        2
    """
    keep = torch.zeros(dense_rows, dtype=torch.bool)
    keep[rows.cpu()] = True
    blocks = keep.reshape(groups, -1)
    whole = blocks.all(dim=1)
    if bool((whole == blocks.any(dim=1)).all()):
        return int(whole.sum())
    return groups
