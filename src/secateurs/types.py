"""The nouns of secateurs: what flows between the rooms, and nothing else.

    trace -> Graph of Targets        score -> Scores        allocate -> Counts
    select -> Plan                   verify -> Verification  measure -> Measurement

Conventions said once: mask True = keep; larger score = keep; `sparsity` is the fraction in
[0, 1) of units removed, a `Budget` says what *remains*; MACs are multiply-adds for one sample.
Index arrays are numpy int64, scores and masks are torch tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from secateurs.asked import Budget, Threshold
from secateurs.filters import Patterns, Place, taken_out
from secateurs.inventory import inventory, table
from secateurs.targets import (
    KINDS,
    STRUCTURED,
    BranchSum,
    GroupTarget,
    IntArray,
    Kind,
    Member,
    Role,
    Site,
    Target,
    WeightTarget,
    expand_granularity,
    learned_tensors,
)

__all__ = [
    "Batch",
    "Batches",
    "BranchSum",
    "Budget",
    "CostDim",
    "CostTerm",
    "Counts",
    "Evaluate",
    "Exclusion",
    "Graph",
    "GroupTarget",
    "Inputs",
    "IntArray",
    "KINDS",
    "Kind",
    "LossFn",
    "Member",
    "Plan",
    "Role",
    "STRUCTURED",
    "Scores",
    "Site",
    "Target",
    "Threshold",
    "WeightTarget",
    "expand_granularity",
    "learned_tensors",
]

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
"""What a model is called with: a tensor, a tuple (positional) or a dict (keywords)."""
Batch = tuple[Any, Any]
"""One batch: `(inputs, targets)`, inputs as in `Inputs`."""
Batches = Iterable[Batch]
"""Something that can be iterated more than once: a list or a DataLoader, not a generator."""
LossFn = Callable[[Any, Any], Tensor]
"""`loss_fn(outputs, targets) -> scalar`, the mean over the samples of the batch."""
Evaluate = Callable[[torch.nn.Module], float | Mapping[str, float]]
"""`evaluate(model) -> float or dict`; the first entry of a dict is the main metric."""


@dataclass(frozen=True)
class Exclusion:
    """A part of the model that is not pruned, and why.

    Attributes:
        name: what is left whole: a parameter, a dimension of it, or a module.
        reason: one sentence a user understands.
        where: the operator that pinned it, with the user's source line when it is known.
    """

    name: str
    reason: str
    where: str = ""


@dataclass(frozen=True, eq=False)
class CostDim:
    """One factor of a cost: `size` entries, of which those in `owned` belong to units.

    `owned[target]` is (n_units,) int64: how many of the entries each unit of that target owns.
    """

    size: int
    owned: Mapping[str, IntArray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CostTerm:
    """Parameters, MACs and bytes that vanish with units: the product of its dimensions.

    Attributes:
        name: the parameter, buffer or operator it stands for.
        dims: the number of elements is the product of the entries that remain in each.
        is_parameter: whether it counts as parameters (else only as MACs and bytes).
        uses: MACs per element for one sample (a convolution weight: output positions).
        item_bytes: of one element in the stored model; 0 for what is not stored.
        names: names that it is stored under, each with its own copy (tied tensors).
    """

    name: str
    dims: tuple[CostDim, ...]
    is_parameter: bool = True
    uses: float = 0.0
    item_bytes: int = 0
    names: int = 1


@dataclass(frozen=True, eq=False)
class Graph:
    """What `trace` found: everything that can be pruned, and what cannot and why.

    Attributes:
        targets: all targets by name: groups first, in execution order, then weights.
        excluded: parts that are left whole.
        costs: one term per parameter, per buffer, and per operator that multiplies activations.
        front_end: which capture made it, e.g. "torch.export".
        unknown_ops: operators without a rule; what they touch is pinned.
        outputs: names of the model's outputs that matter; empty for all.
        notes: what a user should know about the capture.
        device: type of the device that holds the model, e.g. "cpu".
        inputs: what the model was traced with: shapes and types, but no data (meta tensors).
    """

    targets: Mapping[str, Target]
    excluded: tuple[Exclusion, ...] = ()
    costs: tuple[CostTerm, ...] = ()
    front_end: str = ""
    unknown_ops: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    detail: Any = field(default=None, repr=False)
    device: str = "cpu"
    inputs: Inputs | None = field(default=None, repr=False)

    @property
    def units(self) -> dict[str, int]:
        """Number of units of each structural target."""
        return {t.name: t.n_units for t in self.groups()}

    def groups(self, granularity: str | Iterable[str] = "structured") -> list[GroupTarget]:
        """Structural targets of the given kinds, in execution order."""
        return [t for t in self.select(granularity) if isinstance(t, GroupTarget)]

    def select(self, granularity: str | Iterable[str]) -> list[Target]:
        """Targets of one kind, several kinds, or "structured" (all but weight, embedding, layer).

        Raises:
            ConfigError: the kind is unknown.
        """
        kinds = expand_granularity(granularity)
        return [t for t in self.targets.values() if t.kind in kinds]

    def only(
        self,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        model: torch.nn.Module | None = None,
    ) -> Graph:
        """The same graph with fewer targets; those taken out are listed in `excluded`.

        A target matches when its name matches, or the module of any of its learned members, or a
        module around that one. Those that match `include` stay, but not those that match `exclude`.

        Args:
            include, exclude: one or several of: a name or glob ("layer3", "layer3.*", "*:head"), a
                kind ("channel"; names of targets and modules go first), a regular expression that
                is searched for (compiled, or the text "re:..."), a module class, a module.
            model: the traced model; needed for module classes and modules.

        Raises:
            ConfigError: a pattern that matches nothing, or nothing is left.

        Example:
            >>> graph = Graph({"fc.weight": WeightTarget("fc.weight", (2, 2)),
            ...                "head.weight": WeightTarget("head.weight", (2, 2))})
            >>> fewer = graph.only(exclude="head")
            >>> list(fewer.targets), fewer.excluded[0].reason
            (['fc.weight'], 'excluded by the user: head')
        """
        places = {t.name: Place(t.name, t.kind, learned_tensors(t)) for t in self.targets.values()}
        whole = {e.name: e.reason for e in self.excluded}
        out = taken_out(list(places.values()), whole, include, exclude, model)
        held = {x for n in out if places[n].kind != "weight" for x in places[n].tensors}
        # A weight of a listed group is not listed again.
        listed = [Exclusion(n, why) for n, why in out.items() if n not in held]
        targets = {name: t for name, t in self.targets.items() if name not in out}
        return replace(self, targets=targets, excluded=(*self.excluded, *listed))

    def summary(self, *, every: bool = False) -> str:
        """A plain-text table: what can be pruned and how much that is, what cannot and why.

        Args:
            every: name each member, and each part that is left whole.
        """
        return table(inventory(self, {*KINDS} - {"weight"}, STRUCTURED), every=every)


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each unit matters: larger = keep.

    Attributes:
        graph: where the targets come from.
        values: target name -> (n_units,) float32; `-inf` marks a unit that was removed
            earlier: it takes part in no statistic and is never kept again.
        criterion: name of the criterion, with its options; empty where nothing was scored.
        notes: what a reader should know (a target scored sample by sample, ...).
        n_samples: samples that were seen; 0 for data-free criteria.
        not_scored: target name -> why this criterion says nothing about it.
    """

    graph: Graph
    values: Mapping[str, Tensor]
    criterion: str
    notes: tuple[str, ...] = ()
    n_samples: int = 0
    not_scored: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Counts:
    """Units KEPT per target, what was asked, and what that leaves.

    Attributes:
        kept: target name -> units kept.
        asked: the budget or threshold.
        realised: remaining fraction of the dense model for "units", "params", "macs" and "bytes",
            where the graph knows them; with a latency table also "latency_ms", the milliseconds
            that it predicts.
        thresholds: target name -> score below which units go (for plots and messages).
        round_to: target name -> its count is a multiple of this; only where that is above 1.
        notes: what a reader should know (counts that were estimated from a sample).
    """

    kept: Mapping[str, int]
    asked: Budget | Threshold
    realised: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    round_to: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """What is removed: for people (units, reasons), for structure (kept), for training (masks).

    Attributes:
        kept: tensor name -> {dim: (n,) int64 kept positions, ascending}; only dims that lose some.
        masks: tensor name -> bool tensor of the dense shape, True = keep; covers removed weights
            and everything that belongs to removed units.
        removed: target name -> (n,) int64 removed units, ascending.
        shapes: tensor name -> dense shape of every tensor in `kept` or `masks`.
        granularity: kinds that were pruned.
        reasons: target name -> one sentence: criterion, threshold or budget, how many.
        outputs: names of the model's outputs that matter; empty for all.
        layers: name of a removed unit of kind "layer" -> parameters and buffers that go with it;
            those whose mask is all False make it zero.
        detail: the analysis of the graph that it was made from, while that is at hand.
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    masks: Mapping[str, Tensor]
    removed: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    granularity: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    detail: Any = field(default=None, repr=False)

    @property
    def n_removed(self) -> int:
        """Units removed in all."""
        return sum(len(v) for v in self.removed.values())

    def gone(self, target: Target) -> Tensor:
        """(n_units,) bool, True for units of a target that are removed.

        Weights go by themselves, with the rows and columns of removed units, and with whole layers.
        """
        lost = torch.zeros(target.n_units, dtype=torch.bool)
        if target.name in self.removed:
            lost[self.removed[target.name]] = True
        if isinstance(target, WeightTarget):
            if target.name in self.masks:
                lost |= ~self.masks[target.name].reshape(-1)
            if any(target.name in tensors for tensors in self.layers.values()):
                lost[:] = True
        return lost

    @property
    def structural(self) -> bool:
        """Whether something is physically removed (else only masked)."""
        return bool(self.kept or self.layers)
