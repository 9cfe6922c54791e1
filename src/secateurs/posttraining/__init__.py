"""Repairs without training: minutes, a few hundred samples, no labels.

Each works in place on a masked model, or on a smaller one of the same class, leaves everything as
it was if it fails, and returns what it `Won`.

    reconstruct         least squares: the weights that stay answer for those that are gone
    recalibrate_norms   running statistics of norms, measured again; after the others, if at all
    compensate_bias     what removed units said on average goes into biases; instead of reconstruct
    prune_layerwise     single weights pruned layer by layer: SparseGPT, Wanda
    search_masks        heads, neurons, channels by Fisher information, rearranged, solved again
"""

from secateurs.posttraining.bias import compensate_bias
from secateurs.posttraining.config import FisherSearch, LayerwiseCut
from secateurs.posttraining.fisher_gates import GateFisher, any_output, gate_fisher
from secateurs.posttraining.fisher_search import FisherMasks, search_masks
from secateurs.posttraining.layerwise import prune_layerwise
from secateurs.posttraining.norms import recalibrate_norms
from secateurs.posttraining.rearranging import rearrange
from secateurs.posttraining.reconstruction import reconstruct
from secateurs.posttraining.scaling import tune_scales_
from secateurs.posttraining.won import Won

__all__ = [
    "FisherMasks",
    "FisherSearch",
    "GateFisher",
    "LayerwiseCut",
    "Won",
    "any_output",
    "compensate_bias",
    "gate_fisher",
    "prune_layerwise",
    "rearrange",
    "recalibrate_norms",
    "reconstruct",
    "search_masks",
    "tune_scales_",
]
