"""How long a forward call takes, and which widths make it short enough.

    {name: model}, example_inputs ── compare_latency ──> {name: [LatencyRow per batch size]}
    model, graph, example_inputs  ── measure_table ────> LatencyTable     milliseconds of counts
    model, scores, table, budget  ── fit_latency ──────> LatencyFit       counts, and what they take

A table is measured on the machine and runtime on which the model will run: the model is made
smaller at several widths, and each layer is timed in each. It is a limit of `allocate`
(`Budget(latency_ms=...)`, `latency=table`); `fit_latency` closes the loop, since a prediction is
not yet a measurement.
"""

from secateurs.latency.fitting import LatencyFit, Round, fit_latency
from secateurs.latency.measuring import measure_table
from secateurs.latency.table import LatencyTable
from secateurs.latency.timing import (
    MIN_MS,
    REPEATS,
    LatencyRow,
    compare_latency,
    resize_batch,
)

__all__ = [
    "MIN_MS",
    "REPEATS",
    "LatencyFit",
    "LatencyRow",
    "LatencyTable",
    "Round",
    "compare_latency",
    "fit_latency",
    "measure_table",
    "resize_batch",
]
