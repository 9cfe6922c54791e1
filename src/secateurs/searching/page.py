"""The report of a search: one HTML file that needs nothing else, and the same in Markdown.

render_search(result) -> HTML       write_search(result, folder) -> [search.html, search.md]
search_summary(result) -> Markdown
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from secateurs.report import words
from secateurs.report.data import plain
from secateurs.report.html import check_available, page_engine
from secateurs.searching import telling
from secateurs.searching.results import SearchResult, Standing
from secateurs.sensitivities import MeasuredSensitivity

__all__ = ["render_search", "search_summary", "write_search"]


def write_search(
    result: SearchResult, folder: str | Path, sensitivity: MeasuredSensitivity | None = None
) -> list[Path]:
    """Write `search.html` and `search.md` into a folder, and return their paths.

    Raises:
        MissingDependencyError: as `render_search`.
    """
    texts = {
        "search.html": render_search(result, sensitivity),
        "search.md": search_summary(result, sensitivity),
    }
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def render_search(result: SearchResult, sensitivity: MeasuredSensitivity | None = None) -> str:
    """The report of a search as a self-contained HTML page.

    Args:
        result: of a search, with or without a choice.
        sensitivity: curves of the dense network, drawn and explained as well.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    check_available()
    from markupsafe import Markup

    room, engine = files("secateurs.report"), page_engine()
    engine.filters |= {n: getattr(words, n) for n in ("number", "percent", "sentence", "shorten")}
    template = engine.from_string(room.joinpath("search.html.jinja").read_text("utf-8"))
    page: str = template.render(
        result=result,
        style=Markup(room.joinpath("style.css").read_text("utf-8")),
        headline=telling.headline(result),
        why_title=_why_title(result),
        final=telling.final_words(result),
        met=None if result.final is None else result.final.within,
        plot=Markup(_plot(result)),
        legend=_legend(result),
        table=_table(result),
        keys=_keys(result),
        importance=telling.importance_words(result),
        how=telling.how_words(result),
        failures=telling.failures(result),
        untried=telling.untried_words(result),
        sensitivity=sensitivity and sensitivity.recommendation().splitlines(),
        sensitivity_notes=() if sensitivity is None else sensitivity.notes,
        curves=Markup(_curves(sensitivity)),
        recipe=yaml.safe_dump(plain(result.recipe), sort_keys=False, allow_unicode=True),
        environment=[(str(k), str(v)) for k, v in plain(result.environment).items()],
    )
    return page


def search_summary(result: SearchResult, sensitivity: MeasuredSensitivity | None = None) -> str:
    """The same in Markdown, without pictures."""
    lines = [f"# Search: {result.title}", "", telling.headline(result), "",
             telling.final_words(result)]  # fmt: skip
    lines += _section(_why_title(result), result.choice.why)
    lines += _section("Candidates", _markdown_table(result), bullets=False)
    lines += _section("What mattered", telling.importance_words(result))
    if sensitivity is not None:
        lines += _section("Sensitivity of the dense network",
                          sensitivity.recommendation().splitlines())  # fmt: skip
    lines += _section("How it was searched", [f"{k}: {v}" for k, v in telling.how_words(result)])
    lines += _section("Could not be judged",
                      [f"{n} x {why}" for why, n in telling.failures(result)])  # fmt: skip
    lines += _section("What was not tried", telling.untried_words(result))
    lines += _section("Notes", result.notes)
    return "\n".join(lines) + "\n"


def _why_title(result: SearchResult) -> str:
    return "What was compared" if result.choice.candidate is None else "Why this one"


def _section(title: str, lines: Sequence[str], *, bullets: bool = True) -> list[str]:
    if not lines:
        return []
    return ["", f"## {title}", "", *(f"- {line}" if bullets else line for line in lines)]


def _markdown_table(result: SearchResult) -> list[str]:
    heads = ["candidate", "remaining", "mean drop", "upper bound", "verdict"]
    rows = [
        [row["text"], row["remaining"], row["drop"], row["upper"], row["verdict"]]
        for row in _table(result)
    ]
    cells = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]


def _keys(result: SearchResult) -> list[str]:
    """The settings that were searched, in the order of the space."""
    space = result.settings.get("space", {})
    tried = (key for s in result.standings for key in s.candidate.values)
    return list(dict.fromkeys([*space, *tried]))


