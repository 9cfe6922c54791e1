"""What is asked for: how much may remain (`Budget`), or below which score units go (`Threshold`).

Both are blocks of a recipe and arguments of `allocate` and `prune`, and check themselves.
"""

from secateurs.asked.budget import QUANTITIES, Budget
from secateurs.asked.threshold import RULES, THRESHOLD_FIELDS, Parameter, Rule, Threshold

__all__ = [
    "QUANTITIES",
    "RULES",
    "THRESHOLD_FIELDS",
    "Budget",
    "Parameter",
    "Rule",
    "Threshold",
]
