"""Slice the parameters and buffers of a module to the kept positions, and fix recorded sizes.

Works on any module tree that has the dense names: the user's class or a captured graph. Tied
tensors stay tied; `requires_grad` and dtype stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateurs.errors import SoundnessError
from secateurs.graph.rewriting import kept_groups as groups_left
from secateurs.masks import named_tensors
from secateurs.surgery.padded import PADDED, PLAIN

__all__ = [
    "Kept",
    "fix_sizes",
    "observe_sizes",
    "owner_of",
    "set_size_",
    "set_tensor_",
    "slice_module_",
    "takes_size",
]

Kept = Mapping[str, Mapping[int, Tensor]]
"""Tensor name -> {dim: (n,) int64 kept positions, ascending}."""

SIZES = frozenset(
    "in_features out_features in_channels out_channels groups num_features hidden_size input_size "
    "embedding_dim num_parameters normalized_shape n_dense num_channels num_groups embed_dim "
    "num_heads kdim vdim nf nx".split()
)
"""Attributes of modules of torch.nn that follow their weights (nf and nx: of a Conv1D)."""


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
    new = _sliced_tensors(model, kept)
    for name, old in named_tensors(model).items():
        if id(old) in new:
            set_tensor_(*owner_of(model, name), new[id(old)])


def sliced_copy(model: nn.Module, kept: Kept) -> nn.Module:
    """A deep copy in which every reference to a tensor named in `kept` is to its slice.

    Raises:
        SoundnessError: a name or position does not exist in this model.
    """
    memo: dict[int, Any] = dict(_sliced_tensors(model, kept))
    new = copy.deepcopy(model, memo)
    for parameter in new.parameters():
        parameter.grad = None
    return new


def _sliced_tensors(model: nn.Module, kept: Kept) -> dict[int, Tensor]:
    """Identity of each tensor that loses something -> what is left of it, as it was registered."""
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
    return new


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
        if path in before:
            sizes = _sizes(module, before[path], rows)
            differ = {k: v for k, v in sizes.items() if size_of(module, k) != v}
            for attribute, value in differ.items():
                set_size_(module, attribute, value)
            if differ:
                changed[path] = differ
    return changed


def size_of(module: nn.Module, attribute: str) -> int | None:
    """A recorded size; None if there is no such attribute, or it is not one size."""
    found = getattr(module, attribute, None)
    if attribute == "normalized_shape" and isinstance(found, (tuple, list)) and len(found) == 1:
        found = found[0]
    return found if type(found) is int else None


def set_size_(module: nn.Module, attribute: str, value: int) -> None:
    """Record a size; a norm that is given a dense size becomes its padded class."""
    if attribute == "n_dense":
        module.__class__ = PADDED.get(type(module), type(module))
    setattr(module, attribute, (value,) if attribute == "normalized_shape" else value)


def takes_size(module: nn.Module, attribute: str) -> bool:
    """Whether `set_size_` may set an attribute of this module."""
    if attribute == "n_dense":
        return type(module) in PADDED or type(module) in PLAIN
    return attribute in SIZES and size_of(module, attribute) is not None


def _sizes(module: Any, dense: Any, kept_rows: Mapping[int, Tensor]) -> dict[str, int]:
    """Size attributes implied by the weights of a module of torch.nn."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution_sizes(module, dense, kept_rows)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        held = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        return {} if held is None else {"num_features": held.shape[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(shape) == 1:
        return _norm_sizes(dense, "normalized_shape", shape[0], dense.weight.shape[0])
    if isinstance(module, nn.GroupNorm) and shape:
        return _group_sizes(dense, shape[0], kept_rows)
    if isinstance(module, nn.RNNBase):
        recurrent = module.get_parameter("weight_hh_l0")
        first = module.get_parameter("weight_ih_l0")
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        sizes = {"hidden_size": recurrent.shape[0] // gates, "input_size": first.shape[1]}
        return sizes | ({"proj_size": recurrent.shape[1]} if module.proj_size else {})
    if isinstance(module, nn.RNNCellBase):
        recurrent, first = module.get_parameter("weight_hh"), module.get_parameter("weight_ih")
        return {"hidden_size": recurrent.shape[1], "input_size": first.shape[1]}
    if isinstance(module, nn.MultiheadAttention):
        return _attention_sizes(module)
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    if type(module).__name__ == "Conv1D" and len(shape) == 2 and hasattr(module, "nf"):
        return {"nf": shape[1], "nx": shape[0]}  # of transformers: a linear layer, transposed
    return {}


def _convolution_sizes(module: Any, dense: Any, kept_rows: Mapping[int, Tensor]) -> dict[str, int]:
    groups = module.groups
    rows = kept_rows.get(id(dense.weight))
    if groups > 1 and rows is not None:  # of a transposed one: its input channels
        groups = kept_groups(rows, dense.weight.shape[0], groups)
    out, into = (1, 0) if module.transposed else (0, 1)
    shape = module.weight.shape
    return {
        "out_channels": shape[out] * (groups if module.transposed else 1),
        "in_channels": shape[into] * (1 if module.transposed else groups),
        "groups": groups,
    }


def _norm_sizes(dense: Any, attribute: str, size: int, before: int) -> dict[str, int]:
    """The new size of a norm, and the dense one if it is not recorded yet."""
    padded = {} if size == before or hasattr(dense, "n_dense") else {"n_dense": before}
    return {attribute: size, **padded}


def _group_sizes(dense: Any, size: int, kept_rows: Mapping[int, Tensor]) -> dict[str, int]:
    """Whole groups are gone, or channels of each."""
    rows, before = kept_rows.get(id(dense.weight)), dense.weight.shape[0]
    if rows is None:
        return {}
    groups = kept_groups(rows, before, dense.num_groups)
    per_group = before // dense.num_groups
    if size == groups * per_group:
        return {"num_channels": size, "num_groups": groups}
    padded = {} if hasattr(dense, "n_dense") else {"n_dense": per_group}
    return {"num_channels": size, **padded}


def _attention_sizes(module: nn.MultiheadAttention) -> dict[str, int]:
    """Fits when as much is left of the heads as of the embedding; else the comparison says no."""
    size, head = module.out_proj.weight.shape[1], module.head_dim
    sizes = {"embed_dim": size, "num_heads": size // head}
    if module._qkv_same_embed_dim:
        return {**sizes, "kdim": size, "vdim": size}
    assert module.k_proj_weight is not None
    assert module.v_proj_weight is not None
    return {**sizes, "kdim": module.k_proj_weight.shape[1], "vdim": module.v_proj_weight.shape[1]}


def observe_sizes(model: nn.Module, run: Callable[[], object]) -> dict[str, dict[str, int]]:
    """Set the size of normalisations without any tensor to what they meet in one run.

    Returns:
        as `fix_sizes`.
    """
    changed: dict[str, dict[str, int]] = {}
    handles = []
    for path, module in model.named_modules():
        if [*module.parameters(recurse=False)]:
            continue

        def note(norm: Any, inputs: tuple[Tensor, ...], path: str = path) -> None:
            sizes = _met_sizes(norm, inputs[0])
            differ = {k: v for k, v in sizes.items() if size_of(norm, k) != v}
            for attribute, value in differ.items():
                set_size_(norm, attribute, value)
            if differ:
                changed[path] = differ

        statistics = getattr(module, "running_mean", None)
        if (hasattr(module, "_get_no_batch_dim") and statistics is None) or type(module) in PADDED:
            handles.append(module.register_forward_pre_hook(note))
    try:
        if handles:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return changed


def _met_sizes(norm: Any, x: Tensor) -> dict[str, int]:
    """Sizes of a norm without tensors, for this input."""
    if hasattr(norm, "_get_no_batch_dim"):
        return {"num_features": x.shape[x.dim() - norm._get_no_batch_dim()]}
    if isinstance(norm, nn.GroupNorm):
        if norm.num_groups != 1:
            return {}
        return _norm_sizes(norm, "num_channels", x.shape[1], norm.num_channels)
    if len(norm.normalized_shape) != 1:
        return {}
    return _norm_sizes(norm, "normalized_shape", x.shape[-1], norm.normalized_shape[0])


def kept_groups(rows: Tensor, dense_rows: int, groups: int) -> int:
    """Groups of a convolution that are left: fewer if whole groups went, else the same.

    Example:
        >>> import torch
        >>> kept_groups(torch.tensor([0, 1]), 4, 2)  # the second group went
        1
        >>> kept_groups(torch.tensor([0, 2]), 4, 2)  # one channel of each
        2
    """
    keep = np.zeros(dense_rows, dtype=np.bool_)
    keep[rows.cpu().numpy()] = True
    return groups_left(keep, groups)
