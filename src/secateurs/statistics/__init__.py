"""Statistics that criteria need, streamed over the batches so that one pass feeds many criteria.

    collector    what a collector is; `register_statistic` adds one
    sums         what it leaves behind: sums over samples, which merge exactly
    units        which members of a unit count, and sums from elements to units
    hooks        activations at sites of the model
    gates        gates on units: per-sample derivatives from one backward pass
    gradients    gradients of single weights
    activations  mean |activation|
    removals     what removing each unit does: finite differences and directional derivatives
    jobs         from statistics to scores
    stream       the pass itself

What is made here lives for one pass; nothing here changes the model.
"""

from __future__ import annotations

# Importing a module registers its statistics.
from secateurs.statistics import activations, gradients, removals, simple
from secateurs.statistics.collector import (
    COLLECTORS,
    Collector,
    Request,
    Run,
    Setting,
    register_statistic,
)
from secateurs.statistics.jobs import Job, make_job
from secateurs.statistics.stream import Pass
from secateurs.statistics.sums import Sums
from secateurs.statistics.units import Parameters, check_fits, members_of, removal_role

__all__ = [
    "COLLECTORS",
    "Collector",
    "Job",
    "Parameters",
    "Pass",
    "Request",
    "Run",
    "Setting",
    "Sums",
    "activations",
    "check_fits",
    "gradients",
    "make_job",
    "members_of",
    "register_statistic",
    "removal_role",
    "removals",
    "simple",
]
