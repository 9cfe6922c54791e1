"""A job: one criterion on the targets that it can score, and how its statistics become scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateurs.criteria import FINISH, Criterion
from secateurs.errors import ConfigError
from secateurs.statistics.collector import COLLECTORS
from secateurs.statistics.units import Parameters, into_units, members_of
from secateurs.types import Member, Target, WeightTarget

__all__ = ["Job", "element_scores", "make_job", "member_places"]


@dataclass
class Job:
    """One criterion on the targets that it can score.

    Attributes:
        criterion: with its options.
        targets: what it can score.
        not_scored: target name -> why it cannot.
        notes: what a reader of the scores should know.
    """

    criterion: Criterion
    targets: list[Target]
    not_scored: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def by_gradient(self) -> bool:
        """Whether it needs first derivatives at single elements."""
        return bool(self.criterion.needs & {"grad", "gate"})


def make_job(
    criterion: Criterion,
    targets: Sequence[Target],
    model: nn.Module,
    params: Parameters,
    granularity: str | Iterable[str],
) -> Job:
    """Sort the targets into those that the criterion can score and those that it cannot, and why.

    Raises:
        ConfigError: it can score none.
    """
    reasons = {t.name: _obstacle(criterion, t, model, params) for t in targets}
    job = Job(
        criterion,
        [t for t in targets if not reasons[t.name]],
        {name: reason for name, reason in reasons.items() if reason},
    )
    if not job.targets:
        why = "; ".join(f"{n}: {r}" for n, r in list(job.not_scored.items())[:3])
        raise ConfigError(
            f"criterion {criterion.label!r} can score nothing at granularity {granularity!r}: "
            f"{why or 'the graph has no such targets'}"
        )
    return job


def _obstacle(criterion: Criterion, target: Target, model: nn.Module, params: Parameters) -> str:
    """Why this criterion cannot score this target, or an empty text."""
    if not criterion.covers(target.kind):
        return f"{criterion.name} is not defined for {target.kind} units"
    for need in sorted(criterion.needs):
        why = COLLECTORS[need].obstacle(model, params, target, criterion.members)
        if why:
            return why
    return ""


def member_places(
    criterion: Criterion, target: Target, params: Parameters
) -> list[tuple[str, Member | None]]:
    """The parameters over which a criterion sums for one target, and where the units live there.

    None for a target that is the parameter itself.
    """
    if isinstance(target, WeightTarget):
        return [(target.name, None)]
    return [(m.tensor, m) for m in members_of(target, criterion.members, params)]


@torch.no_grad()
def element_scores(
    criterion: Criterion,
    target: Target,
    params: Parameters,
    stats_of: Callable[[str], Mapping[str, Tensor]],
) -> Tensor:
    """(n_units,) float64 finished scores from statistics of elements.

    Args:
        criterion: of level "element".
        target: one weight or one family of units.
        params: the parameters of the model.
        stats_of: parameter name -> its statistics.
    """
    finish = FINISH[criterion.finish]

    def contribution(name: str) -> Tensor:
        return criterion.fn(stats_of(name)).broadcast_to(params[name].shape)

    out = torch.zeros(target.n_units, dtype=torch.float64)
    for name, member in member_places(criterion, target, params):
        values = contribution(name)
        if member is None:
            return finish(values).reshape(-1).double().cpu()
        into_units(finish(values) if criterion.finish_on == "element" else values, member, out)
    return finish(out) if criterion.finish_on == "unit" else out
