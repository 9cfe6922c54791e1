"""One checkpoint, one file: safetensors, with the tree of the state and a checksum inside.

The bytes go to a name of their own and are flushed to the disk; then the file gets its name, in one
step. So a file that has its name is whole, whatever happens to process or machine, and the checksum
says so. Tensors are written one by one, without a second copy of the state in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateurs.checkpoints.trees import flatten, restore
from secateurs.errors import ConfigError, FileFormatError
from secateurs.tensorfiles import as_bytes, flush

__all__ = ["PART", "OtherFormatError", "read_state", "write_state"]

PART = ".part"
"""Ending of a file that is being written."""
FORMAT, VERSION = "secateurs checkpoint", "1"
TREE, CHECK = "__tree__", "__crc32__"
CHUNK = 1 << 24

_TYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""The names of the format, by which the safetensors package reads the file."""


class OtherFormatError(FileFormatError):
    """A whole file that another version of secateurs wrote."""


def write_state(path: Path, state: Any) -> None:
    """Write a state, whole or not at all; an earlier file of the name is replaced.

    Raises:
        ConfigError: a value that cannot be stored.
        FileFormatError: the disk is full, read-only or broken; nothing is left behind.
    """
    plain, tensors = flatten(state)
    header, n_bytes = _layout(plain, tensors)
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            for piece in _pieces(header, plain, tensors):
                write(file, piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        flush(path.parent)
    except OSError as error:
        _remove(part)
        raise FileFormatError(_unwritten(path, n_bytes, error)) from error
    except BaseException:
        _remove(part)
        raise


def write(file: BinaryIO, piece: memoryview) -> None:
    """Write bytes to a file."""
    file.write(piece)


def _remove(part: Path) -> None:
    with suppress(OSError):
        part.unlink(missing_ok=True)


def _unwritten(path: Path, n_bytes: int, error: OSError) -> str:
    """What to say of a checkpoint that could not be written."""
    free = "unknown"
    with suppress(OSError):
        free = f"{shutil.disk_usage(path.parent).free:,}"
    return (
        f"{path}: the checkpoint cannot be written: {error.strerror or error}. It needs "
        f"{n_bytes:,} bytes, free there: {free}. Earlier checkpoints are whole: make room and "
        "resume, or keep fewer"
    )


def _layout(plain: Any, tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """The header of the file, and the size of the whole."""
    tree = len(_text(plain))
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION}}
    at = 0

    def add(name: str, kind: str, shape: list[int], n_bytes: int) -> None:
        nonlocal at
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes

    for name, tensor in _ordered(tensors):
        if tensor.dtype not in _TYPES:
            raise ConfigError(f"{name}: a tensor of {tensor.dtype} cannot be saved; convert it")
        add(name, _TYPES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size())
    add(TREE, "U8", [tree], tree)
    add(CHECK, "U8", [4], 4)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def _text(plain: Any) -> bytes:
    return json.dumps(plain, allow_nan=False).encode()


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Widest elements first, so that each tensor is aligned."""
    return sorted(tensors.items(), key=lambda item: -item[1].element_size())


def _pieces(header: bytes, plain: Any, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file in order; the last four are the checksum of all before."""
    check = 0
    for piece in _content(header, plain, tensors):
        check = zlib.crc32(piece, check)
        yield piece
    yield memoryview(check.to_bytes(4, "little"))


def _content(header: bytes, plain: Any, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for _, tensor in _ordered(tensors):
        if tensor.numel():
            yield as_bytes(tensor.cpu()).numpy().data
    yield memoryview(_text(plain))


def read_state(path: Path) -> Any:
    """The state in a file, tensors on the CPU.

    Raises:
        OtherFormatError: it is whole, and of another version.
        FileFormatError: it is missing, torn, damaged or no checkpoint.
    """
    try:
        with path.open("rb") as file:
            whole = _is_whole(file)
        if not whole:
            raise FileFormatError(f"{path} is torn or damaged: its checksum does not match")
        with safe_open(path, framework="pt") as held:
            facts = held.metadata() or {}
            if facts.get("format") != FORMAT or facts.get("version") != VERSION:
                raise OtherFormatError(
                    f"{path}: {facts.get('format')!r}, version {facts.get('version')!r}; this "
                    f"version reads {FORMAT!r}, version {VERSION!r}. Go on with the secateurs that "
                    "wrote it, or name another folder"
                )
            tensors = {key: held.get_tensor(key).clone() for key in held.keys()}  # noqa: SIM118
        return restore(json.loads(tensors.pop(TREE).numpy().tobytes()), tensors)
    except FileFormatError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FileFormatError(f"{path} is missing, torn or no checkpoint: {error}") from error


def _is_whole(file: BinaryIO) -> bool:
    """Whether the last four bytes are the checksum of all before them."""
    left = file.seek(0, os.SEEK_END) - 4
    file.seek(0)
    check = 0
    while left > 0:
        piece = file.read(min(CHUNK, left))
        if not piece:
            return False
        check, left = zlib.crc32(piece, check), left - len(piece)
    return left == 0 and file.read() == check.to_bytes(4, "little")
