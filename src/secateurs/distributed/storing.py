"""Checkpoints that every rank writes a part of, on torch.distributed.checkpoint.

    save_sharded(path, model, ...)    written beside `path`, renamed when all ranks are done
    load_sharded(path, model, ...)    with any number of ranks
    newest(folder)                    the last one by name that is complete

The format is that of torch.distributed.checkpoint, and beside its files the hash of each. Its
index is a pickle: load only checkpoints of your own. What goes to others is written by
`secateurs.save`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from secateurs.distributed.groups import Group, Ranks, is_dtensor, ranks_of
from secateurs.distributed.same import assert_same
from secateurs.errors import ConfigError, FileFormatError
from secateurs.tensorfiles import flush

__all__ = ["load_sharded", "newest", "save_sharded"]

PART = ".part"
EXTRA = "extra"
HASHES = "hashes.json"
"""File name -> hash, of all other files of a checkpoint."""


def save_sharded(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    masks: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
    group: Group = "world",
) -> Path:
    """Write a checkpoint of a training to a new directory; all ranks call it, with the same path.

    Sharded parameters and their optimizer state are written by the rank that holds them, the rest
    once. The directory appears whole or not at all: a crash leaves one that ends in ".part".

    Args:
        path: on a file system that all ranks see; must not exist.
        model: wrapped by DDP, sharded by `fully_shard`, or neither.
        optimizer: of the model.
        masks: full masks, the same on every rank, or sharded as the parameters.
        extra: plain values by name (steps done, ...), those of rank 0.
        group: the ranks that train.

    Returns:
        The directory.

    Raises:
        ConfigError: it exists already, or `extra` holds more than plain values.
        FileFormatError: a rank cannot write (the disk is full); nothing is left behind.
        RankError: the masks differ between ranks.
    """
    out, ranks = Path(path), ranks_of(group)
    part = out.with_name(out.name + PART)
    with ranks.agreed("save_sharded"):
        text = _plain(extra)
        if ranks.rank == 0:
            if out.exists():
                raise ConfigError(f"{out} exists already; give every checkpoint its own directory")
            shutil.rmtree(part, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
    held = dict(masks or {})
    assert_same({n: m for n, m in held.items() if not is_dtensor(m)}, group, what="masks")
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state, "masks": held, EXTRA: ranks.first(text)}
    try:
        with ranks.agreed("save_sharded"), ranks.named(), _told(f"{out} cannot be written"):
            state_dict_saver.save(
                content, checkpoint_id=part, process_group=ranks.group, no_dist=ranks.group is None
            )
        hashes = _hashes(part, ranks, "save_sharded")
        with ranks.agreed("save_sharded"):
            if ranks.rank == 0:
                _write(part / HASHES, json.dumps(hashes, indent=1))
    except FileFormatError:  # make room again; earlier checkpoints are as they were
        if ranks.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise
    with ranks.agreed("save_sharded"):
        if ranks.rank == 0:
            _sync(part)
            os.replace(part, out)
            flush(out.parent)
    return out


def load_sharded(
    path: str | Path, model: nn.Module, optimizer: Optimizer, *, group: Group = "world"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint into model and optimizer, in place; the masks and the extra values.

    The number of ranks, and how the model is wrapped, may differ from when it was saved.

    Args:
        path: written by `save_sharded`.
        model, optimizer: built as before.
        group: the ranks that go on.

    Raises:
        FileFormatError: there is no complete checkpoint, a file is damaged, or it does not fit
            the model.
    """
    ranks, where = ranks_of(group), Path(path)
    found = _hashes(where, ranks, "load_sharded")
    with ranks.agreed("load_sharded"):
        _check_whole(where, found)
        kinds = _kinds(where)
        masks = {
            key.removeprefix("masks."): torch.empty(kind.size, dtype=kind.properties.dtype)
            for key, kind in kinds.items()
            if key.startswith("masks.") and isinstance(kind, TensorStorageMetadata)
        }
        extra = torch.empty(kinds[EXTRA].size, dtype=torch.uint8)
        weights, state = get_state_dict(model, optimizer)
        _check_fits(where, weights, kinds)
    content = {"model": weights, "optimizer": state, "masks": masks, EXTRA: extra}
    with (
        ranks.agreed("load_sharded"),
        ranks.named(),
        _told(f"{where} cannot be read, take an earlier one"),
    ):
        state_dict_loader.load(
            content, checkpoint_id=where, process_group=ranks.group, no_dist=ranks.group is None
        )
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return masks, json.loads(bytes(extra.tolist()))


