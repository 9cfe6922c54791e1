"""A training and its cuts on TensorBoard: curves, kept units per layer, histograms.

    with BoardLog("runs/board") as log:
        finetune(model, batches, loss_fn, config, parts=[log], progress=log.epoch)

Then `tensorboard --logdir runs/board`. Nothing about the training changes: a log only looks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, MissingDependencyError
from secateurs.finetuning import EpochRow, Part, Training
from secateurs.masks import model_sparsity
from secateurs.masks.sets import by_tensor
from secateurs.types import Graph, GroupTarget, Plan

__all__ = ["BoardLog"]


class BoardLog(Part):
    """Writes what happens to a folder that TensorBoard reads; closes the file after its `with`.

    Written are, over the optimizer steps of all trainings in a row: learning rate and norm of the
    gradient at every step; train loss and metric after every epoch; the share of zeros, and
    histograms of weights and gradients (kept and finite entries only), every `every` steps; after
    each cut the units left in each layer.

    Args:
        folder: made when the first value is written.
        every: optimizer steps between two histograms, at least 1.

    Raises:
        MissingDependencyError: tensorboard is not installed.
        ConfigError: `every` is below 1, or the folder is a file.
    """

    def __init__(self, folder: str | Path, *, every: int = 100) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every must be a whole number of steps, at least 1, got {every!r}")
        if Path(folder).is_file():
            raise ConfigError(f"{folder} is a file; name a directory for TensorBoard")
        _writer_class()
        self.folder, self.every = Path(folder), every
        self._writer: Any = None
        self._training: Training | None = None
        self._before, self._now = 0, 0  # steps of earlier trainings, and of all
        self._purge: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- as a part of a training -----------------------------------------------------------------

    def start(self, training: Training) -> None:
        """A training begins: its steps are counted on from the one before."""
        self._training, self._before = training, self._now

    def gradients(self, steps: int) -> None:
        """The norm of the gradient; sometimes the gradients themselves."""
        assert self._training is not None
        trained = {n: p for n, p in self._training.model.named_parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
        self._scalar("train/gradient norm", norm.item())
        if steps % self.every == 0:
            masks = by_tensor(self._training.model, self._training.held.masks)
            for name, parameter in trained.items():
                self._histogram(f"gradients/{name}", parameter.grad, masks.get(id(parameter)))

    def stepped(self, steps: int) -> None:
        """The learning rate; sometimes weights and the share of zeros."""
        assert self._training is not None
        model, optimizer = self._training.model, self._training.optimizer
        self._scalar("train/learning rate", float(optimizer.param_groups[0]["lr"]))
        if (steps - 1) % self.every == 0:
            self._scalar("pruning/zeros", model_sparsity(model))
            masks = by_tensor(self._training.model, self._training.held.masks)
            for name, parameter in model.named_parameters():
                self._histogram(f"weights/{name}", parameter, masks.get(id(parameter)))
        self._now = self._before + steps

    def state(self) -> dict[str, Any]:
        """Where the curves are."""
        return {"before": self._before, "now": self._now}

    def load(self, state: dict[str, Any]) -> None:
        """Go on there: what was written later by the interrupted run is hidden."""
        self._before, self._now = int(state["before"]), int(state["now"])
        self._purge = self._now + 1  # values of this very step may have been written before

    # --- what others tell ------------------------------------------------------------------------

    def epoch(self, row: EpochRow) -> None:
        """After an epoch: give this to `finetune(progress=)`."""
        self._scalar("train/loss", row.train_loss)
        if row.metric is not None:
            self._scalar("validation/metric", row.metric)

    def cut(self, graph: Graph, plan: Plan) -> None:
        """After a cut: what every layer has left, in units and as a share."""
        for target in graph.targets.values():
            gone = int(plan.gone(target).sum())
            if isinstance(target, GroupTarget) or gone:
                left = target.n_units - gone
                self._scalar(f"kept units/{target.name}", left)
                self._scalar(f"kept share/{target.name}", left / target.n_units)

    # --- writing ---------------------------------------------------------------------------------

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = _writer_class()(str(self.folder), purge_step=self._purge)
        return self._writer

    def _scalar(self, name: str, value: float) -> None:
        self._open().add_scalar(name, value, self._now)

    def _histogram(self, name: str, tensor: Tensor | None, mask: Tensor | None) -> None:
        """Of the finite entries that are kept; none left gives none."""
        assert tensor is not None
        values = tensor.detach().float().to_dense() if tensor.is_sparse else tensor.detach().float()
        if mask is not None:
            values = values[mask]
        values = values[torch.isfinite(values)]
        if values.numel():
            self._open().add_histogram(name, values.cpu(), self._now)


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            "logs for TensorBoard need it: pip install 'secateurs[tensorboard]'"
        ) from error
    return SummaryWriter
