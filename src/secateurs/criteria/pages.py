"""What there is to say about a criterion: a row, and a page in Markdown. All from the registry.

Measured figures (cost, agreement with exact removal) are written by the benchmarks into
`measured.json` beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from secateurs.criteria.registry import CRITERIA, STATISTICS, Criterion
from secateurs.types import KINDS

__all__ = ["cost_text", "describe", "index", "kinds_text", "measured", "page"]

ORDER = {
    "dataset": "once, from the mean over all samples",
    "batch": "for each batch, then averaged (the batch size matters)",
    "sample": "for each sample, then averaged",
}
FINISH = {"none": "nothing", "abs": "the absolute value", "square": "the square",
          "sqrt": "the square root"}  # fmt: skip
NETWORKS = {"resnet50": "a network like ResNet-50", "bert": "a network like BERT-base"}


@cache
def measured() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """Criterion -> {"cost": {network: multiple}, "oracle": {task: rank correlation}}.

    A cost is a multiple of one forward and backward pass of the same batch.
    """
    held: dict[str, Any] = json.loads(
        (files("secateurs.criteria") / "measured.json").read_text(encoding="utf-8")
    )
    return held


def describe(c: Criterion) -> dict[str, Any]:
    """Everything about a criterion as plain values.

    Example:
        >>> from secateurs.criteria import get_criterion
        >>> row = describe(get_criterion("magnitude"))
        >>> row["sees"], row["cost"], row["family"]
        ('weights', 'free', 'weight')
    """
    figures = measured().get(c.name, {})
    return {
        "name": c.name,
        "family": c.family,
        "summary": c.summary,
        "formula": c.formula,
        "words": c.words,
        "use": c.use,
        "avoid": c.avoid,
        "sees": c.sees,
        "needs": sorted(c.needs),
        "cost": c.cost,
        "second_order": c.cost == "second order",
        "granularities": list(c.kinds),
        "options": {
            name: {"default": value, "allowed": list(c.allowed.get(name, ()))}
            for name, value in c.options.items()
        },
        "finish": c.finish,
        "finish_on": c.finish_on,
        "average": c.average,
        "members": c.members,
        "reference": c.reference,
        "measured": {key: dict(value) for key, value in figures.items()},
    }


def kinds_text(c: Criterion) -> str:
    """The kinds that a criterion scores, in few words.

    Example:
        >>> from secateurs.criteria import get_criterion
        >>> kinds_text(get_criterion("magnitude"))
        'all'
    """
    missing = [k for k in KINDS if k not in c.kinds]
    if not missing:
        return "all"
    if len(missing) <= 2:
        return f"all but {', '.join(missing)}"
    return ", ".join(c.kinds)


def cost_text(c: Criterion) -> str:
    """What a batch costs, with the largest measured multiple of a training step.

    Example:
        >>> from secateurs.criteria import get_criterion
        >>> cost_text(get_criterion("magnitude"))
        'free'
    """
    multiples = measured().get(c.name, {}).get("cost", {}).values()
    return f"{c.cost}, {max(multiples):.2f}x" if multiples and c.cost != "free" else c.cost


def page(c: Criterion) -> str:
    """The page of one criterion."""
    parts = [f"# `{c.name}`", c.summary, f"    score = {c.formula}", c.words, c.use, c.avoid]
    parts += [_facts(c)]
    if c.options:
        parts += ["## Options", _options(c)]
    parts += ["## Cost and agreement", _figures(c)]
    parts += ["## Reference", c.reference + "."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(c: Criterion) -> str:
    needs = "; ".join(f"`{n}`: {STATISTICS[n].summary}" for n in sorted(c.needs))
    rows = {
        "family": c.family,
        "looks at": c.sees,
        "a batch costs": c.cost,
        "units": kinds_text(c),
        "statistics": needs,
    }
    if c.level == "element":
        rows |= {
            "summed over": f"the {c.members} of a unit" if c.members != "removal"
            else "the members that alone remove a unit",
            "then": f"{FINISH[c.finish]}, of each {c.finish_on}",
            "finished": ORDER[c.average],
        }  # fmt: skip
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _options(c: Criterion) -> str:
    lines = ["| option | default | allowed |", "|---|---|---|"]
    for name, value in c.options.items():
        allowed = c.allowed.get(name, ())
        if allowed and not isinstance(allowed[0], str):
            text = f"{allowed[0]} to {allowed[1]}"
        else:
            text = ", ".join(f"`{a}`" for a in allowed) or "any number"
        lines.append(f"| `{name}` | `{value}` | {text} |")
    return "\n".join(lines)


def _figures(c: Criterion) -> str:
    """Measured figures, or that there are none."""
    held = measured().get(c.name, {})
    said = []
    if held.get("cost"):
        costs = [f"{x:.2f} on {NETWORKS.get(n, n)}" for n, x in held["cost"].items()]
        said.append(
            "Multiples of one forward and backward pass of the same batch, one thread: "
            f"{', '.join(costs)}."
        )
    else:
        said.append(f"Not measured by itself; a batch costs: {c.cost}.")
    if held.get("oracle"):
        said.append(
            "Rank correlation with the exact change of the loss when a unit is removed, mean of "
            "three seeds:"
        )
        tasks = held["oracle"]
        said.append(
            "\n".join(
                ["| " + " | ".join(tasks) + " |", "|---" * len(tasks) + "|",
                 "| " + " | ".join(f"{x:+.2f}" for x in tasks.values()) + " |"]
            )
        )  # fmt: skip
    return "\n\n".join(said)


def index() -> str:
    """The table of all criteria, with links to their pages."""
    lines = [
        "# Criteria",
        "One page for each, written from the registry. `secateurs criteria` prints the same.",
        "| criterion | family | what it says | looks at | a batch costs | units |\n"
        "|---|---|---|---|---|---|\n"
        + "\n".join(
            f"| [`{c.name}`]({c.name}.md) | {c.family} | {_cell(c.summary)} | {c.sees} | {c.cost} "
            f"| {kinds_text(c)} |"
            for c in sorted(CRITERIA.values(), key=lambda c: c.family)
        ),
    ]
    return "\n\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
