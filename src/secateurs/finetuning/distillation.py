"""Distillation: the loss between a model and its teacher."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.batches import call_model, in_mode, tensors
from secateurs.errors import CaptureError, ConfigError, DataError
from secateurs.finetuning.config import Finetune
from secateurs.finetuning.hidden import (
    HiddenPoint,
    Recorder,
    hidden_loss,
    hidden_points,
    never_seen,
)
from secateurs.types import Graph, Inputs, LossFn, Plan

__all__ = ["Distillation", "distillation", "distillation_loss", "taught_by"]


class Distillation:
    """A student that learns from the dense model beside its task; holds inside its `with`.

    loss = (1 - weight) x task + weight x `distillation_loss` + hidden x mean of `hidden_loss`

    Inside, the teacher is in eval mode and the hidden states of both are seen. It never changes.

    Args:
        teacher: the dense model, on the device of the student.
        student: what is trained: with the dense shapes and a plan held at zero, or shrunk by it.
            None where `finetune` is to fill it in.
        weight: of the outputs, in [0, 1]; the task has the rest.
        temperature: of the distillation between class probabilities, above 0.
        hidden: weight of the hidden states, at least 0; above 0 needs `graph`.
        hidden_at: names or globs of modules whose inputs are compared, see `hidden_points`.
        graph: of the dense model.
        plan: what the student lacks; None for nothing. It may be assigned anew while training.

    Raises:
        ConfigError: a weight is out of range, or there is no graph for the hidden states.

    Example:
        >>> teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> inputs, labels = torch.ones(4, 3), torch.tensor([0, 1, 1, 0])
        >>> with Distillation(teacher, student, weight=0.5) as distillation:
        ...     teach = distillation.objective(nn.functional.cross_entropy, inputs)
        ...     loss = teach(student(inputs), labels)
        >>> loss.requires_grad
        True
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | None = None,
        *,
        weight: float = 0.5,
        temperature: float = 2.0,
        hidden: float = 0.0,
        hidden_at: Iterable[str] | None = None,
        graph: Graph | None = None,
        plan: Plan | None = None,
    ) -> None:
        if not 0 <= weight <= 1 or not temperature > 0 or not 0 <= hidden < math.inf:
            raise ConfigError(
                "Distillation: weight in [0, 1], temperature above 0 and hidden at least 0; got "
                f"weight={weight!r}, temperature={temperature!r}, hidden={hidden!r}"
            )
        if hidden and graph is None:
            raise ConfigError(
                "hidden states are found by the graph of the dense model: "
                "give graph=trace(teacher, example_inputs)"
            )
        self.teacher, self.student = teacher, student
        self.weight, self.temperature, self.hidden = weight, temperature, hidden
        self._graph, self._at, self._plan = graph, hidden_at, plan
        self.points: tuple[HiddenPoint, ...] = ()
        self.plan = plan
        if hidden and graph is not None and hidden_at is None:
            self._tell_unseen(graph)
        self._entered = ExitStack()
        self._seen: tuple[Recorder, Recorder] | None = None

    def _tell_unseen(self, graph: Graph) -> None:
        """Warn of families that nobody named, and that are not compared."""
        missing = never_seen(graph)
        if missing:
            warnings.warn(
                f"hidden: {', '.join(missing)} cannot be seen from outside, so only these are "
                f"compared: {', '.join(point.name for point in self.points)}. Name what is meant "
                "by hidden_at=, or leave hidden away",
                stacklevel=4,
            )

    @property
    def plan(self) -> Plan | None:
        """What the student lacks now."""
        return self._plan

    @plan.setter
    def plan(self, plan: Plan | None) -> None:
        self._plan = plan
        if self.hidden and self._graph is not None:
            self.points = hidden_points(self._graph, plan, self._at)

    def __enter__(self) -> Self:
        self._entered.enter_context(in_mode(self.teacher, training=False))
        if self.hidden:
            if self.student is None:
                raise ConfigError("hidden states are compared with the student's: give student=")
            taught, wise = Recorder(self.student, self.points), Recorder(self.teacher, self.points)
            self._seen = self._entered.enter_context(taught), self._entered.enter_context(wise)
        return self

    def __exit__(self, *error: object) -> None:
        self._seen = None
        self._entered.close()

    def objective(self, loss_fn: LossFn, inputs: Inputs, where: str = "distillation") -> LossFn:
        """The loss to minimise for these inputs; the student runs next, on the same ones.

        Raises:
            CaptureError: the teacher refuses the inputs.
        """
        for recorder in self._seen or ():
            recorder.forget()
        try:
            with torch.no_grad():
                reference = call_model(self.teacher, inputs)
        except Exception as error:
            raise CaptureError(f"{where}: the teacher refuses the inputs: {error}") from error

        def objective(outputs: Any, targets: Any) -> Tensor:
            loss = (1 - self.weight) * loss_fn(outputs, targets)
            if self.weight:
                away = distillation_loss(outputs, reference, targets, self.temperature)
                loss = loss + self.weight * away
            return loss if not self.hidden else loss + self.hidden * self._hidden_loss()

        return objective

    def _hidden_loss(self) -> Tensor:
        """Mean over the points."""
        assert self._seen is not None
        student, teacher = self._seen
        parts = [hidden_loss(student[p], teacher[p], p) for p in self.points]
        if torch.is_grad_enabled() and not any(part.requires_grad for part in parts):
            raise ConfigError(
                "hidden: no gradient reaches the hidden states. Activation checkpointing with "
                "use_reentrant=True hides them: use use_reentrant=False"
            )
        return torch.stack(parts).mean()


def distillation(
    teacher: nn.Module, config: Finetune, *, graph: Graph | None = None, plan: Plan | None = None
) -> Distillation:
    """The distillation that a `Finetune` describes; other arguments as in `Distillation`."""
    return Distillation(
        teacher, weight=config.distill, temperature=config.temperature, hidden=config.hidden,
        hidden_at=config.hidden_at, graph=graph, plan=plan,
    )  # fmt: skip


def taught_by(
    teacher: nn.Module | Distillation, student: nn.Module, config: Finetune
) -> Distillation:
    """What `finetune` distills by.

    Raises:
        ConfigError: a distillation with other weights than the configured ones.
    """
    if isinstance(teacher, nn.Module):
        teacher = distillation(teacher, config)
    for name, value, own in (
        ("distill", config.distill, teacher.weight),
        ("temperature", config.temperature, teacher.temperature),
        ("hidden", config.hidden, teacher.hidden),
    ):
        if value != own:
            raise ConfigError(
                f"finetune: {name}={value:g} in Finetune and {own:g} in the distillation; make it "
                "by distillation(teacher, config, ...)"
            )
    teacher.student = student
    return teacher


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
