"""The figures of the documentation, drawn from one real run.

    python docs/make_figures.py            run (ten minutes on one core), then draw
    python docs/make_figures.py --draw     draw again from the numbers of the last run

ResNet-20 on Fashion-MNIST (10,000 training images) is pruned to a quarter of its MACs in four
steps. The numbers go to `docs/images/resnet20.json`, the picture to `docs/images/resnet20.svg`.
It needs the data set, see `secateurs tasks`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

IMAGES = Path(__file__).resolve().parent / "images"
RECIPE: dict[str, Any] = {
    "task": "fashion-resnet20",
    "criterion": "taylor",
    "granularity": "channel",
    "budget": {"macs": 0.25},
    "allocation": "global_normalized",
    "schedule": {"curve": "cubic", "steps": 4},
    "finetune": {"epochs": 2, "lr": 0.002, "lr_schedule": "cosine", "distill": 0.5},
    "latency": [1, 64],
    "seed": 0,
}
INK, MUTED, KEPT, GONE, CUT = "#1f2933", "#61707d", "#0b6bcb", "#d5dbe1", "#c2410c"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateurs",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def run() -> dict[str, Any]:
    """Prune by `RECIPE`; the report as plain data."""
    from secateurs.recipe import parse_recipe
    from secateurs.runner import load_problem, run_recipe

    recipe = parse_recipe(RECIPE, "figure")
    return run_recipe(recipe, load_problem(recipe)).report.to_dict()


def draw(report: dict[str, Any]) -> Figure:
    """Kept channels of each layer beside validation accuracy along the schedule."""
    figure = Figure(figsize=(9.2, 4.0), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    rows = report["targets"]
    for y, row in enumerate(rows):
        left.barh(y, row["n_units"], height=0.72, color=GONE)
        left.barh(y, row["n_kept"], height=0.72, color=KEPT)
        left.text(row["n_units"] + 0.8, y, f"{row['n_kept']} of {row['n_units']}", va="center",
                  fontsize=9, color=MUTED)  # fmt: skip
    left.set_yticks(range(len(rows)), [row["name"].rpartition(":")[0] for row in rows])
    left.invert_yaxis()
    left.set_xlim(0, 78)
    left.set_xlabel("channels: kept (blue) of all (grey)")
    left.set_title("What stayed, family by family", loc="left", fontsize=11)
    _schedule(right, report)
    return figure


def _schedule(axes: Any, report: dict[str, Any]) -> None:
    steps = report["steps"]
    left = [100.0, *(100 * s["remaining"]["macs"] for s in steps)]
    healed = [100 * report["metric_dense"], *(100 * s["metric_healed"] for s in steps)]
    masked = [100 * s["metric_masked"] for s in steps]
    axes.plot(left, healed, "-o", color=KEPT, label="after fine-tuning")
    axes.plot(left[1:], masked, "s", color=CUT, mfc="white", label="right after the cut")
    axes.axhline(healed[0], color=MUTED, lw=1, ls="--")
    axes.annotate("dense", (100, healed[0]), xytext=(0, 5), textcoords="offset points",
                  fontsize=9, color=MUTED)  # fmt: skip
    axes.invert_xaxis()
    axes.set_xlabel("MACs that remain, % (pruning goes to the right)")
    axes.set_ylabel("validation accuracy, %")
    axes.set_title("Accuracy along the schedule", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="center left")


def main() -> None:
    """Run unless told to draw only; write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="use the numbers of the last run")
    numbers = IMAGES / "resnet20.json"
    if parser.parse_args().draw:
        report = json.loads(numbers.read_text(encoding="utf-8"))
    else:
        full = run()
        wanted = ("targets", "steps", "rows", "verification", "metric_dense", "recipe", "version")
        report = {key: full[key] for key in wanted}
        report["targets"] = [
            {key: row[key] for key in ("name", "n_units", "n_kept")} for row in full["targets"]
        ]
        numbers.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with rc_context(STYLE):
        figure = draw(report)
        metadata = {"Date": None, "Creator": None}
        figure.savefig(IMAGES / "resnet20.svg", metadata=metadata)


if __name__ == "__main__":
    main()
