"""Single weights at 10, 5, 2 and 1 %: our recipe beside torch.nn.utils.prune, at equal steps.

    python -m benchmarks.unstructured --part search     # validation data, seeds 100 and 101
    python -m benchmarks.unstructured --part final      # the chosen settings, seeds 0 to 4
    python -m benchmarks.unstructured --part collapse   # where magnitude leaves no path
    python -m benchmarks.unstructured --summary         # only summarise what is there

Every row starts from the same dense checkpoint and takes the same number of optimizer steps after
it (counted, and asserted), with everything that a method spends. Density counts the weights of
linear and convolutional layers, for all methods alike; biases stay. Methods:

    one-shot     prune.global_unstructured with L1Unstructured, then fine-tuning
    iterative    the same in rounds, each followed by an equal part of the fine-tuning
    gradual      the same rounds inside one fine-tuning with one optimizer and one cosine, as
                 somebody would write it who knows the literature; no part of the goal
    random       prune.global_unstructured with RandomUnstructured, then fine-tuning
    ours         cuts inside one training, see `Ours`

The settings of every method (learning rate, its schedule, rounds; ours also criterion, allocation
and distillation) are chosen by the mean validation accuracy of the search, for each task and
density on its own (of a density that was not searched: those of the nearest one). AdamW for all,
without weight decay unless the setting says so. Ours scores on 512 or 2048 training samples at each
cut, which is no optimizer step and not counted. One thread; a run that is stopped goes on where it
was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

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
)
from secateurs.finetuning import Finetune, finetune
from secateurs.report import environment
from secateurs.schedules import Schedule

ROWS = Rows(
    RESULTS / "unstructured.jsonl",
    ("part", "task", "start", "density", "method", "setting", "seed", "steps"),
)
SUMMARY = RESULTS / "unstructured.json"
DENSITIES = (0.1, 0.05, 0.02, 0.01)
SEEDS = tuple(range(5))
EPOCHS = {"fashion-lenet300": 10, "fashion-lenet5": 4}
"""Passes over the 55,000 training images after the dense checkpoint, for every method."""
MARGIN = {0.1: 0.0, 0.05: 0.0, 0.02: 0.01, 0.01: 0.01}
"""By how much ours has to be ahead."""


@dataclass(frozen=True)
class Torch:
    """A setting of torch.nn.utils.prune.

    Attributes:
        pick: "l1" or "random".
        rounds: prune, fine-tune, prune, ...; the kept weights fall by equal factors.
        joined: one optimizer and one learning-rate schedule over all rounds.
        tail: with `joined`, the part of the training after the last round.
    """

    pick: str = "l1"
    rounds: int = 1
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    joined: bool = False
    tail: float = 0.5
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Ours:
    """A setting of ours: cuts inside one training with one cosine.

    Attributes:
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


LRS = (3e-4, 1e-3, 3e-3, 1e-2)
PEERS: dict[str, dict[str, Torch]] = {
    "one-shot": {f"cosine {lr:g}": Torch(lr=lr) for lr in LRS},
    "iterative": {
        f"{n} rounds, cosine {lr:g}": Torch(rounds=n, lr=lr) for n in (3, 5) for lr in LRS[1:]
    },
    "random": {f"cosine {lr:g}": Torch(pick="random", lr=lr) for lr in LRS[1:]},
    "gradual": {
        f"10 rounds, one cosine {lr:g}": Torch(rounds=10, lr=lr, joined=True) for lr in LRS[1:3]
    },
}
OURS: dict[str, Ours] = {
    "taylor lamp 0.003": Ours(),
    "taylor lamp 0.005": Ours(lr=5e-3),
    "taylor erk 0.003": Ours(allocation="erk"),
    "taylor erk 0.01": Ours(allocation="erk", lr=1e-2),
    "taylor lamp 0.003, 50 cuts": Ours(cuts=50, until=0.6),
    "taylor lamp 0.003, 2048 samples": Ours(samples=2048),
    "taylor erk 0.005, 2048 samples": Ours(allocation="erk", lr=5e-3, samples=2048),
    "taylor erk 0.005, 2048 samples, decay": Ours(
        allocation="erk", lr=5e-3, samples=2048, weight_decay=0.1
    ),
    "taylor lamp 0.003, distilled": Ours(distill=0.5),
    "taylor global 0.003": Ours(allocation="global"),
    "magnitude lamp 0.003": Ours("magnitude"),
    "magnitude lamp 0.001, distilled": Ours("magnitude", lr=1e-3, distill=0.5),
    "taylor lamp 0.001": Ours(lr=1e-3),
}
METHODS = (*PEERS, "ours")
NAMED = ("one-shot", "iterative", "random")
"""The peers of the goal; "gradual" is shown beside them."""


