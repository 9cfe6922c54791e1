"""What a plan means to a model that is masked, or cut already: which entries it still has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError
from secateurs.masks import apply_masks_, named_tensors
from secateurs.posttraining.layers import Layer
from secateurs.types import Plan

__all__ = ["Cut"]

Masks = Mapping[str, Tensor]
T = TypeVar("T")


class Cut:
    """A plan, and the model and its dense origin that it is about.

    Attributes:
        small: whether the model is physically smaller; else it has the dense shapes.
        masks: tensor name -> bool mask of the dense shape, under all names of a tensor.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, plan: Plan | Masks) -> None:
        layers = plan.layers if isinstance(plan, Plan) else {}
        gone = {n for names in layers.values() for n in names}
        mine, theirs = named_tensors(model), named_tensors(dense)
        self.masks: Masks = _everywhere(plan.masks if isinstance(plan, Plan) else plan, theirs)
        self._kept = _everywhere(plan.kept if isinstance(plan, Plan) else {}, theirs)
        sizes = {
            n: (self.masks[n] if n in self.masks else theirs.get(n))
            for n in [*self.masks, *self._kept]
        }
        problems = [_misfit(n, t, theirs) for n, t in sizes.items()]
        self.small = any(
            n not in mine or mine[n].shape != theirs[n].shape for n in sizes if n in theirs
        )
        for name in sizes if self.small else ():
            if name in theirs and name not in gone:
                want = self.own(name, theirs[name]).shape
                if name not in mine:
                    problems.append(
                        f"{name}: the smaller model has no such tensor; repair before shrink, or "
                        'shrink with form="module"'
                    )
                elif mine[name].shape != want:
                    problems.append(
                        f"{name}: {tuple(mine[name].shape)}, the plan says {tuple(want)}"
                    )
        problems = [p for p in problems if p]
        if problems:
            raise ConfigError("the plan does not fit:\n  " + "\n  ".join(problems))

    def apply_(self, model: nn.Module) -> None:
        """Zero what is removed, where it is still there."""
        names = named_tensors(model)
        masks = {n: self.own(n, m) for n, m in self.masks.items() if n in names}
        apply_masks_(model, masks)

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """What the model still has of something of the dense shape of a tensor."""
        if self.small:
            for dim, rows in self._kept.get(name, {}).items():
                tensor = tensor.index_select(dim, rows.to(tensor.device))
        return tensor

    def mask(self, name: str, like: Tensor) -> Tensor:
        """Bool of the dense shape, True = kept."""
        if name in self.masks:
            return self.masks[name].to(like.device)
        return torch.ones_like(like, dtype=torch.bool)

    def outputs(self, layer: Layer, values: Tensor) -> Tensor:
        """What is left of (..., out) dense outputs of a layer."""
        rows = self._kept.get(layer.weight, {}).get(layer.out_dim)
        if not self.small or rows is None:
            return values
        return values.index_select(-1, rows.to(values.device))

    def inputs(self, layer: Layer, values: Tensor) -> Tensor:
        """What is left of (..., in) dense inputs of a layer of one group."""
        rows = self._kept.get(layer.weight, {}).get(1 - layer.out_dim)
        if not self.small or rows is None:
            return values
        return values.index_select(-1, rows.to(values.device))

    def touches(self, layer: Layer, dense: Tensor) -> bool:
        """Whether outputs of a dense layer that stay have lost some of what they read."""
        if layer.weight not in self.masks:
            return False
        mask = layer.matrix(self.mask(layer.weight, dense))
        stays = mask.any(2)
        if layer.bias is not None:  # what reads nothing any more, and still adds its bias
            stays = stays | self._kept_bias(layer, mask)
        return bool((~mask & stays[:, :, None]).any())

    def _kept_bias(self, layer: Layer, weights: Tensor) -> Tensor:
        """(groups, out) bool: outputs whose bias stays."""
        if layer.bias is None or layer.bias not in self.masks:
            return torch.ones_like(weights[:, :, 0])
        return layer.line(self.masks[layer.bias].to(weights.device))

    def small_groups(self, layer: Layer) -> bool:
        """Whether the outputs of a smaller layer cannot be found in the dense ones."""
        return (
            self.small
            and layer.form == "kernel"
            and layer.groups > 1
            and layer.weight in self._kept
        )


def _everywhere(values: Mapping[str, T], dense: Mapping[str, Tensor]) -> dict[str, T]:
    """What is said of a tensor, under all names that it has (tied weights)."""
    known = {id(dense[name]): name for name in values if name in dense}
    others = {
        name: values[known[id(tensor)]]
        for name, tensor in dense.items()
        if id(tensor) in known and name not in values
    }
    return {**values, **others}


def _misfit(name: str, tensor: Tensor | None, dense: Mapping[str, Tensor]) -> str:
    if name not in dense or tensor is None:
        return f"{name}: the dense model has no such parameter or buffer"
    if tensor.shape != dense[name].shape:
        return f"{name}: mask {tuple(tensor.shape)}, the dense tensor {tuple(dense[name].shape)}"
    return ""
