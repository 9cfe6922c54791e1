"""Over the zoo: does a tool's pruned model compute what it should? secateurs and its peers.

    python -m benchmarks.soundness --tool all            # resumes where it stopped
    python -m benchmarks.soundness --tool secateurs --again
    python -m benchmarks.soundness --tool torch-pruning --cases hf_bert resnet
    python -m benchmarks.soundness --table               # print what is there

Every tool removes half of the units in the way of its own quick start (`peers`), and every result
is checked in the same way, without asking the tool (`masked_dense`). Each attempt of a tool at an
architecture runs in a process of its own; they share 120 CPU seconds equally. The best one is the
row of `benchmarks/results/soundness.jsonl`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import json
import multiprocessing as mp
import os
import pkgutil
import resource
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tests.zoo
from benchmarks.masked_dense import TOLERANCE, compare, distinct_, outputs_of, relative_error
from benchmarks.peers import ATTEMPTS, TOOLS, NotForThisModel, is_refusal, version_of
from secateurs.report import environment
from tests.zoo.case import Case

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "soundness.jsonl"
SUMMARY = HERE / "results" / "soundness.json"
SECONDS = 120
OUTCOMES = {
    "sound": "equals the dense model with zeros where something was removed",
    "sound, rescaled": "the same, when norms and attention scales count the kept entries only",
    "nothing removed": "every tensor has the shape it had, and nothing was said",
    "refused": "the tool said why not",
    "failed": "another exception, or the time limit",
    "unchecked": "runs, but what was removed cannot be read off the weights",
    "broken": "came back, and raises or has outputs of another shape",
    "unsound": "runs with the right shapes, and computes something else",
}
"""From good to bad: of several attempts the first counts."""


def zoo() -> dict[str, tuple[str, Case]]:
    """All cases by name, with the file they are from."""
    found: dict[str, tuple[str, Case]] = {}
    for info in pkgutil.iter_modules(tests.zoo.__path__):
        module = importlib.import_module(f"tests.zoo.{info.name}")
        for case in getattr(module, "CASES", ()):
            if isinstance(case, Case):
                found.setdefault(case.name, (info.name.split("_")[0], case))
    return found


def run_case(tool: str, case: Case, seconds: int = SECONDS) -> dict[str, Any]:
    """The best attempt of one tool at one architecture."""
    rows: dict[str, dict[str, Any]] = {}
    for attempt in ATTEMPTS[tool]:
        row = in_own_process(tool, attempt, case, seconds // len(ATTEMPTS[tool]))
        if row["outcome"] is None:
            continue
        rows[attempt] = row
        if row["outcome"].startswith("sound") or row["message"].startswith("CaptureError"):
            break  # what cannot be captured cannot be captured for another budget
    order = list(OUTCOMES)
    best = min(rows, key=lambda n: order.index(rows[n]["outcome"]))
    return {**rows[best], "attempt": best, "attempts": {n: r["outcome"] for n, r in rows.items()}}


def run_attempt(tool: str, attempt: str, case: Case) -> dict[str, Any]:
    """Prune and judge; the outcome is None if the attempt is for another kind of model."""
    dense, inputs = case.build()
    distinct_(dense).eval()
    started = time.process_time()
    try:
        small = ATTEMPTS[tool][attempt](copy.deepcopy(dense), inputs, case.outputs)
    except NotForThisModel:
        return {"outcome": None}
    except Exception as error:
        word = "refused" if is_refusal(error) else "failed"
        row: dict[str, Any] = {"outcome": word, "message": _told(error)}
    else:
        row = judge(dense, small, inputs, case.outputs)
    return {**row, "seconds": round(time.process_time() - started, 2)}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def judge(
    dense: nn.Module, small: nn.Module, inputs: Any, names: tuple[str, ...]
) -> dict[str, Any]:
    """Outcome, error, share of the parameters that is left, and what to say about it."""
    n_dense, n_small = (sum(p.numel() for p in m.parameters()) for m in (dense, small))
    row: dict[str, Any] = {"params_kept": round(n_small / n_dense, 4)}
    expected = outputs_of(dense, inputs, names)
    try:
        got = outputs_of(small, inputs, names)
    except Exception as error:
        return row | {"outcome": "broken", "message": _told(error)}
    shapes = [[tuple(t.shape) for t in held] for held in (expected, got)]
    if shapes[0] != shapes[1]:
        return row | {"outcome": "broken", "message": f"outputs {shapes[0]} became {shapes[1]}"}
    same = _shapes(dense) == _shapes(small)
    if same:
        gap = relative_error(expected, got)
        word = "nothing removed" if gap <= TOLERANCE else "unsound"
        return row | {"outcome": word, "error": gap, "message": ""}
    found = compare(dense, small, inputs, names)
    row |= {"error": found.error, "changed": found.changed, "rescaled_error": found.rescaled_error}
    if found.error <= TOLERANCE:
        word = "sound"
    elif found.rescaled_error is not None and found.rescaled_error <= TOLERANCE:
        word = "sound, rescaled"
    else:
        word = "unchecked" if found.unclear else "unsound"
    return row | {"outcome": word, "message": ", ".join(found.unclear)[:600]}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}


def in_own_process(tool: str, attempt: str, case: Case, seconds: int) -> dict[str, Any]:
    """`run_attempt` in a fork with a limit of CPU seconds."""
    context = mp.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(tool, attempt, case, seconds, send))
    worker.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv() if receive.poll(20 * seconds) else {}
    except EOFError:
        found = {}
    if not found:
        worker.kill()
    worker.join()
    if not found:
        found = {"outcome": "failed", "message": f"over {seconds} CPU seconds, or crashed"}
    return found


def _work(tool: str, attempt: str, case: Case, seconds: int, send: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet = io.StringIO()
    try:
        with redirect_stdout(quiet), redirect_stderr(quiet):
            row = run_attempt(tool, attempt, case)
    except BaseException as error:
        row = {"outcome": "failed", "message": f"harness: {_told(error)}"}
    send.send(row)
    send.close()
    os._exit(0)


def read_rows() -> list[dict[str, Any]]:
    """Rows that are done; of several for one tool and architecture the last counts."""
    if not ROWS.exists():
        return []
    rows = [json.loads(line) for line in ROWS.read_text().splitlines() if line.strip()]
    return list({(r["tool"], r["case"]): r for r in rows}.values())


def add_row(row: dict[str, Any]) -> None:
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]] | None = None) -> str:
    """Markdown: architectures by outcome and tool, then what became of each."""
    held = read_rows() if rows is None else rows
    tools = [t for t in TOOLS if any(r["tool"] == t for r in held)]
    names = {t: f"{t} {next(r['version'] for r in held if r['tool'] == t)}" for t in tools}
    lines = ["| outcome | " + " | ".join(names.values()) + " |", "|---|" + "---:|" * len(tools)]
    for outcome, meaning in OUTCOMES.items():
        counts = [sum(r["tool"] == t and r["outcome"] == outcome for r in held) for t in tools]
        cells = " | ".join(map(str, counts))
        lines.append(f"| **{outcome}**: {meaning} | {cells} |")
    totals = " | ".join(str(sum(r["tool"] == t for r in held)) for t in tools)
    lines += [f"| architectures | {totals} |", ""]
    lines += ["| architecture | " + " | ".join(tools) + " |", "|---" * (len(tools) + 1) + "|"]
    cell = {(r["case"], r["tool"]): r for r in held}
    for case in dict.fromkeys(r["case"] for r in sorted(held, key=lambda r: (r["zoo"], r["case"]))):
        found = [_cell(cell.get((case, t))) for t in tools]
        lines.append(f"| {case} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    kept = f", {100 * row['params_kept']:.0f} %" if row["outcome"].startswith("sound") else ""
    return f"{row['outcome']}{kept}"


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        by = counts.setdefault(row["tool"], dict.fromkeys(OUTCOMES, 0))
        by[row["outcome"]] += 1
    return {"environment": environment(0), "tolerance": TOLERANCE, "counts": counts, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tool", choices=[*TOOLS, "all"], default="all")
    parser.add_argument("--cases", nargs="*", help="names, or parts of them")
    parser.add_argument("--files", nargs="*", help="of the zoo: vision, huggingface, ...")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of CPU, for each case")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    torch.set_num_threads(1)
    for name in ("transformers", "torch_pruning", "torch_kirigami.pruning"):
        importlib.import_module(name)  # once, before the forks
    cases = zoo()
    wanted = [
        name
        for name, (file, _) in cases.items()
        if not options.cases or any(c in name for c in options.cases)
        if not options.files or file in options.files
    ]
    for tool in TOOLS if options.tool == "all" else (options.tool,):
        done = {r["case"] for r in read_rows() if r["tool"] == tool}
        for name in wanted:
            if name in done and not options.again:
                continue
            file, case = cases[name]
            row = {"tool": tool, "version": version_of(tool), "case": name, "zoo": file}
            row |= run_case(tool, case, options.seconds)
            add_row(row)
            print(f"{tool:15s} {name:32s} {row['outcome']:16s} {row['message'][:90]}", flush=True)
    rows = [r for r in read_rows() if r["case"] in cases]
    ROWS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    SUMMARY.write_text(json.dumps(summarise(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
