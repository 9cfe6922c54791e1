"""What a front end hands to the engine: one flat list of operator calls, whoever captured it.

A `Tape` holds `Value`s (every tensor of one run) and `Record`s (every operator call, in execution
order, under one canonical operator name: `aten.add_.Tensor` and `Tensor.__iadd__` are both "add").
Sizes are plain integers: those of the example inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["Record", "Ref", "Tape", "Value", "refs"]


@dataclass(frozen=True)
class Ref:
    """A tensor argument of a record: the id of a value."""

    id: int


@dataclass(frozen=True)
class Value:
    """One tensor of the run.

    Attributes:
        id: position in `Tape.values`.
        shape: sizes for the example inputs.
        dtype: element type.
        source: "input", "parameter", "buffer", "op", "attribute" (a tensor that a module holds as
            neither) or "constant" (one that no operator made).
        name: fully qualified name of a parameter or buffer, else a readable label.
    """

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Literal["input", "parameter", "buffer", "attribute", "constant", "op"]
    name: str


@dataclass(frozen=True)
class Record:
    """One operator call.

    Attributes:
        op: canonical operator name ("linear", "add", "lstm").
        fn: the callable; may be run on other tensors of the same shapes.
        args, kwargs: tensors are `Ref`s, symbolic sizes are their values for the example.
        outputs: ids of the output values.
        inplace: whether the first argument is overwritten.
        pointwise: whether the operator is tagged as elementwise with broadcasting.
        module: path of the innermost module that made the call, "" for the model itself.
        call: 0 for that module's first call, 1 for its second, ...
        line: the user's source line, when known.
        name: readable label, unique in the tape.
        index: position in the tape.
    """

    op: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    inplace: bool = False
    pointwise: bool = False
    module: str = ""
    call: int = 0
    line: str = ""
    name: str = ""
    index: int = 0

    @property
    def where(self) -> str:
        """For messages: operator, module and line."""
        place = f" in {self.module}" if self.module else ""
        return f"{self.op}{place}" + (f" ({self.line})" if self.line else "")


@dataclass
class Tape:
    """One captured run of a model."""

    values: list[Value]
    records: list[Record]
    outputs: tuple[int, ...]
    front_end: str
    batch_size: int = 1

    def named(self) -> dict[str, Value]:
        """Parameters and buffers by name."""
        return {v.name: v for v in self.values if v.source in ("parameter", "buffer")}


def refs(tree: Any) -> Iterator[Ref]:
    """All `Ref`s in nested arguments, in order."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from refs(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from refs(item)
