"""What allocators share: the last units, one at a time."""

from __future__ import annotations

from collections.abc import Callable

from secateurs.allocation.problem import Allocation, Problem

__all__ = ["fill"]


def fill(p: Problem, kept: Allocation, wish: Callable[[str, int], float]) -> Allocation:
    """Add the next unit of the target with the largest wish while one is within the limits.

    So no single next step of any target fits at the end. Of equal wishes the earlier target wins.
    """
    kept = dict(kept)
    open_ = list(p.names)
    while open_:
        # Costs only grow, so a target whose next unit does not fit now never will.
        name = max(open_, key=lambda n: wish(n, kept[n]))
        more = p.step(name, kept[name])
        if more is None or not p.fits({**kept, name: more}):
            open_.remove(name)
        else:
            kept[name] = more
    return kept
