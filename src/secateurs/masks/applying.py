"""Apply masks once, check them, make them permanent."""

from __future__ import annotations

from torch import nn

from secateurs.errors import SoundnessError
from secateurs.masks.erasing import Eraser
from secateurs.masks.sets import Masks, named_tensors, validate

__all__ = ["apply_masks_", "bake_masks_", "check_masks"]


def apply_masks_(model: nn.Module, masks: Masks) -> None:
    """Zero the removed entries of parameters and buffers once, in place.

    Args:
        model: changed in place; autograd does not see the change.
        masks: tensor name -> bool tensor of the same shape, True = keep.

    Raises:
        ConfigError: a name, shape or dtype does not fit; all problems are listed, none is applied.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> apply_masks_(layer, {"weight": torch.tensor([[True, False]])})
        >>> layer.weight[0, 1].item()
        0.0
    """
    tensors = named_tensors(model)
    for name, full in validate(model, masks).items():
        if not masks[name].all():
            Eraser(tensors[full], masks[name]).erase(tensors[full])


def check_masks(model: nn.Module, masks: Masks) -> None:
    """Raise unless every removed entry is exactly zero (-0.0 counts as zero, NaN does not).

    Raises:
        SoundnessError: names the first tensor that leaked and how many of its entries did.
        ConfigError: as `apply_masks_`.
    """
    tensors = named_tensors(model)
    for name, full in validate(model, masks).items():
        eraser = Eraser(tensors[full], masks[name])
        leaked = eraser.n_leaks(tensors[full])
        if leaked:
            raise SoundnessError(
                f"removed entries must stay zero: {name} {tuple(masks[name].shape)} has "
                f"{leaked} of {int(eraser.removed.sum())} removed entries that are not zero. "
                "Train inside hold_masks(model, optimizer, masks)"
            )


def bake_masks_(model: nn.Module, masks: Masks) -> None:
    """Zero the removed entries for good, and check them: the last verb, after which nothing holds.

    The model is an ordinary dense model with zeros in it. Training it further without
    `hold_masks` moves them away from zero.

    Raises:
        ConfigError, SoundnessError: as `apply_masks_` and `check_masks`.
    """
    apply_masks_(model, masks)
    check_masks(model, masks)
