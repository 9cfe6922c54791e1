"""How to prune before training, and how to look for a ticket: what a recipe can say of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateurs.tickets.initial import check_at_init
from secateurs.tickets.lottery import Reset, check_search

__all__ = ["AtInit", "TicketSearch"]


@dataclass(frozen=True)
class AtInit:
    """What `prune_at_init` is to do; fields as there.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> AtInit("synflow").iterations is None  # 100 of them
        True
    """

    method: str = "snip"
    iterations: int | None = None
    batches_per_iteration: int | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_at_init(self.method, self.iterations, self.batches_per_iteration)


@dataclass(frozen=True)
class TicketSearch:
    """What `find_ticket` is to do; fields as there.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> TicketSearch(rounds=5, rewind=0.1).reset
        'weights'
    """

    rounds: int = 3
    rewind: int | float = 0
    reset: Reset = "weights"

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_search(self.rounds, self.rewind, self.reset)
