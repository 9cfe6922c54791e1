"""How many units each target keeps: one rounding, totals exact.

    Scores, Budget | Threshold -> Counts

A budget says what may remain, and an allocator distributes it; every allocator has the signature
`allocator(problem) -> counts`. A threshold needs no allocator: every rule has the signature
`fn(scores, p, null) -> cut`, units whose score is below the cut go, and `preview` says which would.
Either way each target loses its worst units first, so counts are all there is to decide.
"""

from secateurs.allocation import marginal, ranking, shares  # noqa: F401  (they fill the registry)
from secateurs.allocation.counts import allocate, preview
from secateurs.allocation.curves import Curve, Sensitivity
from secateurs.allocation.frame import same_place
from secateurs.allocation.previews import Preview, PreviewRow
from secateurs.allocation.problem import ALLOCATORS, BY_SIZE, Problem, allocator
from secateurs.allocation.rounding import Rounding, RoundTo, check_round_to
from secateurs.allocation.thresholds import THRESHOLDS, threshold

__all__ = [
    "ALLOCATORS",
    "BY_SIZE",
    "THRESHOLDS",
    "Curve",
    "Preview",
    "PreviewRow",
    "Problem",
    "RoundTo",
    "Rounding",
    "Sensitivity",
    "allocate",
    "allocator",
    "check_round_to",
    "preview",
    "same_place",
    "threshold",
]
