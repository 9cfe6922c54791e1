"""How well does each criterion predict the exact loss change of removing each unit?

    python -m benchmarks.oracle                          # resumes where it stopped
    python -m benchmarks.oracle --tasks digits-mlp --criteria taylor --again
    python -m benchmarks.oracle --table                  # print what is there

The oracle is the exact ablation (finite difference with step 1) of every structural unit, on the
same calibration samples that the criterion sees. Spearman rank correlation of the score with the
absolute loss change, over all units of the network together, and as the mean over the families of
units ("within"); of criteria with signed scores also |score| with |change|, and score with change.
Three seeds, one thread. One row is appended to `benchmarks/results/oracle.jsonl` for each task,
seed and criterion, so a new criterion is just added; `oracle.json` is the summary.

The cost of a row is in CPU seconds of the whole call, and as a multiple of one forward and backward
pass (all weight gradients) of the same samples. These networks are tiny, so that the fixed costs of
a call weigh more than its passes: what passes cost on networks of real size is measured by
`benchmarks/criteria_cost.py`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import secateurs as sc
from secateurs.batches import call_model
from secateurs.criteria import CRITERIA, get_combination
from secateurs.errors import PruningError
from secateurs.report import environment
from secateurs.tasks import TASKS as KNOWN
from secateurs.tasks import available, dense_checkpoint, get_task
from secateurs.types import Batches, Graph, LossFn, Scores

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "oracle.jsonl"
OUT = HERE / "results" / "oracle.json"
TASKS = ("digits-mlp", "digits-cnn", "cancer-mlp", "vowels-gru", "spam-transformer")
SEEDS = (0, 1, 2)
ORACLE = "finite_difference"
MAX_SECONDS = 200.0
ORACLE_SECONDS = 3600.0
PASSES = 2.0
"""The most that a cheap criterion costs, in forward and backward passes."""
GOAL = ("digits-mlp", 0.9)
VARIANTS: tuple[Any, ...] = (
    {"name": "finite_difference", "step": 0.01},
    {"name": "finite_difference", "of": "output"},
    {"name": "directional", "of": "output"},
    {"name": "directional", "order": 2},
    {"name": "taylor", "members": "all"},
    {"name": "magnitude", "members": "all"},
    {"name": "magnitude", "members": "consumers"},
    {"name": "wanda", "members": "consumers"},
    {"name": "gauss_newton", "probes": 4},
    {"name": "gauss_newton", "probes": 16},
    {"name": "obd", "probes": 1},
    {"name": "taylor_second", "probes": 1},
    {"name": "path_integral", "steps": 1},
    {"name": "path_integral", "steps": 2},
    {"name": "path_integral", "path": "all"},
    {"name": "entropy", "estimator": "gaussian"},
    {"combine": "rank", "of": ["taylor", "magnitude"]},
    {"combine": "rank", "of": ["taylor", "activation_variance"]},
    {"combine": "rank", "of": ["gauss_newton", "taylor"]},
    {"combine": "rank", "of": ["taylor", "wanda"]},
)
"""Options that change what a criterion sees."""


def specs() -> dict[str, Any]:
    """Label -> what `score` is asked for: all of the registry, and the variants it accepts."""
    found: dict[str, Any] = {name: name for name in CRITERIA if name != ORACLE}
    for variant in VARIANTS:
        try:
            found[get_combination(variant).label] = variant
        except PruningError as error:
            print(f"left out: {variant}: {error}", flush=True)
    return found


# -- one row --------------------------------------------------------------------------------------


def training_seconds(model: nn.Module, batches: Batches, loss_fn: LossFn) -> float:
    """CPU seconds of one forward and backward pass over all batches: the best of five."""
    params = [p for p in model.parameters() if p.requires_grad]
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        for inputs, targets in batches:
            torch.autograd.grad(
                loss_fn(call_model(model, inputs), targets), params, allow_unused=True
            )
        best = min(best, time.process_time() - started)
    return best


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation; None where one of them is constant."""
    if len(a) < 2 or float(a.max()) == float(a.min()) or float(b.max()) == float(b.min()):
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def correlations(held: Scores, oracle: Mapping[str, Tensor]) -> dict[str, Any]:
    """Everything that is said about the agreement of some scores with the oracle."""
    names = [n for n in oracle if n in held.values]
    pairs = [(held.values[n], oracle[n]) for n in names]
    score = torch.cat([s for s, _ in pairs])
    exact = torch.cat([e for _, e in pairs])
    signed = bool((score < 0).any())
    within = [spearman(s, e.abs()) for s, e in pairs if len(s) > 2]
    known = [w for w in within if w is not None]
    return {
        "spearman": spearman(score, exact.abs()),
        "within": mean(known) if known else None,
        "signed": spearman(score, exact) if signed else None,
        "sizes": spearman(score.abs(), exact.abs()) if signed else None,
        "units": len(score),
        "of": sum(len(e) for e in oracle.values()),
    }


