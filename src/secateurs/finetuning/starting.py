"""Before the first step of a training: what is wrong with it, its optimizer, its random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from secateurs.distributed import is_sharded
from secateurs.errors import ConfigError, DataError
from secateurs.finetuning.config import OPTIMIZERS, Finetune
from secateurs.finetuning.distillation import Distillation
from secateurs.types import Batches, Evaluate

__all__ = ["build_optimizer", "check_arguments", "seeded"]


def check_arguments(
    model: nn.Module,
    batches: Batches,
    config: Finetune,
    teacher: nn.Module | Distillation | None,
    evaluate: Evaluate | None,
    *,
    cuts: bool,
    leaves: bool,
    n_processes: int,
) -> None:
    """Raise one error for all arguments that contradict each other.

    Args:
        cuts: whether more is removed on the way.
        leaves: whether checkpoints are written.
        n_processes: that train together.
    """
    problems = []
    if config.distills and teacher is None:
        given = f"distill={config.distill:g}" if config.distill else f"hidden={config.hidden:g}"
        problems.append(f"{given} needs teacher=, the model to distill from")
    if teacher is not None and not config.distills:
        problems.append("a teacher without effect: set Finetune(distill=) or (hidden=) above 0")
    if teacher is model:
        problems.append("teacher is the model itself: give copy.deepcopy of the dense model")
    if evaluate is None and (config.patience is not None or config.restore_best):
        problems.append("patience and restore_best need evaluate=")
    if cuts and config.patience is not None:
        problems.append("patience could stop before the last recut; leave it away")
    if leaves and n_processes > 1 and is_sharded(model):
        problems.append(
            "checkpoint= holds whole weights, and those of this model are sharded: use "
            "save_sharded in a loop of your own"
        )
    if leaves and n_processes > 1 and not getattr(model, "broadcast_buffers", True):
        problems.append(
            "checkpoint= holds the buffers of rank 0: leave broadcast_buffers=False of "
            "DistributedDataParallel away"
        )
    if problems:
        raise ConfigError("finetune: " + "; ".join(problems))
    if isinstance(batches, Iterator):
        raise DataError("batches can be read only once (a generator): pass a list or a DataLoader")


def build_optimizer(model: nn.Module, config: Finetune) -> Optimizer | None:
    """The configured optimizer; None when there is no step to take."""
    if config.steps == 0 or config.n_epochs == 0:
        return None
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter of the model requires a gradient: nothing to train")
    return OPTIMIZERS[config.optimizer](trainable, config)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run under a seed and restore the caller's random state; None = the caller's own."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
