"""Controls: what a run must beat before its criterion can be said to know anything.

A control changes one link of the run and leaves the rest (budget, schedule, fine-tuning) as it is:

    random          scores are noise
    shuffle         scores are permuted inside each target: only the density per layer is left
    invert          the units that matter most go first
    random-labels   scores are computed on targets shuffled among all samples
    reinit          the last cut keeps the structure but starts from fresh weights

`null_scores` gives what a criterion scores when labels say nothing: what Threshold("permutation")
compares with.

References:
    Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?, 2021,
    arXiv:2009.08576.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.batches import iterate, model_device
from secateurs.criteria import Combination, CriterionLike, get_combination
from secateurs.distributed import ranks_of
from secateurs.errors import ConfigError
from secateurs.masks import apply_masks_
from secateurs.scoring import Options, score
from secateurs.types import Batch, Batches, LossFn, Scores

__all__ = [
    "CONTROLS",
    "check_null",
    "controlled_scores",
    "null_scores",
    "reinitialise_",
    "resets",
    "shuffled_targets",
]

CONTROLS = ("random", "shuffle", "invert", "random-labels", "reinit")
"""Names that `control` accepts."""
FRESH = 10**6
"""Added to the seed of a fresh start, which may be the one that the model was built from."""


def controlled_scores(scores: Scores, control: str | None, seed: int) -> Scores:
    """The scores a control puts in place of these; units removed earlier stay at -inf.

    Example:
        >>> from secateurs.types import Graph
        >>> scores = Scores(Graph({}), {"a": torch.tensor([1.0, 2.0, float("-inf")])}, "taylor")
        >>> controlled_scores(scores, "invert", 0).values["a"]
        tensor([-1., -2., -inf])
    """
    if control not in ("random", "shuffle", "invert"):
        return scores
    generator = torch.Generator().manual_seed(seed)
    values = {name: _changed(v, control, generator) for name, v in scores.values.items()}
    return replace(scores, values=values, criterion=f"{control}({scores.criterion})")


def _changed(values: Tensor, control: str, generator: torch.Generator) -> Tensor:
    alive = torch.isfinite(values)
    held = values[alive]
    changed = values.clone()
    if control == "random":
        changed[alive] = torch.rand(len(held), generator=generator)
    elif control == "shuffle":
        changed[alive] = held[torch.randperm(len(held), generator=generator)]
    else:
        changed[alive] = -held
    return changed


def shuffled_targets(
    batches: Batches, model: nn.Module, seed: int, *, may_be_empty: bool = False
) -> list[Batch]:
    """The same inputs with targets permuted among all samples; batch sizes stay.

    Args:
        batches: of a group of processes those of this one, which then `may_be_empty`; targets
            stay within them.
        model: on whose device they are needed.
        seed: of the permutation.
        may_be_empty: whether there need not be any.

    Raises:
        ConfigError: targets are not tensors with one entry of one shape for each sample.
    """
    pairs = list(iterate(batches, model_device(model), may_be_empty=may_be_empty))
    if not pairs:
        return []
    found = [targets for _, targets in pairs]
    if not all(
        isinstance(t, Tensor) and t.dim() and t.shape[1:] == found[0].shape[1:] for t in found
    ):
        raise ConfigError(
            'shuffling labels (control "random-labels", threshold "permutation") needs targets '
            "that are one tensor per batch, with entries of one shape"
        )
    joined = torch.cat(found)
    order = torch.randperm(len(joined), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(joined[order.to(joined.device)], [len(t) for t in found])
    return [(inputs, part) for (inputs, _), part in zip(pairs, parts, strict=True)]


def null_scores(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn | None = None,
    *,
    criterion: CriterionLike | Combination = "taylor",
    repeats: int = 20,
    **options: Unpack[Options],
) -> list[Scores]:
    """What the criterion scores when labels say nothing: (repeats,) scores on shuffled labels.

    Each repeat permutes the targets among all samples (`shuffled_targets`) and scores once, so the
    cost is that of `repeats` passes. To tell a single unit apart at a false-discovery rate of fdr,
    Threshold("permutation") needs about 1 / fdr repeats.

    A null is fair when labels without information leave the score of an idle unit as it is: so for
    mutual information. A trained model fits its labels, and wrong ones give larger gradients than
    right ones, so criteria made of gradients score *higher* on shuffled labels: little or nothing
    beats them there.

    Args:
        model, batches, loss_fn, criterion: as in `score`, and as for the scores to be compared.
        repeats: how often the labels are shuffled, at least 1.
        **options: other keywords of `score`; `seed` also decides the permutations.

    Raises:
        ConfigError: the criterion does not see labels, several criteria are combined, or targets
            are not tensors with one entry of one shape for each sample.
        Others as `score`.
    """
    asked = check_null(criterion)
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ConfigError(f"repeats must be a whole number, at least 1, got {repeats!r}")
    draws = np.random.SeedSequence(options.get("seed", 0)).generate_state(repeats)
    ranks, drawn = ranks_of(options.get("group")), []
    for draw in draws:
        with ranks.agreed("shuffling labels"):
            data = shuffled_targets(batches, model, int(draw), may_be_empty=ranks.size > 1)
        drawn.append(score(model, data, loss_fn, criterion=asked, **options))
    return drawn


def check_null(criterion: CriterionLike | Combination) -> Combination:
    """The criterion, if scores on shuffled labels mean something for it.

    Raises:
        ConfigError: it does not see labels, or combines criteria.
    """
    asked = get_combination(criterion)
    if asked.how is not None:
        raise ConfigError(
            f"{asked.label} scales the scores of its parts by those of all units, so what they are "
            'on shuffled labels is lost: use one criterion with threshold "permutation"'
        )
    if not asked.sees_labels:
        raise ConfigError(
            f'threshold "permutation" compares with shuffled labels, and criterion {asked.label!r} '
            "does not see the targets: it would score the same. Use one that does"
        )
    return asked


def resets(model: nn.Module) -> list[Callable[[], object]]:
    """What gives every module of the model its initial distribution again.

    Raises:
        ConfigError: modules with parameters of their own that have no `reset_parameters`.
    """
    found: list[Callable[[], object]] = []
    without = []
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(
            module, "_reset_parameters", None
        )
        if callable(reset):
            found.append(reset)
        elif next(module.parameters(recurse=False), None) is not None:
            without.append(f"{name or 'the model'} ({type(module).__name__})")
    if without:
        raise ConfigError(
            'control "reinit" needs reset_parameters() on every module with parameters; '
            f"it is missing on {', '.join(without)}"
        )
    return found


def reinitialise_(model: nn.Module, masks: Mapping[str, Tensor], seed: int) -> None:
    """Give every module its initial distribution again, in place, and apply the masks.

    Raises:
        ConfigError: as `resets`; nothing is changed then.
    """
    calls = resets(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed + FRESH)
        for reset in calls:
            reset()
    apply_masks_(model, masks)
