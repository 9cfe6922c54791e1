"""Write `docs/results-how-much.md` and its figures, and the table of the search for `results.md`.

    python -m benchmarks.how_much_page

From the files of `search_promise.py`, `auto.py`, `allocation_quality.py`, `multi_scale.py`,
`latency_budgets.py` and `selection.py` in `benchmarks/results`; what is not measured is not on the
page.
"""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.drawing import BLUE, GREY, INK, MUTED, RED, ROOT, STYLE, read, save, table, wrapped

PAGE = ROOT / "docs" / "results-how-much.md"
DEFAULT_RULE = "bound (the default)"

HEAD = """# How much to cut, measured

Written by `python -m benchmarks.how_much_page` from the files in `benchmarks/results`; what is not
measured is not here. What to choose, in words and with a decision tree: [how much, and
where](guide/how-much.md).
"""


def main() -> None:
    """Write the page and its figures."""
    parts = [HEAD, promise(), _auto(), _allocation(), _scales(), _latency(), _selection()]
    _draw_tree()
    text = "\n\n".join(part.strip() for part in parts if part)
    PAGE.write_text(wrapped(text) + "\n", encoding="utf-8")


# -- the decision tree ----------------------------------------------------------------------------

TREE = (
    ("a size: memory, file, compute", "Budget(params=, bytes=, macs=)", "exact, one run"),
    ("a time", "Budget(latency_ms=)", "measured on this machine, one run"),
    ("a quality, roughly", "Budget(metric_drop=)", "steps down, one number decides"),
    ("a quality, promised", "secateurs search", "folds, a bound, a confidence"),
    ("nothing", 'budget="auto"', "1 % on validation, and a margin"),
    ("what scores mean", "Threshold(rule)", "size follows; look at preview"),
)


def _draw_tree() -> None:
    """From what one knows to what one writes."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.8, 2.9), dpi=110, layout="constrained")
        ax = figure.subplots()
        ax.set_axis_off()
        ax.set_xlim(0, 10.4)
        ax.set_ylim(-0.6, len(TREE) - 0.4)
        middle = (len(TREE) - 1) / 2
        box: dict[str, Any] = {"boxstyle": "round,pad=0.45", "facecolor": "white", "lw": 1}
        ax.text(0.9, middle, "What do\nyou know?", ha="center", va="center", fontsize=10,
                bbox={**box, "edgecolor": INK})  # fmt: skip
        for i, (known, write, means) in enumerate(reversed(TREE)):
            ax.plot([1.75, 2.35], [middle, i], color=GREY, lw=1, zorder=0)
            ax.text(2.4, i, known, va="center")
            ax.plot([5.0, 5.35], [i, i], color=GREY, lw=1, zorder=0)
            ax.text(5.5, i, write, va="center", family="monospace", fontsize=7.5,
                    bbox={**box, "edgecolor": BLUE})  # fmt: skip
            ax.text(10.4, i, means, va="center", ha="right", color=MUTED, fontsize=7.5)
        save(figure, "how-much-tree")


# -- the promise of a search ----------------------------------------------------------------------


def promise() -> str:
    """The section on cross-validation, for this page and for `results.md`."""
    data = read("search_promise.json")
    if data is None:
        return ""
    rows = data["rows"]
    _draw_promise(rows)
    confidence = rows[0]["confidence"]
    cells = [
        [
            r["task"] if r["rule"] == DEFAULT_RULE else "",
            f"{r['metric']}, {r['max_drop']:g}" if r["rule"] == DEFAULT_RULE else "",
            r["rule"],
            f"{r['kept']} of {r['promised']}",
            f"{r['share']:.2f} [{r['interval_95'][0]:.2f}, {r['interval_95'][1]:.2f}]",
            f"{r['mean_remaining_macs']:.2f}",
            f"{100 * r['worst_test_drop']:.1f}",
        ]
        for r in rows
    ]
    head = ("task", "metric, limit", "rule", "kept", "share [95 %]", "MACs left", "worst drop")
    counts = ", ".join(f"{r['outer']} on {r['task']}" for r in rows if r["rule"] == DEFAULT_RULE)
    return f"""## Does a search keep its promise?

