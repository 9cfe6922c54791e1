"""What it costs to prune: CPU seconds of secateurs and of Torch-Pruning, side by side.

    python -m benchmarks.engine_speed                    # resumes where it stopped
    python -m benchmarks.engine_speed --cases resnet-50 --again
    python -m benchmarks.engine_speed --table            # print what is there

Half of the units go, by magnitude, on one thread. Both tools get the same model and the same batch
of two; each measurement runs in a process of its own that forks from a warm one, the tools take
turns, and the median counts. Torch-Pruning: its constructor (dependency graph) and `step`
(importance, removal). secateurs: `trace`, `score` to `select`, and `shrink`. `shrink` also proves
its result, which Torch-Pruning does not: the first ratio counts of it only the cut itself (timed
once more, alone), the second all of it.

The last row plans a llama of six billion parameters that are not there (meta device), in a fresh
process, with its peak memory.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import multiprocessing as mp
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import secateurs as sc
from benchmarks.architectures import densenet, image, llama, resnet, tokens, transformers_model
from benchmarks.peers import final_layers, head_options, torch_pruner, version_of
from secateurs.report import environment
from secateurs.surgery.slicing import fix_sizes, sliced_copy

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "engine_speed.jsonl"
SUMMARY = HERE / "results" / "engine_speed.json"
TOOLS = ("secateurs", "torch-pruning")
REPETITIONS = 3
SECONDS = 1800
HIDDEN, LAYERS = (256, 1024), (4, 8, 16, 32)
AT_LEAST = {"densenet-201": 5.0, **{f"llama-32x{h}": 5.0 for h in HIDDEN}}
"""Targets of the ratio; 1 for the others."""
META = "llama-6b-meta"
META_SECONDS, META_BYTES = 15.0, 3e9


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "resnet-50": (lambda: resnet((3, 4, 6, 3)), image),
    "resnet-152": (lambda: resnet((3, 8, 36, 3)), image),
    "densenet-201": (lambda: densenet((6, 12, 48, 32)), image),
    "vit-b-16": (lambda: transformers_model("ViTForImageClassification", num_labels=1000), image),
    "bert-base": (lambda: transformers_model("BertForSequenceClassification"), tokens),
    **{
        f"llama-{n}x{h}": ((lambda n=n, h=h: llama(n, h)), tokens)  # type: ignore[misc]
        for h in HIDDEN
        for n in LAYERS
    },
}


class Clock:
    """CPU seconds of named steps."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, step: str) -> None:
        now = time.process_time()
        self.steps[step] = round(now - self._last, 4)
        self._last = now


def time_secateurs(model: nn.Module, inputs: Any, outputs: tuple[str, ...] = ()) -> dict[str, Any]:
    knows = "outputs" in inspect.signature(sc.trace).parameters
    more: dict[str, Any] = {"outputs": outputs} if knows and outputs else {}
    clock = Clock()
    graph = sc.trace(model, inputs, **more)
    clock.lap("trace")
    scores = sc.score(model, criterion="l2_norm", graph=graph)
    plan = sc.select(scores, sc.allocate(scores, sc.Budget(units=0.5)))
    clock.lap("select")
    small = sc.shrink(model, plan, inputs)
    clock.lap("shrink")
    fix_sizes(sliced_copy(model, plan.kept), model, plan.kept)
    clock.lap("cut")  # once more and alone: the rest of shrink is proof
    return {"steps": clock.steps, "params_kept": _parameters(small) / _parameters(model)}


def time_torch_pruning(model: nn.Module, inputs: Any) -> dict[str, Any]:
    before = _parameters(model)
    ignored, options = final_layers(model, inputs), head_options(model)
    clock = Clock()
    pruner = torch_pruner(model, inputs, ignored=ignored, **options)
    clock.lap("graph")
    pruner.step()
    clock.lap("prune")
    return {"steps": clock.steps, "params_kept": _parameters(model) / before}


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def measure(case: str, tool: str) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.manual_seed(0)
    build, inputs = CASES[case]
    model = build().eval()
    n = _parameters(model)
    run = time_secateurs if tool == "secateurs" else time_torch_pruning
    found = run(model, inputs(2))
    steps = found["steps"]
    total = sum(v for k, v in steps.items() if k != "cut")
    return {**found, "params": n, "seconds": round(total, 4), "message": ""}


