"""Write `docs/results-criteria.md`, its figures and the figures that every criterion shows.

    python -m benchmarks.criteria_page

From the files of `oracle.py`, `criteria_cost.py` and `criteria_quality.py` in `benchmarks/results`;
what is not measured is not on the page. `src/secateurs/criteria/measured.json` holds for each
criterion its cost on two networks and its agreement with exact removal on each task.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import criteria_cost, criteria_quality, oracle
from secateurs.criteria import CRITERIA

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent
PAGE = ROOT / "docs" / "results-criteria.md"
IMAGES = ROOT / "docs" / "images"
MEASURED = ROOT / "src" / "secateurs" / "criteria" / "measured.json"
INK, MUTED, GREY = "#1f2933", "#61707d", "#b3bac2"
COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7c3aed", "#b45309", "#0e7490", "#be185d")
STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "secateurs",
}  # fmt: skip
TITLES = {"structured": "share of the MACs that remains", "weight": "share of the weights"}

HEAD = """# Criteria, measured

Written by `python -m benchmarks.criteria_page` from the files in `benchmarks/results`; what is not
measured is not here. Three questions: does the score know what removal does, what does it cost, and
does it help after fine-tuning? What each criterion is: [all criteria](criteria/index.md).
"""


def main() -> None:
    """Write the page, the figures and `measured.json`."""
    parts = [HEAD, _oracle(), _cost(), _quality(), _machine()]
    PAGE.write_text("\n".join(p for p in parts if p).rstrip() + "\n", encoding="utf-8")
    MEASURED.write_text(json.dumps(measured(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found if found and found["rows"] else None


# -- oracle ---------------------------------------------------------------------------------------


def _oracle() -> str:
    data = _read("oracle")
    if data is None:
        return ""
    rows = data["rows"]
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    _draw_oracle(rows, tasks)
    seeds = ", ".join(str(s) for s in sorted({s for r in rows for s in r["seeds"]}))
    costs = oracle.large_costs()
    lines = [
        f"""## Does the score know what removal does?

