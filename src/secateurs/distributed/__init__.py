"""Many processes on torch.distributed: what they tell each other, and what they must hold alike.

    groups      the processes of a group: gather, sum, join, fail together
    same        whether all hold the same, by hash
    threshold   one global threshold from local scores
    wrapping    models as DDP and FSDP2 wrap them
    storing     checkpoints that can be loaded by another number of ranks

Scores of all data are made by `score(..., group=)`, training by `finetune(..., group=)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateurs.distributed.groups import Group, Ranks, on_first, ranks_of
from secateurs.distributed.same import assert_same, digest
from secateurs.distributed.threshold import global_threshold, local_masks
from secateurs.distributed.wrapping import full_state, is_sharded, plain, reshard, whole

if TYPE_CHECKING:
    from secateurs.distributed.storing import load_sharded as load_sharded
    from secateurs.distributed.storing import newest as newest
    from secateurs.distributed.storing import save_sharded as save_sharded

__all__ = [
    "Group",
    "Ranks",
    "assert_same",
    "digest",
    "full_state",
    "global_threshold",
    "is_sharded",
    "load_sharded",
    "local_masks",
    "newest",
    "on_first",
    "plain",
    "ranks_of",
    "reshard",
    "save_sharded",
    "whole",
]


def __getattr__(name: str) -> Any:
    """Checkpoints need parts of torch that take a second to import: on first use."""
    if name not in ("load_sharded", "newest", "save_sharded"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("secateurs.distributed.storing"), name)
