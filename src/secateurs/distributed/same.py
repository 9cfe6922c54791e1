"""Whether all ranks hold the same, by hash: masks, plans, weights, scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from secateurs.distributed.groups import Group, is_dtensor, ranks_of
from secateurs.errors import ConfigError, RankError
from secateurs.tensorfiles import as_bytes

__all__ = ["assert_same", "digest"]


def assert_same(value: Any, group: Group, what: str = "state") -> str:
    """The hash of a value that all ranks hold alike.

    Each rank hashes what it has (blake2b of names, shapes, types and bytes); only hashes travel.

    Args:
        value: masks or a state dict (nested mappings and sequences of tensors and plain values), a
            `Plan` (its masks and kept indices), or `Scores` (their values).
        group: the ranks to compare.
        what: it is, for the error.

    Raises:
        RankError: ranks differ; names the first tensor that does, and the ranks.
        ConfigError: a sharded tensor, which differs on purpose.

    Example:
        >>> import torch
        >>> len(assert_same({"w": torch.ones(2)}, None))
        32
    """
    mine = dict(_pieces(value, ""))
    whole = digest(mine)
    ranks = ranks_of(group)
    if len(set(ranks.gather(whole))) == 1:
        return whole
    told = ranks.gather(mine)
    names = list(dict.fromkeys(name for one in told for name in one))
    first = next((n for n in names if len({one.get(n) for one in told}) > 1), "the order of names")
    known: dict[str | None, list[int]] = {}
    for rank, one in enumerate(told):
        known.setdefault(one.get(first), []).append(rank)
    sides = " and ".join(_ranks(found) for found in known.values())
    without = known.get(None)
    missing = f" ({_ranks(without)} without it)" if without else ""
    raise RankError(
        f"{what} must be the same on every rank: {first} differs between {sides}{missing}. Give "
        "every rank the same weights, seeds and settings"
    )


def digest(value: Any) -> str:
    """The hash of tensors and plain values: 32 hexadecimal digits.

    Example:
        >>> import torch
        >>> digest({"w": torch.ones(2)}) == digest({"w": torch.ones(2).double()})
        False
    """
    found = hashlib.blake2b(digest_size=16)
    for name, part in _pieces(value, ""):
        found.update(f"{name}\0{part}\0".encode())
    return found.hexdigest()


def _ranks(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"rank {listed}" if len(numbers) == 1 else f"ranks {listed}"


def _pieces(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """(name, hash) of each tensor or plain value inside."""
    if isinstance(value, Tensor):
        yield name or "the tensor", _hash(value, name)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _pieces(part, f"{name}.{key}" if name else str(key))
    elif hasattr(value, "masks") and hasattr(value, "kept"):  # a plan
        yield from _pieces(value.masks, name)
        yield from _pieces(value.kept, f"{name}.kept" if name else "kept")
        yield from _pieces(value.layers, f"{name}.layers" if name else "layers")
    elif hasattr(value, "values") and hasattr(value, "criterion"):  # scores
        yield from _pieces(value.values, name)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _pieces(part, f"{name}.{i}" if name else str(i))
    else:
        yield name or "the value", _plain(value, name)


def _plain(value: Any, name: str) -> str:
    try:
        return json.dumps(value)
    except TypeError as error:
        raise ConfigError(
            f"{name or 'the value'} is a {type(value).__name__}: only tensors and plain values in "
            "mappings and lists can be compared"
        ) from error


def _hash(tensor: Tensor, name: str) -> str:
    if is_dtensor(tensor):
        raise ConfigError(
            f"{name or 'the tensor'} is sharded: each rank holds another part on purpose. Compare "
            "tensor.full_tensor(), or what was computed from it"
        )
    found = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    found.update(as_bytes(tensor.cpu()).numpy().data)
    return found.hexdigest()
