"""What a second process is worth when scoring: time of one process over twice that of two.

    python -m benchmarks.distributed_scoring              # resumes where it stopped
    python -m benchmarks.distributed_scoring --again      # measures anew
    python -m benchmarks.distributed_scoring --table      # prints what is there

ResNet-20 on 5,120 images of 28 x 28 in batches of 64, fp32, gloo, one thread for each process; the
time does not depend on what the images show, so they are noise. Measured is the whole call of
`score`, with probes, checks, hashes and the merge, from a barrier to a barrier, after a call on one
batch. Kinds of a repetition, in turns:

    one      one process, all batches
    two      two processes of a group, half of the batches each
    apart    two processes that know nothing of each other, half of the batches each: what this
             machine gives at best (both share caches and memory)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

import secateurs as sc
from secateurs.report import environment
from secateurs.tasks.models import ResNet20

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "distributed_scoring.jsonl"
SUMMARY = HERE / "results" / "distributed_scoring.json"
REPETITIONS = 3
IMAGES, BATCH = 5_120, 64
WORK = {
    "channels: taylor, fisher, activation_mean, entropy": (
        ["taylor", "fisher", "activation_mean", "entropy"], "channel",
    ),
    "weights: taylor_batch, snip, magnitude": (["taylor_batch", "snip", "magnitude"], "weight"),
}  # fmt: skip
"""Name -> criteria that share one pass, and what they score."""
KINDS = ("one", "two", "apart")
TARGET = 0.9


def main() -> None:
    """Measure what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_RAW)
    parser.add_argument("--again", action="store_true", help="measure anew")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(*options.worker)
        return
    if options.again:
        ROWS.unlink(missing_ok=True)
    if not options.table:
        _measure_all()
    _summarise()


_RAW = argparse.RawDescriptionHelpFormatter


def rows() -> list[dict[str, Any]]:
    """What was measured so far."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def _measure_all() -> None:
    done = {(r["work"], r["repetition"], r["kind"]) for r in rows()}
    for repetition in range(REPETITIONS):
        for work in WORK:
            for kind in KINDS:
                if (work, repetition, kind) in done:
                    continue
                load = os.getloadavg()[0]
                seconds = _measure(work, kind)
                row = {"work": work, "repetition": repetition, "kind": kind,
                       "seconds": round(seconds, 3), "load_before": round(load, 2)}  # fmt: skip
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def _measure(work: str, kind: str) -> float:
    """Seconds of the slowest process."""
    size = 1 if kind == "one" else 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.distributed_scoring", "--worker", work, kind]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(rank), str(size), folder], env=environ, cwd=HERE.parent)
            for rank in range(size)
        ]
        for process in ranks:
            if process.wait(timeout=3600) != 0:
                raise SystemExit("a process failed; see above")
        return max(float((Path(folder) / f"{r}.txt").read_text()) for r in range(size))


def _work(work: str, kind: str, rank_text: str, size_text: str, folder: str) -> None:
    """One process: writes its seconds."""
    rank, size = int(rank_text), int(size_text)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size,
        timeout=timedelta(seconds=600),
    )  # fmt: skip
    model = ResNet20().eval()
    x, y = torch.randn(IMAGES, 1, 28, 28), torch.randint(10, (IMAGES,))
    every = list(zip(x.split(BATCH), y.split(BATCH), strict=True))  # type: ignore[no-untyped-call]
    mine = (
        every if size == 1 else every[: len(every) // 2] if rank == 0 else every[len(every) // 2 :]
    )
    graph = sc.trace(model, x[:2])
    names, granularity = WORK[work]
    group: Any = "world" if kind == "two" else None

    def run(batches: Any) -> None:
        sc.score(
            model, batches, cross_entropy, criterion=names, graph=graph, granularity=granularity,
            group=group,
        )  # fmt: skip

    run(every[:1])
    dist.barrier()
    started = time.perf_counter()
    run(mine)
    dist.barrier()
    (Path(folder) / f"{rank}.txt").write_text(str(time.perf_counter() - started))
    dist.destroy_process_group()


def _summarise() -> None:
    found = rows()
    table = {}
    for work in WORK:
        seconds = {
            kind: [r["seconds"] for r in found if (r["work"], r["kind"]) == (work, kind)]
            for kind in KINDS
        }
        if not all(seconds.values()):
            continue
        middle = {kind: median(values) for kind, values in seconds.items()}
        ratios = [a / (2 * b) for a, b in zip(seconds["one"], seconds["two"], strict=False)]
        table[work] = {
            "seconds": {kind: round(value, 2) for kind, value in middle.items()},
            "efficiency": round(middle["one"] / (2 * middle["two"]), 3),
            "efficiency_of_each_repetition": [round(r, 3) for r in ratios],
            "best_on_this_machine": round(middle["one"] / (2 * middle["apart"]), 3),
            "reached": middle["one"] / (2 * middle["two"]) >= TARGET,
        }
        print(work, json.dumps(table[work]))
    torch.set_num_threads(1)
    SUMMARY.write_text(
        json.dumps(
            {
                "what": "seconds of one process / (2 x seconds of two), median of repetitions",
                "target": TARGET, "repetitions": REPETITIONS,
                "largest_load_before": max((r["load_before"] for r in found), default=None),
                "environment": environment(0), "results": table,
            }, indent=1,
        ) + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
