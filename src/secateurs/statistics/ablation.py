"""Removing units in runs of the model: one unit by one, or many in one run.

    removed(inputs, n, target, units, t) -> (outputs with nothing removed, [outputs, one per unit])

Both ways scale a unit by (1 - t). `OneByOne` calls the model with substituted parameters: it covers
every target, and is the oracle. `Replicated` repeats the batch along its first dimension, and
multiplies copy j by (1 - t_j) where the activation of unit j is seen, which is the same wherever
the sites of a target are exact. `t` may require a gradient, or carry a tangent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.batches import call_model, tensors
from secateurs.errors import ScoringError
from secateurs.statistics.collector import Setting, call_with
from secateurs.statistics.hooks import Key, key_of, site_index, site_values
from secateurs.statistics.units import members_of
from secateurs.types import Inputs, Site, Target, WeightTarget

__all__ = ["OneByOne", "Replicated", "agree", "copies_for", "places", "same_name"]

COPY_BYTES = {"cpu": 2**20}
"""Copies go on while the largest activation of all of them fits: more leaves the cache of a core,
and a copy then costs as much as a run of its own."""
OTHER_COPY_BYTES = 2**26
FEWEST, MOST = 4, 64
"""Copies in one run; with fewer than the former, one by one is as fast and needs no check."""


class OneByOne:
    """One run for each unit, with its members scaled."""

    room = 1

    def __init__(self, setting: Setting, members: str) -> None:
        self._setting, self._members = setting, members
        self._names = same_name(setting.params)

    def removed(
        self, inputs: Inputs, n: int, target: Target, units: Sequence[int], t: Tensor
    ) -> tuple[Any, list[Any]]:
        """(None, outputs for each unit); `t` has one entry for each unit."""
        outputs = [
            call_with(self._setting.model, self._scaled(target, unit, step), inputs)
            for unit, step in zip(units, t.unbind(), strict=True)
        ]
        return None, outputs

    def _scaled(self, target: Target, unit: int, t: Tensor) -> dict[str, Tensor]:
        """The tensors in which the unit lives, its members scaled by (1 - t)."""
        changed: dict[str, Tensor] = {}
        for name, place in places(target, unit, self._members, self._setting.params):
            name = self._names[name]
            tensor = changed.get(name, self._setting.params[name].detach())
            if t.requires_grad:
                here = torch.zeros_like(tensor)
                here[place] = 1
                changed[name] = tensor * (1 - t * here)
            else:
                changed[name] = tensor if name in changed else tensor.clone()
                changed[name][place] *= 1 - float(t)
        return changed


class Replicated:
    """Many units in one run: a copy of the batch for each, and one with nothing removed.

    Args:
        model: not changed.
        sites: target name -> places where its units are seen exactly (see `probe_gates`).
        copies: of the batch in one run, one of them with nothing removed.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Sequence[Site]], copies: int) -> None:
        self._model, self._sites = model, sites
        self.room = copies - 1
        self._held: tuple[Inputs, int, Inputs] | None = None

    def removed(
        self, inputs: Inputs, n: int, target: Target, units: Sequence[int], t: Tensor
    ) -> tuple[Any, list[Any]]:
        """(outputs with nothing removed, outputs for each unit); `t` has one entry for each unit.

        Raises:
            ScoringError: an activation or output does not begin with the samples.
        """
        copies = len(units) + 1
        chosen = torch.tensor(list(units))
        hits: dict[Key, list[tuple[Tensor, Tensor]]] = {}
        for site in self._sites[target.name]:
            index, unit = site_index(site)
            hits.setdefault(key_of(site), []).append((index, unit == chosen[:, None]))

        def gated(key: Key, value: Tensor) -> Tensor:
            if value.shape[0] != copies * n:
                raise ScoringError(f"the {key[2]} of {key[0]} does not begin with the samples")
            exact = torch.promote_types(value.dtype, torch.float32)
            here = value.new_zeros(len(units), value.shape[key[4]], dtype=exact)
            for index, hit in hits[key]:
                here[:, index.to(here.device)] += hit.to(here)
            factor = torch.cat([torch.ones_like(here[:1]), 1 - t.to(here)[:, None] * here])
            shape = [copies] + [1] * value.dim()  # (copies, n, ..., size, ...)
            shape[key[4] % value.dim() + 1] = value.shape[key[4]]
            apart = value.reshape(copies, n, *value.shape[1:])
            return (apart * factor.to(value.dtype).reshape(shape)).reshape(value.shape)

        with site_values(self._model, self._sites[target.name], gated):
            outputs = call_model(self._model, self._repeated(inputs, n, copies))
        cut = _cut(outputs, n, copies)
        return cut[0], cut[1:]

    def _repeated(self, inputs: Inputs, n: int, copies: int) -> Inputs:
        """The batch `copies` times, one after the other; the last one is kept."""

        def repeat(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == n:
                return leaf.repeat(copies, *[1] * (leaf.dim() - 1))
            return leaf

        if self._held is None or self._held[0] is not inputs or self._held[1] != copies:
            self._held = inputs, copies, pytree.tree_map(repeat, inputs)
        return self._held[2]


def same_name(params: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Name -> the first name of the same parameter: a tied one is substituted once."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in params.items()}


def places(
    target: Target, unit: int, members: str, params: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Any]]:
    """(parameter name, index expression) of the members of one unit."""
    if isinstance(target, WeightTarget):
        where = torch.unravel_index(torch.tensor(unit), target.shape)
        yield target.name, tuple(where)
        return
    for member in members_of(target, members, params):
        rows = torch.from_numpy(member.index[member.unit == unit])
        yield member.tensor, (*[slice(None)] * member.dim, rows)


def copies_for(model: nn.Module, inputs: Inputs) -> int:
    """How many copies of a batch a run should hold: a number that depends on sizes only.

    A timing would make the sums depend, in their last digits, on how busy the machine is.
    """
    largest = [1]

    def look(_: nn.Module, __: Any, output: Any) -> None:
        largest.extend(t.numel() * t.element_size() for t in tensors(output))

    handles = [m.register_forward_hook(look) for m in model.modules()]
    try:
        with torch.no_grad():
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    device = next((t.device.type for t in tensors(inputs)), "cpu")
    budget = COPY_BYTES.get(device, OTHER_COPY_BYTES)
    return max(1, min(MOST, budget // max(largest)))


def agree(a: Any, b: Any) -> bool:
    """Whether two outputs are equal up to rounding, compared with the largest value of each."""
    left, right = tensors(a), tensors(b)
    if len(left) != len(right):
        return False
    for x, y in zip(left, right, strict=True):
        if x.shape != y.shape:
            return False
        if x.is_floating_point():
            error = (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
            scale = x.double().abs().max().item() if x.numel() else 0.0
            if not error <= tolerance(x.dtype) * (1 + scale):
                return False
        elif not torch.equal(x, y):
            return False
    return True


def tolerance(dtype: torch.dtype) -> float:
    """What rounding may do to an output: kernels add up in another order for other batch sizes."""
    return min(0.1, 1000 * torch.finfo(dtype).eps)


def _cut(outputs: Any, n: int, copies: int) -> list[Any]:
    """The part of the outputs that belongs to each copy."""
    leaves, spec = pytree.tree_flatten(outputs)
    parts: list[Sequence[Any]] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            parts.append([leaf] * copies)
        elif not leaf.dim() or leaf.shape[0] != copies * n:
            raise ScoringError(f"an output of shape {tuple(leaf.shape)} is not one per sample")
        else:
            parts.append(torch.split(leaf, n))
    return [pytree.tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]
