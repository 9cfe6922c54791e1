"""Physically remove what a plan cut, prove it, and keep it in portable files.

shrink(model, plan, example_inputs) -> smaller module, verified against the masked model
verify(model, small, plan, example_inputs) -> Verification
settle(small, example_inputs) -> (plain module, Settled): norms count only what is left
Captures.of(model, example_inputs): capture once, shrink by many plans
save(small, plan, directory) / load(directory, factory) -> module, bit-identical outputs
"""

from secateurs.surgery.files import load, save
from secateurs.surgery.graph_form import Captures
from secateurs.surgery.settling import Settled, settle
from secateurs.surgery.shrinking import ShrinkInfo, shrink, slice_masks
from secateurs.surgery.verification import Verification, masked_copy, verify

__all__ = [
    "Captures",
    "Settled",
    "ShrinkInfo",
    "Verification",
    "load",
    "masked_copy",
    "save",
    "settle",
    "shrink",
    "slice_masks",
    "verify",
]
