"""What a model really costs: parameters, multiply-adds, bytes, and the time of a call.

    model, example_inputs ── measure ──> Measurement

The multiply-adds are counted in `macs`, the time is taken in `latency`; their names can be imported
from here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateurs.errors import ConfigError
from secateurs.latency import MIN_MS, REPEATS, LatencyRow, compare_latency, resize_batch
from secateurs.macs import check_materialised, count_macs, macs
from secateurs.types import Inputs

__all__ = [
    "LatencyRow",
    "Measurement",
    "compare_latency",
    "macs",
    "measure",
    "no_gain_reason",
    "resize_batch",
]

MEANINGFUL_SPEEDUP = 1.05
TINY_CALL_MS = 0.2  # a few operators at about 10 microseconds each, before any arithmetic
BUSY_MACS_PER_S = 2e9  # one core with dense fp32 kernels does several times this


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
    check_materialised(model)
    counted, uncounted = count_macs(model, example_inputs)
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
    total = macs_after * after.batch_size
    rate = total / (after.median_ms / 1e3)
    if after.median_ms < TINY_CALL_MS or rate < BUSY_MACS_PER_S:
        return head + (
            f"with {total:.2g} multiply-adds left per call ({rate / 1e9:.2g} billion per second) "
            "the fixed cost of calling each operator dominates, not the arithmetic; "
            "try larger batches, fewer layers or a compiled runtime"
        )
    return head + (
        f"the multiply-adds fell {macs_before / max(macs_after, 1):.2g}-fold but the time goes "
        "elsewhere: memory traffic, uncounted operators, or widths that suit the kernels badly "
        "(try round_to=16)"
    )
