"""Is the smaller model the same function as the masked one? Compared on the example inputs.

The masked model is the user's own module with every slice of a removed unit set to zero. The error
is max|a - b| / (1 + max|a|) over all outputs: at most 1e-5 in float32 and 1e-10 in float64. Above
that, or in a lower precision, the comparison is repeated in float64 before it counts as unsound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.batches import (
    call_model,
    clone_inputs,
    in_mode,
    named_outputs,
    preserve,
    tensors,
)
from secateurs.errors import CaptureError, ConfigError, PruningError, SoundnessError
from secateurs.graph.tape import record_run
from secateurs.masks import apply_masks_, named_tensors
from secateurs.surgery.comparing import relative_error
from secateurs.surgery.graph_form import Captures, PrunedGraph, in_float64
from secateurs.surgery.lockstep import first_fault
from secateurs.types import Inputs, Plan

__all__ = [
    "compare",
    "TOLERANCE",
    "Verification",
    "copied",
    "difference",
    "masked_copy",
    "relative_error",
    "train_note",
    "verify",
]

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
        fault: the first node of a graph form that differs, in words; empty if none does, or if
            the nodes were not compared.
    """

    error: float
    tolerance: float
    dtype: str
    comparable: bool
    changed: float
    fault: str = ""

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
            + (f". {self.fault}" if self.fault else "")
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
    now = named_tensors(new)
    other = next(
        (n for n, t in named_tensors(model).items() if n not in now and t.is_floating_point()), None
    )
    if other is not None:
        raise CaptureError(
            f"a copy of the model has other names for its tensors: {other!r} is missing there. "
            "(A keras.Sequential is copied so: build it as keras.Model(inputs, outputs).)"
        )
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
    lockstep: bool = False,
    captures: Captures | None = None,
) -> Verification:
    """Compare the masked dense model with the smaller one, in eval mode.

    Where a graph form differs, the two graphs are run node by node and the first node at fault is
    named.

    Args:
        model: the dense model (masked or not) from which `small` was made; not changed.
        small: the result of `shrink`; not changed.
        plan: what was removed.
        example_inputs: what to run.
        strict: raise when they differ; else only report.
        lockstep: compare every node, even if the outputs are equal; `small` must be a graph form.
        captures: of this model, to save capturing it once more for the lockstep.

    Raises:
        SoundnessError: outputs differ by more than the tolerance, or in structure or shape.
        CaptureError: a model refuses the inputs, or cannot be captured for the lockstep.
        ConfigError: a lockstep of something else than a graph form.
    """
    graph = small if isinstance(small, PrunedGraph) else None
    if lockstep and graph is None:
        raise ConfigError(
            f"lockstep compares the nodes of a graph form, and this is a {type(small).__name__}; "
            'shrink with form="graph"'
        )
    try:
        outcome, why = compare(model, masked_copy(model, plan), small, plan, example_inputs)
    except PruningError as error:
        fault = "" if graph is None else _fault(model, graph, plan, example_inputs, captures)
        if not fault:
            raise
        raise SoundnessError(f"{error}. {fault}") from error
    if lockstep and graph is not None:
        captures = captures or Captures.of(copied(model), example_inputs)
        found = first_fault(captures, plan, graph, example_inputs)
        outcome = replace(outcome, fault=found.text() if found is not None else "")
    elif graph is not None and not outcome.ok:
        fault = _fault(model, graph, plan, example_inputs, captures)
        outcome = replace(outcome, fault=fault)
    if strict and (not outcome.ok or outcome.fault):
        raise SoundnessError(f"{outcome.text()}. {why}")
    return outcome


def _fault(
    model: nn.Module, small: PrunedGraph, plan: Plan, inputs: Inputs, captures: Captures | None
) -> str:
    """The first node at fault, to explain a difference that is reported anyway; empty if none can
    be told."""
    try:
        captures = captures or Captures.of(copied(model), inputs)
        found = first_fault(captures, plan, small, inputs)
    except (PruningError, RuntimeError):
        return ""
    return found.text() if found is not None else ""


