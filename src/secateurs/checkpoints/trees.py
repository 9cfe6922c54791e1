"""Nested state as JSON and tensors, and back: exact, typed, no pickle.

    flatten(state) -> plain, tensors        restore(plain, tensors) -> state

Values are None, bool, int, float (inf, nan and -0.0 too), str, list, tuple, dict, tensors, and
numpy arrays and numbers. A tensor that stands at several places is stored once, and is one again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import ConfigError, FileFormatError

__all__ = ["flatten", "restore"]

FIX = "convert it, e.g. to a number, a text or a tensor, or leave it out"


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """What `json.dumps` takes, and the tensors that it names, on their device.

    Raises:
        ConfigError: a value of another type; the message says where it stands.

    Example:
        >>> flatten({"step": 3, "betas": (0.9, float("inf"))})[0]
        {'dict': {'step': 3, 'betas': {'tuple': [0.9, {'float': 'inf'}]}}}
    """
    writer = _Writer()
    try:
        return writer.plain(state, ""), writer.tensors
    except RecursionError as error:
        raise ConfigError("the state is nested too deeply, or holds itself") from error


def restore(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`.

    Raises:
        FileFormatError: this is not what `flatten` gives.
    """
    try:
        return _restored(plain, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"the state is not what was written: {error!r}") from error


class _Writer:
    """Collects the tensors on the way."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}

    def plain(self, value: Any, where: str) -> Any:
        """One value; `where` is its path, for names and messages."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, Tensor):
            return {"tensor": self.named(value, where)}
        if isinstance(value, (np.ndarray, np.generic)):
            return self.numpy(value, where)
        if type(value) is list:
            return self.items(value, where)
        if type(value) in (tuple, torch.Size):
            return {"tuple": self.items(value, where)}
        if isinstance(value, dict):
            return self.mapping(value, where)
        raise ConfigError(
            f"{where or 'the state'}: a {type(value).__name__} cannot be saved; {FIX}"
        )

    def items(self, values: Any, where: str) -> list[Any]:
        return [self.plain(value, f"{where}.{i}") for i, value in enumerate(values)]

    def mapping(self, values: Mapping[Any, Any], where: str) -> dict[str, Any]:
        under = f"{where}." if where else ""
        if all(type(key) is str for key in values):
            return {"dict": {k: self.plain(v, f"{under}{k}") for k, v in values.items()}}
        pairs = [
            [self.plain(k, f"{under}key"), self.plain(v, f"{under}{k}")] for k, v in values.items()
        ]
        return {"pairs": pairs}

    def numpy(self, value: Any, where: str) -> dict[str, Any]:
        array = np.array(value)  # a copy in the byte order of the machine, which torch can write to
        try:
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        except TypeError as error:
            raise ConfigError(f"{where}: numpy {array.dtype} cannot be saved; {FIX}") from error
        kind = "array" if isinstance(value, np.ndarray) else "number"
        return {kind: self.named(tensor, where)}

    def named(self, tensor: Tensor, where: str) -> str:
        """The name that a tensor is stored under."""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            what = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else "sparse"
            raise ConfigError(f"{where or 'the state'}: a {what} tensor cannot be saved; {FIX}")
        if id(tensor) not in self.names:
            name = where or "state"
            if name.startswith("__"):  # such names are the file's own
                name = f"'{name}"
            while name in self.tensors:  # keys with dots in them may meet
                name += "'"
            self.names[id(tensor)], self.tensors[name] = name, tensor
        return self.names[id(tensor)]


def _restored(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_restored(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    return _KINDS[kind](value, tensors)


_KINDS: Mapping[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "float": lambda text, _: float(text),
    "tuple": lambda items, tensors: tuple(_restored(item, tensors) for item in items),
    "dict": lambda items, tensors: {k: _restored(v, tensors) for k, v in items.items()},
    "pairs": lambda items, tensors: {
        _restored(k, tensors): _restored(v, tensors) for k, v in items
    },
    "tensor": lambda name, tensors: tensors[name],
    "array": lambda name, tensors: tensors[name].numpy(),
    "number": lambda name, tensors: tensors[name].numpy()[()],
}
