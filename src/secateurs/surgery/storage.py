"""Tensors in a safetensors file; those with many zeros as a bitmask and their values.

At 90 % zeros a float32 tensor shrinks about 7.6 times; reading it back is bit-identical.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import FileFormatError

__all__ = [
    "BUFFER",
    "MASK",
    "pack",
    "pack_bits",
    "stored_tensors",
    "unpack",
    "unpack_bits",
]

BITMASK, VALUES, SHAPE, MASK = ".__bitmask__", ".__values__", ".__shape__", ".__mask__"
BUFFER = ".__buffer__"  # of a buffer that is not in the state dict
SPARSE_BELOW = 0.9  # density under which bitmask + values is smaller than the dense tensor


# -- tensors -------------------------------------------------------------------------------


def stored_tensors(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that the file holds: state, masks, and buffers outside the state dict."""
    state = model.state_dict()
    others = {
        name + BUFFER: buffer.detach().cpu().contiguous().clone()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in state
    }
    return pack(state) | others | {name + MASK: pack_bits(mask) for name, mask in masks.items()}


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for the file: those with enough zeros as bitmask + values.

    A value of -0.0 counts as a value, so that unpacking is bit-identical.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        flat = tensor.detach().cpu().contiguous().clone()
        held = flat != 0
        if flat.is_floating_point():
            held |= torch.signbit(flat)
        if flat.numel() >= 64 and float(held.float().mean()) < SPARSE_BELOW:
            stored[name + BITMASK] = pack_bits(held)
            stored[name + VALUES] = flat[held]
            stored[name + SHAPE] = torch.tensor(flat.shape, dtype=torch.int64)
        else:
            stored[name] = flat
    return stored


def unpack(stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The inverse of `pack`; entries that are no tensor of the model (masks) are left out."""
    state: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if key.endswith(BITMASK):
            name = key[: -len(BITMASK)]
            try:
                shape = tuple(stored[name + SHAPE].tolist())
                values = stored[name + VALUES]
                held = unpack_bits(tensor, shape)
                dense = torch.zeros(shape, dtype=values.dtype)
                dense[held] = values
            except (KeyError, RuntimeError, IndexError, TypeError, ValueError) as error:
                raise FileFormatError(
                    f"{path}: sparse tensor {name} is damaged: {error}"
                ) from error
            state[name] = dense
        elif not key.endswith((VALUES, MASK, SHAPE, BUFFER)):
            state[key] = tensor
    return state


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bytes, eight entries each."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy()))


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits`, for a known shape."""
    count = prod(shape)  # of Python integers: no overflow
    whole = all(isinstance(n, int) and n >= 0 for n in shape)
    if bits.dtype != torch.uint8 or not whole or bits.numel() != (count + 7) // 8:
        raise RuntimeError(f"{bits.numel()} bytes of bits do not fit shape {shape}")
    flat = np.unpackbits(bits.numpy(), count=count).astype(bool)
    return torch.from_numpy(flat).reshape(shape)
