"""The penalty as a tensor that autograd can follow: plain, slow, what the fast one must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateurs.penalties.config import Penalty
from secateurs.penalties.places import families_of
from secateurs.types import Graph

__all__ = ["penalty_value"]


def penalty_value(
    model: nn.Module,
    graph: Graph,
    config: Penalty,
    *,
    granularity: str | Sequence[str] = "structured",
    units: Mapping[str, Tensor] | None = None,
    strength: float | None = None,
) -> Tensor:
    """The scalar that `config` adds to the loss, with its graph, to be added by hand.

    Its gradient at a unit that is zero is not defined for "group_lasso"; here, as in `UnitPenalty`,
    it is zero.

    Args:
        model, graph, config, granularity, units: as in `UnitPenalty`.
        strength: instead of that of `config`; "growing" is given where it has grown to, else its
            end is meant.

    Raises:
        ConfigError: as `UnitPenalty.start`.

    Example:
        >>> import secateurs as sc
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0], [0.0]]))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[4.0, 1.0]]))
        >>> graph = sc.trace(net, torch.ones(1, 1))
        >>> penalty = Penalty("group_lasso", strength=1.0)
        >>> round(penalty_value(net, graph, penalty).item(), 4)  # sqrt(2) (5 + 1)
        8.4853
    """
    families, _ = families_of(model, graph, config.rule, granularity, units)
    parts = []
    for family in families:
        each: list[list[Tensor]] = [[] for _ in range(family.n_units)]
        for place in family.places:
            for i, u in zip(place.index.tolist(), place.unit.tolist(), strict=True):
                each[u].append(place.weight.select(place.dim, i).reshape(-1))
        for u in family.chosen.nonzero().reshape(-1).tolist():
            if not each[u]:
                continue
            w = torch.cat(each[u])
            if config.rule == "norm_scale":
                parts.append(w.abs().sum())
            elif config.rule == "growing":
                parts.append(w.square().sum() / 2)
            elif bool((w.detach() != 0).any()):
                parts.append(len(w) ** 0.5 * w.square().sum().sqrt())
    total = torch.stack(parts).sum() if parts else torch.zeros(())
    return (config.full if strength is None else strength) * total
