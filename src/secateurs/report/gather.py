"""What a report reads off tensors, models and the machine: histograms and the environment."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError
from secateurs.report.data import Histogram

__all__ = ["environment", "score_histogram", "weight_histograms"]


def _linear_edges(low: float, high: float, bins: int) -> np.ndarray[Any, Any]:
    if low == high:  # one value: a bar a fifth of it wide
        half = 0.1 * abs(low) or 0.5
        low, high = low - half, high + half
    edges: np.ndarray[Any, Any] = np.linspace(low, high, bins + 1)
    return edges


def _histogram(
    values: Tensor, bins: int, *, split_zeros: bool, allow_log: bool = False
) -> Histogram:
    if bins < 1:
        raise ConfigError(f"bins must be at least 1, got {bins}")
    x = values.detach().to("cpu", torch.float64).flatten().numpy()
    finite = x[np.isfinite(x)]
    ignored = int(x.size - finite.size)
    kept = finite[finite != 0]
    log = bool(
        allow_log
        and kept.size > 1
        and finite.min() >= 0
        and np.median(kept) < 0.05 * kept.max()
        and kept.max() > 0
    )
    data = kept if split_zeros or log else finite
    zeros = int(finite.size - data.size)
    if data.size == 0:
        return Histogram((), (), zeros, ignored)
    high = float(data.max())
    if log:
        low = max(float(data.min()), 1e-6 * high)
        edges = np.geomspace(low, high, bins + 1)
        edges[0], edges[-1] = low, high  # rounding must not lose the extremes
        data = np.clip(data, low, high)
    else:
        edges = _linear_edges(float(data.min()), high, bins)
    if not (np.diff(edges) > 0).all():  # a range too narrow for that many bins
        edges = _linear_edges(float(edges[0]), float(edges[-1]), 1)
    counts, _ = np.histogram(data, bins=edges)
    return Histogram(
        tuple(map(float, edges)),
        tuple(map(int, counts)),
        zeros,
        ignored,
        "log" if log else "linear",
    )


def score_histogram(scores: Tensor, bins: int = 30) -> Histogram:
    """Histogram of the scores of one target; -inf (removed earlier) is only counted.

    Scores with a long tail (non-negative, median of the positive ones below a twentieth of the
    largest) get logarithmic bins over at most six decades, exact zeros apart; what is smaller
    still is counted in the first bin.

    Args:
        scores: any shape, larger = keep.
        bins: number of bins, at least 1.

    Example:
        >>> score_histogram(torch.tensor([1.0, 2.0, 3.0, -torch.inf]), bins=2)
        Histogram(edges=(1.0, 2.0, 3.0), counts=(1, 2), zeros=0, ignored=1, scale='linear')
    """
    return _histogram(scores, bins, split_zeros=False, allow_log=True)


def weight_histograms(model: nn.Module, bins: int = 40) -> dict[str, Histogram]:
    """Histogram of every weight tensor of at least two dimensions, by parameter name.

    Exact zeros are counted apart, so that the spike of pruned weights does not flatten the rest.

    Args:
        model: dense, masked or shrunk; not changed.
        bins: number of bins, at least 1.
    """
    return {
        name: _histogram(parameter, bins, split_zeros=True)
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and parameter.is_floating_point() and not parameter.is_meta
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(seed: int | None = None) -> dict[str, Any]:
    """Versions, machine and seed of this process: what a reader needs to repeat the run."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
