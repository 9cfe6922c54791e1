"""Write `docs/results.md` from the JSON files in `benchmarks/results`.

python -m benchmarks.page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import oracle
from benchmarks.drawing import wrapped
from benchmarks.how_much_page import promise
from secateurs.criteria import CRITERIA as REGISTRY

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "results.md"

HEAD = """# Results

Written by `python -m benchmarks.page` from the files in `benchmarks/results`; run
`make bench` to measure again. Method and controls share the budget, the schedule, the fine-tuning
and the seeds: they differ in the scores only. The test split is evaluated once for each run. A
difference is paired (same seed, dense and pruned); ± is the standard error over three seeds.
Samples are those of training / validation / test. "All data" is one run with one seed.
"""


CRITERIA = """## Does the score know what removal does?

Spearman rank correlation between the size of each score and that of the exact loss change of
removing the unit (all units of the network, calibration samples, no fine-tuning), mean ± standard
deviation over three seeds. Options, costs and quality after fine-tuning: [criteria,
measured](results-criteria.md).

![Rank correlation of the criteria with exact removal](images/criteria-oracle.png)

{table}
"""


def main() -> None:
    parts = [HEAD]
    rows = json.loads((RESULTS / "tasks.json").read_text())
    for target, title in (
        ("structured", "Structured: at most a quarter of the MACs may remain (4x fewer)"),
        ("weight", "Weights: at most 10 % may remain"),
    ):
        parts.append(f"## {title}\n\n{_table(rows, target)}")
    named = [r for r in json.loads((RESULTS / "oracle.json").read_text())["rows"]
             if r["criterion"] in REGISTRY]  # fmt: skip
    parts.append(CRITERIA.format(table=oracle.table(named)))
    parts.append(
        wrapped(promise())
        + "\n\nAll about budgets, allocation and time: [how much to cut, measured]"
        "(results-how-much.md).\n"
    )
    parts.append(_machine())
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _table(rows: list[dict[str, Any]], target: str) -> str:
    held = [r for r in rows if r["target"] == target]
    lines = [
        "| task | metric | samples | dense | criterion | pruned | difference, points | remains "
        "| verify error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    last = None
    for r in held:
        key = (r["task"], r["full_data"])
        name = r["task"] + (" (all data)" if r["full_data"] else "")
        first = (
            [name, r["metric"], _samples(r["samples"]), f"{100 * r['dense']:.2f}"]
            if key != last
            else [""] * 4
        )
        last = key
        cells = [
            *first,
            r["criterion"],
            f"{100 * r['pruned']:.2f}{_error(r['pruned_se'])}",
            f"{100 * r['difference']:+.2f}{_error(r['difference_se'])}",
            f"{100 * r['remaining']:.1f} %",
            f"{r['largest_verify_error']:.0e}{'' if r['verified'] else ' FAILED'}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{_verdict(held)}\n"


def _samples(sizes: dict[str, int]) -> str:
    """Training, validation and test samples."""
    return " / ".join(f"{sizes[k]:,}" for k in ("train", "validation", "test"))


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {100 * value:.2f}"


def _verdict(rows: list[dict[str, Any]]) -> str:
    """Where Taylor beats both controls, is level, or loses: two standard errors apart."""
    groups: dict[tuple[str, bool], dict[str, dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["task"], r["full_data"]), {})[r["criterion"]] = r
    words: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": []}
    for (task, _), by in groups.items():
        for control in ("magnitude", "random"):
            if "taylor" not in by or control not in by:
                continue
            gap = by["taylor"]["difference"] - by[control]["difference"]
            error = sum((by[c]["difference_se"] or 0) ** 2 for c in ("taylor", control)) ** 0.5
            word = "level with" if abs(gap) <= 2 * error else "ahead of" if gap > 0 else "behind"
            words[word].append(f"{control} on {task}")
    told = [f"**{word}** {', '.join(held)}" for word, held in words.items() if held]
    return "At two standard errors of the difference, Taylor is\n\n- " + "\n- ".join(told)


def _machine() -> str:
    first = (RESULTS / "tasks.jsonl").read_text().splitlines()[0]
    env = json.loads(first)["environment"]
    listed = ", ".join(f"{k} {v}" for k, v in env.items() if k != "seed")
    return f"## Machine\n\n{listed}. Benchmarks run on one thread.\n"


if __name__ == "__main__":
    main()
