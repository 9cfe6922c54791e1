"""Masks that change while training: entries are dropped, and others grow in their place.

    regrow_masks(model, optimizer, masks, Regrow("rigl"), n_steps=10_000)   around your own loop
    finetune(..., masks=masks, parts=[Regrowth(Regrow("rigl"))])            inside of ours

Both move masks that are held (`secateurs.masks`), by one of `RULES`. From a pruned network they
correct a cut that was wrong; from `random_masks` they train a network that is sparse throughout.
"""

from secateurs.regrowth.config import FADES, Regrow
from secateurs.regrowth.history import Update
from secateurs.regrowth.loop import regrow_masks
from secateurs.regrowth.part import Regrowth
from secateurs.regrowth.rules import RULES
from secateurs.regrowth.start import random_masks

__all__ = ["FADES", "RULES", "Regrow", "Regrowth", "Update", "random_masks", "regrow_masks"]
