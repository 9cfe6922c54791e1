"""Weights that no process holds together: score, threshold and mask the shards, gather nothing.

    model, batches, loss --- score_shards  -> {parameter: scores of this rank's elements}
    scores, model ---------- select_shards -> {parameter: DTensor mask}, for hold_masks
    instep      batches of different number on each rank, one step of all at a time

For models whose full weights fit into one process `score(..., group=)` does more.
"""

from __future__ import annotations

from secateurs.sharding.instep import InStep
from secateurs.sharding.shards import score_shards, select_shards

__all__ = ["InStep", "score_shards", "select_shards"]
