"""Per-sample gradients by vectorising the model over its samples, where hooks cannot see them.

The second path: functional uses of a parameter, recurrent layers, custom modules. It costs about
a backward pass with weight gradients, on slower kernels, and the gradients of a chunk of samples
are in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from secateurs.batches import batch_size, preserve
from secateurs.errors import ScoringError
from secateurs.statistics.persample_probe import difference, plain_gradients
from secateurs.statistics.removals import forward_mode
from secateurs.statistics.units import one_sample
from secateurs.types import Batch, Inputs, LossFn

__all__ = ["vmapped", "vmapped_obstacle"]

CHUNK_BYTES = 2**28


def vmapped(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    names: Sequence[str],
    max_bytes: int = CHUNK_BYTES,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the samples in order, chunk by chunk: name -> (m, *shape).

    Each sample is a batch of one for the model and the loss. Tensors that do not begin with the
    samples are the same for all.

    Args:
        model: in eval mode; never changed.
        batch: `(inputs, targets)`.
        loss_fn: mean over the samples.
        names: parameters.
        max_bytes: gradients of one chunk; one sample at least.

    Raises:
        ScoringError: the model cannot be vectorised (control flow that depends on the data,
            in-place operations, an operator without a rule).

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.zeros(2)
        >>> (chunk,) = vmapped(model, batch, lambda out, _: out.sum(1).mean(), ["weight"])
        >>> chunk["weight"].tolist()
        [[[1.0, 0.0]], [[3.0, 1.0]]]
    """
    n = batch_size(batch[0])
    params = dict(model.named_parameters(remove_duplicate=False))
    distinct = {id(params[name]): params[name] for name in names}.values()
    size = sum(p.numel() * p.element_size() for p in distinct)
    step = max(1, min(n, max_bytes // max(size, 1)))
    for low in range(0, n, step):
        yield _gradients(model, batch, loss_fn, names, slice(low, low + step))


def vmapped_obstacle(model: nn.Module, batch: Batch, loss_fn: LossFn, names: Sequence[str]) -> str:
    """Why `vmapped` cannot be used for these parameters, or an empty text.

    The first and the last sample are compared with plain autograd.
    """
    n = batch_size(batch[0])
    params = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(params[name]): params[name] for name in names}
    ends = sorted({0, n - 1})
    with preserve(model):
        try:
            found = _gradients(model, batch, loss_fn, names, torch.tensor(ends))
        except ScoringError as error:
            return str(error)
        for row, i in enumerate(ends):
            want = plain_gradients(model, one_sample(batch, i, n), loss_fn, wanted)
            largest = max(float(g.double().norm()) for g in want.values())
            for name in names:
                expected, got = want[id(params[name])], found[name][row]
                gap = difference(got, expected, {expected.dtype, got.dtype}, largest)
                if gap:
                    return f"{name}: vectorised, sample {i} differs from autograd {gap}"
    return ""


def _gradients(
    model: nn.Module, batch: Batch, loss_fn: LossFn, names: Sequence[str], which: Any
) -> dict[str, Tensor]:
    """Gradients of the samples that an index or slice chooses: name -> (m, *shape)."""
    n = batch_size(batch[0])
    params = dict(model.named_parameters(remove_duplicate=False))
    first = {id(params[name]): name for name in reversed(names)}  # a tied parameter counts once
    point = {name: params[name].detach() for name in first.values()}
    leaves, spec = pytree.tree_flatten(batch)
    many = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == n for x in leaves]
    cut = [x[which] for x, inside in zip(leaves, many, strict=True) if inside]

    rows = len(cut[0])
    spread = {n: params[n].detach().expand(rows, *params[n].shape) for n in _recurrent(model)}
    point |= {name: spread[name] for name in point.keys() & spread.keys()}

    def loss(point: dict[str, Tensor], others: dict[str, Tensor], *sample: Tensor) -> Tensor:
        parts = iter(sample)
        own = [next(parts)[None] if m else x for x, m in zip(leaves, many, strict=True)]
        inputs, targets = pytree.tree_unflatten(own, spec)
        args, kwargs = _arguments(inputs)
        outputs = functional_call(model, others | point, args, kwargs)
        return loss_fn(outputs, targets).reshape(())

    axes = ({name: 0 if name in spread else None for name in point}, 0, *[0] * len(cut))
    try:
        with forward_mode():
            found = vmap(grad(loss), in_dims=axes, randomness="different")(point, spread, *cut)
    except Exception as error:
        raise ScoringError(f"the model cannot be vectorised over samples: {error}") from error
    return {name: found[first[id(params[name])]].detach() for name in names}


def _recurrent(model: nn.Module) -> list[str]:
    """Parameters of recurrent layers: each sample needs a copy, as their kernels add in place."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        for name, _ in module.named_parameters(recurse=False)
    ]


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