def compare(
    model: nn.Module, masked: nn.Module, small: nn.Module, plan: Plan, example_inputs: Inputs
) -> tuple[Verification, str]:
    """The outputs of the masked and the smaller model, and what to make of a difference."""
    inputs = clone_inputs(example_inputs)
    first = _outputs(masked, inputs, "the masked model", plan.outputs)
    result = _outputs(small, inputs, "the smaller model", plan.outputs)
    dtype = _precision(model)
    limit = TOLERANCE.get(dtype, 0.0)
    error = relative_error(first, result) if _shapes(first) == _shapes(result) else float("inf")
    noise = 0.0
    if error > limit:  # random numbers may explain it
        again = _outputs(masked, inputs, "the masked model", plan.outputs, seed=1)
        same = _shapes(first) == _shapes(again)
        noise = relative_error(first, again) if same else float("inf")
        if same:
            _same_structure(first, result)
        if noise > 0 and error <= NOISE * noise:
            return Verification(float("nan"), limit, _name(dtype), False, float("nan")), ""
    dense = _outputs(model, inputs, "the dense model", plan.outputs)
    changed = relative_error(dense, first)
    if error > limit and dtype != torch.float64 and not noise:
        error, dtype, limit = _deciding(masked, small, inputs, plan.outputs, error, dtype)
    if error > limit and dtype == torch.float64:
        dtype = _lowest(masked, inputs)
        limit = TOLERANCE.get(dtype, ROUGH.get(dtype, 0.0))
    return Verification(error, limit, _name(dtype), True, changed), _why(first, result)


def _lowest(model: nn.Module, inputs: Inputs) -> torch.dtype:
    """The least precise type in which a float64 model computes: its code may have one in it."""
    found = {v.dtype for v in record_run(model, inputs).values if v.source == "op"}
    wide = [dtype for dtype in found if dtype.is_floating_point]
    return max(wide, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def _deciding(
    masked: nn.Module,
    small: nn.Module,
    inputs: Inputs,
    names: Sequence[str],
    error: float,
    dtype: torch.dtype,
) -> tuple[float, torch.dtype, float]:
    """The comparison in float64; where the code has a precision written into it, as it was."""
    wide = _widen(inputs)
    try:
        a = _outputs(in_float64(masked), wide, "the masked model", names)
        b = _outputs(in_float64(small), wide, "the smaller model", names)
    except CaptureError:
        return error, dtype, TOLERANCE.get(dtype, ROUGH.get(dtype, 0.0))
    return relative_error(a, b), torch.float64, TOLERANCE[torch.float64]


def difference(a: nn.Module, b: nn.Module, inputs: Inputs, names: Sequence[str] = ()) -> float:
    """max|a - b| / (1 + max|a|) over the outputs of two models in eval mode.

    Raises:
        CaptureError: a model refuses the inputs.
    """
    first, second = (_outputs(m, inputs, "the model", names) for m in (a, b))
    return relative_error(first, second) if _shapes(first) == _shapes(second) else float("inf")


def _why(masked: list[Tensor], small: list[Tensor]) -> str:
    """What a user should make of a difference."""
    finite = [all(bool(torch.isfinite(t).all()) for t in side) for side in (masked, small)]
    if finite == [False, True]:
        return (
            "The masked model returns values that are not finite: it divides by what is removed, "
            "or takes its logarithm. Exclude these units"
        )
    return "The result is not used; please report the architecture"


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
    model: nn.Module,
    inputs: Inputs,
    who: str,
    names: Sequence[str] = (),
    *,
    seed: int = 0,
    training: bool = False,
) -> list[Tensor]:
    """The tensors of the named outputs of a run, or of all."""
    with preserve(model), in_mode(model, training=training), torch.no_grad():
        torch.manual_seed(seed)
        try:
            made = call_model(model, clone_inputs(inputs))
        except Exception as error:
            raise CaptureError(f"{who} refuses the example inputs: {error}") from error
    found = tensors(named_outputs(made, names))
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


def train_note(
    masked: nn.Module, small: nn.Module, inputs: Inputs, names: Sequence[str] = ()
) -> tuple[str, ...]:
    """A note when the two differ in train mode and no random numbers explain it."""
    who = "the model in train mode"
    try:
        a = _outputs(masked, inputs, who, names, training=True)
        b = _outputs(small, inputs, who, names, training=True)
        error = relative_error(a, b) if _shapes(a) == _shapes(b) else float("inf")
        if error <= 1e-3:
            return ()
        again = _outputs(masked, inputs, who, names, seed=1, training=True)
    except CaptureError:
        return ()  # a batch too small for a batch norm, or a train mode with other inputs
    if _shapes(a) != _shapes(again) or relative_error(a, again) > 0:
        return ()
    return (
        f"equal in eval mode only: in train mode the outputs differ by {error:.1e}, because the "
        "model does something else there to what was removed",
    )
