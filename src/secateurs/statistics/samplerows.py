"""Gradients of single samples at single weights, from one pass where it can be.

Hooks give the gradients of all samples of a layer in one backward pass (`persample`). What hooks
cannot see exactly is vectorised over samples (`vmapped`); what cannot be vectorised either costs a
backward pass for each sample, and a note says so. All three give the same numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from secateurs.batches import checked_loss
from secateurs.statistics.collector import Collector, Run, requiring_grad
from secateurs.statistics.gradients import finite_gradient
from secateurs.statistics.persample import PerSample
from secateurs.statistics.units import one_sample
from secateurs.statistics.vmapped import vmapped, vmapped_obstacle

__all__ = ["SampleRows"]


class SampleRows(Collector):
    """A collector that is told the gradient of every sample: call `ask_for`, write `fold`."""

    def ask_for(self, names: Sequence[str]) -> None:
        """The parameters whose gradients are wanted; call once, before the pass."""
        self._samples = PerSample(self.setting.model, names)
        self._hooked: list[str] = []
        self._vectorised: list[str] = []
        self._single = list(names)
        self._probed = False

    @abstractmethod
    def fold(self, run: Run, name: str, low: int, rows: Tensor) -> None:
        """Take the gradients (m, *shape) of the samples from number `low` on."""

    def fold_squares(self, run: Run, name: str, total: Tensor) -> None:
        """Take the sum over all samples of the squared gradients of one parameter."""
        raise AssertionError(name)

    def only_squares(self, name: str) -> bool:
        """Whether `fold_squares` is enough for this parameter."""
        return False

    def close(self, run: Run) -> None:
        """All gradients of the batch have come."""

    # -- which way -----------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        """Find out which way the gradients of each parameter can be had."""
        if run.n > 1:  # one sample does not tell where the samples are
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
            where = f"batch {run.number}"
            if self.only_squares(name):
                total = finite_gradient(self._samples.squares(name), name, where)
                self.fold_squares(run, name, total)
            else:
                low = 0
                for rows in self._samples.chunks(name):
                    self.fold(run, name, low, finite_gradient(rows, name, where))
                    low += len(rows)

        return self._samples.running(run.n, each)

    def leaves(self) -> Sequence[Tensor]:
        """What the backward pass must reach."""
        return self._samples.leaves if self._hooked else ()

    @torch.no_grad()
    def alone(self, run: Run) -> None:
        """Everything that hooks did not see."""
        for low, name, rows in self._vectorised_rows(run, self._vectorised):
            finite_gradient(rows, name, f"batch {run.number}")
            self.fold(run, name, low, rows)
        for low, name, rows in self._single_rows(run, self._single):
            self.fold(run, name, low, rows)
        self.close(run)
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
