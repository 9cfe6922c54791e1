"""`measure_table`: make the model smaller at several widths and time each layer in each."""

from __future__ import annotations

import copy
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from secateurs.allocation.rounding import RoundTo, roundings
from secateurs.batches import batch_size, model_device, tensors, to_device
from secateurs.errors import ConfigError
from secateurs.latency.probing import call_time, clock_for, layer_times
from secateurs.latency.table import LatencyTable, Layer, Runtime, Width
from secateurs.latency.timing import timing
from secateurs.latency.work import REST, FloatArray, work_curve, works_of
from secateurs.macs import run_once
from secateurs.selection import select
from secateurs.surgery import Captures, shrink
from secateurs.surgery.shrinking import info_of
from secateurs.types import Budget, Counts, Graph, GroupTarget, Inputs, Scores

__all__ = ["WIDTHS", "measure_table", "rising", "runtime_of"]

WIDTHS = (0.85, 0.7, 0.55, 0.4, 0.25, 0.12)
"""Shares of the units of every target at which the model is measured, beside all and the fewest."""
MIXED = (0.3, 0.9)
"""Every other target keeps the one, the rest the other, and the other way round: layers whose
inputs and outputs are of different width."""
REPEATS = 11
BLOCK_MS = 5.0


def measure_table(
    model: nn.Module,
    graph: Graph,
    example_inputs: Inputs,
    *,
    granularity: str | Iterable[str] = "structured",
    round_to: RoundTo = "auto",
    widths: Sequence[float] = WIDTHS,
    repeats: int = REPEATS,
    threads: int | None = 1,
) -> LatencyTable:
    """Return what widths cost on this machine and runtime, in milliseconds of one call.

    The model is made smaller at several shares of the units of every target, and twice with wide
    and narrow targets in turn (`shrink`: what is timed is what pruning gives). All of them take
    turns; in each turn the whole call is timed, and then once more operator by operator, with one
    thread in processor time, which a busy machine disturbs least. The times of layers are scaled so
    that they add up to the whole call, made to rise with the work of the layer (isotonic
    regression), and multiplied by what a call of the dense model took by the wall.

    All models are held at once: about four times the memory of the dense one.

    Args:
        model: the dense model; it is not changed.
        graph: from `trace` of this model.
        example_inputs: the call that is timed.
        granularity: kinds that will be pruned; others keep all their units.
        round_to: which counts are measured, as in `allocate`.
        widths: shares of the units, in (0, 1).
        repeats: turns, at least 3.
        threads: CPU threads while timing; None leaves the setting as it is.

    Raises:
        ConfigError: an option out of range, or nothing of these kinds can be pruned.
    """
    if repeats < 3 or not all(0 < w < 1 for w in widths):
        raise ConfigError(f"repeats must be >= 3 and widths in (0, 1), got {repeats}, {widths}")
    started = time.monotonic()
    targets = graph.groups(granularity)
    if not targets:
        raise ConfigError(f"nothing of granularity {granularity!r} can be pruned: no widths")
    kept = _widths(graph, targets, round_to, widths)
    models = _made(model, graph, kept, example_inputs)
    times = _timed(models, example_inputs, repeats, threads)
    layers = _layers(graph, kept, times)
    runtime = runtime_of(model, example_inputs, threads)
    table = LatencyTable(graph, layers, runtime, (), times.busy, time.monotonic() - started)
    known = tuple(Width(n, kept[n], times.whole[n] * times.busy, table.ms(kept[n])) for n in kept)
    return replace(table, widths=known)