`secateurs search` promises that the chosen network loses at most `max_drop`, with a confidence of
{confidence:g}. Each outer resample divides all data anew, half of it as test part, trains a dense
network, searches on the other half only (stratified folds), prunes, and looks at the test part:
{counts}. "Kept": of the resamples in which something was chosen, how many stayed within the
limit on the test part; the interval is the exact binomial one (Clopper-Pearson). The resamples
share one data set, so it is nominal. Beside the default: what the same folds give without the bound
for one more network, or without any (`benchmarks/search_promise.py`).

![Share of resamples within the promised limit](images/how-much-promise.png)

{table(head, cells)}"""


def _draw_promise(rows: list[dict[str, Any]]) -> None:
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    rules = list(dict.fromkeys(r["rule"] for r in rows))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.62 * len(tasks)), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for i, task in enumerate(tasks):
            for j, rule in enumerate(rules):
                found = [r for r in rows if (r["task"], r["rule"]) == (task, rule)]
                if not found:
                    continue
                r, y = found[0], -i - 0.18 * (j - 1.5)
                colour = BLUE if rule == DEFAULT_RULE else (GREY, MUTED, RED)[(j - 1) % 3]
                low, high = r["interval_95"]
                left.plot([low, high], [y, y], color=colour, lw=1.2)
                left.plot(r["share"], y, "o", ms=4, color=colour, label=rule if i == 0 else None)
                right.plot(r["mean_remaining_macs"], y, "o", ms=4, color=colour)
        left.axvline(rows[0]["confidence"], color=INK, lw=0.8, ls="--")
        left.set_yticks([-i for i in range(len(tasks))], tasks)
        left.set_xlim(0, 1.02)
        left.set_xlabel("share within the limit on test data (dashed: promised)")
        right.set_xlim(0, 1.02)
        right.set_xlabel("MACs left, mean")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        save(figure, "how-much-promise")


# -- auto -----------------------------------------------------------------------------------------


def _auto() -> str:
    data = read("auto.json")
    if data is None:
        return ""
    order = list(dict.fromkeys(r["task"] for r in data["rows"]))
    rows = sorted(data["rows"], key=lambda r: (order.index(r["task"]), r["method"]))
    names = {"auto": '`"auto"`', "metric_drop": "`metric_drop`"}
    cells = [
        [
            r["task"] if r["method"] == "auto" else "", names[r["method"]],
            f"{r['macs']:.3f}", f"{100 * r['test_dense']:.1f}", f"{100 * r['test_drop']:+.2f}",
            f"{100 * r['worst_drop']:+.2f}", f"{r['kept']} of {r['runs'] - r['refused']}"
            + (f", {r['refused']} refused" if r["refused"] else ""),
        ]
        for r in rows
    ]  # fmt: skip
    total = {
        m: (
            sum(r["kept"] for r in rows if r["method"] == m),
            sum(r["runs"] - r["refused"] for r in rows if r["method"] == m),
        )
        for m in names
    }
    head = ("task", "budget", "MACs left", "dense, test", "lost", "worst", "within 1 %")
    return f"""## How good is `budget="auto"`?

"auto" goes down until validation has lost more than 1 % and back to the smallest good network of
at least twice that size; `Budget(metric_drop=)` with the same limit takes the smallest that passes.
Points on **test** data, mean and worst over seeds, which neither has seen. Within 1 % there: "auto"
{total["auto"][0]} of {total["auto"][1]} runs, the smallest that passes {total["metric_drop"][0]} of
{total["metric_drop"][1]}. "Refused": even the first step lost too much on validation, which is an
error that says so. It is a default, not a promise: `secateurs search` makes one
(`benchmarks/auto.py`).

{table(head, cells)}"""


# -- allocation -----------------------------------------------------------------------------------


def _allocation() -> str:
    data = read("allocation_quality.json")
    if data is None:
        return ""
    rows = data["rows"]
    _draw_allocation(rows)
    parts = [
        """## Which allocation loses least?

The same scores (taylor, channels), the same MACs, one shot, the same short fine-tuning: only the
counts differ (`benchmarks/allocation_quality.py`). Test accuracy in % after healing, mean over
seeds; in brackets the difference from `uniform`, paired by seed, ± its standard error.

