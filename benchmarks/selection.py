"""One threshold over very many scores: time as a multiple of one read, and bytes per element.

    python -m benchmarks.selection                   # all sizes that fit; resumes where it stopped
    python -m benchmarks.selection --sizes 25e6 --threads 1 --again
    python -m benchmarks.selection --table           # print what is there

The score above which a tenth of all float32 scores lie. `secateurs` is `kth_largest` over 24
tensors; the others get the same scores joined already, which in use would cost them a copy more.
The unit is a read: `x.sum()` of all tensors, in the same process, just before each run of the
method: in turns. CPU seconds of all threads, so that other people's programs blur it less; wall
time beside it. Median and quartiles over the repetitions. Peak memory is that of the
process (largest resident set during the first run above that before it), so that what torch and
numpy take outside of Python counts as well. Every method, size and thread count has a process of
its own; one that would need more memory than is free is left out, with the reason. All exact
methods must find the same score, or the run fails.

    normal   |w|, w ~ N(0, 1): a layer as it was initialised, scored by magnitude
    ties     |w| in steps of 1/4, half of them 0: as after quantisation, or dead units
    narrow   1 + u / 4096, u uniform in [0, 1): 2048 different numbers that share their first bits
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateurs.kth import about_kth_largest, kth_largest
from secateurs.report import environment

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "selection.json"
SIZES = (25_000_000, 110_000_000, 1_000_000_000)
TENSORS = 24
KEEP = 0.1
SEED = 0
SAMPLE = 1_000_000
REPETITIONS = {25_000_000: 9, 110_000_000: 5, 1_000_000_000: 3}
LARGE = 1_000_000_000
FREE_FOR_LARGE = 12e9
SPARE = 5e9
"""Bytes that stay free for others."""

Run = Callable[[Mapping[str, Tensor], Tensor, int], float]
METHODS: dict[str, tuple[Run, float]] = {
    "secateurs": (lambda parts, x, k: kth_largest(parts, k).threshold, 0.5),
    "secateurs, sample of a million": (
        lambda parts, x, k: about_kth_largest(parts, k, sample=SAMPLE, seed=SEED).threshold,
        0.5,
    ),
    "torch.kthvalue": (lambda parts, x, k: float(x.kthvalue(len(x) - k + 1).values), 13.0),
    "torch.topk": (lambda parts, x, k: float(x.topk(k, sorted=False).values.amin()), 18.0),
    "torch.sort": (lambda parts, x, k: float(x.sort(descending=True).values[k - 1]), 36.0),
    "numpy.partition": (
        lambda parts, x, k: float(np.partition(x.numpy(), len(x) - k)[len(x) - k]),
        4.5,
    ),
}
"""Method -> how it is run, and the bytes per element that it takes at most, to see if it fits."""


def scores(kind: str, n: int) -> Tensor:
    """(n,) float32 scores, made in pieces."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.empty(n)
    for piece in torch.split(x, 1 << 22):
        if kind == "narrow":
            piece.uniform_(generator=generator).div_(4096).add_(1)
            continue
        piece.normal_(generator=generator).abs_()
        if kind == "ties":
            piece.mul_(4).round_().div_(4)
            piece[::2] = 0
    return x


