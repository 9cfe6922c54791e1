"""Masks that moved while the network healed, taken into the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from secateurs.pipeline.stage import Stage
from secateurs.regrowth import Regrowth
from secateurs.types import Plan, expand_granularity

__all__ = ["mixed_stages", "moved", "told"]


def moved(plan: Plan, masks: Mapping[str, Tensor]) -> Plan:
    """The plan of single weights with other masks; as many are removed as the masks say."""
    new = {**plan.masks, **{name: masks[name].cpu() for name in plan.masks if name in masks}}
    removed = {
        name: (~new[name]).reshape(-1).nonzero().reshape(-1) if name in new else gone
        for name, gone in plan.removed.items()
    }
    return replace(plan, masks=new, removed=removed)


def told(part: Regrowth) -> list[str]:
    """What a reader should know of masks that moved, and of those that did not."""
    rule, updates = part.config.rule, part.history
    notes = [f"{rule}: {name} keeps its mask: {why}" for name, why in part.still.items()]
    if updates:
        notes.insert(
            0,
            f"{rule}: masks moved {len(updates)} times; {updates[-1].overlap:.0%} of the first "
            "ones are left",
        )
    return notes


def mixed_stages(stages: Sequence[Stage]) -> Iterator[str]:
    """Stages whose masks move although whole units went before: these would come back in parts."""
    cut = False
    for number, stage in enumerate(stages, start=1):
        if stage.regrow is not None and cut:
            yield (
                f"stage {number}: regrow moves single weights, and an earlier stage removed whole "
                "units, which would come back in parts: put the weights first"
            )
        cut = cut or expand_granularity(stage.granularity) != {"weight"}
