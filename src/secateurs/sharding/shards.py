"""Scores and masks of the elements that this rank holds of an FSDP2 model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.batches import checked_loss, in_mode, iterate, model_device, preserve
from secateurs.criteria import FINISH, Criterion, CriterionLike, get_criterion
from secateurs.distributed import (
    Group,
    Ranks,
    assert_same,
    global_threshold,
    is_sharded,
    local_masks,
    ranks_of,
    reshard,
)
from secateurs.errors import BudgetError, ConfigError, DataError, ScoringError, choose
from secateurs.sharding.instep import InStep
from secateurs.types import Batches, LossFn

__all__ = ["score_shards", "select_shards"]

KNOWN = frozenset({"weight", "grad", "gate"})
"""Statistics of single weights that shards have: the weight, dL/dw, w dL/dw."""


def score_shards(
    model: nn.Module,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    *,
    criterion: CriterionLike = "snip",
    names: Iterable[str] | None = None,
    group: Group = "world",
) -> dict[str, Tensor]:
    """Scores of single weights, of those that this rank holds: larger = keep.

    Equal to the same parts of `score(..., granularity="weight", group=)`, but no rank ever holds
    more than its shard and what FSDP2 gathers for a layer: the gradient of the mean loss over the
    data of all ranks is reduced to shards, as in training.

    Args:
        model: sharded by `fully_shard`; scored in eval mode and left as it was.
        batches: of this rank; any number, or none.
        loss_fn: mean over the samples of the batch.
        criterion: one that sees a weight and its gradient over all data: "magnitude", "gradient",
            "snip", "directional". Those that are finished for each sample or batch need
            `score`, since gradients are summed over the ranks before anyone sees them.
        names: parameters; None for all of two or more dimensions that require a gradient.
        group: the ranks over which the model is sharded.

    Returns:
        Parameter name -> scores of the shape of the local shard.

    Raises:
        ConfigError: another criterion, a model that is not sharded, or an unknown parameter.
        DataError, ScoringError, RankError: as `score`.
    """
    ranks, c = ranks_of(group), get_criterion(criterion)
    reshard(model)
    with ranks.agreed("score_shards"):
        chosen = _chosen(model, c, batches, loss_fn, names)
    n = 0.0
    with ExitStack() as stack:
        stack.enter_context(preserve(model))
        stack.enter_context(in_mode(model, training=False))
        if c.needs_data and batches is not None and loss_fn is not None:
            n = _sum_gradients(model, batches, loss_fn, ranks)
        found = {name: _finished(c, name, p, n) for name, p in chosen.items()}
    with ranks.agreed("score_shards"):
        for name, values in found.items():
            if not torch.isfinite(values).all():
                raise ScoringError(f"criterion {c.label!r}: a score of {name} is not finite")
    return found


def select_shards(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    keep: float | int,
    *,
    group: Group = "world",
) -> dict[str, Tensor]:
    """Masks that keep the best weights of all ranks, by one global threshold.

    Args:
        model: that was scored.
        scores: of `score_shards`.
        keep: the fraction in (0, 1] of the scored weights that stay, or (int) their number, exact.
        group: the ranks.

    Returns:
        Parameter name -> bool DTensor, sharded as the parameter, for `hold_masks`.

    Raises:
        BudgetError: `keep` is out of range.
    """
    ranks = ranks_of(group)
    held: dict[str, Any] = dict(model.named_parameters())
    with ranks.agreed("select_shards"):
        for name in scores:
            choose(name, held, "parameter")
    (total,) = ranks.add_up(sum(int((s > -torch.inf).sum()) for s in scores.values()))
    k = keep if isinstance(keep, int) else round(keep * total)
    if isinstance(keep, bool) or not 1 <= k <= total:
        raise BudgetError(
            f"keep must be a fraction in (0, 1], or a number from 1 to {int(total)}, got {keep!r}"
        )
    masks = local_masks(scores, global_threshold(scores, k, group))
    return {name: _as_sharded(mask, held[name]) for name, mask in masks.items()}


def _as_sharded(mask: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        mask.to(like.to_local().device), like.device_mesh, like.placements, run_check=False,
        shape=like.shape, stride=like.stride(),
    )  # fmt: skip


def _chosen(
    model: nn.Module,
    c: Criterion,
    batches: Batches | None,
    loss_fn: LossFn | None,
    names: Iterable[str] | None,
) -> dict[str, nn.Parameter]:
    """The parameters to score.

    Raises:
        ConfigError: something cannot be done with shards.
    """
    if not is_sharded(model):
        raise ConfigError("score_shards is for a model sharded by fully_shard; use score")
    if c.level != "element" or not c.needs <= KNOWN or (c.needs_data and c.average != "dataset"):
        raise ConfigError(
            f"criterion {c.label!r} cannot be found from shards: it needs more than each weight "
            "and its gradient over all data. Use score(..., group=), or 'magnitude', 'gradient', "
            "'snip', 'directional'"
        )
    if c.needs_data and (batches is None or loss_fn is None):
        raise ConfigError(f"criterion {c.label!r} needs batches and loss_fn")
    params = dict(model.named_parameters())
    if names is None:
        return {n: p for n, p in params.items() if p.dim() > 1 and p.requires_grad}
    found = {choose(n, params, "parameter"): params[n] for n in names}
    frozen = sorted(n for n, p in found.items() if c.needs_data and not p.requires_grad)
    if frozen:
        raise ConfigError(f"{frozen[0]} requires no gradient: criterion {c.label!r} needs one")
    return found


def _sum_gradients(model: nn.Module, batches: Batches, loss_fn: LossFn, ranks: Ranks) -> float:
    """Sum gradients over all samples into `.grad`; what to divide them by for the mean."""
    steps, n = InStep(model, ranks), 0.0
    reader = iterate(batches, model_device(model), may_be_empty=True)
    for i, batch in enumerate(steps.in_step(reader)):
        with steps.forward():
            loss = checked_loss(model, batch, loss_fn, f"batch {i}")
        torch.autograd.backward(loss * steps.size)
        n += steps.samples
    if not n:
        raise DataError("batches is empty on every rank")
    assert_same(n, ranks.group, what="the number of samples")
    return n


def _finished(c: Criterion, name: str, p: Any, n: float) -> Tensor:
    """The scores of the local shard of a parameter."""
    weight = p.to_local().detach()
    known = {"weight": weight}
    if c.needs_data:
        grad = p.grad.to_local().detach() / n if p.grad is not None else torch.zeros_like(weight)
        known |= {"grad": grad, "gate": weight * grad}
    found: Tensor = FINISH[c.finish](c.fn({need: known[need] for need in c.needs}))
    return found.broadcast_to(weight.shape).float()
