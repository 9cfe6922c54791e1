"""Do random networks survive pruning? Outcomes and operators over many generated graphs.

    python -m benchmarks.random_graphs [n]

Each graph is traced, loses random units (keep ratios 0.1, 0.5, 0.9) and is shrunk; the result is
compared with the masked model in float64 by `tests/graph/random_law.py`. One thread. Writes
`benchmarks/results/random_graphs.json`:

    outcomes   graphs by outcome; "unsound", "refused" and "error" must be 0
    operators  name -> graphs that have it, calls, graphs where it met removed units
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from secateurs.report import environment
from tests.graph.random_law import LIMIT, RATIOS, check
from tests.graph.random_nets import random_net

OUT = Path(__file__).resolve().parent / "results" / "random_graphs.json"
LEAST_REMOVED = 0.60


def main(n: int = 1008) -> int:
    torch.set_num_threads(1)
    started = time.perf_counter()
    kinds: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    graphs: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    lines = 0
    failures = []
    for seed in range(n):
        program = random_net(seed)
        lines += len(program.lines)
        found = check(program, seed)
        kinds[found.kind] += 1
        forms[found.form or "none"] += 1
        graphs.update(set(found.ops))
        calls.update(found.ops)
        cut.update(set(found.cut))
        if found.failed:
            failures.append({"seed": seed, "kind": found.kind, "detail": found.detail[:200]})
        if seed % 100 == 99:
            print(f"{seed + 1} graphs: {dict(kinds)}", file=sys.stderr)
    removed = (kinds["equal"] + kinds["vacuous"]) / n
    result = {
        "environment": environment(),
        "n_graphs": n,
        "keep_ratios": list(RATIOS),
        "limit": LIMIT,
        "outcomes": {
            k: kinds[k]
            for k in ("equal", "vacuous", "whole", "uncaptured", "unsound", "refused", "error")
        },
        "forms": dict(sorted(forms.items())),
        "fraction_with_removal": round(removed, 4),
        "mean_lines": round(lines / n, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "n_operators": len(graphs),
        "n_operators_with_removal": len(cut),
        "operators": {
            op: {"graphs": count, "calls": calls[op], "graphs_with_removal": cut[op]}
            for op, count in sorted(graphs.items(), key=lambda item: (-item[1], item[0]))
        },
        "failures": failures,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("operators", "environment")}))
    return 1 if failures or removed < LEAST_REMOVED else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
