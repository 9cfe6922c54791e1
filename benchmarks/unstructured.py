"""Single weights at 10, 5, 2 and 1 %: our recipe beside torch.nn.utils.prune, at equal steps.

    python -m benchmarks.unstructured --part search     # validation data, seeds 100 and 101
    python -m benchmarks.unstructured --part final      # the chosen settings, seeds 0 to 4
    python -m benchmarks.unstructured --summary         # only summarise what is there

Every row starts from the same dense checkpoint and takes the same number of optimizer steps after
it (counted, and asserted), with everything that a method spends. Density counts the weights of
linear and convolutional layers, for all methods alike; biases stay. Methods:

    one-shot     prune.global_unstructured with L1Unstructured, then fine-tuning
    iterative    the same in rounds, each followed by an equal part of the fine-tuning
    gradual      the same rounds inside one fine-tuning with one optimizer and one cosine, as
                 somebody would write it who knows the literature; no part of the goal
    random       prune.global_unstructured with RandomUnstructured, then fine-tuning
    ours         cuts inside one training, or before it, see `Ours`

The settings of every method (learning rate, its schedule, rounds; ours also criterion, allocation
and distillation) are chosen by the mean validation accuracy of the search, for each task and
density on its own (of a density that was not searched: those of the nearest one). 10 % of
fashion-lenet300 was searched by itself, ours with cuts that end early as well, after final rows
with the settings of 5 % had been seen, and fashion-lenet5 at 2 and 10 % after five rows of one
seed; rows with other settings stay in the file and count no more. AdamW for
all, without weight decay unless the setting says so. Ours scores on 512 or 2048 training samples at
each cut, which is no optimizer step and not counted. One thread; a run that is stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from torch import nn

import secateurs as sc
from benchmarks.healing_common import (
    RESULTS,
    SEARCH_SEEDS,
    Dense,
    Rows,
    SameSteps,
    best_setting,
    error_of,
    one_thread,
    paired,
    points,
)
from benchmarks.unstructured_peer import PEERS, n_left, n_weights, with_torch
from secateurs.finetuning import Finetune
from secateurs.report import environment
from secateurs.schedules import Schedule

ROWS = Rows(
    RESULTS / "unstructured.jsonl",
    ("part", "task", "start", "density", "method", "setting", "seed", "steps"),
)
SUMMARY = RESULTS / "unstructured.json"
DENSITIES = (0.1, 0.05, 0.02, 0.01)
SEEDS = tuple(range(5))
EPOCHS = {"fashion-lenet300": 10, "fashion-lenet5": 1}
"""Passes over the 55,000 training images after the dense checkpoint, for every method."""
MARGIN = {0.1: 0.0, 0.05: 0.0, 0.02: 0.01, 0.01: 0.01}
"""By how much ours has to be ahead."""


@dataclass(frozen=True)
class Ours:
    """A setting of ours: cuts inside one training with one cosine.

    Attributes:
        cuts: 1 cuts before the training.
        until: part of the training in which the cuts are made.
        samples: of the training data, to score on.
    """

    criterion: str = "taylor"
    allocation: str = "lamp"
    curve: str = "cubic"
    cuts: int = 20
    until: float = 0.5
    lr: float = 3e-3
    distill: float = 0.0
    temperature: float = 2.0
    samples: int = 512
    weight_decay: float = 0.0


OURS: dict[str, Ours] = {
    "taylor lamp 0.005": Ours(lr=5e-3),
    "taylor lamp 0.003, 2048 samples": Ours(samples=2048),
    "taylor erk 0.01": Ours(allocation="erk", lr=1e-2),
    "taylor erk 0.005, 2048 samples, decay": Ours(
        allocation="erk", lr=5e-3, samples=2048, weight_decay=0.1
    ),
    "taylor lamp 0.01, 2048 samples, decay": Ours(lr=1e-2, samples=2048, weight_decay=0.1),
    "magnitude lamp 0.003": Ours("magnitude"),
    "magnitude erk 0.01, decay": Ours("magnitude", allocation="erk", lr=1e-2, weight_decay=0.1),
    "magnitude lamp 0.01, decay": Ours("magnitude", lr=1e-2, weight_decay=0.1),
    "taylor erk 0.01, 2048 samples, decay": Ours(
        allocation="erk", lr=1e-2, samples=2048, weight_decay=0.1
    ),
    "taylor erk 0.01, 2048 samples, decay 0.3": Ours(
        allocation="erk", lr=1e-2, samples=2048, weight_decay=0.3
    ),
    "taylor erk 0.01, 2048 samples, decay, 50 cuts": Ours(
        allocation="erk", lr=1e-2, samples=2048, weight_decay=0.1, cuts=50, until=0.7
    ),
    "magnitude erk 0.01, decay 0.3": Ours("magnitude", allocation="erk", lr=1e-2, weight_decay=0.3),
    "taylor erk 0.01, 2048 samples, decay, early": Ours(
        allocation="erk", lr=1e-2, samples=2048, weight_decay=0.1, cuts=10, until=0.15
    ),
    "taylor lamp 0.01, 2048 samples, decay, early": Ours(
        lr=1e-2, samples=2048, weight_decay=0.1, cuts=10, until=0.15
    ),
    "magnitude erk 0.01, decay, early": Ours(
        "magnitude", allocation="erk", lr=1e-2, weight_decay=0.1, cuts=10, until=0.15
    ),
    "magnitude lamp 0.01, one shot": Ours("magnitude", lr=1e-2, cuts=1),
    "magnitude erk 0.01, one shot": Ours("magnitude", allocation="erk", lr=1e-2, cuts=1),
    "taylor lamp 0.01, 2048 samples, one shot": Ours(lr=1e-2, samples=2048, cuts=1),
    "magnitude lamp 0.01, one shot, distilled": Ours("magnitude", lr=1e-2, cuts=1, distill=0.5),
    "taylor lamp 0.01": Ours(lr=1e-2),
    "taylor lamp 0.01, early": Ours(lr=1e-2, cuts=10, until=0.15),
    "taylor global 0.01": Ours(allocation="global", lr=1e-2),
    "taylor global 0.01, early": Ours(allocation="global", lr=1e-2, cuts=10, until=0.15),
    "magnitude global 0.01": Ours("magnitude", allocation="global", lr=1e-2),
    "magnitude global 0.01, early": Ours(
        "magnitude", allocation="global", lr=1e-2, cuts=10, until=0.15
    ),
    "magnitude erk 0.02, decay": Ours("magnitude", allocation="erk", lr=2e-2, weight_decay=0.1),
}
METHODS = (*PEERS, "ours")
NAMED = ("one-shot", "iterative", "random")
"""The peers of the goal; "gradual" is shown beside them."""


def settings_of(method: str) -> dict[str, Any]:
    """Name -> setting of a method."""
    return dict(OURS) if method == "ours" else dict(PEERS[method])


# -- the methods -----------------------------------------------------------------------------------


def with_secateurs(dense: Dense, setting: Ours, kept: int, steps: int, seed: int) -> nn.Module:
    """Pruned by our recipe; the dense-shaped model with zeros."""
    result = sc.prune(
        dense.model,
        dense.data.train,
        dense.task.loss_fn,
        example_inputs=dense.data.example_inputs,
        budget=sc.Budget(units=kept),
        criterion=setting.criterion,
        granularity="weight",
        allocation=setting.allocation,
        round_to=1,
        schedule=Schedule("one_shot", 1)
        if setting.cuts == 1
        else Schedule(
            setting.curve,
            steps=setting.cuts,
            every=f"{max(1, int(steps * setting.until) // setting.cuts)} steps",
        ),
        finetune=Finetune(
            steps=steps,
            optimizer="adamw",
            lr=setting.lr,
            weight_decay=setting.weight_decay,
            lr_schedule="cosine",
            distill=setting.distill,
            temperature=setting.temperature,
        ),
        calibration=dense.batches(setting.samples),
        seed=seed,
    )
    return result.masked


def work(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of a row."""
    dense = Dense.of(row["task"], row["seed"])
    kept = round(row["density"] * n_weights(dense.model))
    setting = settings_of(row["method"])[row["setting"]]
    with SameSteps(row["steps"]):
        how: Any = with_secateurs if isinstance(setting, Ours) else with_torch
        model = how(dense, setting, kept, row["steps"], row["seed"])
    left = n_left(model)
    assert sum(left) <= kept, f"{sum(left)} weights are left, {kept} may be"
    return {
        **dense.figures(model.eval(), row["part"]),
        "kept": kept,
        "left": left,
        "options": asdict(setting),
    }


