"""The test split under lock: it is read once, at the end, and never occurs in other data.

locked = LockedSplit(batches)     hand `locked` on wherever the test split is expected
use = locked.unlock("final figures")
with use: metric(model, locked)   the only place where it can be read
use.close()                       and never again
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import torch

from secateurs.batches import iterate, tensors
from secateurs.errors import DataError
from secateurs.tensorfiles import as_bytes
from secateurs.types import Batch, Batches

__all__ = ["LockedSplit", "Use", "check_copies", "copies", "sample_keys"]

SHOWN = 5


class LockedSplit:
    """A split that raises when it is read before it is unlocked, and after its single use.

    It has no `dataset` and no items: iterating is the only way to its samples.

    Args:
        batches: what is guarded.
        name: of the split, for messages.

    Example:
        >>> locked = LockedSplit([(torch.zeros(1, 2), torch.zeros(1))])
        >>> with locked.unlock("final figures") as use:
        ...     len(list(locked))
        1
        >>> use.close()
        >>> locked.unlock("a second look")
        Traceback (most recent call last):
        secateurs.errors.DataError: the test split is read once, and 'final figures' did: \
'a second look' cannot read it again
    """

    def __init__(self, batches: Batches, name: str = "test") -> None:
        self._batches = batches
        self.name = name
        self.use: Use | None = None
        self.tried: list[str] = []

    def __iter__(self) -> Iterator[Batch]:
        if self.use is None or not self.use.open:
            who = _reader(2)
            self.tried.append(who)
            when = (
                "before the choice was made" if self.use is None
                else f"outside its single use by {self.use.who!r}"
            )  # fmt: skip
            raise DataError(
                f"the {self.name} split was touched {when}, by {who}. It is read once, at the "
                "end: judge by training and validation data only"
            )
        return iter(self._batches)

    def unlock(self, who: str) -> Use:
        """The single use of the split; give it a name.

        Raises:
            DataError: it was used before.
        """
        if self.use is not None:
            raise DataError(
                f"the {self.name} split is read once, and {self.use.who!r} did: {who!r} cannot "
                "read it again"
            )
        self.use = Use(who)
        return self.use


class Use:
    """The single use of a `LockedSplit`: open inside `with`, as often as needed until `close`."""

    def __init__(self, who: str) -> None:
        self.who, self.open, self._closed = who, False, False

    def __enter__(self) -> Use:
        if self._closed:
            raise DataError(f"the use of the split by {self.who!r} is over")
        self.open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.open = False

    def close(self) -> None:
        """End it for good."""
        self.open, self._closed = False, True


def _reader(depth: int) -> str:
    """The function that reads, past the helpers of `secateurs.batches`: "accuracy (base.py:9)"."""
    frame = sys._getframe(depth)
    helper = iterate.__code__.co_filename
    while frame.f_back is not None and frame.f_code.co_filename == helper:
        frame = frame.f_back
    file = frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
    return f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})"


def sample_keys(batches: Batches) -> list[bytes]:
    """A hash of the inputs of each sample, in order; equal where the inputs are equal.

    Targets do not count: a test image in the training data is a leak under any label.

    Raises:
        DataError: a batch is no pair, or there is none.
    """
    keys = []
    for inputs, _ in iterate(batches, torch.device("cpu")):
        leaves = [t for t in tensors(inputs) if t.dim()]
        n = leaves[0].shape[0] if leaves else 0
        rows = [t for t in leaves if t.shape[0] == n]
        marks = [f"{t.dtype}{tuple(t.shape[1:])}".encode() for t in rows]
        data = [as_bytes(t).view(n, -1).numpy() if t.numel() else None for t in rows]
        for i in range(n):
            digest = hashlib.blake2b(digest_size=16)
            for mark, block in zip(marks, data, strict=True):
                digest.update(mark)
                if block is not None:
                    digest.update(block[i].tobytes())
            keys.append(digest.digest())
    return keys


def copies(keys: Sequence[bytes], others: Sequence[bytes]) -> list[int]:
    """Positions of `keys` that occur among `others`.

    Example:
        >>> copies([b"a", b"b", b"c"], [b"c", b"a"])
        [0, 2]
    """
    known = set(others)
    return [i for i, key in enumerate(keys) if key in known]


def check_copies(
    test: Sequence[bytes], others: Mapping[str, Sequence[bytes]], *, allowed: bool = False
) -> tuple[str, ...]:
    """Refuse exact copies of test samples in other splits; or, if `allowed`, one note for each.

    Args:
        test: keys of the test split, from `sample_keys`.
        others: name of a split -> its keys.
        allowed: whether copies are only told.

    Raises:
        DataError: there are some; names how many, and the first positions.
    """
    found = []
    for name, keys in others.items():
        held = copies(test, keys)
        if held:
            there = copies(keys, [test[i] for i in held])
            found.append(
                f"{len(held)} of {len(test)} samples of the test split (numbers {_some(held)}) "
                f"occur in the {name} data too (there {_some(there)})"
            )
    if found and not allowed:
        raise DataError(
            "; ".join(found) + ". The final figures would be too good: take these samples out of "
            "one of the two, or, if the data really holds equal samples, write search.copies: note"
        )
    return tuple(found)


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return shown + (", ..." if len(numbers) > SHOWN else "")
