"""Channels at 2x, 4x and 10x fewer MACs: our recipes beside Torch-Pruning, at equal steps.

    python -m benchmarks.structured_healing --part search   # validation data, seeds 100, 101, ...
    python -m benchmarks.structured_healing --part final    # seeds 0 to 2
    python -m benchmarks.structured_healing --summary       # only summarise what is there

Every row starts from the same dense checkpoint and takes the same number of optimizer steps after
it (counted, and asserted), preparation and rounds included, with the same optimizer and cosine:
AdamW. The learning rate is chosen on validation data: one for all of a task, which suits
Torch-Pruning's taylor at a quarter; after one pass over the digits every setting of both tools has
the one that suits it best, at each budget. MACs are counted by `secateurs.macs` on the network that
was really cut, for both tools.

    torch-pruning   all of its criteria that fit (see `PEERS`), ranked locally and globally, in one
                    shot and in rounds; of ResNet-20 the three best of the first seed go on to the
                    others. The best by TEST accuracy, for each point on its own, is what ours is
                    compared with: that favours the peer. The widest network within 1 % of the
                    budget is taken, which favours it too.
    plain           secateurs: taylor, uniform, one shot, fine-tuning.
    + ...           the same with one ingredient, or several. "Recommended" is the one with several
                    that has the best mean validation accuracy of the search over its budgets, for
                    each length of the training; only
                    it and those with one ingredient have final rows. The variants with l2 came
                    to the search after the first seed of Torch-Pruning had been seen on test data.
                    Search rows of ResNet-20 that grow and reconstruct are from when a repair aimed
                    at the dense model; it aims at the grown one now.

One thread; a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import nn

import secateurs as sc
from benchmarks.healing_common import (
    RESULTS,
    SEARCH_SEEDS,
    Dense,
    Rows,
    SameSteps,
    error_of,
    one_thread,
    paired,
    points,
)
from benchmarks.structured_peer import OVER, PEERS, Peer, config, with_torch_pruning
from secateurs.finetuning import finetune
from secateurs.macs import macs
from secateurs.penalties import Penalty
from secateurs.report import environment
from secateurs.schedules import Schedule

ROWS = Rows(
    RESULTS / "structured_healing.jsonl",
    ("part", "task", "keep", "tool", "setting", "lr", "seed", "steps"),
)
SUMMARY = RESULTS / "structured_healing.json"
KEPT = (0.5, 0.25, 0.1)
STEPS = {"digits-cnn": (17, 51), "fashion-resnet20": (157, 314)}
"""Optimizer steps after the dense checkpoint, for every row: one and three passes over the digits,
one and two over the clothes. After twenty passes over the digits (rows with 340 steps) all settings
were within one or two test images of each other."""
SEEDS = {"digits-cnn": tuple(range(10)), "fashion-resnet20": (0, 1, 2)}
PEERS_KEPT = {"digits-cnn": 15, "fashion-resnet20": 3}
"""So many settings of the peer, the best on TEST data of the first seed, go on to other seeds."""
LRS = (1e-3, 3e-3)
OWN_RATES = {("digits-cnn", 17)}
"""Where every setting has a learning rate of its own."""


@dataclass(frozen=True)
class Ours:
    """A setting of ours.

    Attributes:
        cuts: 1 cuts before the fine-tuning; more are made inside it.
        until: part of the training in which the cuts are made.
        distill, temperature: as in `Finetune`.
        penalty: rule that makes small before the cut what will go; "" = none. See `Penalty`.
        prepare: part of the steps that train under it, at a constant learning rate.
        repair: done after each cut, without training. See `prune`.
    """

    criterion: str = "taylor"
    allocation: str = "uniform"
    cuts: int = 1
    until: float = 0.4
    curve: str = "cubic"
    distill: float = 0.0
    temperature: float = 2.0
    penalty: str = ""
    prepare: float = 0.0
    repair: tuple[str, ...] = ()


PLAIN = Ours()
OURS: dict[str, Ours] = {
    "plain": PLAIN,
    "+ iterative": replace(PLAIN, cuts=5),
    "+ distilled": replace(PLAIN, distill=0.5),
    "+ growing": replace(PLAIN, penalty="growing", prepare=0.25),
    "+ reconstructed": replace(PLAIN, repair=("reconstruct",)),
    "+ reconstructed, distilled": replace(PLAIN, repair=("reconstruct",), distill=0.5),
    "+ growing, reconstructed": replace(
        PLAIN, penalty="growing", prepare=0.25, repair=("reconstruct",)
    ),
    "+ growing, reconstructed, distilled": replace(
        PLAIN, penalty="growing", prepare=0.25, repair=("reconstruct",), distill=0.5
    ),
    "+ growing, distilled": replace(PLAIN, penalty="growing", prepare=0.25, distill=0.5),
    "+ iterative, distilled": replace(PLAIN, cuts=5, distill=0.5),
    "+ l2, iterative, distilled": replace(PLAIN, criterion="l2_norm", cuts=5, distill=0.5),
    "+ l2, reconstructed, distilled": replace(
        PLAIN, criterion="l2_norm", repair=("reconstruct",), distill=0.5
    ),
    "+ l2, growing, distilled": replace(
        PLAIN, criterion="l2_norm", penalty="growing", prepare=0.25, distill=0.5
    ),
    "+ iterative, growing, distilled": replace(
        PLAIN, cuts=3, until=0.2, penalty="growing", prepare=0.25, distill=0.5
    ),
}  # fmt: skip
"""One ingredient at a time, and those that go together."""
RECOMMENDED = tuple(name for name in OURS if "," in name)
"""Of these the search takes the best for each task, over its budgets, as "recommended"."""
TOOLS = ("torch-pruning", "secateurs")


# -- ours ------------------------------------------------------------------------------------------


def with_secateurs(
    dense: Dense, setting: Ours, keep: float, lr: float, steps: int, seed: int
) -> nn.Module:
    """Cut and fine-tuned by our recipe; a preparation counts as training."""
    first = round(steps * setting.prepare) if setting.penalty else 0
    healing = replace(
        config(steps - first, lr), distill=setting.distill, temperature=setting.temperature
    )
    one_shot = setting.cuts == 1
    every = f"{max(1, int(steps * setting.until) // setting.cuts)} steps"
    prepare = replace(config(first, lr), lr_schedule="constant") if first else None
    result = sc.prune(
        dense.model, dense.data.train, dense.task.loss_fn,
        example_inputs=dense.data.example_inputs, budget=sc.Budget(macs=keep),
        criterion=setting.criterion, granularity="channel", allocation=setting.allocation,
        round_to=1, calibration=dense.data.calibration, seed=seed,
        schedule=Schedule("one_shot", steps=1)
        if one_shot
        else Schedule(setting.curve, steps=setting.cuts, every=every),
        finetune=None if one_shot else healing,
        prepare=prepare, penalty=Penalty(setting.penalty) if first else None,
        repair=setting.repair,
    )  # fmt: skip
    if one_shot:  # the smaller network is the faster one to train
        teacher = dense.model if setting.distill else None
        finetune(
            result.model, dense.data.train, dense.task.loss_fn, healing, teacher=teacher, seed=seed
        )
    return result.model


def work(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of a row."""
    dense = Dense.of(row["task"], row["seed"])
    for p in dense.model.parameters():
        if p.dim() == 4:  # a quarter faster here
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    setting: Any = (PEERS if row["tool"] == "torch-pruning" else OURS)[row["setting"]]
    how: Callable[..., nn.Module] = (
        with_torch_pruning if isinstance(setting, Peer) else with_secateurs
    )
    with SameSteps(row["steps"]):
        model = how(dense, setting, row["keep"], row["lr"], row["steps"], row["seed"])
    inputs = dense.data.example_inputs
    left = macs(model, inputs) / macs(dense.model, inputs)
    assert left <= row["keep"] * (OVER if isinstance(setting, Peer) else 1)
    return {
        **dense.figures(model.eval(), row["part"]),
        "macs": left,
        "params": sum(p.numel() for p in model.parameters())
        / sum(p.numel() for p in dense.model.parameters()),
        "options": asdict(setting),
    }


