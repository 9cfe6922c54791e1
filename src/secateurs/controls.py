"""Controls: what a run must beat before its criterion can be said to know anything.

A control changes one link of the run and leaves the rest (budget, schedule, fine-tuning) as it is:

    random          scores are noise
    shuffle         scores are permuted inside each target: only the density per layer is left
    invert          the units that matter most go first
    random-labels   scores are computed on shuffled targets
    reinit          the last cut keeps the structure but starts from fresh weights

References:
    Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?, 2021,
    arXiv:2009.08576.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateurs.batches import iterate, model_device
from secateurs.errors import ConfigError
from secateurs.masks import apply_masks_
from secateurs.types import Batch, Batches, Scores

__all__ = ["CONTROLS", "controlled_scores", "reinitialise_", "shuffled_targets"]

CONTROLS = ("random", "shuffle", "invert", "random-labels", "reinit")
"""Names that `control` accepts."""


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


def shuffled_targets(batches: Batches, model: nn.Module, seed: int) -> list[Batch]:
    """The same batches with targets permuted inside each batch.

    Raises:
        ConfigError: targets are not tensors with one entry for each sample.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled: list[Batch] = []
    for inputs, targets in iterate(batches, model_device(model)):
        if not isinstance(targets, Tensor) or targets.dim() == 0:
            raise ConfigError('control "random-labels" needs targets that are one tensor per batch')
        order = torch.randperm(len(targets), generator=generator).to(targets.device)
        shuffled.append((inputs, targets[order]))
    return shuffled


def reinitialise_(model: nn.Module, masks: Mapping[str, Tensor], seed: int) -> None:
    """Give every module its initial distribution again, in place, and apply the masks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    apply_masks_(model, masks)