def _table(result: SearchResult) -> list[dict[str, Any]]:
    """One row for each candidate, from the largest to the smallest; the unjudged last."""
    name = telling.size_name(result)
    trials = {t.candidate.number: t for t in result.trials}

    def order(found: Standing) -> tuple[bool, float, int]:
        size = telling.size_of(found, name)
        return not found.judged, -(size or 0.0), found.candidate.number

    rows = []
    for found in sorted(result.standings, key=order):
        trial = trials.get(found.candidate.number)
        chosen = result.choice.candidate
        rows.append(
            {
                "number": found.candidate.number,
                "text": found.candidate.text,
                "values": found.candidate.values,
                "remaining": telling.remaining_cells(found) if found.judged else "",
                "drop": telling.drop_words(result, found.drop) if found.judged else "",
                "error": _error(result, found),
                "upper": telling.drop_words(result, found.upper) if found.judged else "",
                "folds": "" if trial is None else telling.fold_words(result, trial),
                "verdict": telling.verdict(result, found),
                "chosen": chosen is not None and chosen.number == found.candidate.number,
            }
        )
    return rows


def _error(result: SearchResult, found: Standing) -> str:
    return "" if found.se is None else f"± {telling.drop_words(result, found.se)}"


def _legend(result: SearchResult) -> str:
    """What the marks of the picture mean."""
    interval = (
        f"lines go down to the {telling.confidence_words(result)} upper bound of the drop"
        if telling.bounded(result) else "lines are one standard error of the mean"
    )  # fmt: skip
    failed = " Crosses failed the test of the limit." if telling.bounded(result) else ""
    return (
        "Large: what was chosen. Small dots: single folds, each against the dense network of the "
        f"same fold; circles: their means; {interval}.{failed} Filled and joined: beaten by no "
        "other candidate. Candidates of one size stand side by side."
    )


def _plot(result: SearchResult) -> str:
    """The picture of all candidates that have a size; "" if there is none."""
    from secateurs.report.search import candidates_plot

    name, scale = telling.size_name(result), telling.scale(result)
    points = [p for s in result.standings if (p := _point(result, s, name, scale)) is not None]
    if not points:
        return ""
    timed = name == "latency_ms"
    x = "ms of one call" if timed else f"{words.remaining_words(name)} that remain"
    unit = " in points" if scale == 100 else ""
    limit = result.settings.get("max_drop") if telling.bounded(result) else None
    return candidates_plot(
        points,
        x=f"{x} (smaller to the right)",
        y=f"{words.shorten(result.metric, 24)} against dense{unit}",
        percent=not timed,
        limit=None if limit is None else -scale * float(limit),
        key="candidates",
        label=f"Change of {result.metric} against {x}. {telling.headline(result)}",
    )


def _point(result: SearchResult, found: Standing, name: str, scale: float) -> Any:
    from secateurs.report.search import Point

    size = telling.size_of(found, name)
    if not found.judged or found.drop is None or size is None:
        return None
    factor, sign = (1.0 if name == "latency_ms" else 100.0), (1 if result.maximize else -1)
    trial = next(t for t in result.trials if t.candidate.number == found.candidate.number)
    folds = []
    for fold in trial.folds:
        at = fold.latency_ms if name == "latency_ms" else fold.remaining.get(name)
        if at is not None:
            folds.append((factor * at, -scale * sign * (fold.dense - fold.metric)))
    low, high = _interval(result, found, scale)
    chosen = result.choice.candidate
    is_chosen = chosen is not None and chosen.number == found.candidate.number
    role = "chosen" if is_chosen else telling.role(result, found)
    return Point(
        found.candidate.text, factor * size, -scale * found.drop, low, high, tuple(folds), role,
        found.front,
    )  # fmt: skip


def _interval(
    result: SearchResult, found: Standing, scale: float
) -> tuple[float | None, float | None]:
    """Down to the bound that is tested, or one standard error to both sides."""
    assert found.drop is not None
    if telling.bounded(result):
        return (None if found.upper is None else -scale * found.upper), -scale * found.drop
    if found.se is None:
        return None, None
    return -scale * (found.drop + found.se), -scale * (found.drop - found.se)


def _curves(sensitivity: MeasuredSensitivity | None) -> str:
    if sensitivity is None:
        return ""
    from secateurs.report.sensitivity import sensitivity_svg

    return sensitivity_svg(
        sensitivity, drop=sensitivity.tolerable, key="sensitivity",
        label=" ".join(sensitivity.recommendation().splitlines()),
    )  # fmt: skip
