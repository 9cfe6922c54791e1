"""Scores finished for each sample, where the gradients of single weights are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.criteria import FINISH, Criterion
from secateurs.statistics.collector import Request, Run, Setting
from secateurs.statistics.gradients import gradient_stats
from secateurs.statistics.jobs import Job, member_places
from secateurs.statistics.samplerows import SampleRows
from secateurs.statistics.sums import View
from secateurs.statistics.units import into_units
from secateurs.types import Member, Target

__all__ = ["BySample"]

Place = tuple[Job, Target, Member | None]


class BySample(SampleRows):
    """Finished scores of all criteria whose `average` is "sample", on targets without gates.

    Args:
        setting: of the pass.
        wanted: (criterion, its targets that no gate covers).
        sums: where everything is kept.
    """

    def __init__(
        self, setting: Setting, wanted: Sequence[tuple[Job, Sequence[Target]]], sums: View
    ) -> None:
        targets = {t.name: t for _, several in wanted for t in several}
        super().__init__(setting, Request("", {}, "", list(targets.values())), sums)
        self._places: dict[str, list[Place]] = {}
        for job, several in wanted:
            for target in several:
                for name, member in member_places(job.criterion, target, setting.params):
                    self._places.setdefault(name, []).append((job, target, member))
        self.ask_for(list(self._places))
        self._open: dict[str, tuple[Job, Tensor]] = {}

    def only_squares(self, name: str) -> bool:
        """Whether sums of squared gradients are all that is needed of a parameter."""
        return all(
            job.criterion.linear
            and job.criterion.finish == "square"
            and (member is None or job.criterion.finish_on == "element")
            for job, _, member in self._places[name]
        )

    def fold_squares(self, run: Run, name: str, total: Tensor) -> None:
        """Add the scores of a parameter from the sum of its squared gradients."""
        weight = self.setting.params[name].detach().to(total.dtype)
        for job, target, member in self._places[name]:
            factor = _contribution(job.criterion, weight, torch.ones_like(weight))
            self._add(job, target, member, factor.square() * total)

    def fold(self, run: Run, name: str, low: int, rows: Tensor) -> None:
        """Add the scores of a parameter from the gradients (m, *shape) of some samples."""
        weight = self.setting.params[name].detach().to(rows.dtype)
        for job, target, member in self._places[name]:
            c = job.criterion
            values = _contribution(c, weight, rows)
            if member is None or c.finish_on == "element":
                self._add(job, target, member, FINISH[c.finish](values).sum(0))
            else:
                key = f"{c.label}/{target.name}"
                blank = torch.zeros(run.n, target.n_units, dtype=torch.float64)
                gates = self._open.setdefault(key, (job, blank))[1]
                into_units(values, member, gates[low : low + len(rows)])

    def close(self, run: Run) -> None:
        """Finish the whole units of every sample."""
        for key, (job, gates) in self._open.items():
            self.sums.add(key, FINISH[job.criterion.finish](gates).sum(0))
        self._open = {}

    def _add(self, job: Job, target: Target, member: Member | None, values: Tensor) -> None:
        key = f"{job.criterion.label}/{target.name}"
        if member is None:
            self.sums.add(key, values)
        else:
            self.sums.add(
                key, into_units(values, member, torch.zeros(target.n_units, dtype=torch.float64))
            )

    def score(self, job: Job, target: Target) -> Tensor:
        """(n_units,) finished scores, the mean over all samples."""
        total = self.sums[f"{job.criterion.label}/{target.name}"]
        return total.reshape(-1).double().cpu() / self.n_samples


def _contribution(c: Criterion, weight: Tensor, grad: Tensor) -> Tensor:
    return c.fn(gradient_stats(c.needs, weight, grad))
