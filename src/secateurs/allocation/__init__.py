"""How many units each target keeps: one rounding, totals exact.

    Scores, Budget | Threshold -> Counts

A budget says what may remain, and an allocator distributes it; every allocator has the signature
`allocator(problem) -> counts`. A threshold needs no allocator: units whose score is below it go.
Either way each target loses its worst units first, so counts are all there is to decide.
"""

from secateurs.allocation import methods  # noqa: F401  (fills the registry)
from secateurs.allocation.counts import allocate, same_place
from secateurs.allocation.problem import ALLOCATORS, Problem, allocator
from secateurs.allocation.rounding import Rounding, RoundTo, check_round_to

__all__ = [
    "ALLOCATORS",
    "Problem",
    "RoundTo",
    "Rounding",
    "allocate",
    "allocator",
    "check_round_to",
    "same_place",
]
