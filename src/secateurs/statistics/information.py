"""What the activation of a unit tells: entropy, mutual information, what the others know already.

Each collector ends with an estimator of `estimators` on the rows of `samples`, which all of them
share; those of the labels and of the next layer are kept beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.batches import tensors
from secateurs.errors import DataError
from secateurs.statistics import estimators
from secateurs.statistics.activations import check_finite
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    generator_for,
    register_statistic,
)
from secateurs.statistics.hooks import Key, key_of, site_values
from secateurs.statistics.samples import UnitSamples, capped, pooled, sample_dims, shapes_at
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters
from secateurs.types import GroupTarget, Site, Target

__all__ = ["Entropy", "InformationNext", "MutualInformation", "Redundancy", "labels_of"]


class OnSamples(Collector):
    """What is computed at the end from the samples of each unit."""

    depends: ClassVar[tuple[str, ...]] = ("unit_samples",)

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When no activation can be hooked."""
        return UnitSamples.obstacle(model, params, target, members)

    @property
    def samples(self) -> UnitSamples:
        """Who collects the samples."""
        found = self.others["unit_samples"]
        assert isinstance(found, UnitSamples)
        return found

    @property
    def _bins(self) -> int:
        return int(self.request.options["bins"])

    @property
    def _correct(self) -> bool:
        return self.request.options["correction"] == "miller_madow"


class Entropy(OnSamples):
    """The entropy of each unit's value."""

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64, in nats."""
        x = self.samples.rows(target)
        if self.request.options["estimator"] == "gaussian":
            return estimators.gaussian_entropy(estimators.variance(x))
        return estimators.histogram_entropy(x, self._bins, correct=self._correct)


class MutualInformation(OnSamples):
    """The mutual information of each unit's value and the label."""

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        if request.options["estimator"] == "knn":
            estimators.check_sklearn()

    def begin(self, run: Run) -> None:
        """Refuse labels that are not one for each sample."""
        labels_of(run)

    def alone(self, run: Run) -> None:
        """Keep the labels."""
        capped(self, "labels", labels_of(run), self.samples.limit)

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64, in nats."""
        x, labels = self.samples.rows(target), self.sums["labels"][: self.samples.limit]
        kinds, index = torch.unique(labels, return_inverse=True)
        classes = len(kinds)
        if not labels.is_floating_point() and 2 * classes > len(labels):
            self.notes = [
                f"{classes} different labels in {len(labels)} samples: too few of each to estimate "
                "information; give floating-point targets if they are numbers"
            ]
        if self.request.options["estimator"] == "knn":
            seed = int(torch.randint(2**31, (), generator=generator_for(self.setting, "knn")))
            k = int(self.request.options["neighbors"])
            return estimators.knn_information(x, labels, neighbors=k, seed=seed)
        if labels.is_floating_point():
            index = estimators.bin_index(labels[:, None], self._bins)[:, 0]
        return estimators.histogram_information(x, index, self._bins, correct=self._correct)


def labels_of(run: Run) -> Tensor:
    """(n,) int64 classes or float64 values: the labels of one batch.

    Raises:
        DataError: there is not exactly one class or number for each sample.
    """
    found = tensors(run.batch[1])
    label = found[0].detach().cpu() if len(found) == 1 else torch.empty(0)
    if tuple(label.shape) not in ((run.n,), (run.n, 1)) or label.is_complex():
        got = ", ".join(str(tuple(t.shape)) for t in found) or type(run.batch[1]).__name__
        raise DataError(
            f"batch {run.number}: mutual_information takes one class index or one number for each "
            f"sample, a tensor of shape ({run.n},); got {got}. Where targets are sequences, boxes "
            "or missing, use a criterion without labels, such as 'information_next' or 'entropy'"
        )
    label = label.reshape(-1)
    if not label.is_floating_point():
        return label.long()
    if not torch.isfinite(label).all():
        raise DataError(f"batch {run.number}: a target is not finite")
    return label.double()


class Redundancy(OnSamples):
    """How much of each unit the other units of its family do not know."""

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64: the share in [0, 1], or the entropy in nats; 0 for removed units."""
        alive = self.setting.alive[target.name]
        x = self.samples.rows(target)[:, alive]
        share = estimators.residual_share(estimators.standardised(x))
        out = torch.zeros(target.n_units, dtype=torch.float64)
        if self.request.statistic == "residual_share":
            out[alive] = share
        else:
            out[alive] = estimators.gaussian_entropy(estimators.variance(x) * share)
        return out