![Test accuracy after healing, by allocation method](images/how-much-allocation.png)
"""
    ]
    for task in dict.fromkeys(r["task"] for r in rows):
        held = [r for r in rows if r["task"] == task]
        keeps = sorted({r["keep"] for r in held}, reverse=True)
        cell = {(r["method"], r["keep"]): r for r in held}
        lines = [
            [f"`{m}`", *(_healed(cell.get((m, k))) for k in keeps)]
            for m in dict.fromkeys(r["method"] for r in held)
        ]
        seeds = {k: len(held[0]["seeds"]) for k in keeps}
        seeds = {k: max(len(r["seeds"]) for r in held if r["keep"] == k) for k in seeds}
        told = ", ".join(f"{n} at {k:g}" for k, n in seeds.items())
        parts.append(f"{task}; seeds: {told}.\n")
        parts.append(table(["method", *(f"{k:g} of the MACs" for k in keeps)], lines))
    return "\n".join(parts)


def _healed(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    test = row["test"]
    text = f"{100 * test['healed']:.2f}"
    if test.get("over_uniform") is None or row["method"] == "uniform":
        return text
    error = test.get("over_uniform_se")
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return f"{text} ({100 * test['over_uniform']:+.2f}{spread})"


def _draw_allocation(rows: list[dict[str, Any]]) -> None:
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.8 + 0.22 * len(methods) * len(tasks)), dpi=110,
                        layout="constrained")  # fmt: skip
        axes = figure.subplots(len(tasks), 3, squeeze=False)
        for line, task in zip(axes, tasks, strict=True):
            keeps = sorted({r["keep"] for r in rows if r["task"] == task}, reverse=True)
            for ax, keep in zip(line, keeps, strict=False):
                held = {r["method"]: r for r in rows if (r["task"], r["keep"]) == (task, keep)}
                _dots(ax, methods, held)
                ax.set_title(f"{task}, {keep:g} of the MACs", fontsize=8.5)
                if ax is not line[0]:
                    ax.set_yticklabels([])
        figure.supxlabel("test accuracy after healing, %; orange: uniform")
        save(figure, "how-much-allocation")


def _dots(ax: Axes, methods: list[str], held: dict[str, dict[str, Any]]) -> None:
    for y, method in enumerate(reversed(methods)):
        r = held.get(method)
        if r is None:
            continue
        error = 100 * (r["test"].get("healed_se") or 0)
        colour = RED if method == "uniform" else BLUE
        ax.errorbar(100 * r["test"]["healed"], y, xerr=error, fmt="o", ms=3.5, color=colour,
                    elinewidth=1)  # fmt: skip
    ax.set_yticks(range(len(methods)), list(reversed(methods)))
    ax.grid(axis="x", color=GREY, alpha=0.35, lw=0.5)


# -- scales ---------------------------------------------------------------------------------------


def _scales() -> str:
    data = read("multi_scale.json")
    if data is None:
        return ""
    rows = data["summary"]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    cell = {(r["task"], r["criterion"], r["kept"], r["method"]): r for r in rows}
    lines = []
    for task, criterion, kept in dict.fromkeys(
        (r["task"], r["criterion"], r["kept"]) for r in rows
    ):
        found = [cell.get((task, criterion, kept, m)) for m in methods]
        texts = [
            "" if r is None else f"{100 * r['test']:.1f} ± {100 * r['sd']:.1f} ({r['macs']:.2f})"
            for r in found
        ]
        lines.append([task, criterion, f"{kept:g}", *texts])
    return f"""## Several scales at once

`method="multi_scale"` divides one budget of non-zero parameters among layers, units and single
weights. Beside it: weights only, and two stages with the split halfway. Test accuracy in % ±
standard deviation over three seeds, in brackets the share of the dense MACs that remains; equal
non-zeros, equal fine-tuning (`benchmarks/multi_scale.py`).

{table(["task", "criterion", "non-zeros", *methods], lines)}"""


# -- latency --------------------------------------------------------------------------------------


def _latency() -> str:
    rows = read("latency_budgets.jsonl")
    if rows is None:
        return ""
    tables = {r["net"]: r for r in rows if r["kind"] == "table"}
    checks = {(r["net"], r["share"]): r for r in rows if r["kind"] == "check"}
    lines, missed, points = [], [], []
    for r in [r for r in rows if r["kind"] == "fit"]:
        check = checks.get((r["net"], r["share"]))
        chosen = r["chosen"]
        wall = "" if check is None else f"{check['wall_of_asked']:.2f}"
        processor = "" if check is None else f"{check['processor_of_asked']:.2f}"
        lines.append(
            [r["net"], f"{r['share']:g}", f"{r['asked_ms']:.1f}", f"{chosen['predicted_ms']:.1f}",
             f"{chosen['realised_ms']:.1f}", wall, processor, f"{r['seconds']:.0f} s"]
        )  # fmt: skip
        if check is not None:
            points.append((r["net"], r["share"], check))
            if not 0.9 <= check["processor_of_asked"] <= 1.1:
                missed.append(f"{r['net']} at {r['share']:g} ({check['processor_of_asked']:.2f})")
    _draw_latency(points)
    within = len(points) - len(missed)
    told = "; ".join(
        f"{n}: {t['parts']} {t['layers']} layers, {t['seconds']:.0f} s" for n, t in tables.items()
    )
    busy = ", ".join(f"{t['busy']:.2f} ({n})" for n, t in tables.items())
    head = ("network", "share of dense", "asked, ms", "predicted", "measured", "again, wall",
            "again, processor", "took")  # fmt: skip
    listed = f" Outside: {', '.join(missed)}." if missed else ""
    return f"""## Does a latency budget hold?

