"""What scoring costs: multiples of one forward and backward pass of the same batch.

    python -m benchmarks.criteria_cost                      # resumes where it stopped
    python -m benchmarks.criteria_cost --cases resnet50 --candidates "unit taylor" --again
    python -m benchmarks.criteria_cost --every              # each criterion by itself, too
    python -m benchmarks.criteria_cost --table              # print what is there

One thread, eval mode, fp32. The unit is a training step without the optimizer: forward, loss, and
backward with all weight gradients, of the same batch, in the same process, measured just before
each batch of the candidate: block by block, in turns. The batches that `score` reads carry the
clock: from the moment a batch is handed out to the moment the next one is asked for. The first
batch of a pass is not counted (sums are made there), nor is what is done once: trace, probes,
checks and finishing; that is the column "set-up", in the same unit. CPU seconds; median and
quartiles over all batches of all repetitions. The allocator keeps memory that was freed (as PyTorch
advises for CPUs), or the kernel's clearing of pages would blur all figures. A process of its own
measures the peak memory above the loaded model, with the usual allocator, beside that of the
training step.

Beside it Torch-Pruning: `loss.backward()` and its Taylor importance of all groups, and the backward
pass for each sample that its Hessian importance needs, as in its documentation.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import secateurs as sc
from benchmarks.architectures import resnet, transformers_model
from benchmarks.peers import final_layers, head_options, torch_pruner, version_of
from secateurs.batches import call_model
from secateurs.criteria import CRITERIA, get_criterion
from secateurs.errors import PruningError
from secateurs.report import environment
from secateurs.types import Batch, Graph, Plan

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "criteria_cost.jsonl"
SUMMARY = HERE / "results" / "criteria_cost.json"
REPETITIONS = 3
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
FEW = 4
BATCHES = 4
"""Of each repetition; the first is not counted."""


@dataclass(frozen=True)
class Candidate:
    """Something whose cost is measured.

    Attributes:
        criteria: what `score` is asked for at once; empty for another tool.
        granularity: kinds of units.
        target: the most that it may cost; None where nothing was promised.
        turn: the pass over the batches that counts; None for the sum of all.
        few: True to score four units of one target only; the cost is that of one unit.
    """

    criteria: tuple[Any, ...] = ()
    granularity: str = "structured"
    target: float | None = None
    turn: int | None = None
    few: bool = False


UNIT_FISHER = {"name": "fisher", "finish_on": "unit"}
BATCH_FISHER = {"name": "fisher", "average": "batch"}
TEN = (
    "magnitude", "l2_norm", "activation_mean", "apoz", "activation_variance", "wanda", "gradient",
    "snip", "taylor", "directional",
)  # fmt: skip
CANDIDATES = {
    "unit taylor": Candidate(("taylor",), target=0.80),
    "unit fisher": Candidate((UNIT_FISHER,), target=0.80),
    "weight taylor": Candidate(("taylor_batch",), "weight", 1.06),
    "weight fisher by batch": Candidate((BATCH_FISHER,), "weight", 1.06),
    "ten cheap criteria": Candidate(TEN, target=1.3),
    "JVP, one direction": Candidate(
        ({"name": "directional", "of": "output"},), target=1.15, few=True
    ),
    "weight fisher by sample": Candidate(("fisher",), "weight", 1.5),
    "Hessian-vector product": Candidate(("grasp",), "weight", 3.6, turn=1),
}
PEERS = ("Torch-Pruning Taylor", "Torch-Pruning Hessian")


@dataclass(frozen=True, eq=False)
class Case:
    """A network, one batch and a loss.

    Attributes:
        one_target: pattern of a target near the input, with few units.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    one_target: str


def _images(n: int, side: int) -> Batch:
    return torch.randn(n, 3, side, side), torch.randint(0, 1000, (n,))


def _texts(n: int, length: int) -> Batch:
    return {"input_ids": torch.randint(0, 30000, (n, length))}, torch.randint(0, 20, (n,))


CASES = {
    "resnet50": Case(lambda: resnet((3, 4, 6, 3)), lambda: _images(8, 160), "2.0.a.0*|3.a.0*"),
    "bert": Case(
        lambda: transformers_model("BertForSequenceClassification", num_labels=20),
        lambda: _texts(8, 128),
        "bert.encoder.layer.0.*:head",
    ),
}


