"""Files of tensors: whole or not at all, readable by others, damage is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from secateurs.errors import FileFormatError
from secateurs.tensorfiles import as_bytes, read_tensors, write_tensors


def test_there_and_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    held = {"a": shared, "b": shared.t(), "c": torch.tensor(float("-inf"))}
    write_tensors(tmp_path / "f", held, {"said": "something"})
    tensors, texts = read_tensors(tmp_path / "f")
    assert texts == {"said": "something"}
    assert tensors.keys() == held.keys()
    assert all(torch.equal(tensors[n], held[n]) for n in held)
    assert os.listdir(tmp_path) == ["f"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(tmp_path / "f", {"a": torch.ones(1)})

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_tensors(tmp_path / "f", {"a": torch.zeros(1)})
    assert read_tensors(tmp_path / "f")[0]["a"].item() == 1
    assert os.listdir(tmp_path) == ["f"]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="does not exist"):
        read_tensors(tmp_path / "nothing")
    with pytest.raises(FileFormatError, match="no file"):
        read_tensors(tmp_path)
    write_tensors(tmp_path / "f", {"a": torch.ones(9)})
    whole = (tmp_path / "f").read_bytes()
    for content in (b"", b"\xff" * 64, whole[:-3], whole[:20]):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(FileFormatError, match="truncated or no safetensors"):
            read_tensors(tmp_path / "f")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.int16).reshape(2, 3).T,
        torch.tensor([1 + 2j]).conj(),
        torch.zeros(2, 3)[:1, 1],
        torch.zeros(0, 2),
        torch.tensor(1.5),
    ],
)
def test_bytes_are_those_of_the_entries_in_order(tensor: Tensor) -> None:
    assert (
        as_bytes(tensor).numpy().tobytes()
        == np.array(tensor.tolist()).astype(str(tensor.dtype).removeprefix("torch.")).tobytes()
    )