class InformationNext(OnSamples):
    """The mutual information of each unit's value and the outputs of all layers that read it."""

    shares = "forward"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._readers: dict[str, list[Site]] = {}
        self._dims: dict[Key, int] = {}
        self._seen: dict[Key, Tensor] = {}

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When no activation can be hooked, or no layer reads the units."""
        why = super().obstacle(model, params, target, members)
        if why or not isinstance(target, GroupTarget):
            return why
        return "" if _readers(target) else "no other layer reads these units"

    @property
    def _sites(self) -> list[Site]:
        return [site for sites in self._readers.values() for site in sites]

    def begin(self, run: Run) -> None:
        """Find the outputs of the readers, and the samples in them."""
        model = self.setting.model
        upwards = {
            t.name: [_upwards(model, *reader) for reader in _readers(t)]
            for t in self.request.groups
        }
        every = [site for calls in upwards.values() for sites in calls for site in sites]
        reached = shapes_at(model, run, every)
        for name, calls in upwards.items():
            # A layer whose weights are used without calling it: what the module around it makes.
            nearest = [next(s for s in sites if key_of(s) in reached) for sites in calls]
            self._readers[name] = list({key_of(s): s for s in nearest}.values())
        self._dims = sample_dims(model, run, self._sites)

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Hook the model for one forward pass."""

        def take(key: Key, value: Tensor) -> Tensor:
            line = pooled(value, key[4], self._dims.get(key, 0), run.n)
            check_finite(line, key, run.number)
            capped(self, f"{key}", line.float().cpu(), self.samples.limit)
            return value

        return site_values(self.setting.model, self._sites, take)

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64, in nats."""
        limit = self.samples.limit
        given = torch.cat(
            [self.sums[f"{key_of(site)}"][:limit] for site in self._readers[target.name]], dim=1
        )  # (samples, outputs)
        x = estimators.standardised(self.samples.rows(target))
        noise = float(self.request.options["noise"])
        return estimators.noisy_information(x, estimators.standardised(given), noise)


def _readers(target: GroupTarget) -> list[tuple[str, int]]:
    """(module, call) of every layer that reads the units and does not make them itself."""
    home = {m.tensor: m.tensor.rpartition(".")[0] for m in target.members}
    made = {home[m.tensor] for m in target.members if m.role == "producer"}
    seen = [(s.module, s.call) for s in target.sites if s.role == "consumer"]
    unseen = [
        (home[m.tensor], 0)
        for m in target.members
        if m.role == "consumer" and home[m.tensor] not in {path for path, _ in seen}
    ]
    return [(p, c) for p, c in dict.fromkeys([*seen, *unseen]) if p not in made]


def _upwards(model: nn.Module, path: str, call: int) -> Sequence[Site]:
    """The output of a call of a module, then those of the modules around it."""
    sites = []
    none = np.zeros(0, dtype=np.int64)
    while True:
        conv = isinstance(model.get_submodule(path), nn.modules.conv._ConvNd)
        dim = 1 if conv else -1
        sites.append(Site(path, call, "output", 0, dim, none, none, "producer"))
        if not path:
            return sites
        path, call = path.rpartition(".")[0], 0


register_statistic("entropy", Entropy)
register_statistic("mutual_information", MutualInformation)
register_statistic("residual_share", Redundancy)
register_statistic("conditional_entropy", Redundancy)
register_statistic("information_next", InformationNext)
