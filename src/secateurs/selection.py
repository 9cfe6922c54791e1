"""From scores and counts to a plan: which units go, and what that means for every tensor.

    Scores, Counts -> Plan     kept positions (structure), masks (both levels), reasons

Each target keeps its `count` best units; of equal scores the unit with the smaller index stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from secateurs.errors import ConfigError, choose
from secateurs.kth import count_left, keep_mask, kth_largest
from secateurs.types import (
    Budget,
    Counts,
    Graph,
    GroupTarget,
    Member,
    Plan,
    Scores,
    WeightTarget,
)

__all__ = ["order_of", "select"]


def order_of(values: Tensor) -> Tensor:
    """(n_units,) int64 units from best to worst; equal scores by ascending index.

    Example:
        >>> order_of(torch.tensor([1.0, 3.0, 1.0])).tolist()
        [1, 0, 2]
    """
    return torch.sort(values, descending=True, stable=True).indices


def select(scores: Scores, counts: Counts, *, previous: Plan | None = None) -> Plan:
    """The plan that keeps the best `counts.kept[target]` units of each target.

    Args:
        scores: larger = keep.
        counts: units to keep; targets that it does not name keep all that they have.
        previous: what was removed earlier stays removed, and is part of the new plan.

    Returns:
        A `Plan` of everything that is removed, earlier removals included.

    Raises:
        ConfigError: an unknown target, a count below 1, or more than is left.
        ScoringError: a score is not a number.
    """
    graph = scores.graph
    removed = RemovedTable.after(previous)
    reasons = dict(previous.reasons) if previous is not None else {}
    for name, count in _structure_first(graph, counts).items():
        choose(name, scores.values, "scored target")
        if count == 0 and name in _gone_whole(graph, removed.units, previous):
            continue  # all of it goes with its layer
        values = scores.values[name].reshape(-1)
        left = count_left(name, values)
        gone = _gone(graph, name, removed, previous)
        if gone is not None:
            values = values.masked_fill(gone, float("-inf"))
            left = count_left(name, values)
        if not 1 <= count <= left:
            raise ConfigError(
                f"{name} has {left} of {len(values)} units left, it cannot keep {count}. "
                f"Ask for 1 to {left}"
            )
        if count < len(values):
            cut = kth_largest({name: values}, count)
            mask = keep_mask(values, cut.threshold, cut.equal[name])
            removed.add(name, mask, single=isinstance(graph.targets[name], WeightTarget))
            reasons[name] = _reason(scores, counts, name, len(values) - count, len(values))
    masks: Mapping[str, Tensor] = _masks(graph, removed)
    kept = _kept(graph, removed.units)
    shapes = {name: _shape(graph, name) for name in dict.fromkeys([*masks, *kept])}
    if previous is not None:
        masks, shapes, kept = _join(previous, masks, shapes, kept)
    layers = _layers(graph, removed.units, {} if previous is None else previous.layers)
    kinds: set[str] = {graph.targets[name].kind for name in removed if name in graph.targets}
    kinds |= set(previous.granularity if previous is not None else ())
    return Plan(
        kept, masks, removed, shapes, tuple(sorted(kinds)), reasons, graph.outputs, layers,
        graph.detail,
    )  # fmt: skip


def _structure_first(graph: Graph, counts: Counts) -> dict[str, int]:
    """Counts with those of single weights last: they rank what is inside of the units that stay."""
    weights = [n for n in counts.kept if isinstance(graph.targets.get(n), WeightTarget)]
    return {n: counts.kept[n] for n in [*(n for n in counts.kept if n not in weights), *weights]}


def _gone_whole(graph: Graph, removed: Mapping[str, Tensor], previous: Plan | None) -> set[str]:
    """Tensors that go with a removed layer."""
    layers = _layers(graph, removed, {} if previous is None else previous.layers)
    return {name for names in layers.values() for name in names}


def _gone(graph: Graph, name: str, removed: RemovedTable, previous: Plan | None) -> Tensor | None:
    """(n_units,) bool: the units of a target that went earlier; None if there are none."""
    target = graph.targets[name]
    gone = None
    if name in removed.units:
        gone = torch.zeros(target.n_units, dtype=torch.bool)
        gone[removed.units[name]] = True
    if not isinstance(target, WeightTarget):
        return gone
    # Rows and columns of removed units hold no weights, whenever those went.
    masks = [_inside(graph, target, removed.units), removed.single.get(name)]
    masks.append(None if previous is None else previous.masks.get(name))
    for mask in masks:
        if mask is not None:
            lost = ~mask.reshape(-1)
            gone = lost if gone is None else gone.logical_or_(lost)
    return gone


def _inside(graph: Graph, target: WeightTarget, removed: Mapping[str, Tensor]) -> Tensor | None:
    """Bool: the weights of a tensor that lie in no row or column of a removed unit."""
    mask = None
    for other, gone in removed.items():
        group = graph.targets.get(other)
        for member, rows in _lost(group, gone) if isinstance(group, GroupTarget) else ():
            if member.tensor == target.name:
                mask = torch.ones(target.shape, dtype=torch.bool) if mask is None else mask
                mask.index_fill_(member.dim, rows, False)
    return mask


def _reason(scores: Scores, counts: Counts, name: str, n_gone: int, n: int) -> str:
    asked = counts.asked
    if isinstance(asked, Budget):
        what = "budget " + ", ".join(f"{k}={v}" for k, v in asked.given.items())
    else:
        what = f"threshold {asked.text}"
    below = counts.thresholds.get(name)
    limit = "" if below is None else f"; kept from a score of {below:.6g}"
    notes = "".join(f"; {note}" for note in counts.notes)
    return (
        f"{n_gone} of {n} {scores.graph.targets[name].kind} units removed by criterion "
        f"{scores.criterion}, {what}{limit}{notes}"
    )


def _shape(graph: Graph, name: str) -> tuple[int, ...]:
    """The dense shape of a parameter or buffer."""
    dense: Mapping[str, tuple[int, ...]] = getattr(graph.detail, "shapes", {})
    target = graph.targets.get(name)
    if isinstance(target, WeightTarget):
        return target.shape
    if name not in dense:
        raise ConfigError(f"the graph does not know the shape of {name}; use a graph from trace")
    return tuple(dense[name])


class MaskTable(Mapping[str, Tensor]):
    """Masks that are made when they are read, since of a large model they would fill the memory.

    Attributes:
        shapes: tensor name -> dense shape.
        lines: tensor name -> (dim, positions along it) that are removed whole.
        single: tensor name -> mask of single weights.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        lines: Mapping[str, list[tuple[int, Tensor]]],
        single: Mapping[str, Tensor],
    ) -> None:
        self.shapes, self.lines, self.single = shapes, lines, single

    def __getitem__(self, name: str) -> Tensor:
        own = self.single.get(name)
        mask = torch.ones(self.shapes[name], dtype=torch.bool) if own is None else own.clone()
        for dim, positions in self.lines.get(name, ()):
            mask.index_fill_(dim, positions, False)
        return mask

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class RemovedTable(Mapping[str, Tensor]):
    """Removed units: of structure as they are, of single weights read off their mask.

    Their numbers would take eight bytes for each removed weight.

    Attributes:
        units: target name -> (n,) removed units.
        single: name of a weight target -> (n_units,) bool, True = keep.
    """

    def __init__(self) -> None:
        self.units: dict[str, Tensor] = {}
        self.single: dict[str, Tensor] = {}
        self._names: dict[str, None] = {}

    @classmethod
    def after(cls, previous: Plan | None) -> RemovedTable:
        """A new one that holds what was removed earlier."""
        table = cls()
        earlier = {} if previous is None else previous.removed
        table._names = dict.fromkeys(earlier)
        if isinstance(earlier, RemovedTable):
            table.units, table.single = dict(earlier.units), dict(earlier.single)
        else:
            table.units = dict(earlier)
        return table

    def add(self, name: str, mask: Tensor, *, single: bool) -> None:
        """Remove the units of a target where the mask is False, and no others."""
        self._names[name] = None
        if single:
            self.units.pop(name, None)
            self.single[name] = mask
        else:
            self.units[name] = (~mask).nonzero().reshape(-1)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.single:
            return (~self.single[name]).nonzero().reshape(-1)
        return self.units[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _masks(graph: Graph, removed: RemovedTable) -> MaskTable:
    """Masks of the dense shape for everything that removed units touch."""
    lines: dict[str, list[tuple[int, Tensor]]] = {}
    single = {
        name: mask.view(_shape(graph, name))
        for name, mask in removed.single.items()
        if name in graph.targets
    }
    for name, gone in removed.units.items():
        target = graph.targets.get(name)
        if target is None:
            continue  # of an earlier plan for another graph: its masks are joined as they are
        if not isinstance(target, GroupTarget):
            single[name] = torch.ones(target.shape, dtype=torch.bool)
            single[name].view(-1)[gone] = False
            continue
        for member, rows in _lost(target, gone):
            if member.masked:
                lines.setdefault(member.tensor, []).append((member.dim, rows))
    return MaskTable({name: _shape(graph, name) for name in {**lines, **single}}, lines, single)


def _lost(target: GroupTarget, gone: Tensor) -> Iterator[tuple[Member, Tensor]]:
    """The members that lose positions, and which."""
    lost = torch.zeros(target.n_units, dtype=torch.bool)
    lost[gone] = True
    for member in target.members:
        rows = torch.from_numpy(member.index[lost.numpy()[member.unit]])
        if len(rows):
            yield member, rows


def _kept(graph: Graph, removed: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Positions that remain along every dimension that loses some."""
    lines: dict[str, dict[int, Tensor]] = {}
    for name, gone in removed.items():
        target = graph.targets.get(name)
        if not isinstance(target, GroupTarget) or target.kind == "layer":
            continue  # a layer goes whole: nothing of it is cut
        for member, rows in _lost(target, gone):
            size = _shape(graph, member.tensor)[member.dim]
            dims = lines.setdefault(member.tensor, {})
            dims.setdefault(member.dim, torch.ones(size, dtype=torch.bool))[rows] = False
    return {
        name: {dim: line.nonzero().reshape(-1) for dim, line in sorted(dims.items())}
        for name, dims in lines.items()
    }


def _layers(
    graph: Graph, removed: Mapping[str, Tensor], earlier: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Tensors that go with each removed unit of kind "layer"."""
    layers = dict(earlier)
    for name, gone in removed.items():
        target = graph.targets.get(name)
        if isinstance(target, GroupTarget) and target.kind == "layer":
            for unit in gone.tolist():
                layers[target.unit_names[unit]] = target.unit_tensors[unit]
    return layers


def _join(
    previous: Plan,
    masks: Mapping[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    kept: dict[str, dict[int, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], dict[str, dict[int, Tensor]]]:
    """Add what an earlier plan removed."""
    masks = dict(masks)
    for name, mask in previous.masks.items():
        masks[name] = masks[name] & mask if name in masks else mask.clone()
    shapes = {**previous.shapes, **shapes}
    for name, dims in previous.kept.items():
        mine = kept.setdefault(name, {})
        for dim, rows in dims.items():
            if dim in mine:
                both = mine[dim][torch.isin(mine[dim], rows)]
                mine[dim] = both
            else:
                mine[dim] = rows.clone()
    return masks, shapes, kept