def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of the logits."""
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return functional.cross_entropy(logits, targets)


def make(case: str) -> tuple[nn.Module, Batch]:
    """The network with random weights, in eval mode, and its batch."""
    torch.manual_seed(0)
    model = CASES[case].build().eval()
    return model, CASES[case].batch()


def training_step(model: nn.Module, batch: Batch) -> None:
    """Forward, loss and backward with all weight gradients."""
    model.zero_grad(set_to_none=True)
    loss_fn(call_model(model, batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]


@dataclass
class Clocked:
    """The same batch several times, handed out with a clock and after a training step.

    Attributes:
        laps: for each complete pass, CPU seconds of each batch.
        steps: CPU seconds of each training step beside them.
        beside: all the CPU seconds that were spent in training steps.
    """

    batch: Batch
    n: int
    step: Callable[[], None] | None = None
    laps: list[list[float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    beside: float = 0.0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Batch]:
        laps: list[float] = []
        for number in range(self.n):
            if self.step is not None and number:
                with torch.enable_grad():
                    before = time.process_time()
                    self.step()
                    self.steps.append(time.process_time() - before)
                self.beside += self.steps[-1]
            started = time.process_time()
            yield self.batch
            laps.append(time.process_time() - started)
        self.laps.append(laps)


def few_units(graph: Graph, case: str) -> tuple[Graph, Plan]:
    """The graph with one target near the input, and a plan that leaves four of its units."""
    patterns = CASES[case].one_target.split("|")
    wanted = re.compile("|".join(p.replace(".", r"\.").replace("*", ".*") for p in patterns))
    target = next(t for t in graph.groups() if wanted.match(t.name))
    gone = torch.arange(FEW, target.n_units)
    return graph.only(include=target.name), Plan({}, {}, {target.name: gone}, {})


def score_candidate(
    candidate: Candidate, case: str, model: nn.Module, graph: Graph, batches: Any
) -> int:
    """Score once; the units that were scored."""
    previous = None
    if candidate.few:
        graph, previous = few_units(graph, case)
    scores = sc.score(
        model, batches, loss_fn, criterion=list(candidate.criteria), graph=graph,
        granularity=candidate.granularity, previous=previous, max_seconds=1e9,
    )  # fmt: skip
    values = next(iter(scores.values())).values
    return sum(int(v.isfinite().sum()) for v in values.values())


def measure(
    candidate: Candidate, case: str, model: nn.Module, graph: Graph, batch: Batch, twin: nn.Module
) -> dict[str, Any]:
    """One repetition: CPU seconds of each counted batch, beside training steps of a twin."""
    twin_step = Clocked(batch, BATCHES, lambda: training_step(twin, batch))
    started = time.process_time()
    n = score_candidate(candidate, case, model, graph, twin_step)
    whole = time.process_time() - started - twin_step.beside
    passes = twin_step.laps
    first = sum(laps[0] for laps in passes)
    counted = [sum(x) for x in zip(*(laps[1:] for laps in passes), strict=True)]
    by_turn = [laps[1:] for laps in passes]
    if candidate.turn is not None:
        counted = by_turn[candidate.turn]
    return {
        "seconds": [s / n if candidate.few else s for s in counted],
        "units": n,
        "steps": twin_step.steps,
        "setup": whole - sum(sum(laps) for laps in passes),
        "first": first,
        "message": "",
    }


# -- Torch-Pruning --------------------------------------------------------------------------------


def measure_peer(name: str, case: str, batch: Batch, twin: nn.Module) -> dict[str, Any]:
    """One repetition of another tool, as its documentation does it."""
    tp: Any = importlib.import_module("torch_pruning")
    model, _ = make(case)
    inputs = batch[0]
    example = {k: v[:2] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[:2]
    started = time.process_time()
    ignored, options = final_layers(model, example), head_options(model)
    pruner = torch_pruner(model, example, ignored=ignored, **options)
    setup = time.process_time() - started
    hessian = name.endswith("Hessian")
    kind = tp.importance.GroupHessianImportance if hessian else tp.importance.GroupTaylorImportance
    importance = kind()
    seconds, steps = [], []
    for number in range(2 if hessian else BATCHES):
        before = time.process_time()
        training_step(twin, batch)
        steps.append(time.process_time() - before)
        before = time.process_time()
        if hessian:
            _each_sample(model, batch, importance)
        else:
            loss_fn(call_model(model, inputs), batch[1]).backward()  # type: ignore[no-untyped-call]
        if number:
            seconds.append(time.process_time() - before)
    before = time.process_time()
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        importance(group)
    once = time.process_time() - before
    return {
        "seconds": seconds,
        "steps": steps[1:],
        "setup": setup,
        "once": once,
        "message": "",
    }


def _each_sample(model: nn.Module, batch: Batch, importance: Any) -> None:
    """One forward pass, and a backward pass for the loss of each sample."""
    outputs = call_model(model, batch[0])
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    losses = functional.cross_entropy(logits, batch[1], reduction="none")
    for i, loss in enumerate(losses):
        model.zero_grad()
        loss.backward(retain_graph=i + 1 < len(losses))
        importance.accumulate_grad(model)


# -- memory ---------------------------------------------------------------------------------------


def _status(field_name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field_name in x)
    return int(line.split()[1]) * 1024


def memory(case: str, name: str) -> dict[str, Any]:
    """Peak bytes above the loaded model, in this process; name "" is the training step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, batch = make(case)
    candidate = CANDIDATES.get(name) or _alone(name) if name else None
    graph = sc.trace(model, batch[0]) if candidate is not None else Graph({})
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if candidate is None:
        for _ in range(2):
            training_step(model, batch)
    else:
        score_candidate(candidate, case, model, graph, [batch] * 2)
    return {"peak": _status("VmHWM") - before, "message": ""}


