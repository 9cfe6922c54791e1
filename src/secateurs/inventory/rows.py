"""The rows of an inventory: plain numbers and words."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["GroupRow", "Inventory", "Place", "Reach", "Share", "WholeRow", "percent"]

UNKNOWN = "operator "
"""How the name of an exclusion begins that stands for an operator without a rule."""


@dataclass(frozen=True)
class Place:
    """Where the units of a group live: along `dim` of a parameter, at `n` positions.

    Attributes:
        tensor: name of the parameter.
        dim: its dimension.
        n: positions along it that belong to units.
        role: "producer" makes the units, "consumer" reads them.
        outermost: for producers, whether no other one follows in series.
    """

    tensor: str
    dim: int
    n: int
    role: str
    outermost: bool

    @property
    def text(self) -> str:
        return f"{self.tensor}[{self.dim}]"


@dataclass(frozen=True)
class Share:
    """A part of the model.

    Attributes:
        params, macs: parameters, and multiply-adds for one sample.
        params_share, macs_share: fractions of the whole model in [0, 1].
    """

    params: int
    macs: int
    params_share: float
    macs_share: float


@dataclass(frozen=True)
class GroupRow:
    """One target.

    Attributes:
        name, kind, n_units: of the target.
        tensors: parameters that lose something, each once, as they are listed in the model.
        places: where in them the units live; of a layer, only what alone makes it zero.
        params_per_unit: fewest and most parameters that go with one unit of the dense model.
        share: everything that belongs to its units. Where two groups cross in a weight (rows of
            one, columns of the other) the elements count for both.
        unit_names: what the units are called; empty where they are only numbered.
    """

    name: str
    kind: str
    n_units: int
    tensors: tuple[str, ...]
    places: tuple[Place, ...]
    params_per_unit: tuple[int, int]
    share: Share
    unit_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reach:
    """What belongs to the units of some groups, each element counted once."""

    n_groups: int
    n_units: int
    share: Share

    def text(self, total: Share) -> str:
        """How much of the model that is, in words."""
        groups = f"{self.n_units:,} units in {self.n_groups} group{'s' * (self.n_groups != 1)}"
        if not total.params:
            return groups
        shares = f"{percent(self.share.params_share)} of {total.params:,} parameters"
        if total.macs:
            shares += f" and {percent(self.share.macs_share)} of {total.macs:,} MACs"
        return f"{shares}, as {groups}"


@dataclass(frozen=True)
class WholeRow:
    """A part that is left whole: its name, why, and which operator and line said so."""

    name: str
    reason: str
    where: str


@dataclass(frozen=True)
class Inventory:
    """Everything that can be pruned, and what cannot and why.

    Attributes:
        total: parameters and MACs of the whole model.
        groups: the targets of the wanted kinds, in execution order.
        reach: what belongs to units of any of them, each element once.
        by_default: the same for the kinds that "structured" means.
        by_name_only: listed kinds that "structured" does not mean.
        whole: parts that are left whole.
        unknown_ops: operators without a rule.
        notes: of the capture.
    """

    total: Share
    groups: tuple[GroupRow, ...]
    reach: Reach
    by_default: Reach
    by_name_only: tuple[str, ...]
    whole: tuple[WholeRow, ...]
    unknown_ops: tuple[str, ...]
    notes: tuple[str, ...]

    def by_reason(self) -> dict[str, list[WholeRow]]:
        """What is left whole, gathered by reason; operators without a rule are apart."""
        found: dict[str, list[WholeRow]] = defaultdict(list)
        for row in self.whole:
            if not row.name.startswith(UNKNOWN):
                found[row.reason].append(row)
        return dict(found)

    def unknown(self) -> list[WholeRow]:
        """Operators without a rule that held something back, without the word "operator"."""
        rows = [r for r in self.whole if r.name.startswith(UNKNOWN)]
        found = [WholeRow(r.name.removeprefix(UNKNOWN), r.reason, r.where) for r in rows]
        named = {r.name for r in found}
        text = "no rule yet; what it touches is left whole"
        return found + [WholeRow(op, text, "") for op in self.unknown_ops if op not in named]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "model": {"params": self.total.params, "macs": self.total.macs},
            "in_reach": _reach_dict(self.reach),
            "in_reach_by_default": _reach_dict(self.by_default),
            "groups": [_group_dict(g) for g in self.groups],
            "excluded": [asdict(w) for w in self.whole],
            "unknown_ops": list(self.unknown_ops),
            "notes": list(self.notes),
        }


def _reach_dict(reach: Reach) -> dict[str, Any]:
    return {"n_groups": reach.n_groups, "n_units": reach.n_units, **asdict(reach.share)}


def _group_dict(row: GroupRow) -> dict[str, Any]:
    low, high = row.params_per_unit
    return {
        "name": row.name,
        "kind": row.kind,
        "n_units": row.n_units,
        "unit_names": list(row.unit_names),
        "tensors": list(row.tensors),
        "members": [asdict(p) for p in row.places],
        "params_per_unit": {"min": low, "max": high},
        **asdict(row.share),
    }


def percent(fraction: float) -> str:
    """One decimal; never 100.0 for less than everything, nor 0.0 for something."""
    value = 100 * fraction
    if 0 < value < 0.05 or 99.95 <= value < 100:
        return "under 0.1 %" if value < 1 else "over 99.9 %"
    return f"{value:.1f} %"