# -- what is asked ---------------------------------------------------------------------------------


def searched(task: str, tool: str, steps: int) -> list[dict[str, Any]]:
    """Search rows of a task and tool."""
    wanted = ("search", task, tool, steps)
    return [r for r in ROWS.read() if (r["part"], r["task"], r["tool"], r["steps"]) == wanted]


def rate_of(task: str, keep: float, steps: int, tool: str, setting: str) -> float:
    """The learning rate that suits a setting best on validation data, or one for all.

    That is the best of Torch-Pruning's taylor, for a quarter of the MACs and the longest training.
    """
    places = [("torch-pruning", "taylor", STEPS[task][-1], 0.25)]
    if (task, steps) in OWN_RATES:
        places.insert(0, (tool, setting, steps, keep))
    for tool, setting, n, share in places:
        rows = searched(task, tool, n)
        rows = [r for r in rows if (r["setting"], r["keep"]) == (setting, share)]
        tried = {lr: {r["seed"]: r["validation"] for r in rows if r["lr"] == lr} for lr in LRS}
        seeds = set.intersection(*(set(v) for v in tried.values()))
        if seeds:
            return max(LRS, key=lambda lr: mean(tried[lr][seed] for seed in sorted(seeds)))
    raise SystemExit(f"no learning rate is known for {task}: run the search first")


