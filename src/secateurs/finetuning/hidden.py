"""Hidden states of two models, compared where both have them.

A smaller model lacks units that its teacher has. The graph knows at which positions of which
tensor each unit can be seen, and a plan which units are gone: what is left is compared, position
by position, whether the student still has its dense shape (removed entries held at zero) or has
been shrunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.distributed import plain
from secateurs.errors import ConfigError, DataError
from secateurs.statistics.hooks import Key, key_of, site_values
from secateurs.types import Graph, GroupTarget, IntArray, Plan, Site

__all__ = ["HiddenPoint", "Recorder", "hidden_loss", "hidden_points", "never_seen"]


Place = tuple[str, int, str, int]
"""(module, call, side, position): one tensor of a plain run."""


@dataclass(frozen=True, eq=False)
class HiddenPoint:
    """A tensor of the dense model that the student is to imitate.

    Attributes:
        site: where it can be seen.
        removed: dim -> (n,) int64 positions that the student lacks, ascending.
    """

    site: Site
    removed: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people: the module, and which of its sides."""
        return f"{self.site.side} of {self.site.module}"


def hidden_points(
    graph: Graph, plan: Plan | None = None, at: Iterable[str] | None = None
) -> tuple[HiddenPoint, ...]:
    """Where a student can be compared with the dense model.

    Each family of units (channels, neurons, hidden units, ...) is seen where it is read for the
    first time: after its activation function and its norm. The same tensor is taken once.

    Args:
        graph: of the dense model.
        plan: what the student lacks; None for nothing. Nothing is compared in layers it removes.
        at: names or globs of the reading modules ("layer2.*"); None for all.

    Raises:
        ConfigError: a pattern fits no such module, or no family can be seen at all.

    Example:
        >>> from secateurs.graph import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [point.name for point in hidden_points(trace(net, torch.ones(1, 4)))]
        ['input of 2']
    """
    groups = [t for t in graph.targets.values() if isinstance(t, GroupTarget)]
    firsts: dict[Place, Site] = {}
    for target in groups:
        if (site := _first_read(target)) is not None:
            firsts.setdefault(_place(site), site)
    if not firsts:
        raise ConfigError(
            "no hidden state of this model can be seen from outside (its units live inside fused "
            "kernels): distill from its outputs only, hidden=0"
        )
    chosen = _left(_chosen(firsts, at), plan)
    gone: dict[Place, dict[int, list[IntArray]]] = {place: {} for place in chosen}
    for target in groups:
        removed = None if plan is None else plan.removed.get(target.name)
        for site in target.sites:
            if removed is not None and (place := _place(site)) in gone:
                positions = site.index[np.isin(site.unit, removed)]
                gone[place].setdefault(site.dim, []).append(positions)
    return tuple(
        HiddenPoint(
            site,
            {
                dim: torch.from_numpy(np.unique(np.concatenate(positions)))
                for dim, positions in gone[place].items()
            },
        )
        for place, site in chosen.items()
    )


def never_seen(graph: Graph) -> list[str]:
    """Families whose units no module reads or makes in the open: they are never compared."""
    groups = (t for t in graph.targets.values() if isinstance(t, GroupTarget))
    return [t.name for t in groups if t.kind != "layer" and not t.sites]


def _place(site: Site) -> Place:
    return site.module, site.call, site.side, site.position


def _first_read(target: GroupTarget) -> Site | None:
    """Where the units are read for the first time; else where they are made."""
    reads = [s for s in target.sites if s.role == "consumer" and s.side == "input"]
    return next(iter([*reads, *target.sites]), None)


def _left(chosen: dict[Place, Site], plan: Plan | None) -> dict[Place, Site]:
    """Without the places inside layers that a plan removes: the student has nothing there."""
    if plan is None or not plan.layers:
        return chosen
    emptied = {t.rpartition(".")[0] for names in plan.layers.values() for t in names}
    left = {place: site for place, site in chosen.items() if site.module not in emptied}
    if not left:
        raise ConfigError(
            "hidden: the plan removes every layer whose hidden states would be compared; name "
            "others by hidden_at=, or distill from the outputs only, hidden=0"
        )
    return left


