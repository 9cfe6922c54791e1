"""How data meets a model: calling it, checking batches, counting samples.

One convention for the whole library: a batch is `(inputs, targets)`, `inputs` is a tensor, a tuple
(positional arguments) or a dict (keywords), and `loss_fn(outputs, targets)` is a scalar mean over
the samples. Checks here run before anything expensive and name the batch at fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.errors import CaptureError, ConfigError, DataError, ScoringError, choose
from secateurs.types import Batch, Batches, Inputs, LossFn

__all__ = [
    "batch_size",
    "call_model",
    "check_batches",
    "check_iterable",
    "checked_loss",
    "clone_inputs",
    "in_mode",
    "iterate",
    "model_device",
    "named_outputs",
    "preserve",
    "tensors",
    "to_device",
]


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Return `model(x)`, `model(*tuple)` or `model(**dict)`, by the type of `inputs`."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a nested structure, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def named_outputs(tree: Any, names: Iterable[str] = ()) -> Any:
    """The parts of a model's output that a user named; all of it when there are no names.

    Args:
        tree: what the model returned.
        names: keys of a dict, attributes, or positions, with dots for what is nested:
            "logits", "0", "features.2".

    Raises:
        ConfigError: the output has no such part; the message lists those that it has.

    Example:
        >>> named_outputs({"logits": 1, "states": (2, 3)}, ["logits", "states.1"])
        [1, 3]
    """
    wanted = list(names)
    if not wanted:
        return tree
    found = []
    for name in wanted:
        part = tree
        for step in name.split("."):
            parts = _parts(part)
            if not parts:
                raise ConfigError(
                    f"output {name!r}: what the model returns there is one {type(part).__name__}, "
                    "without named parts; leave outputs away"
                )
            choose(step, parts, "output")
            part = parts[step]
        found.append(part)
    return found


def _parts(tree: Any) -> dict[str, Any]:
    """The parts of one level of an output, by name."""
    if isinstance(tree, Mapping):
        return {str(k): v for k, v in tree.items()}
    if hasattr(tree, "_fields"):  # a named tuple
        return dict(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (tuple, list)):
        return {str(i): v for i, v in enumerate(tree)}
    return {k: v for k, v in getattr(tree, "__dict__", {}).items() if not k.startswith("_")}


def batch_size(inputs: Inputs) -> int:
    """Samples in a batch: the first dimension of its first tensor that has one."""
    for tensor in tensors(inputs):
        if tensor.dim():
            return int(tensor.shape[0])
    raise DataError("a batch has no tensor with a batch dimension")


def to_device(tree: Any, device: torch.device) -> Any:
    """The same structure with its tensors on `device`."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def clone_inputs(inputs: Inputs) -> Inputs:
    """A copy in which no two tensors share memory (aliased inputs mislead a capture)."""
    cloned: Inputs = pytree.tree_map(
        lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs
    )
    return cloned


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def iterate(
    batches: Batches,
    device: torch.device,
    max_batches: int | None = None,
    *,
    may_be_empty: bool = False,
) -> Iterator[Batch]:
    """Yield the batches on `device`, at most `max_batches`.

    Raises:
        DataError: a batch is not a pair, or there is none (an exhausted generator), unless it
            `may_be_empty`: the part of one process of a group.
    """
    n = 0
    for n, batch in enumerate(batches, start=1):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(
                f"batch {n - 1} is a {type(batch).__name__}"
                f"{f' of length {len(batch)}' if isinstance(batch, Sequence) else ''}; "
                "expected a pair (inputs, targets)"
            )
        yield to_device(batch[0], device), to_device(batch[1], device)
        if max_batches is not None and n >= max_batches:
            return
    if n == 0 and not may_be_empty:
        raise DataError(
            "batches is empty. A generator can be read only once: pass a list or a DataLoader"
        )


def checked_loss(model: nn.Module, batch: Batch, loss_fn: LossFn, where: str = "batch 0") -> Tensor:
    """The loss of one batch, checked to be a finite scalar.

    Raises:
        CaptureError: the model refuses the inputs or returns no tensor.
        DataError: the loss function refuses the targets (labels out of range).
        ScoringError: the loss is not a scalar or not finite.
    """
    inputs, targets = batch
    outputs = _checked_outputs(model, inputs, where)
    try:
        loss = loss_fn(outputs, targets)
    except Exception as error:
        raise DataError(
            f"{where}: the loss refuses outputs {_shapes(outputs)} with targets "
            f"{_shapes(targets)}: {error}"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ScoringError(f"{where}: loss_fn must return a scalar tensor, got {got}")
    if not torch.isfinite(loss).all():
        raise ScoringError(f"{where}: the loss is {loss.item()}; check the data and the model")
    return loss.reshape(())


def _checked_outputs(model: nn.Module, inputs: Inputs, where: str) -> Any:
    try:
        outputs = call_model(model, inputs)
    except Exception as error:
        raise CaptureError(f"{where}: the model refuses the inputs: {error}") from error
    if not tensors(outputs):
        raise CaptureError(f"{where}: the model returns {type(outputs).__name__}, no tensor")
    return outputs


def _shapes(tree: Any) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in tensors(tree)) or repr(tree)


def check_batches(model: nn.Module, batches: Batches, loss_fn: LossFn | None) -> None:
    """Run one batch through model and loss, so that bad data fails before anything expensive.

    Raises:
        DataError, CaptureError, ScoringError: as `iterate` and `checked_loss`.
    """
    check_iterable(batches)
    with preserve(model), in_mode(model, training=False), torch.no_grad():
        first = next(iterate(batches, model_device(model), max_batches=1))
        if loss_fn is not None:
            checked_loss(model, first, loss_fn)
        else:
            _checked_outputs(model, first[0], "batch 0")


def check_iterable(batches: Batches) -> None:
    """Refuse what can be read only once, or not at all.

    Raises:
        DataError: it is a generator, or nothing to iterate over.
    """
    if isinstance(batches, Iterator):
        raise DataError("batches can be read only once (a generator): pass a list or a DataLoader")
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise DataError(
            f"batches is a {type(batches).__name__}; expected an iterable of (inputs, targets), "
            "such as a list or a DataLoader"
        )


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module in train or eval mode; restore each module's own mode at the end.

    A graph exported by torch.export has no modes: it stays as it was exported.
    """
    before = [(m, m.training) for m in model.modules()]
    try:
        model.train(training)
    except NotImplementedError:
        if not isinstance(model, torch.fx.GraphModule):
            raise
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def preserve(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers and the random state at the end, also after an exception."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(enabled=True):
        for p, _ in grads:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in grads:
                p.grad = grad
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