def warm_up() -> None:
    """What is loaded or compiled at first use is paid here, by both."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 4)
    time_secateurs(net.eval(), x)
    time_torch_pruning(copy.deepcopy(net), x)
    importlib.import_module("transformers").LlamaForCausalLM  # noqa: B018


def in_own_process(case: str, tool: str, seconds: int) -> dict[str, Any]:
    """`measure` in a fork with a limit of CPU seconds."""
    context = mp.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        try:
            row = measure(case, tool)
        except Exception as error:
            row = {"seconds": None, "message": f"{type(error).__name__}: {error}"[:400]}
        send.send(row)
        send.close()
        os._exit(0)

    worker = context.Process(target=work)
    worker.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv()
    except EOFError:
        found = {"seconds": None, "message": f"over {seconds} CPU seconds, or crashed"}
    worker.join()
    return found


def plan_meta() -> dict[str, Any]:
    """Trace and plan a llama of six billion parameters without weights."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with torch.device("meta"):
        model = llama(
            32,
            4096,
            vocab_size=32000,
            intermediate_size=11008,
            num_attention_heads=32,
            num_key_value_heads=8,
        ).eval()
        mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)  # one of two dimensions is read as data
        inputs = {"input_ids": torch.zeros(2, 32, dtype=torch.long), "attention_mask": mask}
    clock = Clock()
    graph = sc.trace(model, inputs)
    clock.lap("trace")
    scores = sc.score(model, criterion="random", graph=graph)
    plan = sc.select(scores, sc.allocate(scores, sc.Budget(units=0.5)))
    clock.lap("select")
    return {
        "steps": clock.steps,
        "params": _parameters(model),
        "units_removed": plan.n_removed,
        "seconds": round(sum(clock.steps.values()), 4),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "message": "",
    }


