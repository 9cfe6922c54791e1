"""Does a search keep its promise? The drop of the chosen network on data that nothing has seen.

    python -m benchmarks.search_promise --task cancer-mlp --outer 100   # resumes where it stopped
    python -m benchmarks.search_promise --summary                       # rows -> table (JSON)

For each outer resample all data of the task are divided anew: half is the test part (10,000 images
of Fashion-MNIST), the rest training and validation data, 75 to 25. A dense network is trained on
the training data and `secateurs.searching` looks for the smallest network whose metric drops by at
most `max_drop`, with confidence 0.9, in mode "refit": four folds of training and validation data
train a dense network each. Then the test part is read once: all candidates are pruned from the
dense network of the training data, and their drops are written down.

Counted is the drop of the chosen one on the test part as measured. That has noise of its own, which
no search can foresee; it is kept small by test parts at least twice as large as a fold's held-out
part, and nothing is taken off for it. Resamples in which nothing passed promise nothing; they are
counted apart. Limits and budgets were written here before any resample was run, from trial runs on
other divisions of the data that showed where drops begin. Beside the rule stand what simpler rules
would have chosen from the same folds.

One row is appended to `benchmarks/results/search_promise.jsonl` for each resample. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from secateurs.errors import PruningError
from secateurs.pipeline import check_request, cut_stages
from secateurs.recipe import Recipe, parse_recipe
from secateurs.report import environment
from secateurs.report.assemble import metrics_of
from secateurs.runner import Problem
from secateurs.searching.evaluation import Judge, prepare
from secateurs.searching.results import Standing, Trial
from secateurs.tasks import TASKS, Data, Task, get_task
from secateurs.tasks.base import CALIBRATION_BATCH, EVALUATION_BATCH, N_CALIBRATION
from secateurs.tasks.data import Part, stratified_split
from secateurs.tasks.training import trained_once

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "search_promise.jsonl"
SUMMARY = HERE / "results" / "search_promise.json"
CONFIDENCE, FOLDS = 0.9, 4
PATHS = {
    "cancer-mlp": (0.01, (0.8, 0.4, 0.2, 0.1, 0.05, 0.03)),
    "digits-cnn": (0.02, (0.8, 0.6, 0.4, 0.3, 0.2, 0.1)),
    "vowels-gru": (0.05, (0.8, 0.6, 0.4, 0.3, 0.2, 0.1)),
    "fashion-lenet5": (0.01, (0.8, 0.6, 0.4, 0.2, 0.1, 0.05)),
}
"""Task -> max_drop of its main metric, and the MACs that may remain."""
EPOCHS = {"digits-cnn": 10, "cancer-mlp": 20, "fashion-lenet5": 4}
"""Epochs of the dense network, where the task takes more: five are trained for each resample."""
FASHION_POOL, FASHION_TEST = 12_000, 10_000
OUTERS = {"cancer-mlp": 100, "digits-cnn": 100, "vowels-gru": 5, "fashion-lenet5": 5}


def shorten(name: str) -> None:
    """Train the dense networks of a task, in this process, by `EPOCHS`."""
    task = TASKS[name]
    epochs = EPOCHS.get(name, task.train_recipe.epochs)
    TASKS[name] = replace(task, train_recipe=replace(task.train_recipe, epochs=epochs))


def recipe_of(name: str, outer: int) -> Recipe:
    """One cut, one epoch of healing, six sizes."""
    limit, budgets = PATHS[name]
    return parse_recipe(
        {
            "task": name,
            "criterion": "taylor",
            "schedule": {"curve": "one_shot", "steps": 1},
            "finetune": {"epochs": 1, "lr": 0.001, "lr_schedule": "cosine"},
            "seed": outer,
            "search": {
                "space": {"budget.macs": list(budgets)},
                "goal": "smallest",
                "max_drop": limit,
                "confidence": CONFIDENCE,
                "folds": {"kind": "stratified", "k": FOLDS, "seed": outer},
                "mode": "refit",
            },
        }
    )


def resample(task: Task, outer: int) -> Problem:
    """All data of a task divided anew, and the dense network of its training part."""
    whole = task.read(0, None)
    parts = (whole.train, whole.validation, whole.test)
    inputs, labels = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    pool, test = stratified_split(labels, _shares(task.name, len(labels)), outer)[:2]
    train, validation = stratified_split(labels[pool], (0.75, 0.25), outer)
    inputs = _standardised(inputs, pool[train])
    rows = {"train": pool[train], "validation": pool[validation], "test": test}
    size = {"train": task.train_recipe.batch_size}
    split = {
        name: _batched((inputs[at], labels[at]), size.get(name, EVALUATION_BATCH))
        for name, at in rows.items()
    }
    first = pool[train][:N_CALIBRATION]
    calibration = _batched((inputs[first], labels[first]), CALIBRATION_BATCH)
    example = inputs[pool[train][:4]].clone()
    data = Data(split["train"], calibration, [], [], example, {})
    model, _ = trained_once(task, data, outer, f"outer{outer}")
    return Problem(
        name=task.name, model=model, calibration=calibration, example_inputs=example,
        loss_fn=task.loss_fn, metric=task.metric, sizes={k: len(v) for k, v in rows.items()},
        train=split["train"], validation=split["validation"], test=split["test"],
    )  # fmt: skip


def _shares(name: str, n: int) -> tuple[float, ...]:
    if not name.startswith("fashion"):
        return 0.5, 0.5
    pool, test = FASHION_POOL / n, FASHION_TEST / n
    return pool, test, 1 - pool - test


def _standardised(inputs: Tensor, train: Tensor) -> Tensor:
    """Tables: zero mean and unit deviation on the training part; images and series as they are."""
    if inputs.dim() != 2:
        return inputs
    return (inputs - inputs[train].mean(0)) / inputs[train].std(0).clamp_min(1e-8)


def _batched(part: Part, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(part[0], size), torch.split(part[1], size), strict=True))


def run_outer(name: str, outer: int) -> dict[str, Any]:
    """One search, its choice, and the drops of all candidates on the test part."""
    begin = time.perf_counter()
    problem, recipe = resample(get_task(name), outer), recipe_of(name, outer)
    judge = prepare(recipe, problem)
    trials = {c.number: Trial(c, ()) for c in judge.search.grid_space.grid()}
    for fold in range(judge.n_folds):  # fold by fold: each dense network is loaded once
        for number, trial in trials.items():
            if trial.problem:
                continue
            try:
                found = (*trial.folds, judge(trial.candidate, fold))
                trials[number] = Trial(trial.candidate, found)
            except PruningError as error:
                trials[number] = Trial(trial.candidate, trial.folds, str(error))
    result = judge.result(list(trials.values()))
    chosen = result.choice.candidate
    return {
        "task": name,
        "outer": outer,
        "metric": result.metric,
        "max_drop": judge.search.max_drop,
        "confidence": judge.search.confidence,
        "sizes": dict(problem.sizes),
        "chosen": None if chosen is None else chosen.number,
        "candidates": [
            {**_figures(s), "test": value}
            for s, value in zip(result.standings, _test(judge, result.standings), strict=True)
        ],
        "seconds": round(time.perf_counter() - begin, 2),
        "environment": environment(outer),
    }


def _figures(one: Standing) -> dict[str, Any]:
    names = ("drop", "spread", "se", "upper_mean", "upper", "metric", "within", "tested", "passed",
             "one_se", "problem")  # fmt: skip
    figures = {name: getattr(one, name) for name in names}
    return {"budget": one.candidate.values["budget.macs"], **figures,
            "remaining": one.remaining.get("macs")}  # fmt: skip


def _test(judge: Judge, standings: Sequence[Standing]) -> list[dict[str, float] | None]:
    """Metrics of the dense network and of each candidate on the test part, read once."""
    problem, found = judge.problem, list[dict[str, float] | None]()
    with judge.ground.lock.unlock("the count of kept promises"):
        dense = _main(problem.model, problem)
        for one in standings:
            recipe = judge.recipe_of(one.candidate)
            stages = recipe.all_stages()
            try:
                graph = check_request(
                    problem.model, problem.train, problem.loss_fn, stages,
                    example_inputs=problem.example_inputs, calibration=problem.calibration,
                )  # fmt: skip
                small, _ = cut_stages(
                    problem.model, problem.train, problem.loss_fn, stages,
                    example_inputs=problem.example_inputs, graph=graph,
                    calibration=problem.calibration, seed=recipe.seed,
                )  # fmt: skip
            except PruningError:
                found.append(None)
            else:
                found.append({"dense": dense, "pruned": _main(small, problem)})
    return found


def _main(model: torch.nn.Module, problem: Problem) -> float:
    return next(iter(metrics_of(model, lambda m: problem.metric(m, problem.test)).values()))


# -- the table ------------------------------------------------------------------------------------


def exact_interval(kept: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share: kept of n."""
    from scipy.stats import binomtest

    found = binomtest(kept, n).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


