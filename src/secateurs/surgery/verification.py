"""Is the smaller model the same function as the masked one? Compared on the example inputs.

The masked model is the user's own module with every slice of a removed unit set to zero. The error
is max|a - b| / (1 + max|a|) over all outputs: at most 1e-5 in float32 and 1e-10 in float64. Above
that, or in a lower precision, the comparison is repeated in float64 before it counts as unsound.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.batches import call_model, clone_inputs, in_mode, preserve, tensors
from secateurs.errors import CaptureError, SoundnessError
from secateurs.masks import apply_masks_, named_tensors
from secateurs.surgery.graph_form import in_float64
from secateurs.types import Inputs, Plan

__all__ = ["TOLERANCE", "Verification", "copied", "masked_copy", "train_note", "verify"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROUGH = {torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Limits where a model in low precision cannot be run in float64."""

NOISE = 10.0
"""How many times the size of its own random draws a noisy model may differ."""


@dataclass(frozen=True)
class Verification:
    """Result of a comparison.

    Attributes:
        error: max|masked - small| / (1 + max|masked|) over all outputs; NaN if not comparable.
        tolerance: the limit that applied.
        dtype: precision of the deciding comparison.
        comparable: False when the model draws random numbers in eval mode, and the difference
            is of their size.
        changed: the same measure between the dense and the masked model: 0 means that the cut
            has no effect on these inputs, so that the comparison says little; infinite, that it
            makes outputs not finite; NaN, that nothing was compared.
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
            + ("; the cut makes outputs not finite" if math.isinf(self.changed) else "")
        )


def copied(model: nn.Module) -> nn.Module:
    """A deep copy without gradients.

    Raises:
        CaptureError: the model refuses to be copied, or has no values.
    """
    if any(t.is_meta for t in named_tensors(model).values()):
        raise CaptureError(
            "the model is on the meta device, without values: it can be traced, but there is "
            "nothing to remove or compare. Load the weights first"
        )
    try:
        new = copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"the model must be copyable by copy.deepcopy: {error}. Remove cached outputs and "
            "open handles from its attributes"
        ) from error
    for p in new.parameters():
        p.grad = None
    return new


def masked_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the dense model in which everything that the plan removes is zero."""
    new = copied(model)
    apply_masks_(new, plan.masks)
    return new


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
    first = _outputs(masked, inputs, "the masked model")
    again = _outputs(masked, inputs, "the masked model", seed=1)
    result = _outputs(small, inputs, "the smaller model")
    dtype = _precision(model)
    limit = TOLERANCE.get(dtype, 0.0)
    same = _shapes(first) == _shapes(again)
    noise = relative_error(first, again) if same else float("inf")
    if same:
        _same_structure(first, result)
    away = relative_error(first, result) if _shapes(first) == _shapes(result) else float("inf")
    if noise > 0 and limit < away <= NOISE * noise:
        return Verification(float("nan"), limit, _name(dtype), False, float("nan"))
    changed = relative_error(_outputs(model, inputs, "the dense model"), first)
    error = away
    if error > limit and dtype != torch.float64 and not noise:
        error, dtype, limit = _deciding(masked, small, inputs, error, dtype)
    outcome = Verification(error, limit, _name(dtype), True, changed)
    if strict and not outcome.ok:
        raise SoundnessError(f"{outcome.text()}. {_why(first, result)}")
    return outcome


def _deciding(
    masked: nn.Module, small: nn.Module, inputs: Inputs, error: float, dtype: torch.dtype
) -> tuple[float, torch.dtype, float]:
    """The comparison in float64; where the code has a precision written into it, as it was."""
    wide = _widen(inputs)
    try:
        a = _outputs(in_float64(masked), wide, "the masked model")
        b = _outputs(in_float64(small), wide, "the smaller model")
    except CaptureError:
        return error, dtype, TOLERANCE.get(dtype, ROUGH.get(dtype, 0.0))
    return relative_error(a, b), torch.float64, TOLERANCE[torch.float64]


def _why(masked: list[Tensor], small: list[Tensor]) -> str:
    """What a user should make of a difference."""
    finite = [all(bool(torch.isfinite(t).all()) for t in side) for side in (masked, small)]
    if finite == [False, True]:
        return (
            "The masked model returns values that are not finite: it divides by what is removed, "
            "or takes its logarithm. Exclude these units"
        )
    return "The result is not used; please report the architecture"


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precision(model: nn.Module) -> torch.dtype:
    """The least precise floating-point type among the parameters."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _widen(inputs: Inputs) -> Inputs:
    wide: Inputs = pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    return wide


def _outputs(
    model: nn.Module, inputs: Inputs, who: str, seed: int = 0, *, training: bool = False
) -> list[Tensor]:
    with preserve(model), in_mode(model, training=training), torch.no_grad():
        torch.manual_seed(seed)
        try:
            found = tensors(call_model(model, clone_inputs(inputs)))
        except Exception as error:
            raise CaptureError(f"{who} refuses the example inputs: {error}") from error
    if not found:
        raise CaptureError(f"{who} returns no tensor")
    return [t.detach() for t in found]


def _shapes(outputs: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in outputs]


def _same_structure(a: list[Tensor], b: list[Tensor]) -> None:
    if _shapes(a) != _shapes(b):
        raise SoundnessError(
            f"the smaller model returns shapes {_shapes(b)}, the masked one {_shapes(a)}"
        )


def train_note(masked: nn.Module, small: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """A note when the two differ in train mode and no random numbers explain it."""
    try:
        a, again, b = (
            _outputs(m, inputs, "the model in train mode", seed=seed, training=True)
            for m, seed in ((masked, 0), (masked, 1), (small, 0))
        )
    except CaptureError:
        return ()  # a batch too small for a batch norm, or a train mode with other inputs
    if _shapes(a) != _shapes(again) or relative_error(a, again) > 0:
        return ()
    error = relative_error(a, b) if _shapes(a) == _shapes(b) else float("inf")
    if error <= 1e-3:
        return ()
    return (
        f"equal in eval mode only: in train mode the outputs differ by {error:.1e}, because the "
        "model does something else there to what was removed",
    )
