"""What cutting each target alone would cost, as measured: the curves behind "where to cut".

    model, batches, Scores -> MeasuredSensitivity     a curve for each target, and words about them

`measure` runs the data with more and more units masked, one target at a time; `replay` spares it
the part of the network that a cut does not reach; `cache` keeps finished curves on disk; `found`
holds the result and says what follows from it.
"""

from secateurs.sensitivities.found import MeasuredSensitivity
from secateurs.sensitivities.measure import FRACTIONS, sensitivity

__all__ = ["FRACTIONS", "MeasuredSensitivity", "sensitivity"]
