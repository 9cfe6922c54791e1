"""Moments of each unit's activation, where it is read (or made, if no reader can be seen).

    act           mean |a|
    active        fraction of samples and positions at which a is not exactly zero
    act_variance  variance of a

Whatever is asked of one activation is computed once, in one visit, from one absolute value. Sums go
over the positions of a sample first, in the precision of the activation; over samples in float64.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateurs.errors import ScoringError
from secateurs.statistics.collector import Collector, Request, Run, Setting, register_statistic
from secateurs.statistics.hooks import Key, into_site_units, key_of, site_index, site_values
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters
from secateurs.types import GroupTarget, Site, Target

__all__ = [
    "Active",
    "Activations",
    "Moments",
    "Variance",
    "activation_sites",
    "check_finite",
    "moments",
    "unreached",
]


def activation_sites(target: GroupTarget) -> tuple[Site, ...]:
    """The consumer sites of a target; its producer sites if it has none."""
    read = tuple(s for s in target.sites if s.role == "consumer")
    return read or target.sites


def check_finite(value: Tensor, key: Key, batch: int) -> None:
    """Refuse an activation, or a sum of it, that is not finite.

    Raises:
        ScoringError: it names the batch and the module.
    """
    if not torch.isfinite(value).all():
        raise ScoringError(
            f"batch {batch}: the {key[2]} of {key[0]} holds values that are not finite"
        )


def unreached(target: GroupTarget, site: Site) -> ScoringError:
    """The error for a site that no batch has touched."""
    return ScoringError(
        f"{target.name}: call {site.call} of {site.module} was never reached; "
        "trace the model with inputs like those of the batches"
    )


def moments(value: Tensor, dim: int, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Sums over everything but one dimension: (size,) float64 on the CPU for each that is wanted.

    Args:
        value: an activation whose first dimension holds the samples.
        dim: the dimension that stays.
        wanted: of "abs" (sum of |a|), "nonzero" (how many are not zero), "sum" and "square" (the
            sum of squares, from the deviations within each sample, so that nothing cancels).

    Example:
        >>> found = moments(torch.tensor([[1.0, -2.0], [0.0, -4.0]]), 1, frozenset(["abs", "sum"]))
        >>> found["abs"], found["sum"]
        (tensor([1., 6.], dtype=torch.float64), tensor([ 1., -6.], dtype=torch.float64))
    """
    value = value.detach()
    if not value.is_floating_point() or value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    inner = [d for d in range(value.dim()) if d not in (0, dim)]

    def rows(x: Tensor) -> Tensor:  # (n, size), or (size,) if the samples are the units
        return (x.sum(inner) if inner else x).double()

    def line(x: Tensor) -> Tensor:
        return (x.sum(0) if x.dim() > 1 else x).cpu()

    found: dict[str, Tensor] = {}
    if wanted & {"sum", "square"}:
        total = rows(value)
        found["sum"] = line(total)
        if "square" in wanted:
            k = math.prod(value.shape[d] for d in inner)
            squares = total.square() / k
            if inner:
                mean = (total / k).to(value.dtype)
                shape = [n if d in (0, dim) else 1 for d, n in enumerate(value.shape)]
                centred = value - mean.reshape(shape)
                # Around the rounded mean: the sum of deviations is not exactly zero.
                mean = mean.double()
                squares = rows(centred.square_()) + 2 * mean * total - k * mean.square()
            found["square"] = line(squares)
    if wanted & {"abs", "nonzero"}:
        size = value.abs()
        if "abs" in wanted:
            found["abs"] = line(rows(size))
        if "nonzero" in wanted:
            found["nonzero"] = line(rows(size.sign_()))
    return {name: found[name] for name in wanted}


