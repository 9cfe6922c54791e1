"""Dotted keys: a place inside a recipe, as `--set` and the space of a search write it."""

from __future__ import annotations

from typing import Any

from secateurs.errors import ConfigError

__all__ = ["set_value"]


def set_value(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set one value of a recipe in place, by its dotted key.

    Args:
        data: a recipe as a mapping.
        key: "budget.macs", "stages.0.allocation", ...; mappings that are missing are made.
        value: plain data.
        where: what asks for it, for messages.

    Raises:
        ConfigError: the key leads to no place.

    Example:
        >>> recipe = {"stages": [{"budget": {"macs": 0.5}}]}
        >>> set_value(recipe, "stages.0.budget.macs", 0.25, "search")
        >>> recipe
        {'stages': [{'budget': {'macs': 0.25}}]}
    """
    *parents, last = key.split(".")
    place: Any = data
    for part in parents:
        if isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        else:
            raise ConfigError(f"{where}: {_no_key(place, part)}")
    if not isinstance(place, dict):
        raise ConfigError(f"{where}: {_no_key(place, last)}")
    place[last] = value


def _no_key(place: Any, part: str) -> str:
    if isinstance(place, list):
        numbers = f"0 to {len(place) - 1}" if place else "none yet"
        return f"a list has no key {part!r}; name an entry by its number ({numbers}), then its key"
    return f"{place!r} has no key {part!r} below it"