def settings_of(method: str) -> dict[str, Any]:
    """Name -> setting of a method."""
    return dict(OURS) if method == "ours" else dict(PEERS[method])


def layers_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """What density counts: the weights of linear and convolutional layers."""
    kinds = (nn.Linear, nn.Conv2d)
    return [(m, "weight") for m in model.modules() if isinstance(m, kinds)]


def n_weights(model: nn.Module) -> int:
    """How many of them there are."""
    return sum(getattr(m, name).numel() for m, name in layers_of(model))


def n_left(model: nn.Module) -> list[int]:
    """Weights that are not zero, layer by layer."""
    return [int((getattr(m, name) != 0).sum()) for m, name in layers_of(model)]


# -- the methods -----------------------------------------------------------------------------------


def with_torch(dense: Dense, setting: Torch, kept: int, steps: int, seed: int) -> nn.Module:
    """Pruned by torch.nn.utils.prune and fine-tuned."""
    model = copy.deepcopy(dense.model)
    layers, total = layers_of(model), n_weights(model)
    own: list[Any] = [module for module, _ in layers]
    goals = [round(total * (kept / total) ** (i / setting.rounds)) for i in range(setting.rounds)]
    goals = [*goals[1:], kept]
    pick = {"l1": torch_prune.L1Unstructured, "random": torch_prune.RandomUnstructured}

    def cut(goal: int) -> None:
        left = sum(int(getattr(m, "weight_mask", torch.ones_like(m.weight)).sum()) for m in own)
        torch_prune.global_unstructured(
            layers, pruning_method=pick[setting.pick], amount=left - goal
        )

    def train(n: int, recut: Any = None) -> None:
        config = Finetune(
            steps=n,
            optimizer="adamw",
            lr=setting.lr,
            weight_decay=setting.weight_decay,
            lr_schedule=setting.lr_schedule,
        )
        finetune(model, dense.data.train, dense.task.loss_fn, config, seed=seed, recut=recut)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if setting.joined:
            every = int(steps * (1 - setting.tail)) // setting.rounds
            due = {i * every: goal for i, goal in enumerate(goals)}
            cut(due.pop(0))
            train(steps, lambda done: cut(due.pop(done)) if done in due else None)
        else:
            ends = [round(steps * (i + 1) / len(goals)) for i in range(len(goals))]
            for goal, begin, end in zip(goals, [0, *ends], ends, strict=False):
                cut(goal)
                train(end - begin)
    for module, name in layers:
        torch_prune.remove(module, name)  # type: ignore[no-untyped-call]
    return model


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
        schedule=Schedule(
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


# -- collapse --------------------------------------------------------------------------------------

COLLAPSE = {"init": (0.05, 0.04, 0.02, 0.01), "dense": (0.005, 0.002, 0.001)}
"""Where pruning starts -> densities. A new network has its largest weights in its last layers, so
that one global magnitude empties the first layer; a trained one loses single classes."""
COLLAPSE_LR = 3e-3


def outputs_reached(model: nn.Module, inputs: Tensor) -> int:
    """Outputs to which a path of weights leads that are not zero.

    The network computes on ones with weights of one where they are not zero and without biases.
    """
    plain = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_((p != 0).to(p) if p.dim() > 1 else torch.zeros_like(p))
        found: Tensor = plain(torch.ones_like(inputs[:1], dtype=torch.double))
    return int((found > 0).sum())


def fresh(dense: Dense, seed: int) -> nn.Module:
    """The network of a task before any training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dense.task.build()


def collapse_work(row: dict[str, Any]) -> dict[str, Any]:
    """Cut without training, then trained: how many outputs are reached, and what comes of it.

    Ours is SynFlow in its hundred exponential steps.
    """
    dense = Dense.of(row["task"], row["seed"])
    model = copy.deepcopy(dense.model) if row["start"] == "dense" else fresh(dense, row["seed"])
    kept = round(row["density"] * n_weights(model))
    steps, masks = row["steps"], dict[str, Tensor]()
    if row["method"] == "one-shot":
        cut = copy.deepcopy(model)  # what torch has pruned cannot be copied
        for each in (cut, model):
            torch_prune.global_unstructured(
                layers_of(each),
                pruning_method=torch_prune.L1Unstructured,
                amount=n_weights(model) - kept,
            )
        for module, weight in layers_of(cut):
            torch_prune.remove(module, weight)  # type: ignore[no-untyped-call]
    else:
        result = sc.prune(
            model, dense.data.calibration, dense.task.loss_fn,
            example_inputs=dense.data.example_inputs, budget=sc.Budget(units=kept),
            criterion="synflow", granularity="weight", allocation="global", round_to=1,
            schedule=Schedule("exponential", steps=100), seed=row["seed"],
        )  # fmt: skip
        model, masks = result.masked, dict(result.plan.masks)
        cut = copy.deepcopy(model)
    config = Finetune(steps=steps, lr=COLLAPSE_LR, lr_schedule="cosine")
    with SameSteps(steps):
        finetune(model, dense.data.train, dense.task.loss_fn, config, masks=masks, seed=row["seed"])
    return {
        **dense.figures(model.eval(), "final"),
        "kept": kept,
        "left": n_left(cut),
        "outputs_reached": outputs_reached(cut, dense.data.example_inputs),
    }


def collapse_rows(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Magnitude beside ours, from a new network and from the dense one."""
    for task in tasks:
        steps = steps_of(task, EPOCHS[task])
        for start, densities in COLLAPSE.items():
            for seed in seeds:
                for density in densities:
                    for method, name in (("one-shot", "magnitude"), ("ours", "synflow")):
                        yield {
                            "part": "collapse", "task": task, "start": start, "density": density,
                            "method": method, "setting": name, "seed": seed, "steps": steps,
                        }  # fmt: skip


# -- summary ---------------------------------------------------------------------------------------


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means, standard errors, paired differences; each goal met or missed."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == "final":
            kind = (row["task"], row["density"], row["method"])
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
        "collapse": _collapsed(rows),
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


def _collapsed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs reached and accuracy after training, of magnitude and of ours."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == "collapse":
            kind = (row["task"], row["start"], row["density"], row["setting"])
            found.setdefault(kind, []).append(row)
    names = ("task", "start", "density", "setting")
    return [
        dict(zip(names, kind, strict=True))
        | {
            "test": mean(r["test"] for r in held),
            "standard_error": error_of([r["test"] for r in held]),
            "outputs_reached": [r["outputs_reached"] for r in held],
            "emptied_layers": [sum(n == 0 for n in r["left"]) for r in held],
            "seeds": sorted(r["seed"] for r in held),
        }
        for kind, held in found.items()
    ]


def table(found: dict[str, Any]) -> str:
    """Plain text: methods by density, then the goals, then collapse."""
    told = []
    for r in found["lines"]:
        gap = r.get("ours_ahead") or {}
        ahead = ""
        if gap.get("difference") is not None:
            ahead = (
                f"| ours ahead by {100 * gap['difference']:+.2f} ({_points(gap['standard_error'])})"
            )
        told.append(
            f"{r['task']} {r['density']:<5} {r['method']:<10} n={len(r['seeds'])} dense "
            f"{100 * r['dense']:.2f} test {100 * r['test']:.2f} ({_points(r['standard_error'])}) "
            f"{ahead} [{', '.join(r['setting'])}]"
        )
    told += [
        f"goal {g['task']} {g['density']}: ahead of {g['of']} by {100 * g['ahead_by']:+.2f} "
        f"points, asked {'more than ' if not g['asked'] else ''}{100 * g['asked']:g}: "
        + ("met" if g["met"] else "MISSED")
        for g in found["goals"]
    ]
    told += [
        f"collapse {c['task']} from {c['start']} {c['density']:<6} {c['setting']:<10} "
        f"n={len(c['seeds'])} outputs reached {c['outputs_reached']} emptied layers "
        f"{c['emptied_layers']} test {100 * c['test']:.2f} ({_points(c['standard_error'])})"
        for c in found["collapse"]
    ]
    return "\n".join(told)


def _points(value: float | None) -> str:
    return "-" if value is None else f"se {100 * value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--part", choices=("search", "final", "collapse"), default="final")
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
        if options.part == "collapse":
            ROWS.run(collapse_rows(options.tasks, seeds), collapse_work)
        else:
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
