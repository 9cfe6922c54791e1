"""Before the cut: penalties that make what is going to be removed small while the network trains.

    finetune(..., parts=[UnitPenalty(Penalty("group_lasso"), graph)])    inside the library's loop
    penalty.start(...); loss.backward(); penalty.gradients(step)         inside your own

A penalty acts on whole units, everywhere they live: on the members that the graph found.
`penalty_value` is the same number by autograd, slower; the tests hold one against the other.
"""

from secateurs.penalties.config import RULES, Penalty
from secateurs.penalties.part import UnitPenalty
from secateurs.penalties.value import penalty_value

__all__ = ["RULES", "Penalty", "UnitPenalty", "penalty_value"]