def meta_in_own_process() -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.engine_speed", "--plan-meta"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["crashed"])[-1]
        return {"seconds": None, "message": last[:400]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def read_rows() -> list[dict[str, Any]]:
    """Rows that are done."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines() if line.strip()]


def add_row(case: str, tool: str, repetition: int, found: dict[str, Any]) -> None:
    key = {"case": case, "tool": tool, "repetition": repetition, "version": version_of(tool)}
    row = key | found | {"environment": environment(0)}
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    told = row["message"] or f"{row['seconds']:.2f} s {row['steps']}"
    print(f"{case:14s} {tool:14s} {repetition} {told}", flush=True)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model: medians of both tools and their ratios, without and with the proof."""
    table = []
    for case in CASES:
        held = {t: [r for r in rows if (r["case"], r["tool"]) == (case, t)] for t in TOOLS}
        if not all(held.values()):
            continue
        ours, theirs = (_medians(held[t]) for t in TOOLS)
        steps = ours["steps"]
        lean = ours["seconds"] and steps["trace"] + steps["select"] + steps["cut"]
        table.append(
            {
                "case": case,
                "params": next((r["params"] for t in TOOLS for r in held[t] if "params" in r), 0),
                "repetitions": min(len(v) for v in held.values()),
                "secateurs": ours,
                "torch_pruning": theirs,
                "unverified": lean and round(lean, 4),
                "ratio": _ratio(theirs["seconds"], lean),
                "ratio_verified": _ratio(theirs["seconds"], ours["seconds"]),
                "target": AT_LEAST.get(case, 1.0),
            }
        )
    return table


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    good = [r for r in rows if r["seconds"] is not None]
    if not good:
        return {"seconds": None, "steps": {}, "message": rows[-1]["message"]}
    steps = {k: round(median(r["steps"][k] for r in good), 4) for k in good[0]["steps"]}
    kept = round(good[0]["params_kept"], 4)
    seconds = round(median(r["seconds"] for r in good), 4)
    return {"seconds": seconds, "steps": steps, "params_kept": kept, "message": ""}


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return round(theirs / ours, 2) if theirs and ours else None


def table(rows: list[dict[str, Any]] | None = None) -> str:
    """Markdown: seconds and ratios with targets, depth by width, and the plan without weights."""
    held = read_rows() if rows is None else rows
    found = summarise(held)
    lines = [
        "| model | parameters | trace | select | shrink | of it the cut | Torch-Pruning graph "
        "| prune | ratio | with proof | target |",
        "|---|" + "---:|" * 10,
    ]
    for r in found:
        ours, theirs = r["secateurs"], r["torch_pruning"]
        cells = [_seconds(ours["steps"].get(k)) for k in ("trace", "select", "shrink", "cut")]
        cells += [_seconds(theirs["steps"].get(k)) for k in ("graph", "prune")]
        ratio = _times(r["ratio"]) if r["ratio"] else ours["message"] or theirs["message"]
        good = r["ratio"] is not None and r["ratio"] >= r["target"]
        goal = f">= {r['target']:g}{' met' if good else ' MISSED'}"
        cells += [ratio, _times(r["ratio_verified"]), goal]
        lines.append(f"| {r['case']} | {r['params'] / 1e6:.1f} M | " + " | ".join(cells) + " |")
    by = {r["case"]: r for r in found}
    lines += ["", "| llama, CPU s: ours / theirs | " + " | ".join(f"{n} layers" for n in LAYERS)]
    lines[-1] += " |"
    lines.append("|---" * (len(LAYERS) + 1) + "|")
    for h in HIDDEN:
        cells = [_pair(by.get(f"llama-{n}x{h}")) for n in LAYERS]
        lines.append(f"| hidden {h} | " + " | ".join(cells) + " |")
    for r in held:
        if r["case"] == META:
            lines += ["", _meta_line(r)]
    return "\n".join(lines)


def _meta_line(row: dict[str, Any]) -> str:
    if row["seconds"] is None:
        return f"{META}: FAILED: {row['message']}"
    good = row["seconds"] < META_SECONDS and row["peak_rss"] < META_BYTES
    return (
        f"{META}: {row['params'] / 1e9:.2f} billion parameters, {row['seconds']:.1f} CPU s "
        f"({row['steps']}), peak memory {row['peak_rss'] / 1e9:.2f} GB; target "
        f"< {META_SECONDS:g} s and < {META_BYTES / 1e9:g} GB {'met' if good else 'MISSED'}"
    )


def _pair(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{_seconds(row['unverified'])} / {_seconds(row['torch_pruning']['seconds'])}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", nargs="*", default=[*CASES, META])
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of CPU, a measurement")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--plan-meta", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan_meta:
        print(json.dumps(plan_meta()))
        return
    if options.table:
        print(table())
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.again:
        rest = [
            r
            for r in read_rows()
            if r["case"] not in options.cases or r["tool"] not in options.tools
        ]
        ROWS.write_text("".join(json.dumps(r) + "\n" for r in rest))
    warm_up()
    done = {(r["case"], r["tool"], r["repetition"]) for r in read_rows()}
    for case in [c for c in options.cases if c != META]:
        for repetition in range(options.repetitions):
            for tool in options.tools:
                if (case, tool, repetition) not in done:
                    found = in_own_process(case, tool, options.seconds)
                    add_row(case, tool, repetition, found)
    if META in options.cases and (META, "secateurs", 0) not in done:
        add_row(META, "secateurs", 0, meta_in_own_process())
    rows = read_rows()
    meta = [r for r in rows if r["case"] == META]
    payload = {"environment": environment(0), "models": summarise(rows), "meta": meta}
    SUMMARY.write_text(json.dumps(payload, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
