"""Statistics of whole feature maps: the rank of one (HRank), the independence of each (CHIP).

Both need singular values, so only the first `samples` samples are used, whatever the cut into
batches, and what would take longer than `max_seconds` is refused before it begins.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.batches import call_model
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics.activations import check_finite, unreached
from secateurs.statistics.collector import Collector, Request, Run, Setting, register_statistic
from secateurs.statistics.hooks import Key, key_of, site_values
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters
from secateurs.types import GroupTarget, Site, Target

__all__ = ["Independence", "MapRank", "independence", "map_ranks"]

PLANAR = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.InstanceNorm2d,
)
"""Modules that read and make maps of shape (n, C, H, W)."""
HELD = 1 << 23
"""Numbers that a batch of small matrices may hold."""


def map_ranks(maps: Tensor) -> Tensor:
    """(n, C) float64: the numerical rank of each feature map.

    Args:
        maps: (n, C, H, W). Singular values above max(H, W) eps of the largest count.

    Example:
        >>> map_ranks(torch.stack([torch.eye(3), torch.ones(3, 3), torch.zeros(3, 3)])[None])
        tensor([[3., 1., 0.]], dtype=torch.float64)
    """
    eps = max(torch.finfo(maps.dtype).eps, torch.finfo(torch.float32).eps)
    wide = maps if maps.dtype == torch.float64 else maps.float()
    values = torch.linalg.svdvals(wide)  # (n, C, min(H, W)), descending
    limit = values[..., :1] * (eps * max(maps.shape[-2:]))
    ranks: Tensor = (values > limit).sum(-1).double().cpu()
    return ranks


def independence(rows: Tensor, chosen: Iterable[int] | None = None) -> Tensor:
    """(C,) float64: how much of the nuclear norm of a matrix is lost without each of its rows.

    From the eigenvalues of the smaller Gram matrix, whose square roots are the singular values.

    Args:
        rows: (C, P).
        chosen: the rows that are asked for; 0 for the others. None for all.

    Example:
        >>> independence(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.], dtype=torch.float64)
    """
    a = rows.double()
    n, p = a.shape
    asked = torch.tensor(list(range(n) if chosen is None else chosen), dtype=torch.int64)
    gram = a @ a.T if n <= p else a.T @ a
    out = torch.zeros(n, dtype=torch.float64)
    whole = _nuclear(gram).cpu()
    for part in torch.split(asked, max(1, HELD // max(1, gram.numel()))):
        mine = part.to(a.device)
        less = gram.repeat(len(part), 1, 1)
        if n <= p:  # without a row: that row and column of the Gram matrix are zero
            each = torch.arange(len(part), device=a.device)
            less[each, mine, :] = 0
            less[each, :, mine] = 0
        else:
            less -= a[mine][:, :, None] * a[mine][:, None, :]
        out[part] = (whole - _nuclear(less).cpu()).clamp(min=0)
    return out


def _nuclear(gram: Tensor) -> Tensor:
    """Sum of singular values, from the Gram matrix."""
    norms: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)
    return norms


class FeatureMaps(Collector):
    """Looks at the first samples only: a line of (size,) or (n_units,) for each site."""

    shares = "forward"
    what: ClassVar[str]

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._samples = int(request.options["samples"])
        self._sites = {t.name: self.seen(setting.model, t) for t in request.groups}
        self._owners: dict[Key, list[tuple[GroupTarget, Site]]] = {}
        for target in request.groups:
            for site in self._sites[target.name]:
                self._owners.setdefault(key_of(site), []).append((target, site))
            if self._sites[target.name][0].role == "producer":
                self.notes.append(
                    f"{target.name}: seen where it is made, before an activation function, because "
                    f"no reader sees {self.what}"
                )

    @classmethod
    @abstractmethod
    def fits(cls, module: nn.Module, site: Site, target: GroupTarget) -> bool:
        """Whether the units can be seen as maps there."""

    @abstractmethod
    def values(self, rows: Tensor, target: GroupTarget, site: Site) -> Tensor:
        """(n_units,) float64: the sum over samples; `rows` are (n, size, ...) activations."""

    @classmethod
    def seen(cls, model: nn.Module, target: GroupTarget) -> list[Site]:
        """Where units are read as maps; where they are made if nowhere else."""
        found = [s for s in target.sites if cls.fits(model.get_submodule(s.module), s, target)]
        return [s for s in found if s.role == "consumer"] or found

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When no site shows maps."""
        seen = isinstance(target, GroupTarget) and cls.seen(model, target)
        return "" if seen else f"its units cannot be seen as {cls.what}"

    def begin(self, run: Run) -> None:
        """Time one sample.

        Raises:
            ConfigError: all of them would take longer than `max_seconds`.
        """
        spent = 0.0

        def clock(key: Key, value: Tensor) -> Tensor:
            nonlocal spent
            started = time.perf_counter()
            for _ in self._lines(run, key, value, 1):
                pass
            spent += time.perf_counter() - started
            return value

        with torch.no_grad(), site_values(self.setting.model, self._every(), clock):
            call_model(self.setting.model, run.inputs)
        samples = min(self._samples, self.setting.n_batches * run.n)
        if spent * samples > self.setting.max_seconds:
            raise ConfigError(
                f"singular values of {samples} samples would take about {spent * samples:.0f} s, "
                f"more than max_seconds={self.setting.max_seconds:g}. Ask for fewer samples "
                f"(option samples), or for fewer targets"
            )

    def _every(self) -> list[Site]:
        return [site for sites in self._sites.values() for site in sites]

    def _lines(
        self, run: Run, key: Key, value: Tensor, take: int
    ) -> Iterator[tuple[GroupTarget, Tensor]]:
        """Sums over the first `take` samples at one site."""
        if value.shape[0] % run.n or key[4] == 0:
            raise ScoringError(
                f"{key[0]}: {key[2]} of shape {tuple(value.shape)} does not begin with the {run.n} "
                "samples of the batch, so that the first samples cannot be told"
            )
        rows = value.detach()[: take * (value.shape[0] // run.n)].movedim(key[4], 1)
        check_finite(rows, key, run.number)
        for target, site in self._owners[key]:
            yield target, self.values(rows, target, site)

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Hook the model for one forward pass, if samples are still wanted."""
        take = min(self._samples - self.n_samples, run.n)
        if take <= 0:
            return nullcontext()

        def add(key: Key, value: Tensor) -> Tensor:
            for target, line in self._lines(run, key, value, take):
                self.sums.add(f"{target.name} {key}", line)
            maps = torch.tensor(float(take * (value.shape[0] // run.n)), dtype=torch.float64)
            self.sums.add(f"{key} maps", maps)
            return value

        return site_values(self.setting.model, self._every(), add)

    def merged(self) -> None:
        """Every rank has looked at its own first samples.

        Raises:
            ConfigError: these are not the first samples of all data.
        """
        if self.n_samples > self._samples:
            raise ConfigError(
                f"{self.request.statistic} looks at the first {self._samples} samples, and the "
                f"ranks together have {self.n_samples}: ask for all of them "
                f"(samples={self.n_samples}), or give the ranks fewer batches"
            )

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64: the mean over samples and sites.

        Raises:
            ScoringError: a site was never reached.
        """
        assert isinstance(target, GroupTarget)
        total = torch.zeros(target.n_units, dtype=torch.float64)
        seen = torch.zeros_like(total)
        for site in self._sites[target.name]:
            key = key_of(site)
            if f"{key} maps" not in self.sums:
                raise unreached(target, site)
            total += self.sums[f"{target.name} {key}"] / self.sums[f"{key} maps"]
            seen[torch.from_numpy(np.unique(site.unit))] += 1
        return total / seen.clamp(min=1)


class MapRank(FeatureMaps):
    """The rank of each channel's map."""

    what = "maps of height and width"

    @classmethod
    def fits(cls, module: nn.Module, site: Site, target: GroupTarget) -> bool:
        """At a two-dimensional convolution or norm."""
        return isinstance(module, PLANAR) and site.dim == 1

    def values(self, rows: Tensor, target: GroupTarget, site: Site) -> Tensor:
        """Ranks, summed over samples; the mean over the maps of a unit."""
        index, unit = (torch.from_numpy(np.ascontiguousarray(x)) for x in (site.index, site.unit))
        chosen = rows[:, index.to(rows.device)]  # (n, len(index), H, W)
        step = max(1, HELD // max(1, chosen[0].numel()))
        owned = torch.bincount(unit, minlength=target.n_units).clamp(min=1)
        out = torch.zeros(target.n_units, dtype=torch.float64)
        for part in torch.split(chosen, step):
            out.index_add_(0, unit, map_ranks(part).sum(0))
        return out / owned


class Independence(FeatureMaps):
    """How much of the nuclear norm of all maps is lost with one unit."""

    what = "a matrix of units x positions"

    @classmethod
    def fits(cls, module: nn.Module, site: Site, target: GroupTarget) -> bool:
        """Where all units have equally many positions, and more than one."""
        counts = np.bincount(site.unit, minlength=target.n_units)
        single = isinstance(module, (nn.Linear, nn.BatchNorm1d)) and site.dim == 1
        return bool((counts == counts[0]).all()) and not (single and counts[0] == 1)

    def values(self, rows: Tensor, target: GroupTarget, site: Site) -> Tensor:
        """The loss of each unit that is still there, summed over samples."""
        order = torch.from_numpy(site.index[np.argsort(site.unit, kind="stable")])
        alive = self.setting.alive[target.name].tolist()
        matrices = rows[:, order.to(rows.device)].reshape(len(rows), target.n_units, -1)
        return torch.stack([independence(matrix, alive) for matrix in matrices]).sum(0)


register_statistic("map_rank", MapRank)
register_statistic("independence", Independence)