Every structural unit is removed exactly, one at a time, and the change of the loss on the
calibration samples is compared with its score: Spearman rank correlation of the sizes of both (a
score that predicts a signed change is taken by its size),
all units of the network together, mean ± standard deviation over seeds {seeds}, no fine-tuning
(`benchmarks/oracle.py`). `finite_difference` with step 1 is the oracle itself.
""",
        _headline(rows, costs),
        "\n![Rank correlation of the criteria with exact removal](images/criteria-oracle.png)\n",
        oracle.table(rows),
        "\nThe best of those that cost at most two passes, as measured below:\n",
    ]
    for task in tasks:
        best = oracle.best(rows, task, costs)[:5]
        told = ", ".join(f"{r['criterion']} {r['agreement']:.2f}" for r in best)
        lines.append(f"- {task}: {told}")
    return "\n".join([*lines, "", _signed(rows, tasks), ""])


def _headline(rows: list[dict[str, Any]], costs: dict[str, float]) -> str:
    task, goal = oracle.GOAL
    found = [r for r in oracle.best(rows, task, costs) if r["criterion"] in CRITERIA]
    if not found:
        return ""
    best = found[0]
    size = best["agreement"]
    word = "met" if size >= goal else "**MISSED**"
    passes = best["passes"]
    told = "" if passes is None else f", {passes:.2f} forward + backward passes"
    return (
        f"The best criterion that costs at most two forward and backward passes on {task} is "
        f"`{best['criterion']}`{told}: {size:.3f} ± {best['agreement_sd'] or 0:.3f} over "
        f"{len(best['seeds'])} seeds (target {goal}: {word})."
    )


def _signed(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    """Criteria with signed scores: what the sign is worth."""
    held = [r for r in rows if r["signed"] is not None]
    if not held:
        return ""
    cell = {(r["task"], r["criterion"]): r for r in held}
    lines = [
        "Signed scores say below zero that removal lowers the loss. Score with change / |score| "
        "with |change|:",
        "",
        "| criterion | " + " | ".join(tasks) + " |",
        "|---" * (len(tasks) + 1) + "|",
    ]
    for label in dict.fromkeys(r["criterion"] for r in held):
        found = [cell.get((t, label)) for t in tasks]
        cells = [f"{r['signed']:+.2f} / {r['sizes']:+.2f}" if r else "" for r in found]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw_oracle(rows: list[dict[str, Any]], tasks: list[str]) -> None:
    """One column of dots for each task, criteria sorted by their mean."""
    cell = {(r["task"], r["criterion"]): r for r in rows if r["agreement"] is not None}
    names = [c for c in CRITERIA if sum((t, c) in cell for t in tasks) >= max(1, len(tasks) - 1)]
    names.sort(key=lambda c: mean(cell[t, c]["agreement"] for t in tasks if (t, c) in cell))
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 1.75 * len(tasks), 0.19 * len(names) + 0.9), dpi=110,
                        layout="constrained")  # fmt: skip
        axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for ax, task in zip(axes, tasks, strict=True):
            for y, name in enumerate(names):
                r = cell.get((task, name))
                if r is None:
                    continue
                cheap = r["cost"] in ("free", "forward", "backward")
                colour = GREY if name == "random" else COLOURS[0] if cheap else COLOURS[1]
                ax.errorbar(r["agreement"], y, xerr=r["agreement_sd"] or 0, fmt="o", ms=3.5,
                            color=colour, elinewidth=1)  # fmt: skip
            ax.axvline(0, color=GREY, lw=0.8, zorder=0)
            ax.set_title(task, fontsize=9)
            ax.set_xlim(-0.5, 1.05)
            ax.grid(axis="x", color=GREY, alpha=0.35, lw=0.5)
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(-0.7, len(names) - 0.3)
        figure.supxlabel(
            "Spearman with |exact loss change|. Blue: forward and backward passes or less;\n"
            "orange: second order, training or a run for every unit", fontsize=8,
        )  # fmt: skip
        figure.savefig(IMAGES / "criteria-oracle.png", metadata={"Software": None})


# -- cost -----------------------------------------------------------------------------------------


def _cost() -> str:
    data = _read("criteria_cost")
    if data is None:
        return ""
    rows = data["rows"]
    missed = [
        f"{r['candidate']} on {r['case']}: {r['multiple']:.2f} instead of {r['target']:.2f}"
        for r in rows
        if r["target"] is not None and r["multiple"] is not None and r["multiple"] > r["target"]
    ]
    steps = {r["case"]: r["step_seconds"] for r in rows if r["step_seconds"]}
    told = ", ".join(f"{case} {seconds:.2f} CPU s" for case, seconds in steps.items())
    training = {r["case"]: r["training_bytes"] for r in rows if r["training_bytes"]}
    memory = ", ".join(f"{case} {b / 1e6:,.0f} MB" for case, b in training.items())
    lines = [
        f"""## What does it cost?

Multiples of one forward and backward pass with all weight gradients, of the same batch in the same
process, one thread, fp32, eval mode (`benchmarks/criteria_cost.py`). ResNet-50-like: 25.6 million
parameters, 8 images of 160 x 160; BERT-base-like: 110 million parameters, 8 texts of 128 tokens.
Median and quartiles over all counted batches. The unit: {told}. "Set-up" is everything that a call
does once (checks, probes, first sums, finishing; not `trace`), in the same unit: it is paid once,
however many batches follow. Memory: the peak above the loaded model; the training step itself, its
gradients included: {memory or "not measured"}.
""",
        criteria_cost.table(criteria_cost.read_rows()),
        "",
        f"Missed targets: {'; '.join(missed)}." if missed else "All targets are met.",
        "",
        _every(rows),
    ]
    return "\n".join(lines)


def _every(rows: list[dict[str, Any]]) -> str:
    """Each criterion by itself."""
    held = [r for r in rows if not r["named"]]
    if not held:
        return ""
    cell = {(r["case"], r["candidate"]): r for r in held}
    cases = list(dict.fromkeys(r["case"] for r in held))
    lines = [
        "Each criterion by itself, with its defaults, on structural units (on weights or layers "
        'where it has no units); one repetition. A criterion of class "per unit" is measured on '
        "one family of units, and the figure is that of one unit.",
        "",
        "| criterion | class | " + " | ".join(cases) + " | set-up |",
        "|---|---|" + "---:|" * (len(cases) + 1),
    ]
    for name in [c for c in CRITERIA if any((k, c) in cell for k in cases)]:
        found = [cell.get((k, name)) for k in cases]
        cells = []
        for r in found:
            if r is None or r["multiple"] is None:
                cells.append("" if r is None else "not scored")
            else:
                cells.append(f"{r['multiple']:.2f}{' a unit' if r['per_unit'] else ''}")
        once = " / ".join(f"{r['setup']:.2f}" for r in found if r and r["setup"] is not None)
        lines.append(f"| {name} | {CRITERIA[name].cost} | " + " | ".join(cells) + f" | {once} |")
    return "\n".join([*lines, ""])


# -- quality --------------------------------------------------------------------------------------


def _quality() -> str:
    data = _read("criteria_quality")
    if data is None:
        return ""
    rows = data["rows"]
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    seeds = sorted({len(r["seeds"]) for r in rows})
    parts = [
        f"""## Does it help after fine-tuning?

