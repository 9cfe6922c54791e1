"""What a built-in task is, and the registry of all tasks.

A task is data, a network, a loss, a metric and a training recipe under one name. Registering one
is a decorator on the function that builds its network; the command line, the listings and the
error messages follow from the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.batches import call_model, in_mode, iterate, model_device
from secateurs.errors import ConfigError, DataError, ScoringError, choose
from secateurs.finetuning import Finetune
from secateurs.tasks.data import Part, Read, Source
from secateurs.types import Batch, Batches, LossFn

__all__ = [
    "TASKS",
    "Data",
    "Metric",
    "Task",
    "TrainRecipe",
    "accuracy",
    "accuracy_and_auc",
    "auc_and_accuracy",
    "available",
    "get_task",
    "task",
]

Metric = Callable[[nn.Module, Batches], dict[str, float]]
"""`metric(model, batches)`: the first entry is the main metric; larger is better."""
Field = Literal["image", "medical", "speech", "text"]
Granularity = Literal["neuron", "channel", "hidden", "structured"]
N_CALIBRATION, CALIBRATION_BATCH, EVALUATION_BATCH = 512, 64, 500


@dataclass(frozen=True, eq=False)
class Data:
    """The data of a task, in memory, as lists of `(inputs, targets)` tensors.

    Attributes:
        train: shuffled once by the seed; the last batch may be smaller.
        calibration: at most 512 samples of `train`, for scoring.
        validation: for every choice (thresholds, budgets, when to stop).
        test: touched once, for the final number.
        example_inputs: four training samples, for tracing.
        sizes: samples in "train", "validation" and "test".
    """

    train: list[Batch]
    calibration: list[Batch]
    validation: list[Batch]
    test: list[Batch]
    example_inputs: Tensor
    sizes: dict[str, int]


@dataclass(frozen=True)
class TrainRecipe:
    """How the dense network is trained.

    Attributes:
        epochs: passes over the training data.
        lr: learning rate of the first step.
        batch_size: samples per step, at least 1.
        weight_decay, optimizer, momentum, lr_schedule: as in `Finetune`.

    Raises:
        ConfigError: a field is out of range or an unknown name.
    """

    epochs: int
    lr: float = 1e-3
    batch_size: int = 64
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    momentum: float = 0.0
    lr_schedule: str = "cosine"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        _ = self.finetune  # checks the other fields

    @property
    def finetune(self) -> Finetune:
        """The same recipe for the training loop."""
        return Finetune(
            epochs=self.epochs,
            optimizer=self.optimizer,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            lr_schedule=self.lr_schedule,
        )


@dataclass(frozen=True)
class Task:
    """A ready-made problem.

    Attributes:
        name: as in `get_task`.
        description: one sentence: data, split, network.
        kind: field of application.
        source: what must be installed; see `available`.
        read: reads and splits the data.
        build: a new network, initialised from the global torch seed.
        train_recipe: how the dense network is trained.
        default_granularity: what is usually pruned in this network.
        loss_fn: mean loss of a batch.
        metric: quality on batches; first entry = main metric, larger is better.
        n_train: the fixed subset that trains unless all data is asked for; None: all.
    """

    name: str
    description: str
    kind: Field
    source: Source
    read: Read
    build: Callable[[], nn.Module]
    train_recipe: TrainRecipe
    default_granularity: Granularity
    loss_fn: LossFn
    metric: Metric
    n_train: int | None = None

    @property
    def needs(self) -> str:
        """What must be installed, with the command."""
        return self.source.needs

    def load(self, seed: int, *, full_data: bool = False) -> Data:
        """Read, split, shuffle and batch the data; the same seed gives the same batches.

        Args:
            seed: drives the split and the order of the training samples.
            full_data: train on everything where the task uses a subset (`n_train`).

        Raises:
            MissingDependencyError: the data is not installed; names the command.
            FileFormatError: a data file is damaged.
        """
        splits = self.read(seed, None if full_data else self.n_train)
        inputs, labels = splits.train
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train = inputs[order], labels[order]
        first = train[0][:N_CALIBRATION], train[1][:N_CALIBRATION]
        return Data(
            train=_batched(train, self.train_recipe.batch_size),
            calibration=_batched(first, CALIBRATION_BATCH),
            validation=_batched(splits.validation, EVALUATION_BATCH),
            test=_batched(splits.test, EVALUATION_BATCH),
            example_inputs=train[0][:4].clone(),
            sizes={
                "train": len(labels),
                "validation": len(splits.validation[1]),
                "test": len(splits.test[1]),
            },
        )


def _batched(part: Part, size: int) -> list[Batch]:
    """Consecutive batches."""
    return list(zip(torch.split(part[0], size), torch.split(part[1], size), strict=True))


def _outputs(model: nn.Module, batches: Batches) -> Part:
    """Outputs (finite) and targets of all batches, in eval mode."""
    pairs = []
    with in_mode(model, training=False), torch.no_grad():
        for inputs, targets in iterate(batches, model_device(model)):
            pairs.append((call_model(model, inputs), targets))
    outputs = torch.cat([out for out, _ in pairs])
    if not torch.isfinite(outputs).all():
        raise ScoringError("the model returns nan or inf, so it has no metric; did it diverge?")
    return outputs, torch.cat([targets for _, targets in pairs])


def accuracy(model: nn.Module, batches: Batches) -> dict[str, float]:
    """`{"accuracy": share of samples whose largest output is the label}`, in [0, 1].

    Raises:
        ScoringError: an output is nan or infinite.
    """
    logits, labels = _outputs(model, batches)
    return {"accuracy": (logits.argmax(1) == labels).double().mean().item()}


def auc_and_accuracy(model: nn.Module, batches: Batches) -> dict[str, float]:
    """`{"auc": area under the ROC curve of class 1 against 0, "accuracy": ...}`, in [0, 1].

    Raises:
        DataError: the batches hold only one class, for which no ROC curve exists.
        ScoringError: an output is nan or infinite.
    """
    from sklearn.metrics import roc_auc_score

    logits, labels = _outputs(model, batches)
    if len(torch.unique(labels)) < 2:
        raise DataError(
            f"the AUC needs both classes, got only label {torch.unique(labels).tolist()}"
        )
    auc = float(roc_auc_score(labels.cpu().numpy(), (logits[:, 1] - logits[:, 0]).cpu().numpy()))
    return {"auc": auc, "accuracy": (logits.argmax(1) == labels).double().mean().item()}


def accuracy_and_auc(model: nn.Module, batches: Batches) -> dict[str, float]:
    """The entries of `auc_and_accuracy`, accuracy first."""
    both = auc_and_accuracy(model, batches)
    return {"accuracy": both["accuracy"], "auc": both["auc"]}


TASKS: dict[str, Task] = {}
"""All tasks by name, in the order of registration."""


def task(
    name: str,
    description: str,
    *,
    kind: Field,
    data: tuple[Source, Read],
    recipe: TrainRecipe,
    granularity: Granularity,
    metric: Metric = accuracy,
    n_train: int | None = None,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register the decorated builder of a network as a classification task.

    Raises:
        ConfigError: the name is taken.
    """

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if name in TASKS:
            raise ConfigError(f"task {name!r} is registered already; choose another name")
        TASKS[name] = Task(
            name=name,
            description=description,
            kind=kind,
            source=data[0],
            read=data[1],
            build=build,
            train_recipe=recipe,
            default_granularity=granularity,
            loss_fn=functional.cross_entropy,
            metric=metric,
            n_train=n_train,
        )
        return build

    return register


def get_task(name: str) -> Task:
    """The task of that name; its data may still be missing (see `available`).

    Raises:
        ConfigError: unknown name; says the nearest one and the choices.

    Example:
        >>> get_task("digits-cnn").kind
        'image'
    """
    return TASKS[choose(name, TASKS, "task")]


def available(task: Task) -> str | None:
    """None if the data of the task is installed, else one sentence that says how to install it."""
    return None if task.source.present() else f"needs {task.needs}"
