"""Tensors and a few texts in one safetensors file, written whole or not at all. No pickle.

write_tensors(path, tensors, texts)
read_tensors(path) -> tensors, texts
as_bytes(tensor) -> its bytes, for files, hashes and collectives
flush(path) on the disk, whatever happens to the machine
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateurs.errors import FileFormatError

__all__ = ["as_bytes", "flush", "read_tensors", "write_tensors"]


def as_bytes(tensor: Tensor) -> Tensor:
    """(n,) uint8: the bytes of the entries in their order, on the device of the tensor.

    Example:
        >>> as_bytes(torch.tensor([[1, 9]], dtype=torch.int16)[:, 0]).tolist()
        [1, 0]
    """
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = plain.reshape(-1)
    if flat.stride(0) != 1:  # a single entry counts as contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def flush(path: Path) -> None:
    """Have the system put a file or the names in a folder on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows does it by itself
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write beside the target, then rename: a reader never sees half a file.

    Args:
        path: the file; its folder exists.
        tensors: by name; copied to the CPU.
        texts: by name, kept in the metadata of the file.
    """
    held = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = save(held, metadata=dict(texts) if texts else None)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp lets only its owner read it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and texts of a safetensors file.

    Raises:
        FileFormatError: it is missing, truncated or of another format.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist or is no file")
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            return {key: file.get_tensor(key).clone() for key in file.keys()}, texts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path} is truncated or no safetensors file: {error}") from error
