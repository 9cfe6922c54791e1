"""What a model really costs: parameters, multiply-adds, bytes, and the time of a call.

    model, example_inputs ── measure ──> Measurement

`macs` counts the multiply-adds that one forward run really performs, from the operators that reach
the kernels: linear layers, convolutions, matrix products, attention and recurrent layers, in any
module or captured graph. Pointwise operators, normalisation, pooling, softmax, look-ups and biases
are not multiply-adds and are not counted. An operator that does multiply but has no formula is
named in `Measurement.uncounted`. Zeros count like other numbers (a dense kernel multiplies them
too), and so does the masked half of causal attention.

`compare_latency` times candidates in one process, block by block in turn, so that a busy machine
slows all of them alike; medians and quartiles are reported, never a single run.
"""

from __future__ import annotations

import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
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
from secateurs.errors import CaptureError, ConfigError, DataError
from secateurs.types import Inputs

__all__ = [
    "LatencyRow",
    "Measurement",
    "compare_latency",
    "eval_mode",
    "macs",
    "measure",
    "no_gain_reason",
    "resize_batch",
]

REPEATS = 21
MIN_MS = 5.0
MEANINGFUL_SPEEDUP = 1.05
TINY_CALL_MS = 0.2  # a few operators at about 10 microseconds each, before any arithmetic
BUSY_MACS_PER_S = 2e9  # one core with dense fp32 kernels does several times this


@dataclass(frozen=True)
class LatencyRow:
    """Time of one forward call at one batch size.

    Attributes:
        batch_size: samples in the call.
        median_ms: median over the timed blocks, milliseconds per call (not per sample).
        p25_ms: first quartile.
        p75_ms: third quartile; half of the blocks lie between the two.
        runs: calls that were timed.
    """

    batch_size: int
    median_ms: float
    p25_ms: float
    p75_ms: float
    runs: int


