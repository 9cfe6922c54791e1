"""Packing is bit-identical, whatever the values and types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateurs.errors import FileFormatError
from secateurs.surgery.storage import pack, pack_bits, unpack, unpack_bits

HERE = Path("model.safetensors")


def bits(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def sparse(dtype: torch.dtype, n: int = 100) -> Tensor:
    t = torch.zeros(n)
    t[::7] = torch.arange(1.0, len(t[::7]) + 1)
    return t.to(dtype).reshape(4, n // 4)


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool])
def test_sparse_tensors_come_back_bit_identical(dtype: torch.dtype) -> None:
    t = sparse(dtype)
    stored = pack({"w": t})
    assert "w" not in stored
    back = unpack(stored, HERE)["w"]
    assert (back.dtype, back.shape) == (dtype, t.shape)
    assert bits(back) == bits(t)


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_zero_nan_and_infinity_survive(dtype: torch.dtype) -> None:
    t = sparse(dtype)
    t[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf")]).to(dtype)
    back = unpack(pack({"w": t}), HERE)["w"]
    assert bits(back) == bits(t)
    assert bool(torch.signbit(back[0, 0]))


def test_dense_small_empty_and_scalar_tensors_are_stored_as_they_are() -> None:
    state = {
        "dense": torch.ones(100), "small": torch.zeros(63), "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7), "strided": torch.arange(200.0).reshape(10, 20).t(),
    }  # fmt: skip
    stored = pack(state)
    assert stored.keys() == state.keys()
    back = unpack(stored, HERE)
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_all_zeros_and_size_on_disk() -> None:
    t = torch.zeros(64, 64)
    stored = pack({"w": t})
    assert sum(s.numel() * s.element_size() for s in stored.values()) == 64 * 64 // 8 + 16
    assert torch.equal(unpack(stored, HERE)["w"], t)


def test_bits_by_hand() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    packed = pack_bits(mask)
    assert packed.tolist() == [0b10100100]
    assert torch.equal(unpack_bits(packed, (2, 3)), mask)
    for shape in [(3, 3), (-2, -3), (2**40, 2**40), (0,)]:
        with pytest.raises(RuntimeError, match="do not fit shape"):
            unpack_bits(packed, shape)


@pytest.mark.parametrize(
    "change",
    [
        {"w.__shape__": torch.tensor([-4, -25])},
        {"w.__shape__": torch.tensor([2**32, 2**32])},
        {"w.__shape__": torch.tensor([4.0, 25.0])},
        {"w.__shape__": torch.tensor(100)},
        {"w.__values__": torch.ones(3)},
        {"w.__bitmask__": torch.zeros(13)},
        {"w.__values__": None},
    ],
)
def test_damaged_sparse_tensors(change: dict[str, Tensor | None]) -> None:
    stored = {**pack({"w": sparse(torch.float32)}), **change}
    with pytest.raises(FileFormatError, match="sparse tensor w is damaged"):
        unpack({k: v for k, v in stored.items() if v is not None}, HERE)