class Moments:
    """The moments that the collectors of one pass want, each computed once for a tensor."""

    _of: ClassVar[weakref.WeakKeyDictionary[Setting, Moments]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._wanted: dict[Key, frozenset[str]] = {}
        self._held: dict[tuple[int, int], tuple[Any, int, dict[str, Tensor]]] = {}

    @classmethod
    def of(cls, setting: Setting) -> Moments:
        """The one that all collectors of a pass share."""
        return cls._of.setdefault(setting, cls())

    def want(self, key: Key, names: frozenset[str]) -> None:
        """Ask for moments at a site."""
        self._wanted[key] = self._wanted.get(key, frozenset()) | names

    def at(self, key: Key, value: Tensor) -> Mapping[str, Tensor]:
        """All that is wanted of this activation (several modules may read the same tensor)."""
        wanted, place = self._wanted[key], (id(value), key[4])
        version = 0 if value.is_inference() else value._version
        held = self._held.get(place)
        known = held[2] if held and held[0]() is value and held[1] == version else {}
        if not wanted <= known.keys():
            more = moments(value, key[4], wanted - known.keys())
            known = {**known, **more}
            self._held = {k: h for k, h in self._held.items() if h[0]() is not None}
            self._held[place] = (weakref.ref(value), version, known)
        return known


class ActivationMoments(Collector):
    """Streams moments, so that what comes of them does not depend on the cut into batches."""

    shares = "forward"
    names: ClassVar[frozenset[str]]
    readers_only: ClassVar[bool] = False

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._sites = {t.name: activation_sites(t) for t in request.groups}
        self._moments = Moments.of(setting)
        for site in self._every():
            self._moments.want(key_of(site), self.names)

    def _every(self) -> list[Site]:
        return [site for sites in self._sites.values() for site in sites]

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When no activation can be hooked."""
        if not isinstance(target, GroupTarget) or not target.sites:
            return "no activation can be seen from outside"
        if cls.readers_only and not any(s.role == "consumer" for s in target.sites):
            return "its activation can be seen only before the activation function"
        return ""

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Hook the model for one forward pass."""

        def add(key: Key, value: Tensor) -> Tensor:
            found = self._moments.at(key, value)
            for name in sorted(self.names):
                check_finite(found[name], key, run.number)
                self.sums.add(f"{key} {name}", found[name])
            count = value.numel() // value.shape[key[4]]
            self.sums.add(f"{key} count", torch.tensor(float(count), dtype=torch.float64))
            return value

        return site_values(self.setting.model, self._every(), add)

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64: the mean over the sites at which a unit can be seen.

        Raises:
            ScoringError: a site was never reached.
        """
        assert isinstance(target, GroupTarget)
        total = torch.zeros(target.n_units, dtype=torch.float64)
        seen = torch.zeros_like(total)
        for site in self._sites[target.name]:
            key = f"{key_of(site)}"
            if f"{key} count" not in self.sums:
                raise unreached(target, site)
            owned = torch.bincount(site_index(site)[1], minlength=target.n_units)
            count = owned.clamp(min=1) * self.sums[f"{key} count"]
            means = {
                name: into_site_units(self.sums[f"{key} {name}"], site, torch.zeros_like(total))
                / count
                for name in self.names
            }
            total += self.finished(means)
            seen += owned > 0
        return total / seen.clamp(min=1)

    def finished(self, means: Mapping[str, Tensor]) -> Tensor:
        """The statistic from the means of the moments over samples and positions."""
        (name,) = self.names
        return means[name]


class Activations(ActivationMoments):
    """Mean |a|."""

    names = frozenset(["abs"])


class Active(ActivationMoments):
    """How often a unit is not exactly zero, after the activation function."""

    names = frozenset(["nonzero", "abs"])  # the sum of |a| tells what is not finite
    readers_only = True

    def finished(self, means: Mapping[str, Tensor]) -> Tensor:
        """The fraction of values that are not zero."""
        return means["nonzero"]

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64 in [0, 1]; says so where it tells nothing."""
        found = super().unit(target)
        if bool((found == 1).all()):
            self.notes.append(
                f"{target.name}: no activation is ever exactly zero, so all its units score 1"
            )
        return found


class Variance(ActivationMoments):
    """Variance over samples and positions."""

    names = frozenset(["sum", "square"])

    def finished(self, means: Mapping[str, Tensor]) -> Tensor:
        """E a^2 - (E a)^2."""
        return (means["square"] - means["sum"].square()).clamp(min=0)


register_statistic("act", Activations)
register_statistic("active", Active)
register_statistic("act_variance", Variance)