class Problem:
    """A trained task with its oracle, made when it is first needed."""

    def __init__(self, name: str, seed: int) -> None:
        task = get_task(name)
        self.loss_fn = task.loss_fn
        self.model, data, _ = dense_checkpoint(task, seed)
        self.batches = data.calibration
        self.graph: Graph = sc.trace(self.model, data.example_inputs)
        self.training = training_seconds(self.model, self.batches, self.loss_fn)
        started = time.process_time()
        self.oracle = self.score(ORACLE, ORACLE_SECONDS).values
        self.seconds = time.process_time() - started

    def score(self, spec: Any, max_seconds: float = MAX_SECONDS) -> Scores:
        """Scores of all structural units."""
        scores: Scores = sc.score(
            self.model, self.batches, self.loss_fn, criterion=spec, graph=self.graph,
            max_seconds=max_seconds,
        )  # fmt: skip
        return scores

    def row(self, spec: Any) -> dict[str, Any]:
        """Agreement and cost of one criterion; the reason if it cannot score this network."""
        started = time.process_time()
        try:
            held = self.score(spec)
        except PruningError as error:
            return {"spearman": None, "message": str(error)[:300]}
        seconds = time.process_time() - started
        found = correlations(held, self.oracle)
        return found | {
            "cost": cost_class(spec),
            "seconds": round(seconds, 4),
            "multiple": round(seconds / self.training, 2),
            "message": "",
        }


def cost_class(spec: Any) -> str:
    """The dearest cost class of what is asked for."""
    order = ["free", "forward", "backward", "second order", "training", "per unit"]
    return max((part.cost for part in get_combination(spec).parts), key=order.index)


# -- rows -----------------------------------------------------------------------------------------


