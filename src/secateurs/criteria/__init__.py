"""Criteria: what makes a weight or unit matter. One file per family, one function per criterion.

    fn(stats) -> contribution      the predicted increase of the loss when it is removed

`taylor` is the usual choice; `random` is the control that belongs beside every result. To add one:
write the function, decorate it with `criterion`, add a row to the law tests.
"""

from __future__ import annotations

# Importing a family registers its criteria.
from secateurs.criteria import (
    activation,
    attribution,
    control,
    curvature,
    directional,
    gradient,
    information,
    synaptic,
    weight,
    window,
)
from secateurs.criteria.combination import Combination, CriterionLike, get_combination
from secateurs.criteria.registry import (
    CRITERIA,
    FINISH,
    STATISTICS,
    Criterion,
    criterion,
    get_criterion,
)

__all__ = [
    "CRITERIA",
    "FINISH",
    "STATISTICS",
    "Combination",
    "Criterion",
    "CriterionLike",
    "activation",
    "attribution",
    "control",
    "criterion",
    "curvature",
    "directional",
    "get_combination",
    "get_criterion",
    "gradient",
    "information",
    "synaptic",
    "weight",
    "window",
]
