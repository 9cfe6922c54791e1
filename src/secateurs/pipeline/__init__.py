"""`prune`: score, allocate, select, heal, step by step; then shrink, verify, measure, report.

    check the request: everything that can be found before scoring
    for each stage, for each step of its schedule:
        score -> allocate -> select -> zero -> fine-tune with the cut held at zero
        (too much lost: back to the last good point, bit for bit)
    shrink -> verify -> measure -> report

Everything happens on a copy and under a random state of its own: the caller's model and random
state are not changed, whatever happens.
"""

from secateurs.pipeline.entry import PruneResult, cut_stages, prune, prune_stages
from secateurs.pipeline.request import check_request
from secateurs.pipeline.stage import Stage

__all__ = ["PruneResult", "Stage", "check_request", "cut_stages", "prune", "prune_stages"]
