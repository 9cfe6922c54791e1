"""An inventory as a plain-text table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from secateurs.inventory.rows import GroupRow, Inventory, WholeRow, percent

__all__ = ["ADVICE", "common_module", "members_text", "range_text", "table"]

FIRST_MEMBERS = 4
"""Members of a group that the short table names."""
FIRST_WHOLE = 3
"""Parts with the same reason that the short table names."""
ADVICE = "teach it the operator with secateurs.graph.register_rule: docs/extending.md"


def table(found: Inventory, *, every: bool = False) -> str:
    """Plain text; `every` names each member, and each part that is left whole."""
    unknown = [f"no rule for the operator {r.name}: {r.reason}" for r in found.unknown()]
    blocks = [
        _group_lines(found, every),
        _reach_lines(found),
        [*unknown, f"    {ADVICE}"] if unknown else [],
        *(_whole_lines(reason, rows, every) for reason, rows in found.by_reason().items()),
        [f"note: {note}" for note in found.notes],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _reach_lines(found: Inventory) -> list[str]:
    """How much of the model is in reach; a second line without the kinds asked for by name."""
    if not found.groups:
        return []
    lines = [f"in reach: {found.reach.text(found.total)}"]
    if found.by_name_only:
        names = ", ".join(found.by_name_only)
        lines.append(f"without {names}: {found.by_default.text(found.total)}")
    return lines


def _group_lines(found: Inventory, every: bool) -> list[str]:
    if not found.groups:
        return ["nothing can be pruned"]
    head = ["group", "kind", "units", "params/unit", "params", "share", "MACs", "share"]
    rows = [head, *map(_cells, found.groups)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, group in zip(rows, [None, *found.groups], strict=True):
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
        if group is not None and group.places:
            lines.append(f"    {members_text(group, every)}")
    return lines


def _cells(row: GroupRow) -> list[str]:
    own = row.share
    return [
        row.name, row.kind, f"{row.n_units:,}", range_text(row.params_per_unit),
        f"{own.params:,}", percent(own.params_share), f"{own.macs:,}", percent(own.macs_share),
    ]  # fmt: skip


def range_text(limits: tuple[int, int]) -> str:
    """Fewest and most, as one number where they are the same."""
    low, high = limits
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def common_module(names: Sequence[str]) -> str:
    """The module around all these tensors, with a dot behind it; "" for none or for one tensor.

    Example:
        >>> common_module(["a.b.weight", "a.c.weight"]), common_module(["a.weight", "b.weight"])
        ('a.', '')
    """
    if len(names) < 2:
        return ""
    levels = zip(*(n.split(".")[:-1] for n in names), strict=False)  # up to the shortest
    shared = takewhile(lambda level: len(set(level)) == 1, levels)
    return "".join(f"{level[0]}." for level in shared)


def members_text(row: GroupRow, every: bool = False) -> str:
    """Number of tensors and where in them the units are, the common module said once."""
    n = len(row.tensors)
    around = common_module(row.tensors)
    texts = [p.text.removeprefix(around) for p in row.places]
    inside = f" in {around[:-1]}" if around else ""
    if row.unit_names:
        texts, inside = list(row.unit_names), " of the units"
    shown = texts if every else texts[:FIRST_MEMBERS]
    more = f" and {len(texts) - len(shown)} more" if len(texts) > len(shown) else ""
    return f"{n} tensor{'s' * (n != 1)}{inside}: {', '.join(shown)}{more}"


def _whole_lines(reason: str, rows: list[WholeRow], every: bool) -> list[str]:
    shown = rows if every else rows[:FIRST_WHOLE]
    width = max(len(r.name) for r in shown)
    count = f" ({len(rows)} parts)" if len(rows) > 1 else ""
    lines = [f"left whole: {reason}{count}"]
    lines += [f"    {r.name.ljust(width)}  {r.where}".rstrip() for r in shown]
    more = len(rows) - len(shown)
    return [*lines, f"    and {more} more"] if more else lines