A table of layer widths is measured once, then candidates are cut for real and timed in turns with
the dense network until one is within the budget and not more than 10 % below it. "Measured" is that
candidate; "again" is a later, independent timing of the same network, relative to what was asked,
by the wall and in processor time. Within 10 % of what was asked, in processor time: {within} of
{len(points)}.{listed} Wall over processor time of the dense network while the tables were measured:
{busy}. One thread
(`benchmarks/latency_budgets.py`). Tables: {told}

![Asked and realised latency](images/how-much-latency.png)

{table(head, lines)}"""


def _draw_latency(points: list[tuple[str, float, dict[str, Any]]]) -> None:
    nets = list(dict.fromkeys(n for n, _, _ in points))
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.4), dpi=110, layout="constrained")
        ax = figure.subplots()
        line = [0.25, 0.85]
        ax.fill_between(line, [0.9 * x for x in line], [1.1 * x for x in line], color=GREY,
                        alpha=0.3, lw=0, label="within 10 %")  # fmt: skip
        ax.plot(line, line, color=MUTED, lw=0.8)
        for net, colour in zip(nets, (BLUE, RED, "#15803d", "#7c3aed"), strict=False):
            held = [(s, s * c["processor_of_asked"]) for n, s, c in points if n == net]
            ax.plot(*zip(*held, strict=True), "o", ms=5, color=colour, label=net)
        ax.set_xlabel("asked, share of the dense latency")
        ax.set_ylabel("realised, timed again later")
        ax.legend(frameon=False)
        save(figure, "how-much-latency")


# -- selection ------------------------------------------------------------------------------------


def _selection() -> str:
    data = read("selection.json")
    if data is None:
        return ""
    rows = data["rows"]
    columns = list(dict.fromkeys((r["n"], r["scores"], r["threads"]) for r in rows))
    columns.sort(key=lambda c: (c[2], c[1] != "normal", c[1], c[0]))
    cell = {(r["method"], (r["n"], r["scores"], r["threads"])): r for r in rows}
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        texts = []
        for column in columns:
            r = cell.get((method, column))
            if r is None:
                texts.append("")
            elif r.get("reads") is None:
                texts.append("left out")
            else:
                texts.append(f"{r['reads']:.1f} x, {r['peak_bytes_per_element']:.2f} B")
        lines.append([method, *texts])
    loads = [r["load_before"] for r in rows if r.get("load_before") is not None]
    names = [f"{_millions(n)} {s}" + (f", {t} threads" if t > 1 else "") for n, s, t in columns]
    skipped = dict.fromkeys(r["skipped"] for r in rows if r.get("skipped"))
    notes = f" Left out at 1 G: {'; '.join(skipped)}." if skipped else ""
    target = data["target"]
    return f"""## One threshold over all weights

The exact threshold that keeps {100 * data["keep"]:g} % of the scores, spread over {data["tensors"]}
tensors: time as a multiple of one read of them (`sum`, taken in turns, processor time), and peak
extra bytes for each score. Target: at most {target["reads"]} reads and
{target["bytes_per_element"]} bytes. The peers first need all scores in one tensor, which is
counted in their bytes. Load average {min(loads):.0f} to {max(loads):.0f} on two cores
(`benchmarks/selection.py`).{notes}

{table(["", *names], lines)}"""


def _millions(n: int) -> str:
    return f"{n / 1e9:g} G" if n >= 1e9 else f"{n / 1e6:g} M"


if __name__ == "__main__":
    main()
