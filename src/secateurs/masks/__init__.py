"""Masks: make removed entries zero, keep them zero while training, make them permanent.

A mask set is `{tensor name: bool tensor of the dense shape}`, True = keep, as in `Plan.masks`.
Names are those of `named_parameters()` and `named_buffers()`; tied parameters have several names
and any of them works. A model that is wrapped (DDP, an averaged model, torch.compile) has the names
of the plain one. A sharded parameter (DTensor) has the mask of the full shape: each process deals
with its own shard. Masks live beside the model: no module is wrapped, no state-dict key changes.
The verbs, in the order in which a run meets them:

    apply_masks_   zero once
    hold_masks     keep zero while training: gradients, weights, optimizer state, averages
    check_masks    raise if anything leaked
    bake_masks_    zero for good, and checked; nothing is held afterwards
"""

from secateurs.masks.applying import apply_masks_, bake_masks_, check_masks
from secateurs.masks.holding import HeldMasks, hold_masks
from secateurs.masks.sets import combine, model_sparsity, named_tensors, sparsity

__all__ = [
    "HeldMasks",
    "apply_masks_",
    "bake_masks_",
    "check_masks",
    "combine",
    "hold_masks",
    "model_sparsity",
    "named_tensors",
    "sparsity",
]
