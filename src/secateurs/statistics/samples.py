"""One number for each sample and unit: its activation, averaged over all positions.

UnitSamples    the first samples of each unit, shared by all statistics that need them
sample_dims    where the samples are in the tensors that pass through the model
pooled         (..., samples, ..., features, ...) -> (n, features)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.batches import call_model
from secateurs.errors import DataError
from secateurs.statistics.activations import activation_sites, check_finite, unreached
from secateurs.statistics.collector import Collector, Request, Run, Setting, register_statistic
from secateurs.statistics.hooks import Key, into_site_units, key_of, site_index, site_values
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters, one_sample
from secateurs.types import GroupTarget, Site, Target

__all__ = ["UnitSamples", "capped", "pooled", "sample_dims", "shapes_at"]


class UnitSamples(Collector):
    """(samples, n_units) float32 rows of each target, for at most `samples` samples.

    A unit's value for a sample is the mean of its activation over positions, over the features
    that it owns (the components of a head), and over the sites where it is read.
    """

    shares = "forward"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._sites = {t.name: activation_sites(t) for t in request.groups}
        self._dims: dict[Key, int] = {}
        self._seen: dict[Key, Tensor] = {}

    @property
    def limit(self) -> int:
        """The most samples that are kept."""
        return int(self.request.options["samples"])

    @property
    def _all_sites(self) -> list[Site]:
        return [site for sites in self._sites.values() for site in sites]

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When no activation can be hooked."""
        seen = isinstance(target, GroupTarget) and target.sites
        return "" if seen else "no activation can be seen from outside"

    def begin(self, run: Run) -> None:
        """Find the samples in every tensor.

        Raises:
            DataError: a tensor does not hold them along one dimension.
        """
        self._dims = sample_dims(self.setting.model, run, self._all_sites)

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Hook the model for one forward pass."""
        self._seen = {}

        def take(key: Key, value: Tensor) -> Tensor:
            line = pooled(value, key[4], self._dims.get(key, 0), run.n)
            check_finite(line, key, run.number)
            self._seen[key] = line
            return value

        return site_values(self.setting.model, self._all_sites, take)

    def arrived(self, run: Run) -> None:
        """Join the rows of this batch, until there are enough.

        Raises:
            ScoringError: a site was not reached.
        """
        for target in self.request.groups:
            sites = self._sites[target.name]
            total = torch.zeros(run.n, target.n_units, dtype=torch.float64)
            for site in sites:
                if key_of(site) not in self._seen:
                    raise unreached(target, site)
                owned = torch.bincount(site_index(site)[1], minlength=target.n_units).clamp(min=1)
                rows = self._seen[key_of(site)].cpu()
                total += into_site_units(rows, site, torch.zeros_like(total)) / owned
            capped(self, target.name, (total / len(sites)).float(), self.limit)
        self._seen = {}

    def rows(self, target: Target) -> Tensor:
        """(samples, n_units) float32."""
        if self.n_samples > self.limit:
            self.notes = [f"from the first {self.limit} of {self.n_samples} samples"]
        return self.sums[target.name][: self.limit]


def capped(collector: Collector, key: str, rows: Tensor, limit: int) -> None:
    """Join rows under that name, at most `limit` in all."""
    room = limit - collector.sums.n_rows(key)
    if room > 0:
        collector.sums.append(key, rows[:room].clone())


def pooled(value: Tensor, features: int, samples: int, n: int) -> Tensor:
    """(n, features) float64: the mean over everything else.

    Args:
        value: any tensor of the model.
        features: its dimension that holds the units; counted from the end if negative.
        samples: its dimension that holds the samples, each of them one or several times in a row
            (n images cut into k windows each).
        n: how many samples there are.

    Raises:
        DataError: that dimension is no multiple of `n`.

    Example:
        >>> pooled(torch.arange(8.0).view(2, 2, 2), features=2, samples=0, n=2)
        tensor([[1., 2.],
                [5., 6.]], dtype=torch.float64)
    """
    features %= value.dim()
    size = value.shape[samples]
    if size % n or samples == features:
        raise DataError(
            f"an activation of shape {tuple(value.shape)} does not hold the {n} samples of the "
            f"batch along dimension {samples}, as in the first batch; give batches of one kind"
        )
    others = [d for d in range(value.dim()) if d not in (features, samples)]
    line = value.detach()
    line = line.mean(others, dtype=torch.float64) if others else line.double()
    line = line if samples < features else line.T  # (samples, features)
    return line.reshape(n, size // n, -1).mean(1)


def sample_dims(model: nn.Module, run: Run, sites: Sequence[Site]) -> dict[Key, int]:
    """The dimension that holds the samples, for each site that is reached.

    It is the one that shrinks when the model is run on a single sample; the first for a batch that
    has only one.

    Raises:
        DataError: none does.
    """
    whole = shapes_at(model, run, sites)
    if run.n == 1:
        return dict.fromkeys(whole, 0)
    single = Run(0, one_sample((run.inputs, None), 0, run.n))
    small = shapes_at(model, single, sites)
    found: dict[Key, int] = {}
    for key, shape in whole.items():
        less = small.get(key, ())
        same = len(less) == len(shape)
        dims = [d for d in range(len(shape)) if same and shape[d] == less[d] * run.n]
        dims = [d for d in dims if d != key[4] % len(shape)]
        if not dims:
            raise DataError(
                f"the {key[2]} of {key[0]} has shape {shape} for {run.n} samples and {less} for "
                "one: no dimension holds the samples. Leave its targets out (graph.only(exclude="
                f"{key[0]!r}))"
            )
        found[key] = dims[0]
    return found


def shapes_at(model: nn.Module, run: Run, sites: Sequence[Site]) -> dict[Key, tuple[int, ...]]:
    """Shape of the tensor at each site that a run reaches."""
    found: dict[Key, tuple[int, ...]] = {}

    def look(key: Key, value: Tensor) -> Tensor:
        found[key] = tuple(value.shape)
        return value

    with torch.no_grad(), site_values(model, sites, look):
        call_model(model, run.inputs)
    return found


register_statistic("unit_samples", UnitSamples)
