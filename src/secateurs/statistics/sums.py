"""What a pass over the batches leaves behind: sums over samples, and rows that are joined.

Every statistic is a sum over samples with its weight, or a set of rows with one row for a sample.
Both merge exactly: two halves of the data, a pass that was interrupted and resumed, or several
processes give what one pass over everything gives (up to rounding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from secateurs.distributed import Ranks
from secateurs.errors import ConfigError, RankError

__all__ = ["Sums"]

TOGETHER = 1 << 22
"""Elements that are sent to the other processes at once."""


Part = tuple[int, tuple[int, ...], torch.dtype]
Signature = dict[tuple[str, str], Part]
"""(kind, name) -> rows, shape and type of what one rank holds."""


class Sums:
    """Named tensors that only grow by addition (`add`) or by concatenation (`append`).

    Example:
        >>> left, right = Sums(), Sums()
        >>> left.add("act", torch.tensor([1.0, 2.0]), weight=3)
        >>> right.add("act", torch.tensor([1.0, 0.0]))
        >>> left.merge(right)
        >>> left["act"]
        tensor([4., 6.])
    """

    def __init__(self) -> None:
        self._added: dict[str, Tensor] = {}
        self._joined: dict[str, list[Tensor]] = {}
        self._sealed: set[str] = set()

    def add(self, key: str, value: Tensor, weight: float = 1.0) -> None:
        """Add `weight * value`; half precision is summed in float32."""
        assert key not in self._sealed, f"{key} is of all ranks already"
        half = value.dtype in (torch.float16, torch.bfloat16)
        have = self._added.get(key)
        if have is None:
            self._added[key] = (value.detach().float() if half else value.detach()) * weight
        else:
            have.add_(value.detach(), alpha=weight)

    def add_product(self, key: str, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """Add `weight * a * b` without a temporary product."""
        have = self._added.get(key)
        if have is None or have.dtype != a.dtype:
            self.add(key, a.detach() * b.detach(), weight)
        else:
            have.addcmul_(a.detach(), b.detach(), value=weight)

    def append(self, key: str, rows: Tensor) -> None:
        """Join rows (n, ...) below those that are held."""
        assert key not in self._sealed, f"{key} is of all ranks already"
        self._joined.setdefault(key, []).append(rows.detach())

    def __getitem__(self, key: str) -> Tensor:
        """The sum, or all rows, under that name."""
        if key in self._added:
            return self._added[key]
        parts = self._joined[key]
        if len(parts) > 1:
            self._joined[key] = parts = [torch.cat(parts)]
        return parts[0]

    def __contains__(self, key: str) -> bool:
        return key in self._added or key in self._joined

    def __iter__(self) -> Iterator[str]:
        yield from self._added
        yield from self._joined

    def n_rows(self, key: str) -> int:
        """Rows held under that name; 0 for none."""
        return sum(len(part) for part in self._joined.get(key, []))

    def under(self, prefix: str) -> View:
        """The same store, with every name behind a prefix."""
        return View(self, prefix)

    def merge(self, other: Sums) -> None:
        """Take in what another pass over other samples has left."""
        for key, value in other._added.items():
            self.add(key, value.clone())
        for key, parts in other._joined.items():
            self._joined.setdefault(key, []).extend(parts)

    def merge_ranks(self, ranks: Ranks, device: torch.device) -> None:
        """Take in what all other ranks have left since the last time; all of them call it.

        Afterwards every rank holds the same: sums over all ranks, rows in the order of the ranks.

        Args:
            ranks: that work together.
            device: for what this rank has not seen.

        Raises:
            RankError: a sum or a row differs in shape or type between ranks.
        """
        mine: Signature = {
            ("sum", key): (0, tuple(value.shape), value.dtype)
            for key, value in self._added.items()
            if key not in self._sealed
        }
        for key in self._joined:
            if key not in self._sealed:
                mine["rows", key] = (len(self[key]), tuple(self[key].shape[1:]), self[key].dtype)
        told = ranks.gather(mine)
        every = {name: part for one in told for name, part in one.items()}
        for (kind, key), (_, shape, dtype) in every.items():
            if any(one.get((kind, key), (0, shape, dtype))[1:] != (shape, dtype) for one in told):
                raise RankError(
                    f"the {kind} of {key} differ in shape or type between ranks; give all of them "
                    "the same model and batches of one kind"
                )
        self._sum_over(ranks, {k: v for (kind, k), v in every.items() if kind == "sum"}, device)
        for kind, key in every:
            if kind == "rows":
                _, shape, dtype = every[kind, key]
                empty = torch.zeros((0, *shape), dtype=dtype, device=device)
                lengths = [one.get((kind, key), (0, (), dtype))[0] for one in told]
                rows = self[key] if key in self._joined else empty
                self._joined[key] = [ranks.join(rows, lengths)]
        self._sealed |= {key for _, key in every}

    def _sum_over(self, ranks: Ranks, parts: Mapping[str, Part], device: torch.device) -> None:
        """Add up these sums over the ranks, many small ones at once."""
        for dtype in dict.fromkeys(part[2] for part in parts.values()):
            bucket: list[str] = []
            names = [key for key, part in parts.items() if part[2] == dtype]
            for key in names:
                if key not in self._added:
                    self._added[key] = torch.zeros(parts[key][1], dtype=dtype, device=device)
                bucket.append(key)
                size = sum(self._added[k].numel() for k in bucket)
                if size < TOGETHER and key != names[-1]:
                    continue
                flat = torch.cat([self._added[k].reshape(-1).to(device) for k in bucket])
                sizes = [self._added[k].numel() for k in bucket]
                for k, line in zip(bucket, torch.split(ranks.sum(flat), sizes), strict=True):
                    held = self._added[k]
                    self._added[k] = line.view(held.shape).to(held.device)
                bucket = []

    def state(self) -> dict[str, Tensor]:
        """All tensors, to be saved; rows are marked by their name."""
        added = {f"sum:{key}": value for key, value in self._added.items()}
        return added | {f"rows:{key}": self[key] for key in self._joined}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace everything by what `state` returned.

        Raises:
            ConfigError: a name that `state` never writes.
        """
        added: dict[str, Tensor] = {}
        joined: dict[str, list[Tensor]] = {}
        for name, value in state.items():
            kind, _, key = name.partition(":")
            if kind == "sum":
                added[key] = value.clone()
            elif kind == "rows":
                joined[key] = [value.clone()]
            else:
                raise ConfigError(f"{name!r} is no sum and no rows of a scoring pass")
        self._added, self._joined = added, joined


class View:
    """A part of a `Sums`: what one collector writes."""

    def __init__(self, sums: Sums, prefix: str) -> None:
        self._sums, self._prefix = sums, prefix

    def add(self, key: str, value: Tensor, weight: float = 1.0) -> None:
        """As `Sums.add`."""
        self._sums.add(self._prefix + key, value, weight)

    def add_product(self, key: str, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """As `Sums.add_product`."""
        self._sums.add_product(self._prefix + key, a, b, weight)

    def append(self, key: str, rows: Tensor) -> None:
        """As `Sums.append`."""
        self._sums.append(self._prefix + key, rows)

    def __getitem__(self, key: str) -> Tensor:
        return self._sums[self._prefix + key]

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._sums

    def n_rows(self, key: str) -> int:
        """As `Sums.n_rows`."""
        return self._sums.n_rows(self._prefix + key)
