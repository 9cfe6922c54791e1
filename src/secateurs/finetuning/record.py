"""The epochs of a training, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from secateurs.finetuning.config import EpochRow, Finetune
from secateurs.finetuning.state import restore_, snapshot
from secateurs.masks import HeldMasks

__all__ = ["Best", "Record"]


@dataclass
class Best:
    """The best epoch so far.

    Attributes:
        row: of that epoch.
        weights: of the model then, where they are to be given back.
        masks: that were held then.
    """

    row: EpochRow
    weights: dict[str, Tensor] | None
    masks: Mapping[str, Tensor]


@dataclass
class Record:
    """What a training has noted.

    Attributes:
        config: `patience` and `restore_best` count.
        maximize: whether a larger metric is better.
        rows: one for each epoch.
        best: None without a metric.
        impatient: whether patience has run out.
    """

    config: Finetune
    maximize: bool
    rows: list[EpochRow] = field(default_factory=list)
    best: Best | None = None
    impatient: bool = False

    def note(self, row: EpochRow, model: nn.Module, held: HeldMasks | None) -> None:
        """Add an epoch; keep the best one; see whether patience has run out."""
        self.rows.append(row)
        if row.metric is None:
            return
        sign = 1 if self.maximize else -1
        known = -math.inf if self.best is None else sign * (self.best.row.metric or 0.0)
        if self.best is None or sign * row.metric > known:
            weights = snapshot(model) if self.config.restore_best else None
            masks = held.masks if held is not None and weights is not None else {}
            self.best = Best(row, weights, masks)
        patience = self.config.patience
        self.impatient = patience is not None and row.epoch - self.best.row.epoch >= patience

    def give_back(self, model: nn.Module, held: HeldMasks | None) -> None:
        """Load the best weights if asked, with the masks of their time: parts may move them."""
        if self.best is None or self.best.weights is None:
            return
        if held is not None:
            held.replace(self.best.masks)
        restore_(model, self.best.weights)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        best = self.best
        return {
            "rows": [asdict(row) for row in self.rows],
            "best": None if best is None else {**vars(best), "row": asdict(best.row)},
            "impatient": self.impatient,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        best = state["best"]
        self.rows = [EpochRow(**row) for row in state["rows"]]
        self.best = None if best is None else Best(**{**best, "row": EpochRow(**best["row"])})
        self.impatient = state["impatient"]