@dataclass(frozen=True)
class Measurement:
    """The cost of a model.

    Attributes:
        params: parameter elements; a shared parameter counts once.
        nonzeros: of these, how many are not zero.
        macs: multiply-adds for one sample.
        param_bytes: memory of the parameters.
        buffer_bytes: memory of the buffers (running statistics, tables).
        latency: one row per batch size; empty if not asked for.
        threads: CPU threads the latency was taken with; None without latency.
        uncounted: operators that multiply but have no formula, so `macs` is too low by them.
    """

    params: int
    nonzeros: int
    macs: float
    param_bytes: int
    buffer_bytes: int
    latency: tuple[LatencyRow, ...] = ()
    threads: int | None = None
    uncounted: tuple[str, ...] = ()

    @property
    def model_sparsity(self) -> float:
        """Zeros over all parameters, in [0, 1]; 0 for a model without parameters."""
        return 1 - self.nonzeros / self.params if self.params else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `latency` becomes a list of dicts."""
        return {
            **asdict(self),
            "model_sparsity": self.model_sparsity,
            "latency": [asdict(row) for row in self.latency],
            "uncounted": list(self.uncounted),
        }


def measure(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    latency: bool = True,
    batch_sizes: Sequence[int] | None = None,
    repeats: int = REPEATS,
    min_ms: float = MIN_MS,
    threads: int | None = 1,
) -> Measurement:
    """Count and time a model in eval mode. Mode, gradients, buffers and random state stay.

    Args:
        example_inputs: a batch; dimension 0 of its first tensor is the batch size, by which the
            multiply-adds are divided.
        latency: whether to time calls too.
        batch_sizes: sizes to time, e.g. (1, 256); None: the size of the example.
        repeats: timed blocks per batch size, at least 2.
        min_ms: shortest block, milliseconds; fast models are called many times per block.
        threads: CPU threads while timing; None leaves the setting as it is.

    Raises:
        CaptureError: the model refuses the inputs, returns no tensor, or has lazy parameters.
        ConfigError: an option is out of range.
        DataError: the example has no batch dimension.

    Example:
        >>> m = measure(nn.Linear(4, 3), torch.zeros(2, 4), latency=False)
        >>> m.params, m.macs, m.param_bytes
        (15, 12.0, 60)
    """
    _check_materialised(model)
    counted, uncounted = _count(model, example_inputs)
    rows: tuple[LatencyRow, ...] = ()
    if latency:
        rows = tuple(
            compare_latency(
                {"model": model},
                example_inputs,
                batch_sizes,
                repeats=repeats,
                min_ms=min_ms,
                threads=threads,
            )["model"]
        )
    params = list(model.parameters())
    return Measurement(
        params=sum(p.numel() for p in params),
        nonzeros=sum(int(torch.count_nonzero(p)) for p in params),
        macs=counted,
        param_bytes=sum(p.numel() * p.element_size() for p in params),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        latency=rows,
        threads=(torch.get_num_threads() if threads is None else threads) if latency else None,
        uncounted=uncounted,
    )


def macs(model: nn.Module, inputs: Inputs) -> float:
    """Multiply-adds of one forward run in eval mode, per sample of `inputs`.

    Warns with the names of operators that multiply but have no formula.

    Raises:
        CaptureError: the model refuses the inputs or returns no tensor.

    Example:
        >>> macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 4, 4))  # 8 x 3 x 9 x 16
        3456.0
    """
    counted, uncounted = _count(model, inputs)
    if uncounted:
        warnings.warn(f"MACs leave out {', '.join(uncounted)}: no formula", stacklevel=2)
    return counted


def resize_batch(inputs: Inputs, size: int) -> Inputs:
    """The inputs with `size` samples, repeating or dropping those of the example.

    Every tensor whose dimension 0 equals the example's batch size is resized; others stay.

    Raises:
        ConfigError: `size` is below 1.
        DataError: the example has no samples.

    Example:
        >>> resize_batch(torch.tensor([1, 2]), 5).tolist()
        [1, 2, 1, 2, 1]
    """
    if size < 1:
        raise ConfigError(f"a batch size must be at least 1, got {size}")
    have = batch_size(inputs)
    if have == 0:
        raise DataError("the example batch has no samples (dimension 0 has size 0)")

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != have:
            return leaf
        return leaf.detach()[torch.arange(size, device=leaf.device) % have]

    resized: Inputs = pytree.tree_map(resize, inputs)
    return resized


# --- latency -------------------------------------------------------------------------------------


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    batch_sizes: Sequence[int] | None = None,
    *,
    repeats: int = REPEATS,
    min_ms: float = MIN_MS,
    threads: int | None = 1,
) -> dict[str, list[LatencyRow]]:
    """Time several models fairly: eval mode, no gradients, blocks of calls taken in turn.

    Each round times one block of every model, in alternating order, so drift and a busy neighbour
    reach all of them. A block is as many calls as fill `min_ms` (one for a slow model).

    Args:
        models: name -> model; all take `example_inputs` and are called on their own device.
        batch_sizes: sizes to time, made by repeating or dropping example samples; None: the
            example's own.
        repeats: rounds, at least 2.
        min_ms: shortest block, milliseconds, above 0.
        threads: CPU threads while timing, restored afterwards; None leaves the setting.

    Returns:
        name -> one `LatencyRow` per batch size, in the order asked for.

    Raises:
        CaptureError: a model refuses the inputs or returns no tensor.
        ConfigError: an option is out of range.
    """
    if repeats < 2 or not min_ms > 0:
        raise ConfigError(f"repeats must be >= 2 and min_ms > 0, got {repeats} and {min_ms}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1 or None, got {threads}")
    sizes = [batch_size(example_inputs)] if batch_sizes is None else list(batch_sizes)
    batches = [(size, resize_batch(example_inputs, size)) for size in sizes]
    rows: dict[str, list[LatencyRow]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(_threads(threads))
        for model in models.values():
            _check_materialised(model)
            stack.enter_context(preserve(model))
            stack.enter_context(in_mode(model, training=False))
        for size, inputs in batches:
            for name, row in _time_in_turn(models, inputs, size, repeats, min_ms).items():
                rows[name].append(row)
    return rows


def _time_in_turn(
    models: Mapping[str, nn.Module], inputs: Inputs, size: int, repeats: int, min_ms: float
) -> dict[str, LatencyRow]:
    """One latency row per model at one batch size."""
    calls, placed, times = {}, {}, {name: list[float]() for name in models}
    for name, model in models.items():
        # The first call allocates and may fill caches, which must stay usable for training.
        with torch.inference_mode(False), torch.no_grad():
            placed[name] = to_device(inputs, model_device(model))
            _run(model, placed[name], f"{name!r} at batch size {size}")
        warm = min(_block_ms(model, placed[name], 1) for _ in range(3))
        calls[name] = max(1, math.ceil(min_ms / max(warm, 1e-6)))
    order = list(models)
    for _ in range(repeats):
        for name in order:
            took = _block_ms(models[name], placed[name], calls[name])
            times[name].append(took / calls[name])
        order.reverse()
    rows = {}
    for name, samples in times.items():
        p25, median, p75 = statistics.quantiles(samples, n=4, method="inclusive")
        rows[name] = LatencyRow(size, median, p25, p75, runs=repeats * calls[name])
    return rows


def _block_ms(model: nn.Module, inputs: Inputs, calls: int) -> float:
    """Milliseconds for `calls` calls, until the device has finished."""
    device = model_device(model)
    with torch.inference_mode():
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call_model(model, inputs)
        _wait(device)
        return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """Use `n` CPU threads (None: as they are); restore the number afterwards."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        if n is not None:
            torch.set_num_threads(before)


