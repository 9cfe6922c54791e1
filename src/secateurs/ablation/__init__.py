"""`ablate`: a criterion against its controls over several seeds, with a verdict in words.

for each seed: the criterion itself and every control, same dense network, budget, schedule
    and training -> one Row each, written when it is done
Rows -> paired differences -> Comparisons -> verdict
"""

from secateurs.ablation.plan import Intended, Job, check_ablation, controlled
from secateurs.ablation.rows import Row
from secateurs.ablation.run import Ablation, ablate
from secateurs.ablation.verdict import Comparison, Difference, compare, difference, verdict

__all__ = [
    "Ablation",
    "Comparison",
    "Difference",
    "Intended",
    "Job",
    "Row",
    "ablate",
    "check_ablation",
    "compare",
    "controlled",
    "difference",
    "verdict",
]
