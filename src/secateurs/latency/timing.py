"""How long a forward call takes, for candidates that take turns.

All candidates are timed in one process, block by block in turn, so that a busy machine slows all of
them alike; medians and quartiles are reported, never a single run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.batches import batch_size, call_model, in_mode, model_device, preserve, to_device
from secateurs.errors import ConfigError, DataError
from secateurs.macs import check_materialised, run_once
from secateurs.types import Inputs

__all__ = [
    "LatencyRow",
    "block_ms",
    "compare_latency",
    "resize_batch",
    "row_of",
    "threads_set",
    "times_in_turn",
    "timing",
    "wait",
]

REPEATS = 21
MIN_MS = 5.0


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
    with timing(models, threads):
        for size, inputs in batches:
            times, calls = times_in_turn(models, inputs, size, repeats, min_ms)
            for name, taken in times.items():
                rows[name].append(row_of(taken, size, repeats * calls[name]))
    return rows


@contextmanager
def timing(models: Mapping[str, nn.Module], threads: int | None) -> Iterator[None]:
    """Within: eval mode and so many threads; everything is as before afterwards.

    Raises:
        CaptureError: a model has parameters without a shape.
    """
    with ExitStack() as stack:
        stack.enter_context(threads_set(threads))
        for model in models.values():
            check_materialised(model)
            stack.enter_context(preserve(model))
            stack.enter_context(in_mode(model, training=False))
        yield


def times_in_turn(
    models: Mapping[str, nn.Module], inputs: Inputs, size: int, repeats: int, min_ms: float
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of a call in each block, by round, and calls per block; inside `timing`."""
    calls, placed, times = {}, {}, {name: list[float]() for name in models}
    for name, model in models.items():
        # The first call allocates and may fill caches, which must stay usable for training.
        with torch.inference_mode(False), torch.no_grad():
            placed[name] = to_device(inputs, model_device(model))
            run_once(model, placed[name], f"{name!r} at batch size {size}")
        warm = min(block_ms(model, placed[name], 1) for _ in range(3))
        calls[name] = max(1, math.ceil(min_ms / max(warm, 1e-6)))
    order = list(models)
    for _ in range(repeats):
        for name in order:
            took = block_ms(models[name], placed[name], calls[name])
            times[name].append(took / calls[name])
        order.reverse()
    return times, calls


def row_of(times: Sequence[float], size: int, runs: int) -> LatencyRow:
    """Median and quartiles."""
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive")
    return LatencyRow(size, median, p25, p75, runs)


def block_ms(model: nn.Module, inputs: Inputs, calls: int) -> float:
    """Milliseconds for `calls` calls, until the device has finished."""
    device = model_device(model)
    with torch.inference_mode():
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call_model(model, inputs)
        wait(device)
        return (time.perf_counter() - start) * 1e3


def wait(device: torch.device) -> None:
    """Until the device has finished."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


@contextmanager
def threads_set(n: int | None) -> Iterator[None]:
    """Use `n` CPU threads (None: as they are); restore the number afterwards."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        if n is not None:
            torch.set_num_threads(before)


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
