"""Scores finished for each sample, where single weights are needed: from one pass where it can be.

Hooks give the gradients of all samples of a layer in one backward pass (`persample`). What hooks
cannot see exactly is vectorised over samples (`vmapped`); what cannot be vectorised either costs a
backward pass for each sample, and a note says so. All three give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from secateurs.batches import checked_loss
from secateurs.criteria import FINISH, Criterion
from secateurs.statistics.collector import Collector, Request, Run, Setting, requiring_grad
from secateurs.statistics.gradients import finite_gradient, gradient_stats
from secateurs.statistics.jobs import Job, member_places
from secateurs.statistics.persample import PerSample
from secateurs.statistics.sums import View
from secateurs.statistics.units import into_units, one_sample
from secateurs.statistics.vmapped import vmapped, vmapped_obstacle
from secateurs.types import Member, Target

__all__ = ["BySample"]

Place = tuple[Job, Target, Member | None]


class BySample(Collector):
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
        names = list(self._places)
        self._samples = PerSample(setting.model, names)
        self._hooked: list[str] = []
        self._vectorised: list[str] = []
        self._single = names
        self._probed = False
        self._open: dict[str, tuple[Job, Tensor]] = {}

    # -- which way -----------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        """Find out which way the gradients of each parameter can be had."""
        if run.n > 1:
            self._probe(run)

    def _probe(self, run: Run) -> None:
        assert self.setting.loss_fn is not None
        model, loss_fn = self.setting.model, self.setting.loss_fn
        self._probed = True
        reasons = self._samples.probe(run.batch, loss_fn)
        self._hooked = list(self._samples.covered)
        if self._hooked:
            self.shares = "backward"
        self._single = []
        if reasons:
            why = vmapped_obstacle(model, run.batch, loss_fn, list(reasons))
            if why:
                self._single = list(reasons)
                self.notes += [
                    f"{name}: one backward pass for each sample ({reason}; {why})"
                    for name, reason in reasons.items()
                ]
            else:
                self._vectorised = list(reasons)

    # -- the pass ------------------------------------------------------------------------------

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Hook the layers; what they see is folded in as the backward pass reaches them."""
        if not self._hooked:
            return nullcontext()

        @torch.no_grad()
        def each(name: str) -> None:
            if self._only_squares(name):
                total = finite_gradient(self._samples.squares(name), name, f"batch {run.number}")
                self._fold_squares(name, total)
            else:
                low = 0
                for rows in self._samples.chunks(name):
                    self._fold(run, name, low, rows)
                    low += len(rows)

        return self._samples.running(run.n, each)

    def leaves(self) -> Sequence[Tensor]:
        """What the backward pass must reach."""
        return self._samples.leaves if self._hooked else ()

    def alone(self, run: Run) -> None:
        """Everything that hooks did not see; then the scores of whole units."""
        names = self._vectorised if self._probed else []
        for low, name, rows in self._vectorised_rows(run, names):
            self._fold(run, name, low, rows)
        for low, name, rows in self._single_rows(run, self._single):
            self._fold(run, name, low, rows)
        for key, (job, gates) in self._open.items():
            self.sums.add(key, FINISH[job.criterion.finish](gates).sum(0))
        self._open = {}
        if not self._probed and run.n > 1:
            self._probe(run)

    def _vectorised_rows(self, run: Run, names: Sequence[str]) -> Iterator[tuple[int, str, Tensor]]:
        if not names:
            return
        assert self.setting.loss_fn is not None
        low = 0
        for found in vmapped(self.setting.model, run.batch, self.setting.loss_fn, names):
            yield from ((low, name, rows) for name, rows in found.items())
            low += len(next(iter(found.values())))

    def _single_rows(self, run: Run, names: Sequence[str]) -> Iterator[tuple[int, str, Tensor]]:
        params = self.setting.params
        for i in range(run.n if names else 0):
            where = f"batch {run.number}, sample {i}"
            single = one_sample(run.batch, i, run.n)
            with requiring_grad(params[n] for n in names), torch.enable_grad():
                assert self.setting.loss_fn is not None
                loss = checked_loss(self.setting.model, single, self.setting.loss_fn, where)
                grads = torch.autograd.grad(loss, [params[n] for n in names], allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                row = torch.zeros_like(params[name]) if grad is None else grad
                yield i, name, finite_gradient(row, name, where)[None]

    # -- from gradients to sums ----------------------------------------------------------------

    def _only_squares(self, name: str) -> bool:
        """Whether sums of squared gradients are all that is needed of a parameter."""
        return all(
            job.criterion.linear
            and job.criterion.finish == "square"
            and (member is None or job.criterion.finish_on == "element")
            for job, _, member in self._places[name]
        )

    def _fold_squares(self, name: str, total: Tensor) -> None:
        """Add the scores of a parameter from the sum of its squared gradients."""
        weight = self.setting.params[name].detach().to(total.dtype)
        for job, target, member in self._places[name]:
            factor = _contribution(job.criterion, weight, torch.ones_like(weight))
            self._add(job, target, member, factor.square() * total)

    @torch.no_grad()
    def _fold(self, run: Run, name: str, low: int, rows: Tensor) -> None:
        """Add the scores of a parameter from the gradients (m, *shape) of some samples."""
        finite_gradient(rows, name, f"batch {run.number}")
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
