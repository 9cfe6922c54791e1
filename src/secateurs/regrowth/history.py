"""What the updates of the masks did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Update"]


@dataclass(frozen=True)
class Update:
    """One update of the masks.

    Attributes:
        steps: optimizer steps done before it.
        dropped: tensor name -> entries that were kept and are not any more.
        grown: tensor name -> entries that were removed and are kept now.
        n_kept: entries kept now, in all tensors whose masks move.
        overlap: fraction in [0, 1] of the entries kept at the very start that are kept now.
    """

    steps: int
    dropped: Mapping[str, int]
    grown: Mapping[str, int]
    n_kept: int
    overlap: float

    @property
    def n_dropped(self) -> int:
        """Entries dropped in all tensors."""
        return sum(self.dropped.values())

    @property
    def n_grown(self) -> int:
        """Entries grown in all tensors."""
        return sum(self.grown.values())

    @classmethod
    def between(
        cls,
        steps: int,
        first: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> Update:
        """The update that leads from masks to masks with the same names.

        Example:
            >>> import torch
            >>> a, b = {"w": torch.tensor([True, False])}, {"w": torch.tensor([False, True])}
            >>> update = Update.between(100, a, a, b)
            >>> update.n_dropped, update.n_grown, update.n_kept, update.overlap
            (1, 1, 1, 0.0)
        """
        started = sum(int(mask.sum()) for mask in first.values())
        common = sum(int((first[name] & mask).sum()) for name, mask in after.items())
        return cls(
            steps,
            {name: int((before[name] & ~mask).sum()) for name, mask in after.items()},
            {name: int((mask & ~before[name]).sum()) for name, mask in after.items()},
            sum(int(mask.sum()) for mask in after.values()),
            common / started if started else 1.0,
        )

    def plain(self) -> list[Any]:
        """Plain values, for a checkpoint."""
        return [self.steps, dict(self.dropped), dict(self.grown), self.n_kept, self.overlap]
