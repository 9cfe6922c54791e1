"""The processes of a group, and what they tell each other.

    ranks_of(group) -> Ranks     rank, size, gather, sum, join, first, either, agreed

`Ranks` of a single process do nothing and need no process group, so that the same code runs with
one process and with many. Tensors stay where they are (gloo: CPU, nccl: GPU).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateurs import errors
from secateurs.errors import ConfigError, PruningError, RankError
from secateurs.tensorfiles import as_bytes

__all__ = ["Group", "Ranks", "is_lost", "on_first", "ranks_of"]

Group = dist.ProcessGroup | Literal["world"] | None
"""Which processes work together: a group, "world" for all, None for this process alone."""

T = TypeVar("T")
SIGNS = (
    "gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe",
    "processgroup", "process group", "tcpstore",
)  # fmt: skip
"""What torch writes when a collective fails, of which there is no class of its own."""


def ranks_of(group: Group) -> Ranks:
    """The processes of a group; those of None are this one alone.

    Raises:
        ConfigError: there is no process group, this process is not in it, or it is no group.

    Example:
        >>> ranks_of(None).size
        1
    """
    if group is None:
        return Ranks(None)
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"group={group!r} needs a process group: start the script with torchrun and call "
            "torch.distributed.init_process_group() first, or leave group away"
        )
    if isinstance(group, str):
        if group != "world":
            raise ConfigError(f'group must be "world", a ProcessGroup or None, got {group!r}')
        return Ranks(dist.group.WORLD)
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ConfigError(
            f'group must be "world", a ProcessGroup that holds this process, or None, got {group!r}'
        )
    return Ranks(group)


class Ranks:
    """The processes that work together.

    Every method is called by all of them, in the same order, or none of them gets on.

    Attributes:
        rank: number of this process in the group, from 0.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """What each rank has given, in the order of the ranks. Small values only: it pickles."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.named():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def first(self, value: T) -> T:
        """What rank 0 has given."""
        return self.of(0, value)

    def of(self, rank: int, value: T) -> T:
        """What one rank has given; the others' values are not looked at."""
        if self.size == 1:
            return value
        held: list[Any] = [value if self.rank == rank else None]
        assert self.group is not None
        with self.named():
            dist.broadcast_object_list(
                held, src=dist.get_global_rank(self.group, rank), group=self.group
            )
        found: T = held[0]
        return found

    def copy_first_(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of rank 0."""
        if self.size > 1:
            assert self.group is not None
            with self.named(), torch.no_grad():
                given = self._placed(tensor.detach())
                dist.broadcast(given, dist.get_global_rank(self.group, 0), group=self.group)
                if given is not tensor:
                    tensor.copy_(given)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each; the one that is given may be changed."""
        if self.size == 1:
            return tensor
        with self.named():
            given = self._placed(tensor.contiguous())
            dist.all_reduce(given, group=self.group)
        return given.to(tensor.device)

    def add_up(self, *numbers: float) -> list[float]:
        """The sums of some numbers over the ranks."""
        total: list[float] = self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return total

    def either(self, *flags: bool) -> list[bool]:
        """Which of some flags are set on any rank."""
        return [n > 0 for n in self.add_up(*flags)] if self.size > 1 else list(flags)

    def join(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """The rows (n, ...) of all ranks below each other, in the order of the ranks.

        Args:
            rows: of one type, and of one shape behind the first dimension.
            lengths: how many each rank gives.
        """
        if self.size == 1:
            return rows
        flat = as_bytes(rows)
        width = math.prod(rows.shape[1:]) * rows.element_size()
        padded = torch.zeros(max(lengths) * width, dtype=torch.uint8, device=rows.device)
        padded[: len(flat)] = flat
        padded = self._placed(padded)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self.named():
            dist.all_gather(parts, padded, group=self.group)
        held = [part[: n * width] for part, n in zip(parts, lengths, strict=True)]
        joined = torch.cat(held).to(rows.device).view(rows.dtype)
        return joined.reshape(sum(lengths), *rows.shape[1:])

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather(None)

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """Run the body; if it fails on one rank, it fails on all of them, and no rank waits.

        A rank whose own body was fine raises the error of the first that failed, by the same class
        where it is one of secateurs. What happens inside must not wait for other ranks half-way.

        Args:
            what: is done in the body, for the error.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and not is_lost(error):
                self.tell(what, error)
            raise
        self.tell(what, None)

    def tell(self, what: str, error: Exception | None) -> None:
        """Tell the other ranks how it went; raise the first error of another rank.

        Raises:
            RankError, PruningError: see `agreed`; not where `error` is this rank's own.
        """
        if self.size == 1 or self.add_up(error is not None) == [0.0]:
            return
        mine = None if error is None else (type(error).__name__, str(error))
        told = self.gather(mine)
        failed = [rank for rank, one in enumerate(told) if one is not None]
        if not failed or error is not None:
            return
        name, text = told[failed[0]] or ("", "")
        kind = getattr(errors, name, RankError)
        known = isinstance(kind, type) and issubclass(kind, PruningError)
        said = text if known and kind is not RankError else f"{name}: {text}"
        others = f" (and {len(failed) - 1} others)" if len(failed) > 1 else ""
        raise (kind if known else RankError)(
            f"{what} failed on rank {failed[0]}{others} of {self.size}: {said}"
        )

    @contextmanager
    def named(self) -> Iterator[None]:
        """Turn what torch raises when a process is gone into one clear error.

        Raises:
            RankError: another process is gone, or did not come within the timeout of the group.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, RankError) or not is_lost(error):
                raise
            text = " ".join(str(_root(error)).split())[:200]
            raise RankError(
                f"rank {self.rank} of {self.size}: another process of the group is gone, or did "
                "not come within the timeout of the group. All must end and start again, from the "
                f"last checkpoint if there is one (torchrun does so with --max-restarts). {text}",
                lost=True,
            ) from error

    def _placed(self, tensor: Tensor) -> Tensor:
        """On a device that the group can send from."""
        assert self.group is not None
        if dist.get_backend(self.group) == "nccl" and tensor.device.type == "cpu":
            return tensor.to(torch.device("cuda", torch.cuda.current_device()))
        return tensor


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone, so that nothing can be told to it."""
    if isinstance(error, RankError):
        return error.lost
    root = _root(error)
    if isinstance(root, RankError):
        return root.lost
    if not isinstance(root, RuntimeError) or isinstance(root, PruningError):
        return False
    text = str(root).lower()
    return isinstance(root, dist.DistError) or any(sign in text for sign in SIGNS)


def _root(error: BaseException) -> BaseException:
    """What was raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def on_first(group: Group, function: Callable[[], T], what: str = "the work of rank 0") -> T | None:
    """What a function returns on rank 0, None on the others, which wait until it is done.

    Use it to save, shrink or report once. An error on rank 0 is raised on all ranks.

    Example:
        >>> on_first(None, lambda: "saved")
        'saved'
    """
    ranks = ranks_of(group)
    with ranks.agreed(what):
        return function() if ranks.rank == 0 else None


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor lives in parts on several ranks, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def order_of_first(told: Sequence[Sequence[str]]) -> list[str]:
    """All names, each where it is first met: the same order on every rank.

    Example:
        >>> order_of_first([["a", "c"], ["b", "a"]])
        ['a', 'c', 'b']
    """
    return list(dict.fromkeys(name for names in told for name in names))
