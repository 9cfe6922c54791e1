"""Arrays that are made when they are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

__all__ = ["OnDemand"]

A = TypeVar("A")


class OnDemand(Mapping[str, A], Generic[A]):
    """A mapping that makes its values when they are read, and keeps some of them.

    Args:
        names: the keys.
        make: name -> value.
        keep: names whose values are kept once they are made; others are made every time.

    Example:
        >>> squares = OnDemand(["2", "3"], lambda name: int(name) ** 2)
        >>> squares["3"], list(squares), len(squares)
        (9, ['2', '3'], 2)
    """

    def __init__(
        self, names: Iterable[str], make: Callable[[str], A], keep: Collection[str] = ()
    ) -> None:
        self._names = dict.fromkeys(names)
        self._make, self._keep = make, keep
        self._made: dict[str, A] = {}

    def __getitem__(self, name: str) -> A:
        if name in self._made:
            return self._made[name]
        if name not in self._names:
            raise KeyError(name)
        value = self._make(name)
        if name in self._keep:
            self._made[name] = value
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
