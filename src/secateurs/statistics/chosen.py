"""Which batches of those that were given a pass reads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from secateurs.batches import iterate, model_device
from secateurs.distributed import Ranks
from secateurs.errors import ConfigError
from secateurs.types import Batch, Batches

__all__ = ["ChosenBatches"]


class ChosenBatches:
    """The batches that are used, with their numbers; re-iterable."""

    def __init__(
        self,
        batches: Batches | None,
        model: nn.Module,
        max_batches: int | None,
        sample_batches: int | None,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._several = ranks.size > 1
        self._batches, self._device = batches, model_device(model)
        known = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
        self._only: frozenset[int] | None = None
        self._first = max_batches
        if sample_batches is None:
            self.total = max_batches if known is None else min(known, max_batches or known)
            return
        if known is None:
            raise ConfigError(
                "sample_batches draws from batches with a length; these have none: use max_batches"
            )
        drawn = np.random.default_rng(seed).permutation(known)[:sample_batches]
        self._only, self.total = frozenset(drawn.tolist()), len(drawn)

    def first(self, shared: Batches | None) -> Batch:
        """The first batch that is used; of several processes the one that they share."""
        if self._several and shared is not None:
            return next(iter(shared))
        return next(iter(self))[1]

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        assert self._batches is not None
        every = iterate(self._batches, self._device, self._first, may_be_empty=self._several)
        for i, batch in enumerate(every):
            if self._only is None or i in self._only:
                yield i, batch
