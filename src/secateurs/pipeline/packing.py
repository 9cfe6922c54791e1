"""The nouns of a run as plain values for a checkpoint, and back.

    pack(value, known) -> plain        unpack(plain, known) -> value

What a run has anyway (its graph) is not stored: `known` says what stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from secateurs.errors import FileFormatError
from secateurs.finetuning import EpochRow, FinetuneResult
from secateurs.latency import LatencyTable
from secateurs.latency.table import Layer, Runtime, Width
from secateurs.pipeline.points import Point, Ranking
from secateurs.report.data import StepRow
from secateurs.tickets import Ticket, TicketRow
from secateurs.types import Budget, Counts, Plan, Scores, Threshold

__all__ = ["pack", "unpack"]

KINDS = {
    kind.__name__: kind
    for kind in (
        Budget, Counts, EpochRow, FinetuneResult, LatencyTable, Layer, Plan, Point, Ranking,
        Runtime, Scores, StepRow, Threshold, Ticket, TicketRow, Width,
    )
}  # fmt: skip
KIND, KNOWN = "~kind", "~known"


def pack(value: Any, known: Mapping[str, Any]) -> Any:
    """Nested dicts, lists and tuples instead of dataclasses.

    Example:
        >>> pack([Budget(macs=0.5)], {})[0]["macs"]
        0.5
    """
    for name, held in known.items():
        if held is not None and value is held:
            return {KNOWN: name}
    if is_dataclass(value) and not isinstance(value, type):
        assert type(value).__name__ in KINDS, f"{type(value).__name__} has no place in KINDS"
        held = {f.name: pack(getattr(value, f.name), known) for f in fields(value)}
        return {KIND: type(value).__name__, **held}
    if isinstance(value, Mapping):
        return {key: pack(inner, known) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(pack(inner, known) for inner in value)
    return value


def unpack(plain: Any, known: Mapping[str, Any]) -> Any:
    """The inverse of `pack`.

    Raises:
        FileFormatError: this version has no such noun.
    """
    if isinstance(plain, (list, tuple)):
        return type(plain)(unpack(inner, known) for inner in plain)
    if not isinstance(plain, dict):
        return plain
    if KNOWN in plain:
        return known[plain[KNOWN]]
    held = {key: unpack(inner, known) for key, inner in plain.items() if key != KIND}
    if KIND not in plain:
        return held
    try:
        return KINDS[plain[KIND]](**held)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{plain[KIND]!r} is not what was written: {error!r}") from error
