"""One noun: a mask that removes something, with the tensors whose entries it removes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, SoundnessError
from secateurs.masks.erasing import Eraser, is_sharded
from secateurs.masks.sets import Masks, named_tensors, plain_names, validate

__all__ = ["Entry", "find_tensors", "prepare", "removed_by_id"]


@dataclass(eq=False)
class Entry:
    """One mask that is held.

    Attributes:
        name: as it was given.
        path: full name of the tensor in the model, wrappers included.
        tensor: that is held; `shape` is what it had then.
        averages: the tensors that stand for it in the averaged models.
        eraser: zeroes what is removed.
        version: count of in-place writes when it was last zeroed.
    """

    name: str
    path: str
    tensor: Tensor
    shape: torch.Size
    averages: tuple[Tensor, ...]
    eraser: Eraser
    version: int = -1


def prepare(
    model: nn.Module,
    masks: Masks,
    averages: Sequence[nn.Module],
    before: Sequence[Entry] = (),
) -> list[Entry]:
    """Masks checked and copied; those that remove nothing need no entry.

    Raises:
        ConfigError: masks do not fit, or an averaged model lacks a masked tensor.
    """
    full, plain = validate(model, masks), plain_names(model)
    tensors = named_tensors(model)
    # While FSDP has gathered its shards the names stand for the gathered tensors.
    tensors |= {old.path: old.tensor for old in before if is_sharded(old.tensor)}
    averaged = [_by_plain_name(one) for one in averages]
    entries = []
    for name, path in full.items():
        tensor, short = tensors[path], plain[path]
        for i, average in enumerate(averaged):
            if short not in average or average[short].shape != tensor.shape:
                raise ConfigError(
                    f"averaged model {i} has no {short} {tuple(tensor.shape)}: "
                    "give copies of the model that is trained"
                )
        if not masks[name].all():
            copies = tuple(average[short] for average in averaged)
            eraser = Eraser(tensor, masks[name])
            entries.append(Entry(name, path, tensor, tensor.shape, copies, eraser))
    return entries


def find_tensors(model: nn.Module, entries: Sequence[Entry]) -> None:
    """Raise when a parameter was replaced; a buffer may be, then its entry holds the new one.

    Raises:
        SoundnessError: names the first parameter that is another tensor now.
    """
    for entry in entries:
        found = _tensor_at(model, entry.path)
        if found is entry.tensor and found.shape == entry.shape:
            continue
        if isinstance(found, Tensor) and found.shape == entry.shape:
            if not isinstance(entry.tensor, nn.Parameter):
                entry.tensor = found
                continue
            if is_sharded(entry.tensor) and not is_sharded(found):  # gathered for a forward pass
                continue
        raise SoundnessError(
            f"{entry.name} {tuple(entry.shape)} is no longer the tensor whose mask is held: it "
            "was replaced (assigned anew, converted, sharded). Leave hold_masks before that, "
            "and enter it again with an optimizer of the new parameters"
        )


def removed_by_id(entries: Sequence[Entry]) -> dict[int, Tensor]:
    """Id of a tensor -> what is removed of it, under whichever of its names."""
    removed: dict[int, Tensor] = {}
    for entry in entries:
        known, now = removed.get(id(entry.tensor)), entry.eraser.removed
        removed[id(entry.tensor)] = now if known is None else known | now
    return removed


def _by_plain_name(model: nn.Module) -> dict[str, Tensor]:
    tensors = named_tensors(model)
    return {short: tensors[name] for name, short in plain_names(model).items()}


def _tensor_at(model: nn.Module, path: str) -> Any:
    """What a full name stands for now; None when there is nothing."""
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
