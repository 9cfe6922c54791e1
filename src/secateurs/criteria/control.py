"""Controls: what a criterion must beat before it is believed."""

from __future__ import annotations

from torch import Tensor

from secateurs.criteria.registry import Stats, criterion


@criterion(
    "random",
    needs={"noise"},
    family="control",
    options={"seed": 0},
    formula="uniform noise in [0, 1)",
    reference="control asked for by Blalock et al., 2020, arXiv:2003.03033",
)
def random(stats: Stats) -> Tensor:
    """Seeded noise: the control that belongs beside every result.

    It knows nothing. A criterion that is not ahead of it, with the same budget and the same
    training, has not shown that it knows anything either.

    Use it beside every criterion, with several seeds.

    Avoid it as a method: where a network is so redundant that it does as well as the others, cut
    deeper.
    """
    return stats["noise"]
