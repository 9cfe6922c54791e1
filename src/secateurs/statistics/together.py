"""What several processes settle before they score together, each its own part of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateurs.batches import check_iterable, iterate, model_device, to_device
from secateurs.distributed import Group, Ranks, assert_same, is_sharded
from secateurs.errors import ConfigError, DataError
from secateurs.statistics.jobs import Job
from secateurs.types import Batches, Plan

__all__ = ["agree", "check_group", "shared_batches"]


def check_group(model: nn.Module, ranks: Ranks, resume: str | Path | None) -> None:
    """Refuse what one process cannot do with others, or without them.

    Args:
        model: as it was given, wrapped or not.
        ranks: of the group that was asked for.
        resume: the file of an unfinished pass.

    Raises:
        ConfigError: it cannot.
    """
    if ranks.group is None and is_sharded(model):
        raise ConfigError(
            'the parameters of this model are sharded over several processes: give group="world"'
        )
    if ranks.group is None and isinstance(model, DistributedDataParallel):
        others = model.process_group.size()
        if others > 1:
            raise ConfigError(
                f"this model is trained by {others} processes, and each would score its own part "
                'of the data: give group="world", or the plain module to score by yourself'
            )
    if ranks.size > 1 and resume is not None:
        raise ConfigError(
            "resume= keeps the unfinished pass of one process; leave it away with group="
        )


def shared_batches(model: nn.Module, batches: Batches | None, ranks: Ranks) -> Batches | None:
    """Batches to look at before the pass: a single process's own, or one that all ranks get.

    It is the first batch of the first rank that has any, so that all ranks find out the same about
    the model, also one that has no data.

    Raises:
        DataError: no rank has a batch.
    """
    if ranks.size == 1:
        return batches
    mine = None
    with torch.random.fork_rng(), ranks.agreed("reading the first batch"):
        if batches is not None:
            check_iterable(batches)
            mine = next(iterate(batches, torch.device("cpu"), 1, may_be_empty=True), None)
    told = ranks.gather((batches is not None, mine is not None))
    if not any(given for given, _ in told):
        return None
    giver = next((rank for rank, (_, some) in enumerate(told) if some), None)
    if giver is None:
        raise DataError(
            "batches is empty on every rank. A generator can be read only once: pass a list or a "
            "DataLoader"
        )
    return [to_device(ranks.of(giver, mine), model_device(model))]


def agree(
    model: nn.Module,
    jobs: Sequence[Job],
    previous: Plan | None,
    asked: Sequence[object],
    group: Group,
    ranks: Ranks,
) -> None:
    """Make sure that all ranks score the same; buffers are taken over from rank 0.

    Raises:
        RankError: names the first weight, criterion or setting that differs.
    """
    if ranks.size == 1:
        return
    criteria = {j.criterion.label: {t.name: t.n_units for t in j.targets} for j in jobs}
    assert_same({"criteria": criteria, "asked": asked}, group, what="what is scored")
    assert_same(dict(model.named_parameters()), group, what="the weights")
    if ranks.first(previous is not None):
        assert_same({} if previous is None else previous, group, what="the previous plan")
    for buffer in model.buffers():
        ranks.copy_first_(buffer)