def no_gain_reason(
    before: LatencyRow,
    after: LatencyRow,
    *,
    macs_before: float,
    macs_after: float,
    structural: bool,
) -> str | None:
    """Why the time did not improve, in one sentence; None if it did.

    It improved when the quartile ranges lie apart and the medians differ by at least 5 %. The
    reason is the most likely one, told from the numbers; it is not a profile.

    Args:
        before: latency of the original, same batch size as `after`.
        after: latency of the pruned model.
        macs_before: multiply-adds per sample of the original.
        macs_after: the same of the pruned model.
        structural: whether tensors became smaller (False: weights were only set to zero).

    Raises:
        ConfigError: the rows are for different batch sizes.
    """
    if before.batch_size != after.batch_size:
        raise ConfigError(
            "latency rows to compare must have one batch size, "
            f"got {before.batch_size} and {after.batch_size}"
        )
    speedup = before.median_ms / after.median_ms
    if after.p75_ms < before.p25_ms and speedup >= MEANINGFUL_SPEEDUP:
        return None
    what = "slower" if after.p25_ms > before.p75_ms else "not measurably faster"
    head = (
        f"{what} at batch {before.batch_size} "
        f"({before.median_ms:.3g} -> {after.median_ms:.3g} ms): "
    )
    if not structural:
        return head + (
            "weights were only set to zero, and dense kernels multiply zeros like any number; "
            "remove whole units or store the weights in a sparse format"
        )
    if macs_after > 0.95 * macs_before:
        return head + f"the multiply-adds hardly fell ({macs_before:.3g} -> {macs_after:.3g})"
    total = macs_before * before.batch_size
    rate = total / (before.median_ms / 1e3)
    if before.median_ms < TINY_CALL_MS or rate < BUSY_MACS_PER_S:
        return head + (
            f"at {total:.2g} multiply-adds per call ({rate / 1e9:.2g} billion per second) the "
            "fixed cost of calling each operator dominates, not the arithmetic; "
            "try larger batches, fewer layers or a compiled runtime"
        )
    return head + (
        f"the multiply-adds fell {macs_before / max(macs_after, 1):.2g}-fold but the time goes "
        "elsewhere: memory traffic, uncounted operators, or widths that suit the kernels badly "
        "(try round_to=16)"
    )


# --- multiply-adds -------------------------------------------------------------------------------

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


def _count(model: nn.Module, inputs: Inputs) -> tuple[float, tuple[str, ...]]:
    """Multiply-adds per sample, and the operators that were left out."""
    _check_materialised(model)
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
        _run(model, placed, "the model")
    return counter.get_total_flops() / 2 / samples, tuple(sorted(watch.names))


@contextmanager
def _no_fused_transformer() -> Iterator[None]:
    """Keep nn.TransformerEncoderLayer from hiding its products in one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# --- shared --------------------------------------------------------------------------------------


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; a graph exported by torch.export keeps the mode that it was exported in."""
    with ExitStack() as stack:
        try:
            stack.enter_context(in_mode(model, training=False))
        except NotImplementedError:  # its train() and eval() are not available
            if not isinstance(model, torch.fx.GraphModule):
                raise
        yield


def _run(model: nn.Module, inputs: Inputs, where: str) -> None:
    """One call, checked to return a tensor."""
    try:
        outputs = call_model(model, inputs)
    except Exception as error:
        raise CaptureError(f"{where} refuses the example inputs: {error}") from error
    if not tensors(outputs):
        raise CaptureError(f"{where} returns {type(outputs).__name__}, no tensor")


def _check_materialised(model: nn.Module) -> None:
    """Refuse lazy parameters: running the model would silently create them."""
    lazy = [n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise CaptureError(
            f"parameters without a shape yet: {', '.join(lazy)}. Run the model once first"
        )
