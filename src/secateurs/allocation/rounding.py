"""Which counts a target may keep: `round_to`.

Convolution kernels on a CPU work on blocks of 16 channels, so an odd width costs as much as the
next multiple, or more. Everything else hardly cares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from secateurs.errors import ConfigError, choose
from secateurs.types import KINDS, Graph

__all__ = ["AUTO_FROM", "AUTO_MULTIPLE", "RoundTo", "Rounding", "check_round_to", "roundings"]

RoundTo = int | str | Mapping[str, int]
"""A multiple for all targets, one for each kind, or "auto"."""

AUTO_MULTIPLE = 16
"""With "auto", channels on the CPU are kept in multiples of this."""
AUTO_FROM = 128
"""With "auto", targets with fewer units are not rounded: too few multiples to choose from."""


@dataclass(frozen=True)
class Rounding:
    """The counts that are allowed: multiples of `multiple`, and all below `free_below`.

    Example:
        >>> auto = Rounding(16, free_below=16)
        >>> [auto.down(n) for n in (5, 16, 40)], [auto.up(n) for n in (5, 17, 40)]
        ([5, 16, 32], [5, 32, 48])
    """

    multiple: int = 1
    free_below: int = 0

    def down(self, count: float) -> int:
        """The largest allowed count that is not above `count`."""
        whole = int(count)
        return whole if whole < self.free_below else whole // self.multiple * self.multiple

    def up(self, count: int) -> int:
        """The smallest allowed count that is not below `count`."""
        return count if count < self.free_below else -(-count // self.multiple) * self.multiple


def check_round_to(round_to: Any) -> None:
    """Raise unless it is "auto", a whole number of at least 1, or kinds with such numbers.

    Raises:
        ConfigError: it is something else, or names an unknown kind.
    """
    if round_to == "auto":
        return
    given = round_to.values() if isinstance(round_to, Mapping) else [round_to]
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                'round_to must be a whole number, at least 1, "auto", or a mapping of kinds to '
                f"such numbers, got {round_to!r}"
            )
    for kind in round_to if isinstance(round_to, Mapping) else ():
        choose(kind, KINDS, "kind in round_to")


def roundings(round_to: RoundTo, graph: Graph, names: Iterable[str]) -> dict[str, Rounding]:
    """The rounding of each named target.

    With "auto", families of at least `AUTO_FROM` channels of a model on the CPU keep multiples of
    `AUTO_MULTIPLE`, or any count below it; everything else keeps any count.
    """
    found = {}
    for name in names:
        target = graph.targets[name]
        if isinstance(round_to, Mapping):
            found[name] = Rounding(round_to.get(target.kind, 1))
        elif isinstance(round_to, int):
            found[name] = Rounding(round_to)
        elif target.kind == "channel" and graph.device == "cpu" and target.n_units >= AUTO_FROM:
            found[name] = Rounding(AUTO_MULTIPLE, free_below=AUTO_MULTIPLE)
        else:
            found[name] = Rounding()
    return found
