"""What every process of a group checks; one launch runs all of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from secateurs.distributed import ranks_of
from tests.distributed import (
    pruning_checks,
    resuming_checks,
    runner_checks,
    scores_checks,
    shards_checks,
    training_checks,
)
from tests.distributed.cases import ranks

MODULES = (
    scores_checks, shards_checks, training_checks, resuming_checks, pruning_checks, runner_checks,
)  # fmt: skip
CHECKS: list[Callable[[Path], None]] = [
    value
    for module in MODULES
    for name, value in vars(module).items()
    if name.startswith("check_") and value.__module__ == module.__name__
]
SMALL = 2
FOR_TWO = (
    "check_every_criterion_merges_or_is_refused_by_name",
    "check_a_task_deals_out_its_batches_and_trains_once",
    "check_ctrl_c_on_one_rank_stops_all_after_the_same_step",
    *(name for name in vars(pruning_checks) if name.startswith("check_") and "equals" not in name),
)
"""Checks to which more ranks add nothing."""


def run_checks(folder: Path) -> None:
    """All checks; those that fail leave a file, on every rank."""
    rank, size = ranks()
    for check in CHECKS:
        said = ""
        if size > SMALL and check.__name__ in FOR_TWO:
            continue
        torch.manual_seed(0)
        try:
            check(folder)
        except Exception:
            said = traceback.format_exc()
        (folder / f"{check.__name__}.{rank}").write_text(said)
        told = ranks_of("world").gather(bool(said))
        if len(set(told)) > 1:
            return  # the ranks may be at different places