def picks(row: Mapping[str, Any]) -> dict[str, int | None]:
    """What each rule chooses from the folds of one resample: a position, or None."""
    rows, limit = row["candidates"], row["max_drop"]
    judged = [i for i, c in enumerate(rows) if not c["problem"]]
    means = [i for i in judged if rows[i]["drop"] <= limit]
    near = [i for i in judged if rows[i]["one_se"]]

    def smallest(some: Sequence[int]) -> int | None:
        return min(some, key=lambda i: rows[i]["remaining"], default=None)

    along = list[int]()
    for i in judged:  # the grid goes from the largest on
        if rows[i]["upper_mean"] > limit:
            break
        along.append(i)
    return {
        "bound (the default)": row["chosen"],
        "bound on the expected drop only": smallest(along),
        "mean drop within the limit": smallest(means),
        "one_se": smallest(near),
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each task and rule."""
    table = []
    for name in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == name]
        for rule in picks(own[0]):
            chosen = [(r, picks(r)[rule]) for r in own]
            made = [(r, r["candidates"][i]) for r, i in chosen if i is not None]
            drops = [c["test"]["dense"] - c["test"]["pruned"] for _, c in made]
            limit = own[0]["max_drop"]
            kept = sum(d <= limit + 1e-12 for d in drops)
            low, high = exact_interval(kept, len(made)) if made else (0.0, 1.0)
            table.append(
                {
                    "task": name, "metric": own[0]["metric"], "max_drop": limit,
                    "confidence": own[0]["confidence"], "rule": rule, "outer": len(own),
                    "promised": len(made), "kept": kept,
                    "share": kept / len(made) if made else None,
                    "interval_95": [low, high],
                    "mean_remaining_macs": mean(c["remaining"] for _, c in made) if made else None,
                    "mean_test_drop": mean(drops) if drops else None,
                    "worst_test_drop": max(drops, default=None),
                    "sizes": own[0]["sizes"],
                    "seconds": round(mean(r["seconds"] for r in own), 1),
                }
            )  # fmt: skip
    return table


def write_summary() -> None:
    rows = _rows()
    SUMMARY.write_text(json.dumps({"rows": summarise(rows)}, indent=1) + "\n", encoding="utf-8")
    for line in summarise(rows):
        share = "-" if line["share"] is None else f"{line['share']:.3f}"
        low, high = line["interval_95"]
        print(
            f"{line['task']:15} limit {line['max_drop']:<5} {line['rule']:32} kept {line['kept']:3}"
            f" of {line['promised']:3} promised ({line['outer']} resamples): {share} "
            f"[{low:.3f}, {high:.3f}]  MACs {line['mean_remaining_macs'] or 0:.3f}"
        )


def _rows() -> list[dict[str, Any]]:
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*PATHS], default=None)
    parser.add_argument("--outer", type=int, default=None, help="resamples, the first is 0")
    parser.add_argument("--summary", action="store_true", help="only write the table")
    given = parser.parse_args()
    if given.summary:
        write_summary()
        return
    torch.set_num_threads(1)
    for name in [given.task] if given.task else PATHS:
        shorten(name)
        for outer in range(given.outer or OUTERS[name]):
            if any((r["task"], r["outer"]) == (name, outer) for r in _rows()):
                continue
            folder = tempfile.mkdtemp(prefix="secateurs-promise-")
            os.environ["SECATEURS_CACHE"] = folder
            try:
                row = run_outer(name, outer)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            ROWS.parent.mkdir(parents=True, exist_ok=True)
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
            print(f"{name} {outer} chosen {row['chosen']} {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