# -- what is asked ---------------------------------------------------------------------------------


def steps_of(task: str, epochs: int) -> int:
    """Optimizer steps of a row."""
    return epochs * len(Dense.of(task, SEARCH_SEEDS[0]).data.train)


def wanted(
    part: str,
    tasks: Sequence[str],
    densities: Sequence[float],
    methods: Sequence[str],
    seeds: Sequence[int],
    only: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Rows of the search, or final ones with the settings that the search has chosen."""
    for task in tasks:
        steps = steps_of(task, EPOCHS[task])
        for seed in seeds:
            for density in densities:
                for method in methods:
                    names = list(settings_of(method))
                    if part == "final":
                        names = [chosen(task, density, method, steps)]
                    for name in names:
                        if not only or name in only:
                            yield {
                                "part": part, "task": task, "start": "dense", "density": density,
                                "method": method, "setting": name, "seed": seed, "steps": steps,
                            }  # fmt: skip


def chosen(task: str, density: float, method: str, steps: int) -> str:
    """The setting of a method for a density, by validation data; else that of the nearest one."""
    rows = [
        r
        for r in ROWS.read()
        if (r["part"], r["task"], r["method"], r["steps"]) == ("search", task, method, steps)
    ]
    searched = sorted({r["density"] for r in rows}, key=lambda d: abs(math.log(d / density)))
    nearest = searched[0] if searched else None
    return best_setting((r for r in rows if r["density"] == nearest), list(settings_of(method)))


# -- summary ---------------------------------------------------------------------------------------


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means, standard errors, paired differences; each goal met or missed."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        kind = (row["task"], row["density"], row["method"])
        if row["part"] == "final" and row["setting"] == chosen(*kind, row["steps"]):
            groups.setdefault(kind, {})[row["seed"]] = row
    lines, goals = [], []
    for (task, density, method), held in groups.items():
        test = {seed: row["test"] for seed, row in held.items()}
        line = {
            "task": task,
            "density": density,
            "method": method,
            "setting": sorted({row["setting"] for row in held.values()}),
            "steps": sorted({row["steps"] for row in held.values()}),
            "seeds": sorted(held),
            "dense": mean(row["dense_test"] for row in held.values()),
            "test": mean(test.values()),
            "standard_error": error_of(list(test.values())),
        }
        ours = groups.get((task, density, "ours"))
        if method != "ours" and ours is not None:
            line["ours_ahead"] = paired({s: row["test"] for s, row in ours.items()}, test)
        lines.append(line)
    order = {m: i for i, m in enumerate(METHODS)}
    lines.sort(key=lambda r: (r["task"], -r["density"], order[r["method"]]))
    for task, density in sorted({(k[0], k[1]) for k in groups}, key=lambda k: (k[0], -k[1])):
        ahead = {
            line["method"]: line["ours_ahead"]["difference"]
            for line in lines
            if (line["task"], line["density"]) == (task, density) and "ours_ahead" in line
        }
        if all(method in ahead for method in NAMED):
            ahead = {method: ahead[method] for method in NAMED}
            least, asked = min(ahead.values()), MARGIN[density]
            goals.append(
                {
                    "task": task, "density": density, "ahead_by": least, "asked": asked,
                    "of": min(ahead, key=lambda m: ahead[m]),
                    "met": bool(least >= asked if asked else least > 0),
                }
            )  # fmt: skip
    return {
        "lines": lines,
        "goals": goals,
        "search": _searched(rows),
    }


def _searched(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean validation accuracy of every setting that was tried."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["part"] == "search":
            kind = (row["task"], row["density"], row["method"], row["setting"])
            found.setdefault(kind, []).append(row["validation"])
    names = ("task", "density", "method", "setting")
    lines = [
        dict(zip(names, kind, strict=True)) | {"validation": mean(v), "seeds": len(v)}
        for kind, v in found.items()
    ]
    return sorted(lines, key=lambda r: (r["task"], -r["density"], r["method"], -r["validation"]))


def table(found: dict[str, Any]) -> str:
    """Plain text: methods by density, then the goals."""
    told = []
    for r in found["lines"]:
        gap = r.get("ours_ahead") or {}
        ahead = ""
        if gap.get("difference") is not None:
            ahead = (
                f"| ours ahead by {100 * gap['difference']:+.2f} ({points(gap['standard_error'])})"
            )
        told.append(
            f"{r['task']} {r['density']:<5} {r['method']:<10} n={len(r['seeds'])} dense "
            f"{100 * r['dense']:.2f} test {100 * r['test']:.2f} ({points(r['standard_error'])}) "
            f"{ahead} [{', '.join(r['setting'])}]"
        )
    told += [
        f"goal {g['task']} {g['density']}: ahead of {g['of']} by {100 * g['ahead_by']:+.2f} "
        f"points, asked {'more than ' if not g['asked'] else ''}{100 * g['asked']:g}: "
        + ("met" if g["met"] else "MISSED")
        for g in found["goals"]
    ]
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--part", choices=("search", "final"), default="final")
    parser.add_argument("--tasks", nargs="*", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--densities", nargs="*", type=float, default=list(DENSITIES))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--settings", nargs="*", default=[], help="of the search; empty: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=None)
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    options = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")
    if not options.summary:
        seeds = options.seeds or (SEARCH_SEEDS if options.part == "search" else SEEDS)
        rows = wanted(
            options.part, options.tasks, options.densities, options.methods, seeds,
            options.settings,
        )  # fmt: skip
        ROWS.run(rows, work)
    found = summarise(ROWS.read())
    SUMMARY.write_text(json.dumps({"environment": environment(0), **found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