def _chosen(firsts: Mapping[Place, Site], at: Iterable[str] | None) -> dict[Place, Site]:
    """The places whose module fits a pattern."""
    if at is None:
        return dict(firsts)
    patterns = [at] if isinstance(at, str) else list(at)
    modules = list(dict.fromkeys(site.module for site in firsts.values()))
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise ConfigError(
                f"hidden_at: {pattern!r} fits no module that reads units; there are "
                + ", ".join(modules)
            )
    return {
        place: site
        for place, site in firsts.items()
        if any(fnmatchcase(site.module, pattern) for pattern in patterns)
    }


class Recorder:
    """Sees the tensors at points in each run of a model, inside its `with` statement."""

    def __init__(self, model: nn.Module, points: Sequence[HiddenPoint]) -> None:
        self._model, self._sites = model, [point.site for point in points]
        self._seen: dict[Key, Tensor] = {}
        self._hooks = ExitStack()
        self._calls: dict[str, int] = {}

    def __enter__(self) -> Self:
        model = plain(self._model)
        modules = dict(model.named_modules())
        for site in self._sites:
            if site.module not in modules:
                raise ConfigError(
                    f"hidden: the model has no module {site.module!r}; teacher and student must be "
                    "of one class"
                )
        self._calls = self._hooks.enter_context(site_values(model, self._sites, self._see))
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        self.forget()

    def _see(self, key: Key, value: Tensor) -> Tensor:
        self._seen[key] = value
        return value

    def forget(self) -> None:
        """Before a run: nothing has been seen."""
        self._seen.clear()
        self._calls.clear()

    def __getitem__(self, point: HiddenPoint) -> Tensor:
        """What was seen at a point in the last run.

        Raises:
            DataError: the model did not come by.
        """
        key = key_of(point.site)
        if key not in self._seen:
            raise DataError(
                f"hidden: the {point.name} was not seen in this run. A graph form does not call "
                'its modules: shrink with form="module". Else leave it out with hidden_at='
            )
        return self._seen[key]


def hidden_loss(student: Tensor, teacher: Tensor, point: HiddenPoint) -> Tensor:
    """How far a hidden state is from the teacher's where the student has it: a scalar.

    sum of (student - teacher)^2 / sum of teacher^2, over what is kept: 0 when equal, 1 for a
    student of zeros, whatever the size and scale of the layer.

    Args:
        student: of the shape of the teacher's, or without the removed positions.
        teacher: of the dense model; no gradient flows into it.
        point: says which positions the student lacks.

    Raises:
        DataError: the shapes fit neither way.

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, 2015, arXiv:1412.6550, for the idea; there
        a learned layer maps between the sizes, here the plan does.

    Example:
        >>> site = Site("fc", 0, "input", 0, 1, np.arange(3), np.arange(3), "consumer")
        >>> point = HiddenPoint(site, {1: torch.tensor([2])})
        >>> teacher = torch.tensor([[3.0, 4.0, 9.0]])
        >>> hidden_loss(torch.tensor([[3.0, 3.0, 0.0]]), teacher, point).item()  # 1 / 25
        0.03999999910593033
        >>> hidden_loss(torch.tensor([[3.0, 3.0]]), teacher, point).item()
        0.03999999910593033
    """
    wanted = teacher.detach()
    dense = student.shape == teacher.shape
    for dim, removed in point.removed.items():
        kept = torch.ones(wanted.shape[dim], dtype=torch.bool)
        kept[removed] = False
        index = kept.nonzero().reshape(-1).to(wanted.device)
        wanted = wanted.index_select(dim, index)
        if dense:
            student = student.index_select(dim, index)
    if student.shape != wanted.shape:
        raise DataError(
            f"hidden: the {point.name} is {tuple(student.shape)} in the student; expected "
            f"{tuple(teacher.shape)} as in the teacher, or {tuple(wanted.shape)} after the plan. "
            "Give the graph of the teacher and the plan by which the student was made"
        )
    tiny = torch.finfo(wanted.dtype).tiny
    return (student - wanted).square().sum() / wanted.square().sum().clamp(min=tiny)
