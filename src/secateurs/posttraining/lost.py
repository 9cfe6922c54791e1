"""Which tensors have lost entries that no repair can reach, and why: nothing is left silently."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateurs.masks import named_tensors
from secateurs.posttraining.cut import Cut
from secateurs.posttraining.layers import Layer, layers_of, unread

__all__ = ["left_out", "shared"]


def left_out(dense: nn.Module, cut: Cut) -> list[str]:
    """One sentence for each parameter that is masked in part and belongs to no layer."""
    known = {x.weight for x in layers_of(dense)}
    params = dict(dense.named_parameters(remove_duplicate=False))
    notes = []
    for name, mask in cut.masks.items():
        owner = dense.get_submodule(name.rpartition(".")[0])
        if name in known or name not in params or params[name].dim() < 2:
            continue
        if isinstance(owner, nn.Embedding):  # it makes units, and reads none
            continue
        rows = mask.flatten(1)
        if bool((~rows & rows.any(1, keepdim=True)).any()):
            notes.append(f"{name}: {unread(owner)}; left as it was cut")
    return notes


def shared(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Weight -> another name under which something else uses it."""
    tensors = named_tensors(model)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    found = {}
    for layer in layers:
        others = [n for n in names[id(tensors[layer.weight])] if n != layer.weight]
        if others:
            found[layer.weight] = others[0]
    return found