def recommended(task: str, steps: int) -> str:
    """The best of ours with several ingredients, by the search; "" before it.

    Where there was no search for so many steps: that of the longest training.
    """
    for n in (steps, STEPS[task][-1]):
        held = searched(task, "secateurs", n)
        tried: dict[tuple[str, float], dict[int, float]] = {}
        for name, keep in product(RECOMMENDED, KEPT):
            lr = rate_of(task, keep, n, "secateurs", name)
            found = [r for r in held if (r["setting"], r["keep"], r["lr"]) == (name, keep, lr)]
            if found:
                tried[name, keep] = {r["seed"]: r["validation"] for r in found}
        if tried:
            return _best_everywhere(tried)
    return ""


def _best_everywhere(tried: dict[tuple[str, float], dict[int, float]]) -> str:
    """The setting with the best mean over the budgets that all were tried at, on equal seeds."""
    kept = {keep for _, keep in tried}
    names = dict.fromkeys(name for name, _ in tried)
    whole = [name for name in names if all((name, keep) in tried for keep in kept)]
    seeds = set.intersection(*(set(tried[name, keep]) for name in whole for keep in kept))
    assert seeds, f"no seed was tried by all of {', '.join(whole)}"
    return max(
        whole, key=lambda n: mean(tried[n, keep][s] for keep in sorted(kept) for s in sorted(seeds))
    )


def ours_of(task: str, keep: float, seed: int, steps: int) -> list[str]:
    """Plain, with one ingredient each, and the recommended one.

    The ingredients alone of ResNet-20 have all seeds only at a tenth of the MACs, where most is
    lost, and only for the longer training.
    """
    found = recommended(task, steps)
    everywhere = task == "digits-cnn" or (keep == min(KEPT) and steps == STEPS[task][-1])
    if not everywhere:
        return ["plain", found]
    return [name for name in OURS if name not in RECOMMENDED or name == found]


def peers_of(task: str, keep: float, seed: int, steps: int) -> list[str]:
    """All settings of the peer for the first seed; for others those that were best there."""
    first, n = SEEDS[task][0], PEERS_KEPT[task]
    if seed == first or n >= len(PEERS):
        return list(PEERS)
    tried = {
        row["setting"]: row["test"]
        for row in ROWS.read()
        if (row["part"], row["task"], row["keep"], row["tool"], row["seed"], row["steps"])
        == ("final", task, keep, "torch-pruning", first, steps)
    }
    if len(tried) < len(PEERS):
        raise SystemExit(f"{task} at {keep}: run seed {first} of torch-pruning first")
    return sorted(tried, key=lambda name: -tried[name])[:n]