def resident(key: str) -> int:
    """A figure of this process in bytes: "VmRSS" now, "VmHWM" the largest."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status; this benchmark needs Linux")


def one(method: str, kind: str, n: int, threads: int) -> dict[str, Any]:
    """Measure one method in this process."""
    torch.set_num_threads(threads)
    run = METHODS[method][0]
    x = scores(kind, n)
    parts = {f"layer{i}": part for i, part in enumerate(torch.split(x, -(-n // TENSORS)))}
    k = int(n * KEEP)
    reads, times = [], []
    for part in parts.values():
        part.sum()
    run({"warm": x[:10_000]}, x[:10_000], 10)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = resident("VmRSS")
    threshold = run(parts, x, k)
    peak = resident("VmHWM") - before
    used = time.process_time()
    started = time.perf_counter()
    for _ in range(REPETITIONS.get(n, 3)):
        start = _clocks()
        for part in parts.values():
            part.sum()
        middle = _clocks()
        again = run(parts, x, k)
        times.append(_clocks() - middle)
        reads.append(middle - start)
        assert again == threshold
    share = (time.process_time() - used) / (time.perf_counter() - started) / threads
    cpu, wall = np.transpose([t / r for t, r in zip(times, reads, strict=True)]).tolist()
    low, _, high = quantiles(cpu, n=4, method="inclusive")
    return {
        "threshold": threshold,
        "reads": median(cpu),
        "reads_quartiles": [low, high],
        "reads_wall": median(wall),
        "cpu_seconds": median(float(t[0]) for t in times),
        "wall_seconds": median(float(t[1]) for t in times),
        "read_cpu_seconds": median(float(t[0]) for t in reads),
        "read_wall_seconds": median(float(t[1]) for t in reads),
        "peak_bytes_per_element": max(0, peak) / n,
        "repetitions": len(cpu),
        "cpu_share": share,
    }


def _clocks() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """CPU and wall seconds."""
    return np.array([time.process_time(), time.perf_counter()])


def free_memory() -> float:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("no MemAvailable in /proc/meminfo; this benchmark needs Linux")


def too_large(method: str, n: int) -> str:
    """Why it is left out; empty if it fits."""
    free = free_memory()
    need = (4.5 + METHODS[method][1]) * n
    if n >= LARGE and free < FREE_FOR_LARGE:
        return f"{free / 1e9:.0f} GB of memory were free, less than {FREE_FOR_LARGE / 1e9:.0f} GB"
    if need + SPARE > free:
        return (
            f"needs about {need / 1e9:.0f} GB with the scores; {free / 1e9:.0f} GB were free, of "
            f"which {SPARE / 1e9:.0f} stay for others"
        )
    return ""


def measure(method: str, kind: str, n: int, threads: int) -> dict[str, Any]:
    """One row, from a process of its own."""
    load = os.getloadavg()[0]
    row: dict[str, Any] = {"method": method, "scores": kind, "n": n, "threads": threads}
    reason = too_large(method, n)
    if reason:
        return {**row, "skipped": reason}
    asked = ["--one", method, kind, str(n), str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.selection", *asked],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        return {**row, "skipped": f"failed: {said[0]}"}
    return {**row, **json.loads(done.stdout), "load_before": load}


def save(rows: list[dict[str, Any]]) -> None:
    """Write the rows, after checking that all exact methods agree."""
    found: dict[tuple[str, int], set[float]] = {}
    for row in rows:
        if "threshold" in row and "sample" not in row["method"]:
            found.setdefault((row["scores"], row["n"]), set()).add(row["threshold"])
    wrong = [case for case, values in found.items() if len(values) > 1]
    if wrong:
        raise SystemExit(f"exact methods disagree on {wrong}: {[found[case] for case in wrong]}")
    data = {
        "environment": {**environment(SEED), "threads": "see the rows"},
        "keep": KEEP,
        "tensors": TENSORS,
        "target": {"reads": 13, "bytes_per_element": 3},
        "note": "load_before is the load average (1 minute) before the process started, with 2 "
        "cores; cpu_share is CPU time over wall time and threads: below 1 others were running",
        "rows": rows,
    }
    RESULT.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each row."""
    lines = [
        f"{'scores':8}{'elements':>12} {'thr':>3}  {'method':32}{'reads':>7}  {'B/el':>6}  CPU s"
    ]
    for r in rows:
        head = f"{r['scores']:8}{r['n']:>12,} {r['threads']:>3}  {r['method']:32}"
        if "skipped" in r:
            lines.append(f"{head}left out: {r['skipped']}")
        else:
            held = r["peak_bytes_per_element"]
            lines.append(f"{head}{r['reads']:7.1f}  {held:6.2f}  {r['cpu_seconds']:7.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scores", nargs="+", default=["normal", "ties", "narrow"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, kind, n, threads = args.one
        print(json.dumps(one(method, kind, int(n), int(threads))))
        return
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    for n in () if args.table else [int(size) for size in args.sizes]:
        for kind in args.scores:
            for threads in args.threads:
                for method in args.methods:
                    key = (method, kind, n, threads)
                    old = [r for r in rows if key == tuple(map(r.get, _KEY))]
                    if old and not args.again:
                        continue
                    row = measure(*key)
                    print(table([row]).splitlines()[1], file=sys.stderr, flush=True)
                    rows = [r for r in rows if r not in old] + [row]
                    rows.sort(key=_place)
                    save(rows)
    print(table(rows))


_KEY = ("method", "scores", "n", "threads")


def _place(row: Mapping[str, Any]) -> tuple[int, str, int, int]:
    return row["n"], row["scores"], row["threads"], list(METHODS).index(row["method"])


if __name__ == "__main__":
    main()
