"""`LatencyTable`: milliseconds of one call as a function of counts, from measured widths."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secateurs.errors import ConfigError, FileFormatError
from secateurs.latency.work import FloatArray, work_curve, works_of
from secateurs.types import Graph, IntArray

__all__ = ["Layer", "LatencyTable", "Runtime", "Width", "fingerprint"]

FORMAT = 1


@dataclass(frozen=True)
class Runtime:
    """Where and how a table was measured.

    Attributes:
        torch: version.
        processor: name of the processor (or accelerator), and how many cores it has.
        device: type of the device that held the model.
        dtype: of most parameters.
        threads: CPU threads.
        batch_size: samples in the call.
        inputs: shapes of the tensors that the model was called with.
    """

    torch: str
    processor: str
    device: str
    dtype: str
    threads: int
    batch_size: int
    inputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layer:
    """The time of one layer, at ascending amounts of work; between them it lies on a line.

    Attributes:
        name: path of the module, or `REST`.
        work: multiply-adds and elements, see `secateurs.latency.work`.
        ms: milliseconds, ascending.
    """

    name: str
    work: tuple[float, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class Width:
    """A model that was measured.

    Attributes:
        name: how it was made.
        kept: target -> units.
        ms: median of one call.
        predicted_ms: what the table says of it.
    """

    name: str
    kept: Mapping[str, int]
    ms: float
    predicted_ms: float


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """What widths cost on one machine: a limit for `allocate`.

    The prediction is the sum over layers, each at its work for these counts; below the least work
    that was measured a layer takes as long as there, and without any work no time.

    Attributes:
        graph: of the model that was measured.
        layers: by execution, the rest last.
        runtime: where and how it was measured.
        widths: what was measured; the first is the dense model.
        busy: time by the wall over time of the processor, of the dense model; about 1 on a quiet
            machine, and with several threads 1 by definition.
        seconds: that the measurement took.
    """

    graph: Graph = field(repr=False)
    layers: tuple[Layer, ...]
    runtime: Runtime
    widths: tuple[Width, ...]
    busy: float
    seconds: float

    @property
    def dense_ms(self) -> float:
        """Median of one call of the dense model."""
        return self.widths[0].ms

    @property
    def error(self) -> float:
        """Largest |predicted / measured - 1| of the models that the table was made from."""
        return max(abs(w.predicted_ms / w.ms - 1) for w in self.widths)

    def ms(self, counts: Mapping[str, int]) -> float:
        """Milliseconds when each named target keeps that many units; other targets keep all.

        Of units that differ in size those with the smaller index stay.

        Raises:
            ConfigError: an unknown target, or a count out of range.
        """
        units = {t.name: t.n_units for t in self.graph.targets.values() if t.kind != "weight"}
        for name, count in counts.items():
            if name not in units or not 0 <= count <= units[name]:
                raise ConfigError(
                    f"{name} keeps {count}: it must be a structural target of the graph, with at "
                    f"most its {units.get(name, 0)} units"
                )
        orders = {name: np.arange(units[name], dtype=np.int64) for name in counts}
        return self.curve(self.graph, orders)(counts)

    def curve(
        self, graph: Graph, orders: Mapping[str, IntArray]
    ) -> Callable[[Mapping[str, int]], float]:
        """Counts of all targets in `orders` -> milliseconds; never falls when a count rises.

        Args:
            graph: of the same model; it may have fewer targets.
            orders: target -> (n_units,) all its units, the last to go first.

        Raises:
            ConfigError: the table was measured for another model or other inputs.
        """
        if fingerprint(graph) != fingerprint(self.graph):
            raise ConfigError(
                "this latency table was measured for another model, or for inputs of another "
                "shape; measure one with secateurs.latency.measure_table"
            )
        work = work_curve(works_of(graph), orders, [layer.name for layer in self.layers])
        lines = _Lines(self.layers)
        return lambda counts: float(lines(work(counts)).sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format": FORMAT,
            "model": fingerprint(self.graph),
            "runtime": asdict(self.runtime),
            "dense_ms": self.dense_ms,
            "error": self.error,
            "busy": self.busy,
            "seconds": self.seconds,
            "widths": [asdict(w) for w in self.widths],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON, whole or not at all."""
        out = Path(path)
        part = out.with_name(f"{out.name}.{os.getpid()}.part")
        part.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        os.replace(part, out)
        return out

    @classmethod
    def load(cls, path: str | Path, graph: Graph) -> LatencyTable:
        """Read a table for the graph of the model that it was measured for.

        Raises:
            FileFormatError: the file is missing or no table.
            ConfigError: it was measured for another model or other inputs.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise FileFormatError(f"{path}: format {data['format']!r}; this reads {FORMAT}")
            model = data["model"]
            runtime = dict(data["runtime"])
            shapes = tuple(tuple(int(n) for n in s) for s in runtime.pop("inputs"))
            table = cls(
                graph,
                tuple(_layer(**row) for row in data["layers"]),
                Runtime(**runtime, inputs=shapes),
                tuple(Width(**row) for row in data["widths"]),
                float(data["busy"]),
                float(data["seconds"]),
            )
            _ = table.error
        except FileFormatError:
            raise
        except (OSError, KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise FileFormatError(f"{path}: not a latency table: {error!r}") from error
        if model != fingerprint(graph):
            raise ConfigError(
                f"{path} was measured for another model, or for inputs of another shape; measure "
                "this one with secateurs.latency.measure_table"
            )
        return table


def _layer(name: str, work: list[float], ms: list[float]) -> Layer:
    """A layer from a file.

    Raises:
        ValueError: figures that are not finite, or not in order.
    """
    for line in (work, ms):
        if not line or any(not math.isfinite(x) or x < 0 for x in line) or line != sorted(line):
            raise ValueError(f"figures of layer {name!r} are not finite and ascending")
    if len(work) != len(ms):
        raise ValueError(f"layer {name!r} has {len(work)} amounts of work and {len(ms)} times")
    return Layer(str(name), tuple(work), tuple(ms))


class _Lines:
    """Times of all layers at once: (layers,) work -> (layers,) milliseconds."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        longest = max(len(row.work) for row in layers)

        def padded(line: tuple[float, ...]) -> tuple[float, ...]:
            return line + line[-1:] * (longest - len(line))

        self.rows = np.arange(len(layers))
        self.work = np.array([padded(row.work) for row in layers])
        self.ms = np.array([padded(row.ms) for row in layers])

    def __call__(self, work: FloatArray) -> FloatArray:
        inside = np.clip(work, self.work[:, 0], self.work[:, -1])
        after = np.minimum((self.work <= inside[:, None]).sum(axis=1), self.work.shape[1] - 1)
        before = np.maximum(after - 1, 0)
        x0, x1 = self.work[self.rows, before], self.work[self.rows, after]
        y0, y1 = self.ms[self.rows, before], self.ms[self.rows, after]
        share = np.divide(inside - x0, x1 - x0, out=np.ones_like(x0), where=x1 > x0)
        between = np.minimum(y0 + (y1 - y0) * share, y1)  # no rounding above the next point
        times: FloatArray = np.where((work <= 0) & (self.work[:, 0] > 0), 0.0, between)
        return times


def fingerprint(graph: Graph) -> str:
    """What a table belongs to: parameters, buffers, multiply-adds, and shapes of the inputs."""
    terms = [
        (term.name, [d.size for d in term.dims if d.size > 1], round(term.uses, 6))
        for term in graph.costs
    ]
    text = json.dumps([graph.device, terms])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