def wanted(
    part: str,
    tasks: Sequence[str],
    tools: Sequence[str],
    seeds: Sequence[int] | None,
    kept: Sequence[float] = KEPT,
    only: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """Rows of the search, or all final ones.

    Args:
        only: of the lengths of the training; empty: all.
    """
    for task in tasks:
        own = SEARCH_SEEDS if part == "search" else SEEDS[task]
        for steps in only or STEPS[task]:
            base = {"part": part, "task": task, "steps": steps}
            for seed, keep, tool in product(own if seeds is None else seeds, kept, tools):
                if part == "search":
                    names = [*(PEERS if tool == "torch-pruning" else OURS)]
                else:
                    of = peers_of if tool == "torch-pruning" else ours_of
                    names = of(task, keep, seed, steps)
                for name in names:
                    rates = [rate_of(task, keep, steps, tool, name)] if part == "final" else LRS
                    for lr in rates:
                        yield {**base, "keep": keep, "tool": tool, "setting": name, "lr": lr,
                               "seed": seed}  # fmt: skip


# -- summary ---------------------------------------------------------------------------------------


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means, what each ingredient adds to "plain", and each goal met or missed."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    rates: dict[tuple[Any, ...], float] = {}
    named = {(task, steps): recommended(task, steps) for task in STEPS for steps in STEPS[task]}
    for row in rows:
        task, steps = row["task"], row["steps"]
        if row["part"] != "final" or steps not in STEPS[task]:
            continue
        if row["setting"] in RECOMMENDED and row["setting"] != named[task, steps]:
            continue  # it was that of an earlier search
        kind = (task, steps, row["keep"], row["tool"], row["setting"])
        if kind not in rates:
            rates[kind] = rate_of(task, row["keep"], steps, row["tool"], row["setting"])
        if row["lr"] == rates[kind]:
            groups.setdefault(kind, {})[row["seed"]] = row
    lines = []
    for (task, steps, keep, tool, setting), held in groups.items():
        test = {seed: row["test"] for seed, row in held.items()}
        line = {
            "task": task, "steps": steps, "keep": keep, "tool": tool, "setting": setting,
            "seeds": sorted(held), "lr": next(iter(held.values()))["lr"],
            "macs": mean(r["macs"] for r in held.values()),
            "dense": mean(r["dense_test"] for r in held.values()),
            "test": mean(test.values()), "standard_error": error_of(list(test.values())),
        }  # fmt: skip
        plain = groups.get((task, steps, keep, "secateurs", "plain"))
        if plain is not None and setting != "plain":
            line["over_plain"] = paired(test, {s: r["test"] for s, r in plain.items()})
        lines.append(line)
    lines.sort(key=lambda r: (r["task"], r["steps"], -r["keep"], r["tool"], -r["test"]))
    goals: list[dict[str, Any]] = []
    for point in sorted({k[:3] for k in groups}, key=lambda k: (k[0], k[1], -k[2])):
        goals += _goals(groups, lines, *point)
    return {"lines": lines, "goals": goals, "search": _searched(rows)}


def _goals(
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]],
    lines: Sequence[dict[str, Any]],
    task: str,
    steps: int,
    keep: float,
) -> Iterator[dict[str, Any]]:
    """Recommended beside the best of the peer, and beside plain."""
    here = [r for r in lines if (r["task"], r["steps"], r["keep"]) == (task, steps, keep)]
    peers = [r for r in here if r["tool"] == "torch-pruning"]
    most = max((len(r["seeds"]) for r in peers), default=0)
    peers = [r for r in peers if len(r["seeds"]) == most]
    ours = recommended(task, steps)
    held = groups.get((task, steps, keep, "secateurs", ours))
    if held is None:
        return
    others = {"plain": ("secateurs", "plain")}
    if peers:
        best = max(peers, key=lambda r: r["test"])["setting"]
        others[f"torch-pruning's best, {best}"] = ("torch-pruning", best)
    for words, (tool, setting) in others.items():
        other = groups.get((task, steps, keep, tool, setting))
        if other is not None:
            gap = paired(
                {s: r["test"] for s, r in held.items()}, {s: r["test"] for s, r in other.items()}
            )
            yield {
                "task": task, "steps": steps, "keep": keep, "recommended": ours,
                "beside": words, **gap,
                "met": gap["difference"] is not None and gap["difference"] > 1e-9,
            }  # fmt: skip


def _searched(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean validation accuracy of every setting that was tried."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["part"] == "search" and row["steps"] in STEPS[row["task"]]:
            kind = (row["task"], row["steps"], row["keep"], row["tool"], row["setting"], row["lr"])
            found.setdefault(kind, []).append(row["validation"])
    names = ("task", "steps", "keep", "tool", "setting", "lr")
    lines = [
        dict(zip(names, kind, strict=True)) | {"validation": mean(v), "seeds": len(v)}
        for kind, v in found.items()
    ]
    return sorted(
        lines, key=lambda r: (r["task"], r["steps"], -r["keep"], r["tool"], -r["validation"])
    )


def table(found: dict[str, Any]) -> str:
    """Plain text: settings by budget, the best first, then the goals."""
    told = []
    for r in found["lines"]:
        gap = r.get("over_plain") or {}
        over = ""
        if gap.get("difference") is not None:
            over = f"| over plain {_signed(gap['difference'])} ({points(gap['standard_error'])})"
        told.append(
            f"{r['task']} {r['steps']} steps {r['keep']:<4} {r['tool']:<13} {r['setting']:<32} "
            f"n={len(r['seeds'])} "
            f"macs {r['macs']:.3f} dense {100 * r['dense']:.2f} test {100 * r['test']:.2f} "
            f"({points(r['standard_error'])}) {over}"
        )
    told += [
        f"goal {g['task']} {g['steps']} steps {g['keep']}: "
        f"{g['recommended']} beside {g['beside']}: "
        f"{_signed(g['difference'])} ({points(g['standard_error'])}): "
        + ("met" if g["met"] else "MISSED")
        for g in found["goals"]
    ]
    return "\n".join(told)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--part", choices=("search", "final"), default="final")
    parser.add_argument("--tasks", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--kept", nargs="*", type=float, choices=KEPT, default=list(KEPT))
    parser.add_argument("--steps", nargs="*", type=int, default=[], help="empty: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=None)
    parser.add_argument("--summary", action="store_true", help="only summarise what is there")
    options = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")
    if not options.summary:
        ROWS.run(
            wanted(
                options.part, options.tasks, options.tools, options.seeds, options.kept,
                options.steps,
            ),
            work,
        )  # fmt: skip
    found = summarise(ROWS.read())
    SUMMARY.write_text(json.dumps({"environment": environment(0), **found}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
