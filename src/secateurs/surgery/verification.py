"""Is the smaller model the same function as the masked one? Compared on the example inputs.

The masked model is the user's own module with every slice of a removed unit set to zero. The error
is max|a - b| / (1 + max|a|) over all outputs: at most 1e-5 in float32 and 1e-10 in float64. Above
that, or in a lower precision, the comparison is repeated in float64 before it counts as unsound.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.batches import call_model, clone_inputs, in_mode, preserve, tensors
from secateurs.errors import CaptureError, SoundnessError
from secateurs.masks import apply_masks_
from secateurs.types import Inputs, Plan

__all__ = ["TOLERANCE", "Verification", "masked_copy", "verify"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Verification:
    """Result of a comparison.

    Attributes:
        error: max|masked - small| / (1 + max|masked|) over all outputs; NaN if not comparable.
        tolerance: the limit that applied.
        dtype: precision of the deciding comparison.
        comparable: False when the model draws random numbers in eval mode.
        changed: the same measure between the dense and the masked model: 0 means that the cut
            has no effect on these inputs, so that the comparison says little.
    """

    error: float
    tolerance: float
    dtype: str
    comparable: bool
    changed: float

    @property
    def ok(self) -> bool:
        """Whether the two are equal (or cannot be compared)."""
        return not self.comparable or self.error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "text": self.text()}

    def text(self) -> str:
        """One sentence for people."""
        if not self.comparable:
            return "not comparable: the model draws random numbers in eval mode"
        verdict = "equals" if self.ok else "does NOT equal"
        return (
            f"the smaller model {verdict} the masked one: error {self.error:.1e}, "
            f"limit {self.tolerance:.0e} ({self.dtype})"
        )


def masked_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the dense model in which everything that the plan removes is zero."""
    copied = copy.deepcopy(model)
    apply_masks_(copied, plan.masks)
    return copied


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Inputs,
    *,
    strict: bool = True,
) -> Verification:
    """Compare the masked dense model with the smaller one, in eval mode.

    Args:
        model: the dense model (masked or not) from which `small` was made; not changed.
        small: the result of `shrink`; not changed.
        plan: what was removed.
        example_inputs: what to run.
        strict: raise when they differ; else only report.

    Raises:
        SoundnessError: outputs differ by more than the tolerance, or in structure or shape.
        CaptureError: a model refuses the inputs.
    """
    masked = masked_copy(model, plan)
    inputs = clone_inputs(example_inputs)
    dense_out = _outputs(model, inputs, "the dense model")
    first = _outputs(masked, inputs, "the masked model")
    again = _outputs(masked, inputs, "the masked model", seed=1)
    dtype = _precision(model)
    if relative_error(first, again) > 0:
        return Verification(float("nan"), TOLERANCE[torch.float32], str(dtype)[6:], False, 0.0)
    result = _outputs(small, inputs, "the smaller model")
    _same_structure(first, result)
    changed = relative_error(dense_out, first)
    error = relative_error(first, result)
    limit = TOLERANCE.get(dtype, 0.0)
    if error > limit and dtype != torch.float64:
        dtype = torch.float64
        limit = TOLERANCE[dtype]
        wide = _widen(inputs)
        first = _outputs(copy.deepcopy(masked).double(), wide, "the masked model")
        error = relative_error(
            first, _outputs(copy.deepcopy(small).double(), wide, "the smaller model")
        )
    outcome = Verification(error, limit, str(dtype)[6:], True, changed)
    if strict and not outcome.ok:
        raise SoundnessError(
            f"{outcome.text()}. The result is not used; please report the architecture"
        )
    return outcome


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    """max|a - b| / (1 + max|a|) over pairs of tensors; infinity where one is not finite alone."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel() == 0:
            continue
        if not x.is_floating_point():
            if not torch.equal(x, y):
                return float("inf")
            continue
        both = (torch.isfinite(x) & torch.isfinite(y)) | (x == y) | (x.isnan() & y.isnan())
        if not bool(both.all()):
            return float("inf")
        finite = torch.isfinite(x)
        if finite.any():
            gap = (x[finite] - y[finite]).abs().max() / (1 + x[finite].abs().max())
            worst = max(worst, float(gap))
    return worst


def _precision(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _widen(inputs: Inputs) -> Inputs:
    wide: Inputs = pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    return wide


def _outputs(model: nn.Module, inputs: Inputs, who: str, seed: int = 0) -> list[Tensor]:
    with preserve(model), in_mode(model, training=False), torch.no_grad():
        torch.manual_seed(seed)
        try:
            found = tensors(call_model(model, clone_inputs(inputs)))
        except Exception as error:
            raise CaptureError(f"{who} refuses the example inputs: {error}") from error
    if not found:
        raise CaptureError(f"{who} returns no tensor")
    return [t.detach() for t in found]


def _same_structure(a: list[Tensor], b: list[Tensor]) -> None:
    shapes = [tuple(x.shape) for x in a], [tuple(x.shape) for x in b]
    if shapes[0] != shapes[1]:
        raise SoundnessError(
            f"the smaller model returns shapes {shapes[1]}, the masked one {shapes[0]}"
        )