def newest(folder: str | Path) -> Path | None:
    """The complete checkpoint whose name comes last; None where there is none.

    Numbers in names count as numbers: "step-100" comes after "step-20". When files were written is
    not looked at: a copy of the folder may have lost it.
    """
    home = Path(folder)
    found = [p.parent for p in home.glob("*/.metadata") if not p.parent.name.endswith(PART)]
    return max(found, key=lambda p: _in_order(p.name), default=None)


def _in_order(name: str) -> list[tuple[int, str]]:
    """What names are sorted by."""
    parts = re.split(r"([0-9]+)", name)  # texts and numbers in turn
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """One clear error for what torch raises on all ranks when one of them fails.

    That is no `Exception`, and holds the tracebacks of all of them. A single process is warned
    that it is one; it knows.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            text = " ".join(str(cause).split())[:200]
            raise FileFormatError(f"{what}: rank {rank}: {type(cause).__name__}: {text}") from cause


def _plain(extra: Mapping[str, Any] | None) -> Tensor:
    """Plain values as the bytes of their JSON."""
    try:
        text = json.dumps(dict(extra or {}))
    except TypeError as error:
        raise ConfigError(f"extra may hold plain values only: {error}") from error
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _hashes(folder: Path, ranks: Ranks, what: str) -> dict[str, str]:
    """File name -> hash; each rank reads a part of the files, for `what`."""
    files = sorted(p for p in folder.glob("*") if p.is_file() and p.name != HASHES)
    mine = {}
    with ranks.agreed(what):
        for file in files[ranks.rank :: ranks.size]:
            try:
                with file.open("rb") as content:
                    found = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16))
            except OSError as error:
                raise FileFormatError(f"{file} cannot be read: {error}") from error
            mine[file.name] = found.hexdigest()
    return {name: value for one in ranks.gather(mine) for name, value in one.items()}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileFormatError(f"{path} cannot be written: {error}") from error


def _check_whole(where: Path, found: Mapping[str, str]) -> None:
    """Compare the files with what was written: no bit of them may have changed."""
    try:
        held: dict[str, str] = json.loads((where / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{where} holds no complete checkpoint of save_sharded: {error}"
        ) from error
    for name, value in held.items():
        if found.get(name) != value:
            what = "is damaged" if name in found else "is missing"
            raise FileFormatError(f"{where / name} {what}: take an earlier checkpoint")


def _kinds(where: Path) -> dict[str, Any]:
    """What a checkpoint holds, by name."""
    try:
        metadata = FileSystemReader(where).read_metadata()
        kinds: dict[str, Any] = dict(metadata.state_dict_metadata)
    except Exception as error:  # a damaged pickle raises anything
        raise FileFormatError(
            f"{where} holds no complete checkpoint of save_sharded: {error}"
        ) from error
    if EXTRA not in kinds:
        raise FileFormatError(f"{where} was not written by save_sharded")
    return kinds


def _check_fits(where: Path, weights: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Name the first tensor of the model that the checkpoint has not, or has in another shape."""
    for name, value in weights.items():
        kind = kinds.get(f"model.{name}")
        if not isinstance(value, Tensor):
            continue
        if not isinstance(kind, TensorStorageMetadata) or kind.size != value.shape:
            got = "does not hold it" if kind is None else f"holds {tuple(kind.size)}"
            raise FileFormatError(
                f"{where} does not fit the model: {name} has shape {tuple(value.shape)}, the "
                f"checkpoint {got}. Build the model as it was saved"
            )


def _sync(folder: Path) -> None:
    """Wait until the files are on the disk, so that the new name never stands for less."""
    for file in folder.iterdir():
        flush(file)
    flush(folder)