def runtime_of(model: nn.Module, inputs: Inputs, threads: int | None) -> Runtime:
    """Where a call with these inputs would run now."""
    device = model_device(model)
    types = Counter(p.dtype for p in model.parameters())
    common = types.most_common(1)[0][0] if types else torch.get_default_dtype()
    return Runtime(
        torch=str(torch.__version__),
        processor=_processor(device),
        device=device.type,
        dtype=str(common).removeprefix("torch."),
        threads=torch.get_num_threads() if threads is None else threads,
        batch_size=batch_size(inputs),
        inputs=tuple(tuple(t.shape) for t in tensors(inputs)),
    )


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        models = [ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


# -- the models --------------------------------------------------------------------------------


def _widths(
    graph: Graph, targets: Sequence[GroupTarget], round_to: RoundTo, widths: Sequence[float]
) -> dict[str, dict[str, int]]:
    """Name -> counts; the dense model first, equal ones once."""
    rounding = roundings(round_to, graph, [t.name for t in targets])

    def counts(shares: Sequence[float]) -> dict[str, int]:
        found = {}
        for share, target in zip(shares, targets, strict=True):
            n = target.n_units
            wanted = rounding[target.name].up(max(1, round(share * n)))
            found[target.name] = min(n, wanted)
        return found

    n = len(targets)
    made = {"dense": {t.name: t.n_units for t in targets}}
    made |= {f"{share:g}": counts([share] * n) for share in sorted(widths, reverse=True)}
    for shift, name in enumerate(("mixed", "mixed, the other way round")):
        made[name] = counts([MIXED[(i + shift) % 2] for i in range(n)])
    made["fewest"] = counts([0.0] * n)
    once = {tuple(kept.values()): name for name, kept in reversed(made.items())}
    return {name: kept for name, kept in made.items() if once[tuple(kept.values())] == name}


def _made(
    model: nn.Module, graph: Graph, kept: Mapping[str, Mapping[str, int]], inputs: Inputs
) -> dict[str, nn.Module]:
    """The models, all in the same form."""
    lines = {
        t.name: torch.arange(t.n_units, 0, -1, dtype=torch.float32)
        for t in graph.groups([*{t.kind for t in graph.targets.values() if t.kind != "weight"}])
    }
    scores = Scores(graph, lines, "first units")
    plans = {n: select(scores, Counts(c, Budget(units=1.0))) for n, c in kept.items()}
    cut = {name: plan for name, plan in plans.items() if plan.structural}
    small = {name: shrink(model, plan, inputs) for name, plan in cut.items()}
    if any(info_of(m).form == "graph" for m in small.values()):
        captures = Captures.of(copy.deepcopy(model), inputs)
        small = {
            name: shrink(model, plan, inputs, form="graph", captures=captures)
            for name, plan in cut.items()
        }
    return {name: small.get(name, model) for name in kept}


# -- the times ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Times:
    """Medians, in milliseconds by the clock: of whole calls, and of the layers in them."""

    whole: Mapping[str, float]
    parts: Mapping[str, Mapping[str, float]]
    busy: float


def _timed(
    models: Mapping[str, nn.Module], inputs: Inputs, repeats: int, threads: int | None
) -> _Times:
    """Time the models in turn; the first is the dense one."""
    whole: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    first = next(iter(models))
    with timing(models, threads):
        clock = clock_for(model_device(models[first]), torch.get_num_threads())
        placed = {name: to_device(inputs, model_device(m)) for name, m in models.items()}
        calls = {}
        for name, model in models.items():
            with torch.inference_mode(False), torch.no_grad():
                run_once(model, placed[name], f"{name!r}")
            layer_times(model, placed[name], clock)
            taken, _ = call_time(model, placed[name], 2, clock)
            calls[name] = max(1, math.ceil(BLOCK_MS / max(taken, 1e-3)))
        order = list(models)
        for _ in range(repeats):
            for name in order:
                whole[name].append(call_time(models[name], placed[name], calls[name], clock))
                parts[name].append(layer_times(models[name], placed[name], clock))
            order.reverse()
    layers = {}
    for name, runs in parts.items():
        seen = dict.fromkeys(k for run in runs for k in run)
        layers[name] = {k: median(run.get(k, 0.0) for run in runs) for k in seen}
    medians = {name: median(taken for taken, _ in times) for name, times in whole.items()}
    wall = median(wall for _, wall in whole[first])
    return _Times(medians, layers, wall / max(medians[first], 1e-9))


def _layers(
    graph: Graph,
    kept: Mapping[str, Mapping[str, int]],
    times: _Times,
) -> tuple[Layer, ...]:
    """The lines of the table: times against work, scaled so that they add up to the whole call."""
    names = [k for k in dict.fromkeys(k for part in times.parts.values() for k in part) if k]
    names.append(REST)
    orders = {t: np.arange(n, dtype=np.int64) for t, n in kept["dense"].items()}
    work = work_curve(works_of(graph), orders, names)
    done = np.stack([work(counts) for counts in kept.values()])  # (models, layers)
    taken = np.zeros_like(done)
    for row, model in enumerate(kept):
        own = np.array([times.parts[model].get(name, 0.0) for name in names])
        scale = min(1.0, times.whole[model] / own.sum()) if own.sum() else 0.0
        taken[row] = own * scale
        taken[row, -1] = max(0.0, times.whole[model] - taken[row].sum())
    taken *= times.busy
    return tuple(Layer(name, *rising(done[:, i], taken[:, i])) for i, name in enumerate(names))


def rising(work: FloatArray, ms: FloatArray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Work and times in order, the times made to rise: isotonic least squares.

    Example:
        >>> rising(np.array([3.0, 1.0, 2.0]), np.array([4.0, 1.0, 6.0]))
        ((1.0, 2.0, 3.0), (1.0, 5.0, 5.0))
    """
    at, where = np.unique(work, return_inverse=True)
    number = np.bincount(where).astype(float)
    mean = np.bincount(where, weights=ms) / number
    blocks: list[list[float]] = []  # mean, weight, points
    for value, weight in zip(mean.tolist(), number.tolist(), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value2, weight2, points2 = blocks.pop()
            value1, weight1, points1 = blocks.pop()
            total = weight1 + weight2
            pooled = (value1 * weight1 + value2 * weight2) / total
            blocks.append([pooled, total, points1 + points2])
    times = [value for value, _, points in blocks for _ in range(int(points))]
    return tuple(at.tolist()), tuple(times)