The same cut, the same fine-tuning, the same dense networks: only the scores differ
(`benchmarks/criteria_quality.py` says how). Seeds per row: {", ".join(map(str, seeds))}; ± is the
standard error over seeds. Verdicts are about the difference paired by seed: "better" and "worse"
are more than two of its standard errors. With three seeds chance alone exceeds that in 18 % of the
cases that are level in truth: a single verdict is a hint, a row of them is evidence.
""",
        _verdicts(rows),
    ]
    for task in tasks:
        held = [r for r in rows if r["task"] == task]
        _draw_quality(held, task)
        parts.append(f"### {task}\n\n![{task}: quality by criterion](images/criteria-{task}.png)\n")
        parts += [_quality_table([r for r in held if r["level"] == k]) for k in TITLES]
    return "\n".join(parts)


def _verdicts(rows: list[dict[str, Any]]) -> str:
    """How often each criterion is better, level or worse than random and magnitude."""
    lines = []
    for level in TITLES:
        held = [r for r in rows if r["level"] == level]
        if not held:
            continue
        n = len({(r["task"], r["keep"]) for r in held})
        title = "Units" if level == "structured" else "Single weights"
        lines += [
            f"{title}: better / level / worse, of up to {n} pairs of task and budget.",
            "",
            "| criterion | against random | against magnitude |",
            "|---|---|---|",
        ]
        names = dict.fromkeys(r["criterion"] for r in held)
        counted = {name: _counts([r for r in held if r["criterion"] == name]) for name in names}
        for name in sorted(names, key=lambda c: _net(counted[c]["random"]), reverse=True):
            cells = [
                "" if name == ref else " / ".join(
                    str(counted[name][ref][w]) for w in ("better", "level", "worse")
                )
                for ref in criteria_quality.REFERENCES
            ]  # fmt: skip
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", _words(held), ""]
    return "\n".join(lines)


def _counts(rows: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    return {
        ref: Counter(criteria_quality.verdict(r, ref) for r in rows)
        for ref in criteria_quality.REFERENCES
    }


def _net(counts: Counter[str]) -> float:
    known = sum(counts[w] for w in ("better", "level", "worse"))
    return (counts["better"] - counts["worse"]) / known if known else -2.0


def _words(rows: list[dict[str, Any]]) -> str:
    """Which criteria differ from magnitude, where."""
    told = []
    for word in ("better", "worse"):
        by: dict[str, list[str]] = {}
        for r in rows:
            control = r["control"] or r["criterion"] == "magnitude"
            if not control and criteria_quality.verdict(r, "magnitude") == word:
                by.setdefault(r["criterion"], []).append(f"{r['task']} at {100 * r['keep']:g} %")
        listed = "; ".join(f"{name} ({', '.join(places)})" for name, places in by.items())
        told.append(f"- {word} than magnitude: {listed or 'none'}")
    return "\n".join(told)


def _quality_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    keeps = sorted({r["keep"] for r in rows}, reverse=True)
    cell = {(r["criterion"], r["keep"]): r for r in rows}
    dense = mean(r["dense"] for r in rows)
    first = rows[0]
    lines = [
        f"{first['metric']} in %, {TITLES[first['level']]}; dense {100 * dense:.2f}. "
        "`+` or `-`: better or worse than random.",
        "",
        "| criterion | " + " | ".join(f"{100 * k:g} %" for k in keeps) + " |",
        "|---" * (len(keeps) + 1) + "|",
    ]
    names = dict.fromkeys(r["criterion"] for r in rows)
    mark = {"better": " `+`", "worse": " `-`"}
    for name in sorted(names, key=lambda c: -_mean_of(cell, c, keeps)):
        cells = []
        for k in keeps:
            r = cell.get((name, k))
            error = f" ± {100 * r['se']:.2f}" if r and r["se"] is not None else ""
            sign = mark.get(criteria_quality.verdict(r, "random"), "") if r else ""
            cells.append(f"{100 * r['pruned']:.2f}{error}{sign}" if r else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _mean_of(cell: dict[tuple[str, float], Any], name: str, keeps: list[float]) -> float:
    held = [cell[name, k]["pruned"] for k in keeps if (name, k) in cell]
    return mean(held) if held else 0.0


def _draw_quality(rows: list[dict[str, Any]], task: str) -> None:
    """One panel for units, one for weights: criteria as lines, controls grey."""
    levels = [k for k in TITLES if any(r["level"] == k for r in rows)]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(levels), 3.6), dpi=110, layout="constrained")
        axes = figure.subplots(1, len(levels), squeeze=False)[0]
        for ax, level in zip(axes, levels, strict=True):
            held = [r for r in rows if r["level"] == level]
            keeps = sorted({r["keep"] for r in held}, reverse=True)
            names = [c for c in criteria_quality.names_for(level)
                     if any(r["criterion"] == c for r in held)]  # fmt: skip
            for i, name in enumerate(names):
                mine = {r["keep"]: r for r in held if r["criterion"] == name}
                xs = [keeps.index(k) + (i - len(names) / 2) * 0.02 for k in keeps if k in mine]
                ys = [100 * mine[k]["pruned"] for k in keeps if k in mine]
                errors = [100 * (mine[k]["se"] or 0) for k in keeps if k in mine]
                control = name in criteria_quality.CONTROLS
                colour = GREY if control else COLOURS[i % len(COLOURS)]
                dash = ["-", "--", ":"][
                    criteria_quality.CONTROLS.index(name) if control else i // len(COLOURS)
                ]
                ax.errorbar(xs, ys, yerr=errors, color=colour, ls=dash, lw=1.2, marker="o", ms=2.5,
                            elinewidth=0.8, label=name, zorder=1 if control else 2)  # fmt: skip
            ax.axhline(100 * mean(r["dense"] for r in held), color=INK, lw=0.8, ls=":")
            ax.set_xticks(range(len(keeps)), [f"{100 * k:g} %" for k in keeps])
            ax.set_xlabel(TITLES[level])
            ax.set_ylabel(f"{held[0]['metric']}, %")
            ax.grid(axis="y", color=GREY, alpha=0.35, lw=0.5)
            ax.legend(fontsize=6.5, frameon=False, ncols=1, loc="center left",
                      bbox_to_anchor=(1.0, 0.5))  # fmt: skip
        figure.suptitle(f"{task} (dotted: dense)", fontsize=10)
        figure.savefig(IMAGES / f"criteria-{task}.png", metadata={"Software": None})


# -- what every criterion shows -------------------------------------------------------------------


def measured() -> dict[str, dict[str, dict[str, float]]]:
    """Criterion -> {"cost": {network: multiple}, "oracle": {task: rank correlation}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for r in (_read("criteria_cost") or {"rows": []})["rows"]:
        if not r["named"] and r["multiple"] is not None and r["candidate"] in CRITERIA:
            cost = found.setdefault(r["candidate"], {}).setdefault("cost", {})
            cost[r["case"]] = round(r["multiple"], 2)
    for r in (_read("oracle") or {"rows": []})["rows"]:
        if r["agreement"] is not None and r["criterion"] in CRITERIA:
            agreement = found.setdefault(r["criterion"], {}).setdefault("oracle", {})
            agreement[r["task"]] = round(r["agreement"], 2)
    return found


def _machine() -> str:
    for name in ("criteria_cost", "oracle", "criteria_quality"):
        data = _read(name)
        if data is not None:
            env = data["environment"]
            listed = ", ".join(f"{k} {v}" for k, v in env.items() if k not in ("seed", "threads"))
            return f"## Machine\n\n{listed}. One thread for each process.\n"
    return ""


if __name__ == "__main__":
    main()
