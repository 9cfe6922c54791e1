"""Mean absolute activation of each unit, where it is read (or made, if no reader can be seen)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import ScoringError
from secateurs.statistics.collector import Collector, Request, Run, Setting, register_statistic
from secateurs.statistics.hooks import Key, into_site_units, key_of, site_index, site_values
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters
from secateurs.types import GroupTarget, Site, Target

__all__ = ["Activations", "activation_sites", "check_finite", "unreached"]


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


class Activations(Collector):
    """Streams sum |a| and counts, so that the mean does not depend on the cut into batches."""

    shares = "forward"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._sites = {t.name: activation_sites(t) for t in request.groups}

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When no activation can be hooked."""
        seen = isinstance(target, GroupTarget) and target.sites
        return "" if seen else "no activation can be seen from outside"

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Hook the model for one forward pass."""

        def add(key: Key, value: Tensor) -> Tensor:
            others = [d for d in range(value.dim()) if d != key[4]]
            line = value.detach().abs().sum(dim=others, dtype=torch.float64).cpu()  # (size,)
            check_finite(line, key, run.number)
            self.sums.add(f"{key}", line)
            count = value.numel() // value.shape[key[4]]
            self.sums.add(f"{key} count", torch.tensor(float(count), dtype=torch.float64))
            return value

        every = [site for sites in self._sites.values() for site in sites]
        return site_values(self.setting.model, every, add)

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64: mean over samples, positions and sites of |a|.

        Raises:
            ScoringError: a site was never reached.
        """
        assert isinstance(target, GroupTarget)
        total = torch.zeros(target.n_units, dtype=torch.float64)
        sites = self._sites[target.name]
        for site in sites:
            key = f"{key_of(site)}"
            if key not in self.sums:
                raise unreached(target, site)
            line = into_site_units(self.sums[key], site, torch.zeros_like(total))
            owned = torch.bincount(site_index(site)[1], minlength=target.n_units).clamp(min=1)
            total += line / (owned * self.sums[f"{key} count"])
        return total / len(sites)


register_statistic("act", Activations)