def read_rows() -> list[dict[str, Any]]:
    """Rows that are done."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines() if line.strip()]


def run(task: str, seed: int, wanted: Mapping[str, Any]) -> None:
    """All rows of a task and seed that are not there yet."""
    done = {(r["task"], r["seed"], r["criterion"]) for r in read_rows()}
    todo = {label: spec for label, spec in wanted.items() if (task, seed, label) not in done}
    if not todo:
        return
    problem = Problem(task, seed)
    exact = torch.cat(list(problem.oracle.values()))
    print(
        f"{task} {seed}: {len(exact)} units, exact removal {problem.seconds:.1f} s, lowers the "
        f"loss for {(exact < 0).float().mean():.0%}",
        flush=True,
    )
    for label, spec in todo.items():
        row = {"task": task, "seed": seed, "criterion": label} | problem.row(spec)
        row |= {
            "training_seconds": round(problem.training, 5),
            "oracle_seconds": round(problem.seconds, 2),
            "lowers": round(float((exact < 0).double().mean()), 4),
            "environment": environment(seed),
        }
        ROWS.parent.mkdir(parents=True, exist_ok=True)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        told = row["message"] or f"{row['spearman']} within {row['within']} {row['multiple']}x"
        print(f"{task:16s} {seed} {label:36s} {told}", flush=True)


def agreement(row: Mapping[str, Any]) -> float | None:
    """How well the scores tell the sizes of the changes.

    A signed score predicts a signed change, so that its size is compared; but not what is no
    change of a loss (a differential entropy below zero).
    """
    family = get_combination(specs()[row["criterion"]]).parts[0].family
    by_size = row.get("sizes") is not None and family != "information"
    value: float | None = row["sizes"] if by_size else row["spearman"]
    return value


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, for each task and criterion."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    known = specs()
    rows = [r | {"agreement": agreement(r)} for r in rows if r["criterion"] in known]
    for row in rows:
        groups.setdefault((row["task"], row["criterion"]), []).append(row)
    found = []
    for (task, label), held in groups.items():
        good = [r for r in held if r["spearman"] is not None]
        line: dict[str, Any] = {
            "task": task,
            "criterion": label,
            "seeds": sorted(r["seed"] for r in good),
            "message": held[-1]["message"] if not good else "",
        }
        for key in ("agreement", "spearman", "within", "signed", "sizes"):
            values = [r[key] for r in good if r[key] is not None]
            line[key] = round(mean(values), 4) if values else None
            line[f"{key}_sd"] = round(stdev(values), 4) if len(values) > 1 else None
        if good:
            line |= {
                "values": [round(r["agreement"], 4) for r in good],
                "cost": good[0]["cost"],
                "multiple": round(mean(r["multiple"] for r in good), 2),
                "units": good[0]["units"],
                "of": good[0]["of"],
            }
        found.append(line)
    order = {name: i for i, name in enumerate(TASKS)}
    return sorted(found, key=lambda r: (order[r["task"]], -(r["agreement"] or -1.0)))


def large_costs() -> dict[str, float]:
    """Criterion -> the larger of its costs on networks of real size, where that was measured."""
    path = HERE / "results" / "criteria_cost.json"
    if not path.exists():
        return {}
    costs: dict[str, float] = {}
    for r in json.loads(path.read_text())["rows"]:
        if not r["named"] and r["multiple"] is not None:
            costs[r["candidate"]] = max(r["multiple"], costs.get(r["candidate"], 0.0))
    return costs


def passes(label: str, cost: str, costs: Mapping[str, float]) -> float | None:
    """Forward and backward passes that a criterion costs; None if only its class is known.

    What needs a run for every unit, or a training step, is never cheap.
    """
    if cost in ("per unit", "training"):
        return float("inf")
    if cost == "free":
        return 0.0
    return costs.get(label)


def best(rows: list[dict[str, Any]], task: str, costs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Criteria that cost at most `PASSES`, measured on networks of real size; the best first."""
    found = []
    for r in rows:
        if r["task"] != task or r["spearman"] is None:
            continue
        n = passes(r["criterion"], r["cost"], costs)
        if n is not None and n <= PASSES:
            found.append(r | {"passes": n})
    return sorted(found, key=lambda r: -r["agreement"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each criterion, one column for each task."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    cell = {(r["task"], r["criterion"]): r for r in rows}
    labels = dict.fromkeys(r["criterion"] for r in rows)

    def key(label: str) -> float:
        held = [cell[t, label]["agreement"] for t in tasks if (t, label) in cell]
        known = [v for v in held if v is not None]
        return -mean(known) if known else 2.0

    lines = ["| criterion | class | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 2) + "|"]
    for label in sorted(labels, key=key):
        found = [cell.get((t, label)) for t in tasks]
        cost = next((r["cost"] for r in found if r and "cost" in r), "")
        lines.append(f"| {label} | {cost} | " + " | ".join(map(_cell, found)) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["agreement"] is None:
        return "not scored"
    spread = "" if row["agreement_sd"] is None else f" ± {row['agreement_sd']:.2f}"
    part = "" if row["units"] == row["of"] else f" ({row['units']} of {row['of']} units)"
    return f"{row['agreement']:+.2f}{spread}{part}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--criteria", nargs="*", default=None, help="labels; by default all")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = specs()
    if options.criteria is not None:
        wanted = {label: wanted[label] for label in options.criteria}
    if options.again:
        rest = [r for r in read_rows() if r["task"] not in options.tasks
                or r["criterion"] not in wanted or r["seed"] not in options.seeds]  # fmt: skip
        ROWS.write_text("".join(json.dumps(r) + "\n" for r in rest))
    for task in [] if options.table else options.tasks:
        missing = available(get_task(task)) if task in KNOWN else "is not a task here"
        if missing is not None:
            print(f"{task}: {missing}", flush=True)
            continue
        for seed in options.seeds:
            run(task, seed, wanted)
    rows = summarise(read_rows())
    payload = {"seeds": SEEDS, "environment": environment(), "rows": rows}
    OUT.write_text(json.dumps(payload, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
