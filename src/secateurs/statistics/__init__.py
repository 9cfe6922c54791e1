"""Statistics that criteria need, streamed over the batches so that one pass feeds many criteria.

    units        which members of a unit count, and sums from elements to units
    gates        per-sample gate gradients, by multiplying activations with ones
    activations  mean |activation|
    removals     what removing each unit does: finite differences and directional derivatives
    stream       the pass itself

What is made here lives for one pass; nothing here changes the model.
"""

from __future__ import annotations

from secateurs.statistics.stream import Job, Pass, make_job
from secateurs.statistics.units import Parameters, check_fits, members_of, removal_role

__all__ = ["Job", "Parameters", "Pass", "check_fits", "make_job", "members_of", "removal_role"]
