"""Criteria along the direction v = -(the unit's weights) that removes a unit.

With f the loss or the output of the network, `finite_difference` is the quotient
(f(theta + t v) - f(theta)) / t: at t = 1 the exact effect of the removal, the oracle against which
the others are measured. `directional` is its limit for t -> 0, the derivative along v. With the
loss that is <dL/dtheta, v>, one backward pass for all units; with the output it is J v, one
forward-mode product for each unit, and needs no labels.
"""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import Stats, criterion


@criterion(
    "directional",
    needs={"gate"},
    family="directional",
    finish="abs",
    members="removal",
    options={"of": "loss"},
    allowed={"of": ("loss", "output")},
    variants={"of=output": {"needs": frozenset({"jvp_output"})}},
    formula='|<dL/dtheta, v>|; of="output": mean over samples of ||J v||_2',
    reference="Baydin et al., Automatic Differentiation: a Survey, 2018, arXiv:1502.05767",
)
def directional(stats: Stats) -> Tensor:
    """The derivative of the loss or output along the direction that removes the unit."""
    return stats["jvp_output"] if "jvp_output" in stats else -stats["gate"]


@criterion(
    "finite_difference",
    needs={"ablation"},
    family="directional",
    members="removal",
    options={"step": 1.0, "of": "loss"},
    allowed={"step": (1e-6, 1.0), "of": ("loss", "output")},
    formula='(L(theta + t v) - L(theta)) / t; of="output": mean of ||f(theta + t v) - f(theta)||/t',
    reference="exact ablation: Mozer and Smolensky, Skeletonization, 1989",
)
def finite_difference(stats: Stats) -> Tensor:
    """The change of the loss or output after a step t towards removal; t = 1 is the exact ablation.

    With the loss it is signed: a unit whose removal lowers the loss scores below zero and goes
    first. One forward pass for each unit and batch.
    """
    return stats["ablation"]
