"""Finished curves on disk: kept target by target, used again only for the same question."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateurs.allocation.curves import Curve
from secateurs.errors import ConfigError, FileFormatError
from secateurs.masks import named_tensors
from secateurs.sensitivities.found import MeasuredSensitivity
from secateurs.tensorfiles import as_bytes

__all__ = ["Cache", "order_mark", "weights_mark"]

FORMAT = 1
SAME = 1e-4
"""Relative difference of the uncut loss or metric up to which two runs saw the same: kernels on
another number of threads add up in another order."""


class Cache:
    """The curves that a file holds, and those that are added: each is on disk at once.

    The file is the JSON of a `MeasuredSensitivity` with `made_by` and `orders` besides.

    Args:
        path: of the file; None keeps nothing.
        made_by: what the curves depend on: plain values, compared one by one.
        dense: value of the uncut model.

    Raises:
        FileFormatError: the file is something else; it is left alone.
    """

    def __init__(self, path: str | Path | None, made_by: Mapping[str, Any], dense: float) -> None:
        self._path = None if path is None else Path(path)
        self._made_by, self._dense = {"format": FORMAT, **made_by}, dense
        self._before: MeasuredSensitivity | None = None
        self._orders: dict[str, str] = {}
        self.notes: list[str] = []
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            before, orders = data["made_by"], data["orders"]
            found = MeasuredSensitivity.from_dict(data)
            differs = [k for k, v in self._made_by.items() if before.get(k) != v]
            orders = {str(k): str(v) for k, v in orders.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise FileFormatError(
                f"{path} holds no sensitivity curves: {type(error).__name__}: "
                f"{str(error).splitlines()[0]}. Delete it, or choose another cache"
            ) from error
        if not math.isclose(found.dense, self._dense, rel_tol=SAME, abs_tol=1e-12):
            differs.append(f"uncut value ({found.dense:.6g}, now {self._dense:.6g})")
        if differs:
            self.notes.append(
                f"{path} was made with another {', '.join(differs)}: all targets are measured again"
            )
        else:
            self._before, self._orders = found, orders

    def get(
        self, name: str, order: str, removed: tuple[float, ...]
    ) -> tuple[Curve, tuple[float, ...] | None] | None:
        """The curve of a target with its standard errors, if the same cuts are in the file."""
        if self._before is None or name not in self._before.curves:
            return None
        curve = self._before.curves[name]
        if self._orders.get(name) != order or curve.removed != removed:
            what = "fractions" if curve.removed != removed else "order of its units"
            self.notes.append(f"{name} is measured again: {self._path} holds it for another {what}")
            return None
        return curve, self._before.errors.get(name)

    def put(self, found: MeasuredSensitivity, orders: Mapping[str, str]) -> None:
        """Write all curves so far, beside those of the file that may still be asked for.

        A kill in the middle leaves the earlier file.
        """
        if self._path is None:
            return
        data = {**found.to_dict(), "made_by": self._made_by}
        data["orders"] = {**self._orders, **orders}
        if self._before is not None:
            before = self._before.to_dict()
            data |= {key: {**before[key], **data[key]} for key in ("curves", "units", "errors")}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, self._path)


def weights_mark(model: nn.Module) -> str:
    """A hash of every parameter and buffer, with its name, type and shape."""
    found = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(as_bytes(tensor.cpu()).numpy().data)
    return found.hexdigest()[:32]


def order_mark(order: Tensor) -> str:
    """A hash of the order in which units go."""
    return hashlib.sha256(as_bytes(order.cpu()).numpy().data).hexdigest()[:16]
