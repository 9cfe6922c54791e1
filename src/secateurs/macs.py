"""How many multiply-adds one forward run performs, counted at the operators that reach the kernels.

    model, inputs ── macs ──> float, per sample

Counted are linear layers, convolutions, matrix products, attention and recurrent layers, in any
module or captured graph. Pointwise operators, normalisation, pooling, softmax, look-ups and biases
are not multiply-adds. An operator that does multiply but has no formula is named, never skipped in
silence. Zeros count like other numbers (a dense kernel multiplies them too), and so does the masked
half of causal attention.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from secateurs.batches import (
    batch_size,
    call_model,
    in_mode,
    model_device,
    preserve,
    tensors,
    to_device,
)
from secateurs.errors import CaptureError, DataError
from secateurs.types import Inputs

__all__ = ["check_materialised", "count_macs", "macs", "run_once"]


def macs(model: nn.Module, inputs: Inputs) -> float:
    """Multiply-adds of one forward run in eval mode, per sample of `inputs`.

    Warns with the names of operators that multiply but have no formula.

    Raises:
        CaptureError: the model refuses the inputs or returns no tensor.

    Example:
        >>> macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 4, 4))  # 8 x 3 x 9 x 16
        3456.0
    """
    counted, uncounted = count_macs(model, inputs)
    if uncounted:
        warnings.warn(f"MACs leave out {', '.join(uncounted)}: no formula", stacklevel=2)
    return counted


def count_macs(model: nn.Module, inputs: Inputs) -> tuple[float, tuple[str, ...]]:
    """Multiply-adds per sample, and the operators that were left out."""
    check_materialised(model)
    samples = batch_size(inputs)
    if samples == 0:
        raise DataError("the example batch has no samples (dimension 0 has size 0)")
    placed = to_device(inputs, model_device(model))
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    watch = _Uncounted(counter.flop_registry)
    with ExitStack() as stack:
        stack.enter_context(preserve(model))
        stack.enter_context(in_mode(model, training=False))
        stack.enter_context(_no_fused_transformer())
        # Not the caller's inference mode: caches filled here must stay usable for training.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        stack.enter_context(counter)
        run_once(model, placed, "the model")
    return counter.get_total_flops() / 2 / samples, tuple(sorted(watch.names))


def run_once(model: nn.Module, inputs: Inputs, where: str) -> None:
    """One call, checked to return a tensor."""
    try:
        outputs = call_model(model, inputs)
    except Exception as error:
        raise CaptureError(f"{where} refuses the example inputs: {error}") from error
    if not tensors(outputs):
        raise CaptureError(f"{where} returns {type(outputs).__name__}, no tensor")


def check_materialised(model: nn.Module) -> None:
    """Refuse lazy parameters: running the model would silently create them."""
    lazy = [n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise CaptureError(
            f"parameters without a shape yet: {', '.join(lazy)}. Run the model once first"
        )


# --- formulas ------------------------------------------------------------------------------------

Shape = Sequence[int]
aten = torch.ops.aten


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and weighted values; key and value heads may be fewer than query heads."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(x: Shape, weights: Sequence[Shape]) -> int:
    """Every weight matrix is used once per time step and sample, whatever gates it holds."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


# What torch's own table lacks: operation -> 2 x multiply-adds, from the shapes of its arguments.
_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mkldnn_rnn_layer: lambda x, w_ih, w_hh, *_, **__: _recurrent(x, (w_ih, w_hh)),
    aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent(x, weights),
    aten.miopen_rnn: lambda x, weights, *_, **__: _recurrent(x, weights),
    aten._lstm_mps: lambda x, _state, weights, *_, **__: _recurrent(x, weights),
    aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
    aten.addmv: lambda _start, matrix, *_, **__: 2 * math.prod(matrix),
    aten.dot: lambda a, *_, **__: 2 * math.prod(a),
    aten.vdot: lambda a, *_, **__: 2 * math.prod(a),
}

_MULTIPLIES = re.compile(
    r"\w*mm|addmv|mv|v?dot|matmul|linear|trilinear|conv(?!ert)\w*|attention|transformer"
    r"|rnn|lstm|gru|cdist|fft|linalg"
)
_HARMLESS = frozenset({"linalg_vector_norm", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"})
_NAMESPACES = frozenset({"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional"})


class _Uncounted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that reaches a kernel, multiplies, and has no formula."""

    supports_higher_order_operators = True  # handed on; what they contain is seen

    def __init__(self, known: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            return NotImplemented
        name = func._overloadpacket.__name__
        foreign = func.namespace not in _NAMESPACES
        multiplies = name not in _HARMLESS and any(map(_MULTIPLIES.fullmatch, name.split("_")))
        if func._overloadpacket not in self.known and (foreign or multiplies):
            self.names.add(f"{func.namespace}::{name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_fused_transformer() -> Iterator[None]:
    """Keep nn.TransformerEncoderLayer from hiding its products in one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
