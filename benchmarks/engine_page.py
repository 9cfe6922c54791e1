"""Write `docs/results-engine.md` from the JSON files in `benchmarks/results`.

python -m benchmarks.engine_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import engine_speed, soundness

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "results-engine.md"

HEAD = """# The structural engine, measured

Written by `benchmarks/engine_page.py`; what is not measured is not here.

## Is the smaller model the same function?

Each library prunes half of the units of the same models with the calls of its quick start; the best
of its attempts counts. Then the removed slices are found by value, zeroed in the dense model, and
the outputs are compared (`benchmarks/soundness.py`; limit 1e-4 of the largest output). A result
whose norms or attention scale count only what is left is compared with a masked model that does so,
too ("rescaled"). Per cent: parameters that are left. A failure may be a limit of our harness or of
the time: 10 to 60 CPU seconds for each of up to four attempts. The messages are in
`benchmarks/results/soundness.jsonl`.
"""

SPEED = """
## What does it cost?

`benchmarks/engine_speed.py`: CPU seconds, one thread, batch of two, median of three. secateurs
always proves its result: the first ratio counts of `shrink` only the cut itself, the second all of
it.
"""


def main() -> None:
    """Write the page."""
    parts = [HEAD, soundness.table(), SPEED, engine_speed.table(), _random()]
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _random() -> str:
    found: dict[str, Any] = json.loads((RESULTS / "random_graphs.json").read_text())
    outcomes = ", ".join(f"{n} {kind}" for kind, n in found["outcomes"].items())
    return f"""
## Random networks

`benchmarks/random_graphs.py`: {found["n_graphs"]} programs drawn from {found["n_operators"]}
operators, cut at random in float64, and compared by code of their own on the example, on fresh
inputs and on twice the batch: {outcomes}. Something was removed in
{100 * found["fraction_with_removal"]:.0f} % of them. How often each operator occurred and was cut:
`benchmarks/results/random_graphs.json`.
"""


if __name__ == "__main__":
    main()
