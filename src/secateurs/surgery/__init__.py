"""Physically remove what a plan cut, prove it, and keep it in portable files.

shrink(model, plan, example_inputs) -> smaller module, verified against the masked model
verify(model, small, plan, example_inputs) -> Verification
save(small, plan, directory) / load(directory, factory) -> module, bit-identical outputs
"""

from secateurs.surgery.files import load, save
from secateurs.surgery.shrinking import ShrinkInfo, shrink, slice_masks
from secateurs.surgery.verification import Verification, masked_copy, verify

__all__ = [
    "ShrinkInfo",
    "Verification",
    "load",
    "masked_copy",
    "save",
    "shrink",
    "slice_masks",
    "verify",
]
