"""A training by several processes: each its own batches, every decision the same on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secateurs.batches import checked_loss, in_mode, iterate, model_device, preserve
from secateurs.checkpoints import random_state, set_random_state
from secateurs.distributed import Ranks, assert_same, is_sharded, plain, reshard
from secateurs.errors import ConfigError, RankError, ScoringError
from secateurs.finetuning.state import clear_gradients_
from secateurs.sharding import InStep
from secateurs.types import Batches, Evaluate, LossFn

__all__ = ["Sharing", "counted", "has_unused", "wrapped"]


class Sharing(InStep):
    """What the processes of a training tell each other; a single process tells nobody."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        wrapped = is_sharded(model) or plain(model) is not model
        if ranks.size > 1 and not wrapped:
            raise ConfigError(
                "finetune: the ranks of group= would train apart from each other; wrap the model "
                "with DistributedDataParallel or shard it with fully_shard"
            )
        if wrapped and ranks.group is None and not isinstance(model, nn.DataParallel):
            raise ConfigError(
                'finetune: the model is shared by several processes: give group="world"'
            )
        super().__init__(model, ranks)
        reshard(model)

    def start(self, masks: Mapping[str, Tensor] | None, settings: Mapping[str, Any]) -> None:
        """Make sure that all ranks begin with the same.

        Raises:
            RankError: names the first weight, mask or setting that differs.
        """
        if self.ranks.size == 1:
            return
        group = self.ranks.group
        assert_same(settings, group, what="the settings of finetune")
        if not is_sharded(self.model):
            assert_same(dict(plain(self.model).named_parameters()), group, what="the weights")
        self.same(masks)

    def same(self, masks: Mapping[str, Tensor] | None) -> None:
        """Make sure that all ranks hold the same masks.

        Raises:
            RankError: names the first that differs.
        """
        if self.ranks.size > 1:
            assert_same(masks, self.ranks.group, what="masks")

    def same_weights(self) -> None:
        """Make sure that all ranks hold the same weights: at the end, and before a checkpoint.

        Raises:
            RankError: names the first that differs.
        """
        if self.ranks.size == 1 or is_sharded(self.model):
            return
        held = dict(plain(self.model).named_parameters())
        try:
            assert_same(held, self.ranks.group, what="the trained weights")
        except RankError as error:
            raise RankError(
                f"{error}. DistributedDataParallel does so in the last step when a parameter gets "
                "no gradient there: give it find_unused_parameters=True"
            ) from error

    def mean(self, total: float, samples: int) -> float:
        """The mean over the samples of all ranks."""
        total, n = self.ranks.add_up(total, samples) if self.ranks.size > 1 else (total, samples)
        return total / n

    # -- an epoch --------------------------------------------------------------------------------

    def warm_up(self, loss: Callable[[], Tensor], batches: Batches) -> None:
        """A backward pass that leaves nothing behind, before a training goes on.

        By its first one DDP groups the gradients that it adds up, and among more than two ranks
        their place in a group decides the order of a sum, and so its last bits.
        """
        before, buffers = random_state(batches), [b.clone() for b in self.model.buffers()]
        torch.autograd.backward(loss())
        clear_gradients_(self.model)
        with torch.no_grad():
            for buffer, held in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(held)
        set_random_state(before, batches)

    def check_finite(self, trained: Iterable[Tensor], epoch: int) -> None:
        """Raise on all ranks where a weight of any is not finite.

        Raises:
            ScoringError: so it is.
        """
        with self.ranks.agreed("training"):
            for p in trained:
                held: Any = p
                local = held.to_local() if hasattr(held, "to_local") else held
                if not torch.isfinite(local).all():
                    raise ScoringError(f"epoch {epoch}: weights are not finite after its last step")

    def evaluated(self, evaluate: Evaluate) -> float:
        """The main metric that `evaluate` gives on rank 0; it is called on every rank.

        Raises:
            ConfigError: it gives no number.
        """
        self.settle()
        with self.ranks.agreed("evaluate"):
            metric = _main_metric(evaluate(plain(self.model)))
        reshard(self.model)
        return self.ranks.first(metric)

    def settle(self) -> None:
        """Give every rank the buffers of rank 0, which differ by the batches that it has seen."""
        reshard(self.model)
        if self.ranks.size > 1:
            for buffer in self.model.buffers():
                self.ranks.copy_first_(buffer)

    def named(self) -> Any:
        """Around the training: a rank that is gone ends it with a clear error."""
        return self.ranks.named() if self.ranks.size > 1 else nullcontext()


def counted(batches: Batches, ranks: Ranks) -> Batches:
    """Something of as many batches as the rank with most of them has; called by all ranks."""
    if ranks.size == 1:
        return batches
    known = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    every = ranks.gather(known)
    counts = [n for n in every if n is not None]
    return [(None, None)] * max(counts) if len(counts) == len(every) else iter(())


def has_unused(model: nn.Module, batches: Batches, loss_fn: LossFn, ranks: Ranks) -> bool:
    """Whether a parameter gets no gradient from a batch, on any rank; the model stays as it was.

    DDP waits for the gradients of all parameters, and has to be told.

    Args:
        batches: only the first one is looked at.
    """
    unused = False
    with ranks.agreed("a backward pass"), preserve(model), torch.enable_grad():
        with in_mode(model, training=True):
            batch = next(iterate(batches, model_device(model), max_batches=1))
            torch.autograd.backward(checked_loss(model, batch, loss_fn))
        unused = any(p.requires_grad and p.grad is None for p in model.parameters())
    return ranks.either(unused)[0]


def wrapped(model: nn.Module, ranks: Ranks, *, unused: bool = False) -> nn.Module:
    """The model as several processes train it: in DistributedDataParallel, for one training.

    Weights and buffers are those of rank 0 then.

    Args:
        unused: whether parameters get no gradient, see `has_unused`.
    """
    if ranks.size == 1:
        return model
    with ranks.named():
        return DistributedDataParallel(
            model, process_group=ranks.group, find_unused_parameters=unused
        )


def _main_metric(answer: Any) -> float:
    """The number itself, or the first entry of a dict; the others may be anything."""
    main = answer
    if isinstance(answer, Mapping):
        if not answer:
            raise ConfigError("evaluate returned an empty dict; its first entry is the metric")
        main = next(iter(answer.values()))
    try:
        return float(main)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"evaluate must return a number, or a dict whose first entry is one, got {answer!r:.80}"
        ) from error
