"""What is special about each criterion: one row each. A criterion without a row fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LAWS", "Law"]


@dataclass(frozen=True)
class Law:
    """What is special about a criterion.

    Attributes:
        rescaling: power p such that scaling a relu unit's producers by a and its consumers by 1/a
            scales its score by a^p; None: no such law.
        partition: whether scores are independent of the cut into batches.
        signed: whether scores may be negative.
        permutes: whether shuffling the units of a layer shuffles their scores and nothing else.
        half: relative error allowed in bfloat16, of the largest score; None: not comparable.
    """

    rescaling: float | None
    partition: bool = True
    signed: bool = False
    permutes: bool = True
    half: float | None = 0.2


LAWS: Mapping[str, Law] = {
    "magnitude": Law(1.0),
    "l2_norm": Law(1.0),
    "gradient": Law(-1.0),
    "taylor": Law(0.0),
    "taylor_batch": Law(0.0, partition=False),
    "taylor_element": Law(0.0, partition=False),
    "directional": Law(0.0),
    "directional(of=output)": Law(0.0),
    "finite_difference": Law(0.0, signed=True),
    "finite_difference(of=output)": Law(0.0),
    "activation_mean": Law(1.0),
    "random": Law(None, permutes=False),
}
