"""What a run must have in common with the one that left a checkpoint: its marks.

Marks are a nested mapping of plain values. Two runs with the same marks take the same steps.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.batches import tensors
from secateurs.checkpoints.randomness import generators_of, random_state, set_random_state
from secateurs.tensorfiles import as_bytes
from secateurs.types import Batches

__all__ = [
    "UNREPEATABLE",
    "Marks",
    "batch_mark",
    "data_marks",
    "differences",
    "plain",
    "tensor_mark",
    "versions",
]

Marks = Mapping[str, Any]
UNREPEATABLE = "differs each time that it is read"


def tensor_mark(named: Mapping[str, Tensor] | Iterable[Tensor]) -> str:
    """A text that changes with any name, shape, type or value.

    Example:
        >>> tensor_mark([torch.zeros(2)]) == tensor_mark([torch.zeros(2, 1)])
        False
    """
    items = named.items() if isinstance(named, Mapping) else (("", t) for t in named)
    found = hashlib.sha256()
    for name, tensor in items:
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(as_bytes(tensor.cpu()).numpy().data)
    return found.hexdigest()[:16]


def batch_mark(batches: Batches) -> str:
    """A text for the data: its length and its first batch, read under a fixed random state.

    It is read twice; data that draws from a random source of its own is `UNREPEATABLE`. The random
    states of caller and loader are as before.
    """
    first, again = (_first(batches) for _ in range(2))
    try:
        length = f"{len(batches)} batches"  # type: ignore[arg-type]
    except TypeError:
        length = "batches"
    return f"{length}, the first {first if first == again else UNREPEATABLE}"


def _first(batches: Batches) -> str:
    before = random_state(batches)
    try:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        for generator in generators_of(batches):
            generator.manual_seed(0)
        return tensor_mark(tensors(next(iter(batches), None)))
    finally:
        set_random_state(before, batches)


def data_marks(batches: Batches) -> dict[str, Any]:
    """What is known of data without reading it all."""
    return {"batches": batch_mark(batches), "generators": len(generators_of(batches))}


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {"torch": str(torch.__version__), "secateurs": version("secateurs")}


def plain(value: Any) -> Any:
    """A plain text or mapping for an option: dataclasses by their fields, functions by name."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def differences(before: Marks, now: Marks) -> list[str]:
    """One phrase for each mark that differs.

    Example:
        >>> differences({"stage": {"lr": 0.1, "epochs": 3}}, {"stage": {"lr": 0.2, "epochs": 3}})
        ['stage.lr was 0.1 and is 0.2']
    """
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    return [
        f"{name} was {_shown(old, name)} and is {_shown(new, name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _shown(marks: Marks, name: str) -> str:
    return repr(marks[name]) if name in marks else "not given"


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield where, value
        return
    for name, inner in items:
        yield from _leaves(inner, f"{where}.{name}" if where else str(name))
