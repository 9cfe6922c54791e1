"""Distillation: the loss between a model and its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.batches import call_model, in_mode, tensors
from secateurs.errors import CaptureError, DataError
from secateurs.finetuning.config import Finetune
from secateurs.types import Inputs, LossFn

__all__ = ["Teacher", "distillation_loss"]


class Teacher:
    """The dense model beside the one that is trained: in eval mode inside its `with` statement.

    Args:
        model: never changed, on the device of the student.
        config: `distill` (weight of the distillation) and `temperature`.
    """

    def __init__(self, model: nn.Module, config: Finetune) -> None:
        self.model, self.config = model, config
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        self._entered.enter_context(in_mode(self.model, training=False))
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def objective(self, loss_fn: LossFn, inputs: Inputs, where: str) -> LossFn:
        """The loss to minimise for these inputs: task loss and distillation, weighted.

        Raises:
            CaptureError: the teacher refuses the inputs.
        """
        weight, temperature = self.config.distill, self.config.temperature
        try:
            with torch.no_grad():
                reference = call_model(self.model, inputs)
        except Exception as error:
            raise CaptureError(f"{where}: the teacher refuses the inputs: {error}") from error

        def objective(outputs: Any, targets: Any) -> Tensor:
            task = loss_fn(outputs, targets)
            away = distillation_loss(outputs, reference, targets, temperature)
            return (1 - weight) * task + weight * away

        return objective


def distillation_loss(
    outputs: Any, teacher_outputs: Any, targets: Any, temperature: float = 2.0
) -> Tensor:
    """How far a model is from its teacher: a scalar, 0 when the outputs are equal.

    Class labels (an integer tensor of the shape of the outputs without their class dimension, at
    least two classes): KL(softmax(teacher/T) || softmax(student/T)) x T^2, mean over the labelled
    positions; those with a negative label (padding) do not count. Classes are dimension 1 as in
    `cross_entropy`, or the last one. Everything else, single-logit binary outputs included: mean
    squared error between the outputs. Outputs that are not a tensor count by their `logits`, or
    else by their first tensor.

    Args:
        outputs: of the student.
        teacher_outputs: of the teacher, same shape.
        targets: decide only which rule applies, and which positions count.
        temperature: above 0.

    Raises:
        DataError: student and teacher outputs differ in shape, or the class dimension is
            ambiguous because both candidates have the same size.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> distillation_loss(logits, logits, torch.tensor([0])).item()
        0.0

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
        arXiv:1503.02531.
    """
    student, reference = _main_output(outputs), _main_output(teacher_outputs)
    if student.shape != reference.shape:
        raise DataError(
            f"student outputs {tuple(student.shape)} and teacher outputs "
            f"{tuple(reference.shape)} must have one shape to distill"
        )
    dim = _class_dim(student, targets)
    if dim is None:
        return functional.mse_loss(student, reference)
    pointwise = functional.kl_div(
        (student / temperature).log_softmax(dim),
        (reference / temperature).log_softmax(dim),
        reduction="none",
        log_target=True,
    ).sum(dim)  # classes summed -> shape of targets
    labelled = targets >= 0
    mean: Tensor = pointwise[labelled].sum() / labelled.sum().clamp(min=1)
    return mean * temperature**2


def _main_output(outputs: Any) -> Tensor:
    """The tensor to compare: the output itself, its logits, or its first tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else tensors(outputs)[0]


def _class_dim(outputs: Tensor, targets: Any) -> int | None:
    """The dimension of `outputs` that holds classes for integer labels; None when there is none."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or outputs.dim() < 2:
        return None
    shape = outputs.shape
    fits = [
        dim
        for dim in sorted({1, outputs.dim() - 1})
        if shape[dim] >= 2 and shape[:dim] + shape[dim + 1 :] == targets.shape
    ]
    if len(fits) > 1:
        raise DataError(
            f"outputs {tuple(shape)} with labels {tuple(targets.shape)}: classes may be dimension "
            f"1 or {fits[1]}. Flatten both, so that outputs are (positions, classes)"
        )
    return fits[0] if fits else None
