"""What a cut does not reach is recalled: operators that see no changed tensor give what they gave.

A `Recording` of one run of a batch with the uncut model knows which operators saw what. When the
weights of one target change, a `Replay` of it computes those operators again that see a changed
tensor, directly or through others, and recalls the rest: the network before the target, and what
runs beside it. What it must not do is guess: a run that does anything else than the recorded one,
or whose course depends on a changed value, is refused (`CannotReplay`), and is then made in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CannotReplay", "Recording", "Replay"]

SMALL = 64
"""Elements of a constant that is made anew in every run, up to which its values are compared."""

Storages = frozenset[int]


class CannotReplay(Exception):
    """Never leaves this room: the caller makes the run in full instead."""


@dataclass(eq=False)
class Step:
    """One operator call of a recorded run.

    Attributes:
        func: the operator.
        inputs: what it was called with, flat.
        out: what it gave.
        reads, writes: memory of the tensors it was called with, and of those it changed in place.
        makes: memory that is new.
        view: whether it only gives another look at its input.
        numbers: whether it gives anything else than tensors.
    """

    func: Any
    inputs: list[Any]
    out: Any
    reads: Storages
    writes: Storages
    makes: Storages
    view: bool
    numbers: bool


def _storage(tensor: Tensor) -> int:
    """Two tensors share memory when, and only when, this is equal."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _storages(leaves: Iterable[Any]) -> Storages:
    return frozenset([_storage(x) for x in leaves if isinstance(x, Tensor)])


def _leaves(tree: Iterable[Any]) -> list[Any]:
    """What operators are called with and give: nothing is nested but in lists and tuples."""
    found: list[Any] = []
    for part in tree:
        if isinstance(part, (list, tuple)):
            found.extend(_leaves(part))
        else:
            found.append(part)
    return found


@cache
def _effects(func: Any) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Whether the operator gives another look at the memory of its input (a view), and which
    arguments it changes in place, as (position, name)."""
    returns = [r.alias_info for r in func._schema.returns]
    view = any(k is not None and not k.is_write for k in returns)
    infos = [(i, a.name, a.alias_info) for i, a in enumerate(func._schema.arguments)]
    return view, tuple((i, n) for i, n, k in infos if k is not None and k.is_write)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the run inside it, which computes as usual.

    Args:
        limit: bytes of values that may be kept; a run that has more is not recorded.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit
        self.steps: list[Step] = []
        self.n_bytes = 0

    @property
    def complete(self) -> bool:
        """Whether the run fitted into the limit."""
        return self.n_bytes <= self._limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.complete:
            return out
        view, changed = _effects(func)
        inputs, outputs = _leaves((args, *kwargs.items())), _leaves((out,))
        reads = _storages(inputs)
        makes = _storages(outputs) - reads
        given = [args[i] if i < len(args) else kwargs.get(name) for i, name in changed]
        numbers = any(not isinstance(x, Tensor) for x in outputs if x is not None)
        self.steps.append(
            Step(func, inputs, out, reads, _storages(_leaves(given)), makes, view, numbers)
        )
        if makes:
            self.n_bytes += sum(x.nbytes for x in outputs if isinstance(x, Tensor))
        if self.n_bytes > self._limit:
            self.steps.clear()
        return out


class Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes runs out of a recording, one after another: each inside `with`, then `check_end`.

    Args:
        recording: of the same batch.
        changed: tensors that may differ from the recorded run.

    Raises:
        CannotReplay: what the run does depends on a changed value, it changes something that is
            older than itself, or nothing of it can be recalled; and inside `with`, as soon as it
            does something else.
    """

    def __init__(self, recording: Recording, changed: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps = recording.steps
        self._again, self._unsettled = _needed(self._steps, _storages(changed))
        self._next = 0

    def __enter__(self) -> Replay:
        self._next = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._next >= len(self._steps):
            raise CannotReplay("the run is longer than the recorded one")
        step, again = self._steps[self._next], self._again[self._next]
        self._next += 1
        if func is not step.func:
            raise CannotReplay(f"the run calls {func} where the recorded one calls {step.func}")
        if again or step.view:  # torch wants a view to be new, and it costs nothing
            return func(*args, **kwargs)
        inputs = _leaves((args, *kwargs.items()))
        if len(inputs) != len(step.inputs) or not all(map(self._same, inputs, step.inputs)):
            raise CannotReplay(f"{func} is called with something else than in the recorded run")
        return step.out

    def _same(self, now: Any, before: Any) -> bool:
        if now is before:
            return True
        if not isinstance(now, Tensor) or not isinstance(before, Tensor):
            return type(now) is type(before) and bool(now == before)
        alike = now.shape == before.shape and now.dtype == before.dtype
        if _storage(before) in self._unsettled:  # made again, from the same values
            return alike
        if _storage(now) == _storage(before):
            place = now.stride(), now.storage_offset()
            return alike and place == (before.stride(), before.storage_offset())
        return alike and now.numel() <= SMALL and torch.equal(now, before)

    def check_end(self) -> None:
        """Raise CannotReplay unless the whole recorded run was made."""
        if self._next != len(self._steps):
            raise CannotReplay("the run is shorter than the recorded one")


def _needed(steps: Sequence[Step], changed: Storages) -> tuple[list[bool], set[int]]:
    """Which steps must be computed again, and memory whose recorded content is not to be trusted.

    A memory that is written by a repeated step, or after one reads it, does not hold any more what
    that step needs: all steps that make or write it are repeated too.
    """
    reached, again = set(changed), []
    for step in steps:
        again.append(not reached.isdisjoint(step.reads))
        if again[-1]:
            reached |= step.makes | step.writes
            if step.numbers:
                raise CannotReplay(f"{step.func} reads a changed value into Python")
    last = {s: i for i, step in enumerate(steps) for s in step.writes}
    unsettled: set[int] = set()
    while True:
        found = set(unsettled)
        for i, step in enumerate(steps):
            if again[i] and not step.view:  # a view does not look at what it shows
                found |= step.writes | {s for s in step.reads if last.get(s, -1) > i}
        if found == unsettled:
            break
        unsettled = found
        again = [a or not found.isdisjoint(s.makes | s.writes)
                 for a, s in zip(again, steps, strict=True)]  # fmt: skip
    made: set[int] = set()
    for step in steps:
        if not step.writes <= made:
            raise CannotReplay("the run changes something that is older than itself")
        made |= step.makes
    if all(a or s.view for a, s in zip(again, steps, strict=True)):
        raise CannotReplay("every operator is reached by the cut")
    return again, unsettled
