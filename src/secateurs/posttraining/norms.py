"""Running statistics of norms, measured again on data: after a cut the old ones are of another net.

Norms are measured one after the other, in the order of their execution, each behind norms that are
right already and in eval mode; means and variances are those of the whole data at once. So the
result does not depend on how the data is cut into batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from secateurs.errors import ConfigError, DataError
from secateurs.masks import apply_masks_
from secateurs.posttraining.inputs import inputs_of, quiet, watch_calls
from secateurs.posttraining.layers import Call
from secateurs.posttraining.measuring import Judge, checked_finite, restoring
from secateurs.posttraining.won import Won
from secateurs.types import Batches, Evaluate, LossFn, Plan

__all__ = ["recalibrate_norms"]


def recalibrate_norms(
    model: nn.Module,
    batches: Batches,
    *,
    masks: Plan | Mapping[str, Tensor] | None = None,
    dense: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    evaluate: Evaluate | None = None,
    max_batches: int | None = None,
) -> Won:
    """Measure the running mean and variance of every batch norm again; say what that won.

    mean = sum x / N and variance = sum (x - mean)^2 / N over all samples and positions of all
    batches, added in float64. Norms with running statistics of an instance get the mean over the
    samples of each sample's mean and variance. Each norm sees the data behind the norms before it
    as they are now, so there is a run up to each norm for every batch. What a train-mode pass
    with `momentum=None` gives is different: it averages over batches, and behind norms that use
    the statistics of one batch.

    Args:
        model: masked or smaller; its buffers change in place. On any exception it is as before.
        batches: re-iterable of `(inputs, targets)`; a few hundred samples will do.
        masks: by tensor name, or a plan: applied first, and removed channels keep zeros in their
            statistics. None for a smaller model.
        dense: if given, the outputs are compared with its outputs.
        loss_fn, evaluate: if given, measured before and after.
        max_batches: use at most that many batches.

    Raises:
        ConfigError: the model has no running statistics.
        DataError: no sample reaches a norm.
        ScoringError: activations that are not finite.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> x = torch.tensor([[1.0], [2.0], [6.0]])
        >>> won = recalibrate_norms(net, [(x[:2], None), (x[2:], None)])
        >>> net[0].running_mean.item(), round(net[0].running_var.item(), 4), won.samples
        (3.0, 4.6667, 3)

    References:
        Li et al., Revisiting Batch Normalization For Practical Domain Adaptation, 2016,
        arXiv:1603.04779. Li et al., EagleEye, 2020, arXiv:2007.02491 (after pruning).
    """
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }
    if not norms:
        raise ConfigError(
            "recalibrate_norms needs a norm with running statistics (BatchNorm, SyncBatchNorm, or "
            "InstanceNorm with track_running_stats=True) and this model has none; leave it away"
        )
    held = masks.masks if isinstance(masks, Plan) else masks
    outputs = masks.outputs if isinstance(masks, Plan) else ()
    judge = Judge(dense, batches, loss_fn, evaluate, max_batches, outputs)
    with restoring(model):
        apply_masks_(model, held or {})
        judge.start(model)
        order, calls = _order(model, norms, batches)
        notes = [f"{p}: never called, left as it was" for p in norms if p not in calls]
        notes += [
            f"{p}: called {calls[p]} times in a run, all measured together behind its old values"
            for p in order
            if calls[p] > 1
        ]
        changed = []
        for path in order:
            _measure(model, path, calls[path], batches, max_batches)
            dot = f"{path}." if path else ""
            changed += [f"{dot}running_mean", f"{dot}running_var"]
        apply_masks_(model, held or {})
        return judge.won(model, "norms measured again", changed, notes)


def _order(
    model: nn.Module, norms: Mapping[str, nn.Module], batches: Batches
) -> tuple[list[str], dict[str, int]]:
    """Paths in the order of execution, and calls in one run."""
    calls: dict[str, int] = {}

    def look(path: str, call: Call) -> None:
        calls[path] = calls.get(path, 0) + 1

    with quiet(model):
        inputs = next(inputs_of(batches, model, 1))
        watch_calls(model, inputs, dict.fromkeys(norms, -1), look)
    return list(calls), calls


class _Pool:
    """Mean and variance of rows that come in parts, merged exactly."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.square = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take (rows, features)."""
        if not len(rows):
            return
        mean = rows.mean(0)
        square = (rows - mean).square().sum(0)
        if self.n:
            total = self.n + len(rows)
            gap = mean - self.mean
            square = square + self.square + gap.square() * (self.n * len(rows) / total)
            mean = self.mean + gap * (len(rows) / total)
        self.n, self.mean, self.square = self.n + len(rows), mean, square


def _measure(
    model: nn.Module, path: str, calls: int, batches: Batches, max_batches: int | None
) -> None:
    """Measure one norm on all batches and write what it found."""
    norm = model.get_submodule(path)
    assert isinstance(norm, _NormBase)
    by_sample = isinstance(norm, _InstanceNorm)
    pool, spread = _Pool(), _Pool()

    def look(_: str, call: Call) -> None:
        for rows in _rows(norm, call.given(0, "input").detach()):
            if by_sample:
                pool.add(rows.mean(1))  # (n, positions, features) -> (n, features)
                spread.add(rows.var(1, correction=0))
            else:
                pool.add(rows.flatten(0, 1))

    with quiet(model):
        for inputs in inputs_of(batches, model, max_batches):
            watch_calls(model, inputs, {path: calls}, look)
    if not pool.n:
        raise DataError(f"{path}: no sample reached this norm; give batches that have samples")
    variance = spread.mean if by_sample else pool.square / max(1, pool.n)
    checked_finite(variance, path)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(pool.mean)
        norm.running_var.copy_(variance)


def _rows(norm: _NormBase, x: Tensor) -> Iterator[Tensor]:
    """(n, positions, features) float64, some samples at a time."""
    assert norm.running_mean is not None
    if isinstance(norm, _InstanceNorm) and x.dim() == norm._get_no_batch_dim():  # type: ignore[no-untyped-call]
        x = x[None]
    wide = x[:, :, None] if x.dim() == 2 else x.flatten(2)  # (n, features, positions)
    size = max(1, 2**22 // max(1, wide[:1].numel()))
    for some in torch.split(wide, size):
        yield some.double().mT
