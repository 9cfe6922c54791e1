"""Where the weights of units live, in the shape that a training step needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.distributed import is_sharded, plain
from secateurs.errors import ConfigError, choose
from secateurs.statistics.units import check_fits, members_of
from secateurs.types import Graph, GroupTarget, expand_granularity

__all__ = ["Family", "Place", "families_of"]


@dataclass(frozen=True, eq=False)
class Place:
    """Positions of one parameter that belong to units.

    Attributes:
        name: of the parameter.
        weight: the parameter.
        dim: of it.
        index: (n,) positions along `dim`, on its device.
        unit: (n,) the unit of each.
    """

    name: str
    weight: nn.Parameter
    dim: int
    index: Tensor
    unit: Tensor

    def squares(self, n_units: int) -> Tensor:
        """(n_units,) sum of the squares of each unit's weights here."""
        w = self.weight.detach()
        others = [d for d in range(w.dim()) if d != self.dim]
        line = w.square()
        line = line.sum(others) if others else line  # (size of dim,)
        return line.new_zeros(n_units).index_add_(0, self.unit, line[self.index])

    def add_(self, factor: Tensor, *, sign: bool = False) -> None:
        """Add factor[unit] x weight, or its sign, to the gradient.

        Raises:
            ConfigError: the gradient is sparse.
        """
        w = self.weight
        if not w.requires_grad:
            return
        if w.grad is not None and w.grad.is_sparse:
            raise ConfigError(
                f"a penalty cannot be added to the sparse gradient of {self.name}: build the "
                "embedding with sparse=False"
            )
        line = w.detach().new_zeros(w.shape[self.dim])
        line[self.index] = factor[self.unit].to(line)
        shape = [1] * w.dim()
        shape[self.dim] = -1
        with torch.no_grad():
            found = (w.sign() if sign else w) * line.view(shape)
            w.grad = found if w.grad is None else w.grad.add_(found)


@dataclass(frozen=True, eq=False)
class Family:
    """The units of one target.

    Attributes:
        name: of the target.
        places: where they live.
        sizes: (n_units,) how many weights each has.
        chosen: (n_units,) 1 for units that are penalised, else 0.
    """

    name: str
    places: tuple[Place, ...]
    sizes: Tensor
    chosen: Tensor

    @property
    def n_units(self) -> int:
        """How many units there are."""
        return len(self.sizes)


def families_of(
    model: nn.Module,
    graph: Graph,
    rule: str,
    granularity: str | Sequence[str],
    units: Mapping[str, Tensor] | None,
) -> tuple[list[Family], list[str]]:
    """What a penalty acts on, and what it leaves out and why.

    Raises:
        ConfigError: nothing fits, or units that are missing, unknown or out of range.
    """
    if "weight" in expand_granularity(granularity):
        raise ConfigError(
            "a penalty acts on structural units, and granularity has single weights: leave "
            "'weight' away (weight_decay of the optimizer makes those small)"
        )
    if is_sharded(model):
        raise ConfigError(
            "a penalty needs whole parameters, and these are sharded (FSDP2): train with DDP"
        )
    model = plain(model)
    targets = {t.name: t for t in graph.groups(granularity)}
    params = check_fits(model, targets.values())
    if not targets:
        raise ConfigError(f"the graph has no units of granularity {granularity!r} to penalise")
    chosen = _chosen(rule, targets, units)
    norms = _norm_scales(model) if rule == "norm_scale" else None
    found, notes = [], []
    for name, flags in chosen.items():
        places = []
        for m in members_of(targets[name], "all", params):
            if m.masked and (norms is None or m.tensor in norms):
                weight = params[m.tensor]
                index, unit = (
                    torch.from_numpy(np.ascontiguousarray(x)).to(weight.device)
                    for x in (m.index, m.unit)
                )
                places.append(Place(m.tensor, weight, m.dim, index, unit))
        if places:
            found.append(_family(name, places, flags))
        else:
            notes.append(f"{name}: no norm with a scale, so {rule} leaves it as it is")
    if not found:
        raise ConfigError(
            "norm_scale: no norm of the model has a scale for the units; take group_lasso"
            if norms is not None
            else "a penalty on no unit: units= is empty"
        )
    return found, notes


def _chosen(
    rule: str, targets: Mapping[str, GroupTarget], units: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Target -> (n_units,) 1 for units that are penalised."""
    if units is None:
        if rule == "growing":
            raise ConfigError("Penalty('growing') needs units=: which will be cut, by target name")
        return {name: torch.ones(t.n_units) for name, t in targets.items()}
    chosen = {}
    for name, which in units.items():
        choose(name, targets, "target")
        flags, n = torch.zeros(targets[name].n_units), targets[name].n_units
        which = torch.as_tensor(which, dtype=torch.int64)
        if len(which) and not 0 <= int(which.min()) <= int(which.max()) < n:
            raise ConfigError(f"units of {name} must be in [0, {n}), got {which.tolist()}")
        flags[which] = 1.0
        if len(which):
            chosen[name] = flags
    return chosen


def _family(name: str, places: Sequence[Place], flags: Tensor) -> Family:
    first = places[0].weight
    sizes = torch.zeros(len(flags), device=first.device, dtype=first.dtype)
    for place in places:
        each = place.weight.numel() // place.weight.shape[place.dim]
        sizes.index_add_(0, place.unit.to(sizes.device), sizes.new_full((len(place.unit),), each))
    return Family(name, tuple(places), sizes, flags.to(sizes))


def _norm_scales(model: nn.Module) -> set[str]:
    """Names of the scales of norms, whoever wrote them."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, p in module.named_parameters(recurse=False)
        if name == "weight" and p.dim() == 1
    }
