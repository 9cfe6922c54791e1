"""What hooks can be trusted with: where the samples are, and how far a gradient is from autograd.

The layout of each call comes from the shapes with the whole batch and with one sample; it is
proven by comparing the gradients of single samples with plain autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.batches import call_model, checked_loss
from secateurs.statistics.units import one_sample
from secateurs.types import Batch, Inputs, LossFn

__all__ = [
    "Layout",
    "difference",
    "find_layouts",
    "first_input",
    "mixes",
    "only",
    "plain_gradients",
]

TOLERANCE = {torch.float64: (1e-8, 1e-11), torch.float32: (2e-3, 1e-5)}
"""Allowed difference from autograd: of the gradient's norm, and of its largest possible norm."""
LOW_PRECISION = (0.2, 1e-2)

Shape = tuple[int, ...]
Shapes = list[tuple[Shape, Shape]]
"""Shapes of the input and output of each call of a module."""


@dataclass(frozen=True)
class Layout:
    """Where the samples are: in `dim`; one after the other in it (flat); or nowhere (shared)."""

    dim: int = 0
    flat: bool = False
    shared: bool = False

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether an output of this shape can hold `n` samples in this way."""
        size = shape[self.dim] if len(shape) > self.dim else 0
        if self.shared:
            return size == 1
        return size > 0 and (size % n == 0 if self.flat else size == n)


def find_layouts(
    model: nn.Module,
    rows: Mapping[str, bool],
    batch: Batch,
    singles: Sequence[Batch],
    n: int,
) -> tuple[dict[str, list[Layout]], dict[str, str]]:
    """Module path -> layout of each call, and module path -> reason why there is none.

    Args:
        model: called once for the batch and for each single sample.
        rows: module path -> whether everything before its last dimension is positions.
        batch: of `n` samples.
        singles: some of its samples, each as a batch of one.
        n: samples of the batch.
    """
    whole = _observe(model, batch[0], rows)
    parts = [_observe(model, single[0], rows) for single in singles]
    layouts: dict[str, list[Layout]] = {}
    refused = {}
    for path in sorted(rows):
        calls, few = whole[path], parts[0][path]
        if any(part[path] != few for part in parts) or len(few) != len(calls):
            refused[path] = f"how {path} is called depends on the values of a sample"
            continue
        pairs = zip(calls, few, strict=True)
        found = [_layout(a, b, n, rows=rows[path]) for a, b in pairs]
        kept = [layout for layout in found if layout is not None]
        if len(kept) < len(found) or len({layout.shared for layout in kept}) > 1:
            refused[path] = f"the tensors of {path} do not begin with the samples"
        else:
            layouts[path] = kept
    return layouts, refused


def _observe(model: nn.Module, inputs: Inputs, paths: Mapping[str, Any]) -> dict[str, Shapes]:
    """Shapes of the input and output of each call of some modules."""
    seen: dict[str, Shapes] = {path: [] for path in paths}

    def look(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            seen[path].append((_shape(first_input(args, kwargs)), _shape(out)))

        return hook

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            handle = module.register_forward_hook(look(path), with_kwargs=True)
            stack.callback(handle.remove)
        with torch.no_grad():
            call_model(model, inputs)
    return seen


def _shape(value: Any) -> Shape:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _layout(
    whole: tuple[Shape, Shape], single: tuple[Shape, Shape], n: int, *, rows: bool
) -> Layout | None:
    """Where the samples are, from the shapes with `n` samples and with one."""
    (x, a), (_, b) = whole, single
    if not x or len(a) < 2 or len(a) != len(b):
        return None
    changed = [d for d in range(len(a)) if a[d] != b[d]]
    if n == 1 or changed == [0]:
        fits = x[0] == a[0] and a[0] == n * b[0]
        return Layout(flat=b[0] > 1) if fits else None
    if not changed:
        return Layout(shared=True) if a[0] == x[0] == 1 else None
    (dim, *more) = changed
    inside = rows and not more and dim < len(a) - 1 and x[: dim + 1] == a[: dim + 1]
    return Layout(dim) if inside and (a[dim], b[dim]) == (n, 1) else None


def plain_gradients(
    model: nn.Module, batch: Batch, loss_fn: LossFn, wanted: Mapping[int, nn.Parameter]
) -> dict[int, Tensor]:
    """Gradients of the loss of a batch by autograd; zeros where none arrives."""
    with only(model, wanted), torch.enable_grad():
        loss = checked_loss(model, batch, loss_fn, "probe")
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if loss.requires_grad and wanted:
            grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        key: torch.zeros_like(p) if grad is None else grad.to_dense()
        for (key, p), grad in zip(wanted.items(), grads, strict=True)
    }


def difference(got: Tensor, want: Tensor, dtypes: set[torch.dtype], largest: float) -> str:
    """How a gradient differs from autograd's, or an empty text when that is rounding.

    Args:
        got: the gradient to check.
        want: autograd's.
        dtypes: everything that took part; the coarsest counts.
        largest: the norm that the product of inputs and output gradients could have had; rounding
            is proportional to it where terms cancel.
    """
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    relative, absolute = zip(*[TOLERANCE.get(d, LOW_PRECISION) for d in dtypes], strict=True)
    gap, norm = float((got.double() - want.double()).norm()), float(want.double().norm())
    if gap <= max(relative) * norm + max(absolute) * largest:
        return ""
    return f"by {gap:.2g} at a norm of {norm:.2g}"


def mixes(model: nn.Module, batch: Batch, loss_fn: LossFn, n: int) -> str:
    """How the loss of a batch differs from the mean over its samples, or an empty text."""
    with torch.no_grad():
        whole = checked_loss(model, batch, loss_fn, "probe")
        ones = (one_sample(batch, i, n) for i in range(n))
        each = [checked_loss(model, one, loss_fn, "probe").double() for one in ones]
        mean = torch.stack(each).mean()
    precise = whole.dtype in TOLERANCE
    if torch.isclose(whole.double(), mean, rtol=1e-3 if precise else 0.05, atol=1e-6):
        return ""
    return (
        f"the loss of the batch ({float(whole):.4g}) is not the mean of the losses of its samples "
        f"({float(mean):.4g})"
    )


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, positional or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


@contextmanager
def only(model: nn.Module, wanted: Mapping[int, Any]) -> Iterator[None]:
    """Only the parameters with these ids require gradients inside."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, state in before:
            p.requires_grad_(state)
