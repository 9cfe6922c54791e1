"""Scores as values: to keep in a file, to narrow, to combine, to compare.

    Scores <-> one .safetensors file                save_scores, load_scores
    Scores, patterns -> Scores                      subset
    several Scores of the same units -> Scores      combine
    several Scores of the same units -> Agreement   agreement

Nothing here runs a model. Scores are comparable over all targets of a network, as allocation
"global" compares them: ranks and normalisation are taken over the network, unless a function says
otherwise. Units removed earlier (`-inf`) take part in nothing and stay `-inf`.
"""

from secateurs.scores.combining import combine
from secateurs.scores.comparing import Agreement, agreement
from secateurs.scores.files import load_scores, save_scores
from secateurs.scores.units import check_scores, subset

__all__ = [
    "Agreement",
    "agreement",
    "check_scores",
    "combine",
    "load_scores",
    "save_scores",
    "subset",
]
