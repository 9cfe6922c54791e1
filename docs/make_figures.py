"""The figures of the documentation: one real run, and what `trace` says about small networks.

    python docs/make_figures.py            run (ten minutes on one core), then draw all
    python docs/make_figures.py --draw     draw all from the numbers of the last run
    python docs/make_figures.py --engine   draw the engine only (seconds)

ResNet-20 on Fashion-MNIST (10,000 training images) is pruned to a quarter of its MACs in four
steps. The numbers go to `docs/images/resnet20.json`, the picture to `docs/images/resnet20.svg`.
It needs the data set, see `secateurs tasks`. The engine is drawn to `docs/images/engine-*.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

import secateurs as sc

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


# -- drawings of the engine -------------------------------------------------------------------
# Colours are units as `trace` finds them, not drawn by hand: grey is left whole.

UNITS = ("#0b6bcb", "#0f9d8a", "#7c4dba", "#d99a00", "#5aa9e6", "#7fcdbb", "#bfa2e0", "#f2cc6b")


class Block(nn.Module):
    """A residual block between a first convolution and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Heads(nn.Module):
    """Eight channels viewed as two heads of four: read by attention, or by nobody."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 8) for _ in range(3))
        self.out, self.attention = nn.Linear(8, 2), attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v) if self.attention else q
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def colours(graph: Any, tensor: str, dim: int) -> list[str]:
    """The colour of each position of a tensor: that of its unit; grey where it must stay."""
    found = {}
    n = 0
    for target in graph.groups(("structured", "embedding")):
        for m in (m for m in target.members if (m.tensor, m.dim) == (tensor, dim)):
            found.update({int(i): n + int(u) for i, u in zip(m.index, m.unit, strict=True)})
        n += target.n_units
    size = graph.detail.shapes[tensor][dim]
    return [UNITS[found[i]] if i in found else GONE for i in range(size)]


def _cells(
    axes: Any, x: float, y: float, fill: list[str], *, down: bool, size: float = 1, gone: str = ""
) -> None:
    """A strip of coloured cells; (x, y) is its upper left corner. Those that go are hatched."""
    for i, colour in enumerate(fill):
        at = (x, y - size * (i + 1)) if down else (x + size * i, y - size)
        axes.add_patch(Rectangle(at, size, size, facecolor=colour, edgecolor="white", lw=1.5))
        if colour == gone:
            style: Any = {"edgecolor": CUT, "hatch": "////", "facecolor": "white", "lw": 0.8}
            axes.add_patch(Rectangle((at[0] + size * 0.12, at[1]), size * 0.76, size, **style))


def _matrix(axes: Any, x: float, top: float, rows: list[str], columns: list[str]) -> None:
    """A weight: its rows' units at the left, its columns' above, both crossing in the cells."""
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = (x + 0.6 * j, top - 0.6 * (i + 1))
            gone = UNITS[1] in (row, column)
            axes.add_patch(Rectangle(at, 0.6, 0.6, facecolor="white" if gone else "#eef1f4",
                                     edgecolor=CUT if gone else MUTED, lw=0.8,
                                     hatch="////" if gone else None))  # fmt: skip
    _cells(axes, x - 0.7, top, rows, down=True, size=0.6)
    _cells(axes, x, top + 0.7, columns, down=False, size=0.6)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], bend: str = "") -> None:
    style = {"connectionstyle": bend} if bend else {}
    arrow = {"arrowstyle": "-|>", "color": MUTED, "lw": 1.2, "shrinkA": 0, "shrinkB": 0, **style}
    axes.annotate("", end, start, arrowprops=arrow)


def _canvas(width: float, height: float, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, width)
    axes.set_ylim(-0.4, height - 0.4)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def draw_labels() -> Figure:
    """How labels flow through a residual block, and what one unit consists of."""
    graph = sc.trace(Block(), torch.randn(2, 3, 6, 6))
    [family] = graph.groups()
    figure, axes = _canvas(30.2, 9.0, (9.6, 2.95))
    mid = 4.0

    def text(x: float, y: float, words: str, **style: Any) -> None:
        style = {"ha": "center", "va": "center", "fontsize": 9, "color": INK, **style}
        axes.text(x, y, words, **style)

    def weight(name: str, x: float) -> None:
        rows, columns = (colours(graph, f"{name}.weight", d) for d in (0, 1))
        _matrix(axes, x, mid + 0.3 * len(rows), rows, columns)
        text(x + 0.3 * len(columns), 1.6, name)

    def vector(name: str, x: float) -> None:
        for i, part in enumerate(("weight", "bias")):
            fill = colours(graph, f"{name}.{part}", 0)
            _cells(axes, x + 0.75 * i, mid + 1.2, fill, down=True, size=0.6, gone=UNITS[1])
        text(x + 0.68, 1.6, name)

    def value(x: float, fill: list[str], words: str) -> None:
        _cells(axes, x, mid + 1.6, fill, down=True, size=0.8)
        text(x + 0.4, 6.15, words, fontsize=8, color=MUTED)

    rows = colours(graph, "conv1.weight", 0)
    text(0.5, mid, "x")
    _arrow(axes, (0.9, mid), (1.8, mid))
    weight("conv1", 2.9)
    _arrow(axes, (4.9, mid), (5.7, mid))
    vector("bn1", 6.0)
    _arrow(axes, (7.7, mid), (9.1, mid))
    text(8.4, mid + 0.5, "relu", fontsize=8, color=MUTED)
    value(9.3, rows, "labels")
    _arrow(axes, (10.3, mid), (11.4, mid))
    weight("conv2", 12.4)
    _arrow(axes, (15.0, mid), (15.8, mid))
    vector("bn2", 16.1)
    _arrow(axes, (17.8, mid), (18.7, mid))
    text(19.2, mid, "+", fontsize=13)
    axes.add_patch(Circle((19.2, mid), 0.5, fill=False, edgecolor=MUTED))
    axes.plot([9.7, 9.7, 19.2], [6.5, 7.6, 7.6], color=MUTED, lw=1.2)
    _arrow(axes, (19.2, 7.6), (19.2, mid + 0.55))
    words = "the skip carries the labels of conv1: the addition ties them to those of conv2"
    text(14.4, 8.1, words, fontsize=8.5, color=MUTED)
    _arrow(axes, (19.7, mid), (21.1, mid))
    text(20.4, mid + 0.5, "relu", fontsize=8, color=MUTED)
    value(21.3, rows, "labels")
    _arrow(axes, (22.3, mid), (24.0, mid))
    text(23.15, mid + 0.5, "mean", fontsize=8, color=MUTED)
    weight("head", 25.0)
    _arrow(axes, (27.6, mid), (28.4, mid))
    _cells(axes, 28.6, mid + 1.2, colours(graph, "head.weight", 0), down=True, size=0.8)
    text(29.0, 5.7, "output", fontsize=8, color=MUTED)
    places, tensors = len(family.members), len({m.tensor for m in family.members})
    words = (
        f"{family.n_units} units, one colour each; grey stays. Hatched: what goes with the green "
        f"unit. It lives in {places} places in {tensors} tensors\n(biases of the convolutions and "
        "running statistics are not drawn)."
    )
    text(0.3, 0.35, words, ha="left", fontsize=9)
    return figure


def draw_joint() -> Figure:
    """What becomes of channels viewed as heads x head size: the reader decides."""
    x = torch.randn(2, 3, 5)
    fills = [
        colours(sc.trace(Heads(True), x), "q.weight", 0),
        colours(sc.trace(Heads(True), x, heads="head_dim"), "q.weight", 0),
        colours(sc.trace(Heads(False), x), "q.weight", 0),
    ]
    words = [
        ("attention sums over the\nhead size: heads stay apart", "2 units, kind head"),
        ('the same, if asked for\nheads="head_dim"', "4 units, kind head_dim"),
        ("nobody asks: a rectangle\nmust be left, so the longer\nside stays apart", "4 units"),
    ]
    figure, axes = _canvas(30, 10.6, (9.2, 3.3))

    def grid(left: float, top: float, fill: list[str]) -> None:
        for row in range(2):
            _cells(axes, left, top - row, fill[4 * row : 4 * row + 4], down=False)
            for i in range(4):
                axes.text(left + i + 0.5, top - row - 0.5, str(4 * row + i), ha="center",
                          va="center", fontsize=8, color="white")  # fmt: skip

    plain = {"ha": "center", "va": "center", "fontsize": 9, "color": INK}
    _cells(axes, 0.6, 8.9, [MUTED] * 8, down=True, size=0.95)
    for i in range(8):
        axes.text(1.07, 8.43 - 0.95 * i, str(i), **{**plain, "color": "white", "fontsize": 8})
    axes.text(1.07, 9.6, "rows of q", **plain)
    _arrow(axes, (2.0, 5.1), (5.3, 5.1))
    axes.text(3.6, 5.6, "view", **{**plain, "color": MUTED, "fontsize": 8})
    grid(5.7, 6.1, [MUTED] * 8)
    axes.text(7.7, 7.2, "one joint factor:\n2 heads x 4, nothing tied yet", **plain)
    axes.text(7.7, 3.4, "transpose, permute, unbind:\nthe block only moves", **{
        **plain, "color": MUTED, "fontsize": 8})  # fmt: skip
    for n, (fill, (why, result)) in enumerate(zip(fills, words, strict=True)):
        top = 9.9 - 3.5 * n
        _arrow(axes, (10.3, 5.1), (13.0, top - 1.0), "arc3,rad=0")
        grid(13.4, top, fill)
        axes.text(18.2, top - 1.0, why, **{**plain, "ha": "left"})
        axes.text(26.0, top - 1.0, result, **{**plain, "ha": "left", "fontweight": "bold"})
    return figure


def draw_norm() -> Figure:
    """A layer norm over what is left, with and without the dense count."""
    masked = torch.tensor([2.1, 0.0, 1.2, 0.0, 3.0, 1.6, 0.0, 2.4])
    stays = masked != 0
    left = masked[stays]
    cases = [
        ("masked: 8 features, 3 of them zero", masked, layer_norm(masked, [8]), 8),
        ("cut, plain norm: counts 5", left, layer_norm(left, [5]), 5),
        ("cut, padded norm: counts 8", left,
         torch.ops.secateurs.padded_layer_norm(left, [5], None, None, 1e-5, 8), 8),
    ]  # fmt: skip
    figure = Figure(figsize=(9.2, 3.6), layout="constrained", facecolor="white")
    grid = figure.subplots(2, 3, sharey="row")
    for column, (title, x, out, count) in enumerate(cases):
        present = torch.arange(8) if len(x) == 8 else torch.arange(8)[stays]
        mean = float(x.sum() / count)
        spread = float(((x.square().sum() / count) - mean**2) ** 0.5)
        above, below = grid[0, column], grid[1, column]
        above.axhspan(mean - spread, mean + spread, color=KEPT, alpha=0.13, lw=0)
        above.axhline(mean, color=KEPT, lw=1.2)
        above.bar(present, x, color=MUTED, width=0.7)
        above.set_title(title, loc="left", fontsize=10)
        above.set_xlabel(f"mean {mean:.2f}, deviation {spread:.2f}", fontsize=9)
        same = torch.allclose(out, layer_norm(masked, [8])[present], atol=1e-6)
        below.bar(present, out, color=KEPT if same else CUT, width=0.7)
        if len(x) == 8:
            below.bar(present[~stays], out[~stays], color=GONE, width=0.7)
        below.axhline(0, color=MUTED, lw=0.8)
        note = "" if len(x) == 8 else "equal to the masked norm" if same else "another function"
        below.set_xlabel(note or "grey: scale and shift are zero there", fontsize=9)
        for axes in (above, below):
            axes.set_xlim(-0.6, 7.6)
            axes.set_xticks([])
    grid[0, 0].set_ylabel("in")
    grid[1, 0].set_ylabel("out")
    return figure


DRAWINGS = {"labels": draw_labels, "joint": draw_joint, "norm": draw_norm}


def main() -> None:
    """Run unless told to draw only; write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="use the numbers of the last run")
    parser.add_argument("--engine", action="store_true", help="draw the engine only")
    asked = parser.parse_args()
    with rc_context(STYLE):
        for name, drawing in DRAWINGS.items():
            drawing().savefig(IMAGES / f"engine-{name}.png", dpi=160, metadata={"Software": None})
    if asked.engine:
        return
    numbers = IMAGES / "resnet20.json"
    if asked.draw:
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
