"""What a collector is: it watches a pass over the batches and leaves sums over samples.

    Setting   what all collectors of a pass share: model, loss, targets, seed
    Request   one statistic, with the options that shape it, for the targets that need it
    Run       one batch
    Collector begin, watch, wants, gradient, leaves, arrived, alone -> element(name), unit(target)

The pass runs the model once for each batch; every collector looks on (`watch`), asks for gradients
of parameters (`wants`) or of tensors it put into the model itself (`leaves`), and, only if it must,
runs the model alone (`alone`). What it keeps between batches lives in `sums`, so that a pass can be
resumed and merged. To add a statistic, write a collector and `register_statistic` it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateurs.batches import batch_size
from secateurs.criteria.registry import STATISTICS, Option, Statistic
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters, members_of
from secateurs.types import Batch, Graph, GroupTarget, Inputs, LossFn, Target, WeightTarget

__all__ = [
    "COLLECTORS",
    "Collector",
    "Request",
    "Run",
    "Setting",
    "call_with",
    "generator_for",
    "loss_with",
    "register_statistic",
    "requiring_grad",
]


@dataclass(frozen=True, eq=False)
class Setting:
    """What all collectors of a pass share.

    Attributes:
        model: in the mode in which it is scored; no parameter requires a gradient.
        params: its parameters by name, every name of a tied parameter included.
        loss_fn: None when no criterion needs it.
        graph: where the targets come from.
        alive: target name -> (n,) int64 units that were not removed earlier.
        seed: for everything random; use `generator_for`.
        n_batches: batches that will come, 1 if unknown.
        max_seconds: what runs the model unit by unit refuses to take longer.
    """

    model: nn.Module
    params: Parameters
    loss_fn: LossFn | None
    graph: Graph
    alive: Mapping[str, Tensor]
    seed: int = 0
    n_batches: int = 1
    max_seconds: float = 3600.0


@dataclass(frozen=True, eq=False)
class Request:
    """One statistic for some targets.

    Attributes:
        statistic: its name in `STATISTICS`.
        options: values of the options that shape it (`Statistic.options`).
        members: which members of a unit count (see `Criterion.members`).
        targets: those that need it, of all criteria that ask for the same.
    """

    statistic: str
    options: Mapping[str, Option]
    members: str
    targets: list[Target] = field(default_factory=list)

    @property
    def groups(self) -> list[GroupTarget]:
        """The structural targets."""
        return [t for t in self.targets if isinstance(t, GroupTarget)]


@dataclass(frozen=True, eq=False)
class Run:
    """One batch of a pass."""

    number: int
    batch: Batch

    @property
    def n(self) -> int:
        """Samples in the batch."""
        return batch_size(self.batch[0])

    @property
    def inputs(self) -> Inputs:
        """What the model is called with."""
        inputs: Inputs = self.batch[0]
        return inputs


class Collector:
    """Watches a pass over the batches and leaves sums over samples.

    Attributes:
        turn: the pass over the batches in which it works: 0 for the first; 1 for what needs a
            result of the first, such as a Hessian times the mean gradient.
        repeats: passes over the batches that it sees, from `turn` on: epochs of what trains.
        shares: what it needs of the run that all collectors share.
        depends: statistics that it builds on; their collectors, for the same targets and members,
            are in `others` by name.
        not_shared: why several processes, each with its part of the data, cannot give what one
            gives; empty where they can.
    """

    turn: ClassVar[int] = 0
    repeats: int = 1
    shares: Literal["nothing", "forward", "backward"] = "nothing"
    depends: ClassVar[tuple[str, ...]] = ()
    not_shared: ClassVar[str] = ""

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        self.setting, self.request, self.sums = setting, request, sums
        self.notes: list[str] = []
        self.others: dict[str, Collector] = {}

    def begin(self, run: Run) -> None:
        """Look at the first batch before the pass, to probe or to refuse."""

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Open during the shared forward and backward of a batch: hooks go here."""
        return nullcontext()

    def wants(self) -> Iterable[str]:
        """Names of parameters whose gradient of the mean loss `gradient` is to be told."""
        return ()

    def gradient(self, run: Run, name: str, grad: Tensor) -> None:
        """Take one gradient as it arrives; it is gone afterwards, and must not be changed."""

    def leaves(self) -> Sequence[Tensor]:
        """Tensors that were put into the model during the shared forward."""
        return ()

    def arrived(self, run: Run) -> None:
        """After the shared run: `.grad` of the leaves is there, or None where nothing came."""

    def alone(self, run: Run) -> None:
        """Run the model by oneself."""

    def merged(self) -> None:
        """After the sums of all ranks were added up: refuse what does not add up."""

    def element(self, name: str) -> Tensor:
        """The statistic of one parameter, of a shape that broadcasts to the parameter's."""
        raise AssertionError(f"{self.request.statistic} is not known for single elements")

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64 on the CPU: the statistic of each unit."""
        raise AssertionError(f"{self.request.statistic} is not known for units")

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """Why this statistic cannot be had for a target, or an empty text; asked before any pass.

        By default: when units have no learned member of the chosen kind.
        """
        if isinstance(target, WeightTarget):
            return ""
        owned = {int(u) for m in members_of(target, members, params) for u in m.unit}
        missing = target.n_units - len(owned)
        return f"no learned {members} member for {missing} units" if missing else ""

    def parameters(self) -> list[str]:
        """Names of the parameters in which the chosen members of all targets live."""
        names: dict[str, None] = {}
        for target in self.request.targets:
            if isinstance(target, WeightTarget):
                names[target.name] = None
            else:
                members = members_of(target, self.request.members, self.setting.params)
                names |= dict.fromkeys(m.tensor for m in members)
        return list(names)

    def count(self, run: Run) -> None:
        """Remember how many samples were seen; the pass calls it after each batch."""
        self.sums.add("samples", torch.tensor(float(run.n), dtype=torch.float64))

    @property
    def n_samples(self) -> int:
        """Samples seen."""
        return int(self.sums["samples"]) if "samples" in self.sums else 0


COLLECTORS: dict[str, type[Collector]] = {}
"""Statistic -> what collects it."""


def register_statistic(
    name: str, collector: type[Collector], statistic: Statistic | None = None
) -> None:
    """Tell who collects a statistic, and what it is if criteria cannot know it yet.

    Args:
        name: as criteria name it in `needs`.
        collector: a subclass of `Collector`.
        statistic: its description; None for one that `STATISTICS` holds already.

    Raises:
        ConfigError: the name is taken, or nothing describes it.
    """
    if name in COLLECTORS:
        raise ConfigError(f"statistic {name!r} is already registered; choose another name")
    if statistic is not None:
        if name in STATISTICS:
            raise ConfigError(f"statistic {name!r} is described already; choose another name")
        STATISTICS[name] = statistic
    if name not in STATISTICS:
        raise ConfigError(f"statistic {name!r} has no description; give statistic=Statistic(...)")
    COLLECTORS[name] = collector


# -- what collectors share ---------------------------------------------------------------------


def generator_for(setting: Setting, *names: object) -> torch.Generator:
    """A generator that depends on the seed and these names only, whatever was drawn before."""
    text = "/".join(map(str, (setting.seed, *names)))
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def call_with(model: nn.Module, substituted: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """Outputs of the model with some parameters replaced; the model is not changed."""
    if isinstance(inputs, dict):
        return functional_call(model, dict(substituted), (), inputs)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return functional_call(model, dict(substituted), args)


def loss_with(setting: Setting, run: Run, substituted: Mapping[str, Tensor]) -> Tensor:
    """The scalar mean loss of a batch with some parameters replaced.

    Raises:
        ScoringError: it is not finite.
    """
    assert setting.loss_fn is not None
    inputs, targets = run.batch
    loss = setting.loss_fn(call_with(setting.model, substituted, inputs), targets).reshape(())
    if not torch.isfinite(loss.detach()):
        raise ScoringError(
            f"batch {run.number}: the loss is {loss.item()}; check the data and the model"
        )
    return loss


@contextmanager
def requiring_grad(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let these parameters require a gradient, and no longer afterwards."""
    held = list(params)
    try:
        for p in held:
            p.requires_grad_(True)
        yield
    finally:
        for p in held:
            p.requires_grad_(False)
