"""One checkpoint, one file: exact, whole or not at all, and any damage is noticed."""

from __future__ import annotations

import errno
import math
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from secateurs.checkpoints import files, flatten, read_state, restore, write_state
from secateurs.errors import ConfigError, FileFormatError


def same(a: Any, b: Any) -> bool:
    """Equal in type and in every bit, but for the payload of a nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [
            x.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for x in (a, b) if x.numel()
        ]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bool(not bits or torch.equal(*bits))
    if isinstance(a, np.ndarray):
        return bool((a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        keys = list(zip(a, b, strict=True)) if len(a) == len(b) else [(0, 1)]
        return all(same(k, m) and same(a[k], b[m]) for k, m in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a.hex() == b.hex())
    return bool(a == b)


EVERYTHING: dict[str, Any] = {
    "none": None, "yes": True, "big": 2**200, "small": 5e-324, "zero": -0.0, "inf": -math.inf,
    "nan": math.nan, "text": "\u00fc\ud800\n", "list": [1, [2.0]], "tuple": (1, (), []),
    "keys": {0: "int", (1, "a"): "tuple", None: {}, 0.5: "float", True: "bool"},
    "tensors": [
        torch.tensor(3.5), torch.zeros(0, 4), torch.arange(6).reshape(2, 3).T,
        torch.tensor([math.nan, -0.0, math.inf]), torch.tensor([True, False]),
        torch.ones(2, dtype=torch.bfloat16), torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj(),
        torch.ones(3, dtype=torch.uint16), torch.ones(2, dtype=torch.float8_e4m3fn),
    ],
    "numpy": [np.arange(3, dtype=np.uint32), np.float64(0.1), np.int8(-3), np.zeros((0, 2))],
    "random": (np.random.default_rng(3).bit_generator.state, np.random.RandomState(1).get_state()),
    "__tree__": torch.ones(1), "__metadata__": torch.ones(2), "a.b": torch.ones(3),
    "a": {"b": torch.zeros(3)},
}  # fmt: skip


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    write_state(tmp_path / "c", EVERYTHING)
    assert same(read_state(tmp_path / "c"), EVERYTHING)
    load_file(tmp_path / "c")  # the package of the format reads it too


def test_the_comparison_notices_a_difference() -> None:
    for a, b in [(1, True), (1, 1.0), (0.0, -0.0), ((1,), [1]), ({1: 2}, {1: 3}),
                 (torch.ones(2), torch.ones(2, 1)), (np.int8(1), np.int16(1))]:  # fmt: skip
        assert not same(a, b)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers() | st.text(), inner)
    ),
    max_leaves=12,
)  # fmt: skip


@given(PLAIN)
def test_any_plain_state_comes_back(state: Any) -> None:
    plain, tensors = flatten(state)
    assert not tensors
    assert same(restore(plain, tensors), state)


def test_one_tensor_at_two_places_is_stored_once(tmp_path: Path) -> None:
    tied = torch.ones(1000)
    write_state(tmp_path / "c", {"a": tied, "b": [tied]})
    assert (tmp_path / "c").stat().st_size < 6000
    back = read_state(tmp_path / "c")
    assert back["a"] is back["b"][0]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": [1, object()]}, "a.1: a object cannot be saved"),
        ({"hook": len}, "hook: a builtin_function_or_method"),
        ({"w": torch.eye(2).to_sparse()}, "w: a sparse tensor"),
        ({"w": torch.zeros(1, device="meta")}, "w: a meta tensor"),
        ({"s": {1, 2}}, "s: a set"),
        ({"n": np.array(["a"])}, "n: numpy <U1"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        write_state(tmp_path / "c", state)
    assert not list(tmp_path.iterdir())


def test_a_state_that_holds_itself() -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(ConfigError, match="holds itself"):
        flatten(state)


# --- damage --------------------------------------------------------------------------------------


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write_state(path, {"w": torch.arange(20.0), "note": "x"})
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(100):
        broken = bytearray(whole)
        broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(FileFormatError):
            read_state(path)
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError):
            read_state(path)
    path.write_bytes(whole)
    assert same(read_state(path)["w"], torch.arange(20.0))


# --- a disk that refuses -------------------------------------------------------------------------

STATE = {"w": torch.zeros(50_000)}


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A good checkpoint, which must be there in the end; and nothing else."""
    path = tmp_path / "c"
    write_state(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    yield path
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_refuses_is_one_error(
    held: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files if call == "write" else os, call, refuse)
    with pytest.raises(FileFormatError, match=r"cannot be written: .*needs 200,\d\d\d bytes") as it:
        write_state(held, STATE)
    assert str(held) in str(it.value)
    assert os.strerror(code) in str(it.value)
    monkeypatch.undo()


def test_a_limit_on_the_size_of_files(held: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(FileFormatError, match="File too large"):
            write_state(held, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one, where this process may mount it."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(tmp_path)],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("mounting a small disk needs rights that this process does not have")
    try:
        write_state(tmp_path / "first", STATE)
        with pytest.raises(FileFormatError, match="No space left on device"):
            write_state(tmp_path / "second", STATE)
        assert [p.name for p in tmp_path.iterdir()] == ["first"]
        assert same(read_state(tmp_path / "first"), STATE)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_single_entry_of_any_stride(tmp_path: Path) -> None:
    state = {"one": torch.arange(6.0).reshape(1, 6)[:, 2], "part": torch.tensor([1 + 2j]).imag}
    write_state(tmp_path / "c", state)
    assert same(
        read_state(tmp_path / "c"), {"one": torch.tensor([2.0]), "part": torch.tensor([2.0])}
    )
