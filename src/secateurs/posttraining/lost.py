"""Which tensors have lost entries that no repair can reach, and why: nothing is left silently."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateurs.masks import named_tensors
from secateurs.posttraining.cut import Cut
from secateurs.posttraining.layers import Layer, layers_of, unread

__all__ = ["left_out", "owner", "shared"]


def left_out(dense: nn.Module, cut: Cut) -> list[str]:
    """One sentence for each parameter that is masked in part and belongs to no layer."""
    params = dict(dense.named_parameters(remove_duplicate=False))
    known = {id(params.get(x.weight)) for x in layers_of(dense)}
    notes = []
    for name, mask in cut.masks.items():
        home = owner(dense, name)
        if name not in params or id(params[name]) in known or params[name].dim() < 2:
            continue
        if isinstance(home, nn.Embedding):  # it makes units, and reads none
            continue
        rows = mask.flatten(1)
        if bool((~rows & rows.any(1, keepdim=True)).any()):
            notes.append(f"{name}: {unread(home)}; left as it was cut")
    return notes


def shared(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Weight -> another name under which something else uses it.

    A module that is registered at several places has several names too, and is still one layer.
    """
    tensors = named_tensors(model)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    found = {}
    for layer in layers:
        home = owner(model, layer.weight)
        others = [n for n in names[id(tensors[layer.weight])] if owner(model, n) is not home]
        if others:
            found[layer.weight] = others[0]
    return found


def owner(model: nn.Module, name: str) -> nn.Module:
    """The module that holds a tensor."""
    return model.get_submodule(name.rpartition(".")[0])
