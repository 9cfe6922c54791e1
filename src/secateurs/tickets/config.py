"""How to prune before training, and how to look for a ticket: what a recipe can say of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateurs.errors import ConfigError
from secateurs.tickets.initial import check_at_init
from secateurs.tickets.lottery import Reset, check_search

__all__ = ["AtInit", "TicketSearch"]


@dataclass(frozen=True)
class AtInit:
    """What `prune_at_init` is to do; fields as there, and what follows it.

    Args:
        reinitialise: after the cut all weights are drawn anew by `reinitialise_sparse_`, under the
            seed of the run. Those of linear layers, convolutions, recurrent layers and input
            projections of attention are scaled by the inputs that each unit has left; biases, norms
            and embeddings are drawn as their modules do it, and not scaled; a parameter of a module
            without `reset_parameters`, or computed from others, stays as it was, and a note in the
            report names it. The masks do not change: they were chosen for the first weights.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> AtInit("synflow").iterations is None  # 100 of them
        True
    """

    method: str = "snip"
    iterations: int | None = None
    batches_per_iteration: int | None = None
    reinitialise: bool = False

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_at_init(self.method, self.iterations, self.batches_per_iteration)
        if not isinstance(self.reinitialise, bool):
            raise ConfigError(f"reinitialise must be True or False, got {self.reinitialise!r}")


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
