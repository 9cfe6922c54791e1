"""Steps that all ranks make together, though each has its own batches, of any number.

DDP and FSDP2 average gradients over the ranks, whatever each has seen. So that a step follows the
mean over all samples, each loss is weighted by its samples first. A rank that has no batch left
keeps step with its last one, with weight zero and in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from secateurs.batches import batch_size, in_mode, model_device, to_device
from secateurs.distributed import Ranks
from secateurs.errors import ConfigError
from secateurs.types import Batch

__all__ = ["InStep"]


class InStep:
    """Keeps the ranks in step; a single process simply reads its batches.

    Attributes:
        size: samples of the batch of this rank; 0 for one that only keeps step.
        weight: of its mean loss in the loss of the step: its share of all samples, times ranks.
        samples: of the step, all ranks together, over the number of ranks: a gradient of sums over
            samples, averaged over the ranks, is divided by it to be the mean.
        spare: whether this rank has no batch for the step, and only keeps step.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.size, self.weight, self.samples = 0, 1.0, 0.0
        self.spare = False
        self._first: Batch | None = None
        self._last: Batch | None = None

    def in_step(self, reader: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of this rank; where others have more, its last one again.

        A rank without any gets the first batch of the first rank that has one.

        Raises:
            ConfigError: a rank runs out of batches, and a layer waits for all ranks.
            RankError, PruningError: another rank cannot read its batches.
        """
        if self.ranks.size == 1:
            for batch in reader:
                self.size = batch_size(batch[0])
                self.samples = self.size
                yield batch
            return
        stream, begins = iter(reader), True
        self._forget()
        while True:
            own: Batch | None = None
            with self.ranks.agreed("reading a batch"):
                own = next(stream, None)
                self.size = 0 if own is None else batch_size(own[0])
            total, ended = self.ranks.add_up(self.size, own is None)
            if not total:
                return
            self.spare = own is None
            self.samples = total / self.ranks.size
            self.weight = self.size / self.samples
            if own is not None:
                self.keep(own)
            if ended:
                self._check_layers()
                if begins:
                    self._share()
            begins, self._first = False, None
            assert self._last is not None
            yield self._last

    def _forget(self) -> None:
        """A pass begins."""
        self._first = self._last = None

    def keep(self, batch: Batch) -> None:
        """A batch of this rank was read, or passed over where a training goes on."""
        self._first, self._last = self._first or batch, batch

    def _check_layers(self) -> None:
        """Refuse layers that wait for ranks that have no batch left."""
        names = [n for n, m in self.model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
        if names:
            raise ConfigError(
                f"the ranks have different numbers of batches, and {names[0]} (SyncBatchNorm) "
                "waits for all of them; give every rank equally many"
            )

    def _share(self) -> None:
        """Give a batch to ranks that have none in this pass."""
        told = self.ranks.gather(self._first is not None)
        if all(told):
            return
        given = self.ranks.of(told.index(True), to_device(self._first, torch.device("cpu")))
        self._last = self._last or to_device(given, model_device(self.model))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass: an error on one rank ends all, before any waits backward.

        Not inside the forward pass of an FSDP2 model, where the others wait for its weights: there
        they end with the timeout of the group.
        """
        if self.ranks.size == 1:
            yield
            return
        with ExitStack() as stack:
            if not self.size:
                stack.enter_context(in_mode(self.model, training=False))
            stack.enter_context(self.ranks.agreed("a forward pass"))
            yield
