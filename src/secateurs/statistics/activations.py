"""Mean absolute activation of each unit, where it is read (or made, if no reader can be seen)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import ScoringError
from secateurs.statistics.gates import Key, key_of, site_values
from secateurs.types import GroupTarget, Site

__all__ = ["Activations", "activation_sites"]


def activation_sites(target: GroupTarget) -> tuple[Site, ...]:
    """The consumer sites of a target; its producer sites if it has none."""
    read = tuple(s for s in target.sites if s.role == "consumer")
    return read or target.sites


class Activations:
    """Streams sum |a| and counts, so that the mean does not depend on the cut into batches."""

    def __init__(self, model: nn.Module, targets: Sequence[GroupTarget]) -> None:
        self._model = model
        self._targets = targets
        self._sites = {t.name: activation_sites(t) for t in targets}
        self._sum: dict[Key, Tensor] = {}
        self._count: dict[Key, int] = {}

    @contextmanager
    def running(self, batch: int) -> Iterator[None]:
        """Hook the model for one forward pass."""

        def add(key: Key, value: Tensor) -> Tensor:
            others = [d for d in range(value.dim()) if d != key[4]]
            line = value.detach().abs().sum(dim=others, dtype=torch.float64).cpu()  # (size,)
            if not torch.isfinite(line).all():
                raise ScoringError(
                    f"batch {batch}: the {key[2]} of {key[0]} holds values that are not finite"
                )
            self._sum[key] = self._sum.get(key, torch.zeros(())) + line
            self._count[key] = self._count.get(key, 0) + value.numel() // value.shape[key[4]]
            return value

        every = [site for sites in self._sites.values() for site in sites]
        with site_values(self._model, every, add):
            yield

    def result(self, target: GroupTarget) -> Tensor:
        """(n_units,) float64: mean over samples, positions and sites of |a|.

        Raises:
            ScoringError: a site was never reached.
        """
        total = torch.zeros(target.n_units, dtype=torch.float64)
        sites = self._sites[target.name]
        for site in sites:
            key = key_of(site)
            if key not in self._sum:
                raise ScoringError(
                    f"{target.name}: call {site.call} of {site.module} was never reached; "
                    "trace the model with inputs like those of the batches"
                )
            unit = torch.from_numpy(np.ascontiguousarray(site.unit))
            index = torch.from_numpy(np.ascontiguousarray(site.index))
            line = torch.zeros_like(total).index_add_(0, unit, self._sum[key][index])
            owned = torch.bincount(unit, minlength=target.n_units).clamp(min=1)
            total += line / (owned * self._count[key])
        return total / len(sites)
