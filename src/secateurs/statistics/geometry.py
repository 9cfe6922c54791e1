"""Statistics of weights that look at more than one element at a time; no data.

norm_scale       mean |gamma| of the outermost norms of a unit
median_distance  sum of the distances from a unit's weights to those of all others
lamp             w^2 over the sum of all squares that are not smaller
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.statistics.collector import Collector, register_statistic
from secateurs.statistics.units import Parameters, into_units, members_of
from secateurs.types import GroupTarget, Member, Target, WeightTarget

__all__ = ["Lamp", "MedianDistance", "NormScale", "norm_members", "unit_rows"]

BLOCK = 1 << 22
"""Distances that are held at a time."""


def norm_members(model: nn.Module, target: Target, params: Parameters) -> list[Member]:
    """The scales of the outermost norms of a target.

    A norm is a module whose class says so, such as `BatchNorm2d` or `LlamaRMSNorm`; its scale is
    its vector that is not the shift.
    """
    if not isinstance(target, GroupTarget):
        return []

    def is_scale(name: str) -> bool:
        path, _, own = name.rpartition(".")
        if params[name].dim() != 1 or own in ("bias", "beta"):
            return False
        return "norm" in type(model.get_submodule(path)).__name__.lower()

    produce = members_of(target, "producers", params)
    return [m for m in produce if m.outermost and is_scale(m.tensor)]


class NormScale(Collector):
    """Mean |gamma| over the entries of a unit."""

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When some unit has no norm."""
        owned = {int(u) for m in norm_members(model, target, params) for u in m.unit}
        missing = target.n_units - len(owned)
        return f"{missing} units are not made by a norm with a learned scale" if missing else ""

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64."""
        setting = self.setting
        total = torch.zeros(target.n_units, dtype=torch.float64)
        count = torch.zeros_like(total)
        for member in norm_members(setting.model, target, setting.params):
            into_units(setting.params[member.tensor].detach().abs(), member, total)
            count += torch.bincount(torch.from_numpy(member.unit), minlength=target.n_units)
        return total / count


def _matrices(target: Target, members: str, params: Parameters) -> list[Member]:
    if not isinstance(target, GroupTarget):
        return []
    return [m for m in members_of(target, members, params) if params[m.tensor].dim() > 1]


def unit_rows(target: Target, members: str, params: Parameters) -> Tensor:
    """(n_units, d) float64: the weights of each unit, without biases and norms."""
    rows = []
    for member in _matrices(target, members, params):
        weight = params[member.tensor].detach().double().cpu().movedim(member.dim, 0)
        order = np.argsort(member.unit, kind="stable")
        chosen = weight[torch.from_numpy(np.ascontiguousarray(member.index[order]))]
        rows.append(chosen.reshape(target.n_units, -1))  # (n_units * k, ...) -> (n_units, k * ...)
    return torch.cat(rows, 1)


class MedianDistance(Collector):
    """Sum of distances to all other alive units of the target."""

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When units have no weights that can be compared one by one."""
        every = _matrices(target, members, params)
        if not every:
            return f"its units have no {members} weights beside biases and norms"
        counts = [np.bincount(m.unit, minlength=target.n_units) for m in every]
        if any((c != c[0]).any() for c in counts):
            return "its units have different numbers of weights"
        return ""

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64; 0 for units that were removed earlier."""
        rows = unit_rows(target, self.request.members, self.setting.params)
        alive = self.setting.alive[target.name]
        near = rows[alive] - rows[alive].mean(0)  # distances stay, rounding shrinks
        step = max(1, BLOCK // max(1, len(near)))
        out = torch.zeros(target.n_units, dtype=torch.float64)
        for start in range(0, len(near), step):
            apart = torch.cdist(near[start : start + step], near)
            apart.diagonal(start).zero_()  # exactly: the square root magnifies rounding
            out[alive[start : start + step]] = apart.sum(1)
        return out


class Lamp(Collector):
    """w^2 over the sum of the squares from this one up, in ascending order."""

    def unit(self, target: Target) -> Tensor:
        """(n,) float64 in [0, 1]; 0 for weights that are zero or were removed earlier."""
        assert isinstance(target, WeightTarget)
        weight = self.setting.params[target.name].detach().reshape(-1).cpu()
        alive = self.setting.alive[target.name]
        sizes = weight[alive].abs()
        order = sizes.argsort(stable=True)
        ascending = sizes[order].double().square()
        rest = ascending.flip(0).cumsum(0).flip(0)  # (n,): the sum of this one and all larger
        shares = torch.where(ascending > 0, ascending / rest, 0.0)
        out = torch.zeros(target.n_units, dtype=torch.float64)
        out[alive[order]] = shares
        return out


register_statistic("norm_scale", NormScale)
register_statistic("median_distance", MedianDistance)
register_statistic("lamp", Lamp)