def memory_in_own_process(case: str, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.criteria_cost", "--memory", case, name]
    plain = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, check=False, env=plain
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["crashed"])[-1]
        return {"peak": None, "message": last[:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- rows -----------------------------------------------------------------------------------------


def _alone(name: str) -> Candidate:
    """One criterion by itself: on units, or on weights where it has no units."""
    criterion = get_criterion(name)
    units = any(k not in ("weight", "embedding", "layer") for k in criterion.kinds)
    kind = "structured" if units else criterion.kinds[0]
    return Candidate((name,), kind, few=criterion.cost == "per unit")


def read_rows() -> list[dict[str, Any]]:
    """Rows that are done."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines() if line.strip()]


def add_row(row: dict[str, Any]) -> None:
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def run_case(
    case: str, names: list[str], repetitions: int, *, with_memory: bool, optional: frozenset[str]
) -> None:
    """All candidates of one network, in turns."""
    done = {(r["case"], r["candidate"], r["repetition"]) for r in read_rows()}
    todo = [
        (repetition, name)
        for repetition in range(repetitions)
        for name in names
        if (case, name, repetition) not in done and not (name in optional and repetition)
    ]
    if todo:
        model, batch = make(case)
        twin, _ = make(case)
        started = time.process_time()
        graph = sc.trace(model, batch[0])
        trace_seconds = time.process_time() - started
        for _ in range(2):
            training_step(twin, batch)
        for repetition, name in todo:
            try:
                if name in PEERS:
                    found = measure_peer(name, case, batch, twin)
                else:
                    candidate = CANDIDATES.get(name) or _alone(name)
                    found = measure(candidate, case, model, graph, batch, twin)
            except PruningError as error:  # it says itself why it cannot score this network
                found = {"seconds": [], "message": str(error)[:300]}
            row = {"case": case, "candidate": name, "repetition": repetition} | found
            tool = "torch-pruning" if name in PEERS else "secateurs"
            row |= {"trace": trace_seconds, "version": version_of(tool)}
            add_row(row | {"environment": environment(0)})
            print(case, repetition, name, _told(row), flush=True)
    for name in ["", *names] if with_memory else []:
        if name in PEERS or (case, f"memory {name}", 0) in done:
            continue
        found = memory_in_own_process(case, name)
        add_row({"case": case, "candidate": f"memory {name}", "repetition": 0} | found)
        print(case, "memory", name or "training step", found, flush=True)


def _told(row: dict[str, Any]) -> str:
    if not row["seconds"]:
        return str(row["message"])
    unit = median(row["steps"])
    more = f", set-up {row['setup'] / unit:.2f}"
    return f"{median(row['seconds']) / unit:.3f} of {unit:.2f} s{more}"


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each network and candidate: median and quartiles of the multiple, set-up, memory."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if not row["candidate"].startswith("memory "):
            groups.setdefault((row["case"], row["candidate"]), []).append(row)
    peaks = {(r["case"], r["candidate"][7:]): r["peak"] for r in rows if "peak" in r}
    table = []
    for (case, name), held in groups.items():
        ratios = [
            s / step
            for r in held
            for s, step in zip(r["seconds"], r["steps"][-len(r["seconds"]) :], strict=True)
        ]
        candidate = CANDIDATES.get(name)
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else [None] * 3
        units = [median(r["steps"]) for r in held if r["seconds"]]
        table.append(
            {
                "case": case,
                "candidate": name,
                "criteria": [str(c) for c in candidate.criteria] if candidate else [name],
                "named": candidate is not None or name in PEERS,
                "multiple": round(median(ratios), 3) if ratios else None,
                "low": low and round(low, 3),
                "high": high and round(high, 3),
                "target": candidate.target if candidate else None,
                "batches": len(ratios),
                "per_unit": bool(candidate and candidate.few)
                or (name in CRITERIA and get_criterion(name).cost == "per unit"),
                "setup": _ratio([r["setup"] for r in held if r["seconds"]], units),
                "once": _ratio([r["once"] for r in held if "once" in r], units),
                "step_seconds": round(median(units), 3) if units else None,
                "peak_bytes": peaks.get((case, name)),
                "training_bytes": peaks.get((case, "")),
                "message": held[-1]["message"],
            }
        )
    return table


def _ratio(values: list[float], units: list[float]) -> float | None:
    return round(median(values) / median(units), 3) if values and units else None


def table(rows: list[dict[str, Any]] | None = None, *, named: bool = True) -> str:
    """Markdown, one line for each network and candidate."""
    found = [r for r in summarise(read_rows() if rows is None else rows) if r["named"] == named]
    order = [*CANDIDATES, *PEERS]
    if named:
        found.sort(key=lambda r: (r["case"] != "resnet50", order.index(r["candidate"])))
    lines = ["| network | what | multiple | quartiles | target | set-up | peak memory, MB |"]
    lines.append("|---|---|" + "---:|" * 5)
    for r in found:
        goal = ""
        if r["target"] is not None and r["multiple"] is not None:
            met = r["multiple"] <= r["target"]
            goal = f"<= {r['target']:.2f} {'met' if met else '**MISSED**'}"
        value = f"{r['multiple']:.2f}" if r["multiple"] is not None else r["message"]
        if r["per_unit"] and r["multiple"] is not None:
            value += " a unit"
        spread = "" if r["low"] is None else f"{r['low']:.2f} to {r['high']:.2f}"
        once = f"{r['setup']:.2f}" if r["setup"] is not None else ""
        if r["once"] is not None:
            once += f" + {r['once']:.2f} importance"
        peak = "" if r["peak_bytes"] is None else f"{max(0, r['peak_bytes']) / 1e6:,.0f}"
        cells = [r["case"], r["candidate"], value, spread, goal, once, peak]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--candidates", nargs="*", default=[*CANDIDATES, *PEERS])
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--every", action="store_true", help="each criterion by itself, once")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(*options.memory)))
        return
    if not options.table and not ALLOCATOR.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.criteria_cost", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ALLOCATOR})
    if not options.table:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        names = [*options.candidates, *(list(CRITERIA) if options.every else [])]
        if options.again:
            again = {*names, *(f"memory {n}" for n in ["", *names])}
            rest = [
                r
                for r in read_rows()
                if r["case"] not in options.cases or r["candidate"] not in again
            ]
            ROWS.write_text("".join(json.dumps(r) + "\n" for r in rest))
        for case in options.cases:
            run_case(
                case, names, options.repetitions, with_memory=not options.no_memory,
                optional=frozenset(CRITERIA) - {*options.candidates},
            )  # fmt: skip
    payload = {"environment": environment(0), "rows": summarise(read_rows())}
    SUMMARY.write_text(json.dumps(payload, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
