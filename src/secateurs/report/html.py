"""The report as one HTML file that asks for nothing else: no script, no request, style inside.

`render(report) -> str` and `write(report, path)`; `check_available()` lets a pipeline fail before
anything expensive when the extra `secateurs[report]` is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from secateurs.errors import MissingDependencyError
from secateurs.report import words
from secateurs.report.data import Histogram, Report, TargetRow, plain
from secateurs.types import Exclusion

__all__ = ["MAX_PANELS", "check_available", "page_engine", "render", "write"]

MAX_PANELS = 24
"""Small plots shown per section; the page says how many there are besides."""

Quantity = Literal["macs", "params", "units"]


def check_available() -> None:
    """Check that the packages that draw the report are installed.

    Raises:
        MissingDependencyError: one is not; it names it and the command that installs it.
    """
    for package in ("jinja2", "matplotlib"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingDependencyError(
                f"the HTML report needs {package}: pip install 'secateurs[report]'"
            ) from error


def write(report: Report, path: str | Path) -> Path:
    """Write the page to `path` (folders are made) and return the path.

    Raises:
        MissingDependencyError: as `check_available`.
    """
    text = render(report)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def page_engine(breaks: str = ".:/") -> Any:
    """The template engine of all pages; the filter `breakable` lets names break after `breaks`."""
    import jinja2
    from markupsafe import Markup

    engine = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.filters["breakable"] = lambda text: Markup(
        re.sub(f"([{breaks}])", r"\1<wbr>", str(Markup.escape(text)))
    )
    return engine


def render(report: Report) -> str:
    """The report as a self-contained HTML page.

    Sections without data are left out, except what was excluded: an empty list says so.

    Raises:
        MissingDependencyError: as `check_available`.
    """
    check_available()
    from markupsafe import Markup

    room, engine = files("secateurs.report"), page_engine()
    engine.filters |= {
        name: getattr(words, name) for name in words.__all__ if name not in ("MISSING", "Change")
    }
    template = engine.from_string(room.joinpath("report.html.jinja").read_text("utf-8"))
    plots = {
        name: [p | {"svg": Markup(p["svg"])} for p in panels]
        for name, panels in _plots(report).items()
    }
    page: str = template.render(
        report=report,
        style=Markup(room.joinpath("style.css").read_text("utf-8")),
        plots=plots,
        max_panels=MAX_PANELS,
        verification=report.verification and words.verification_words(report.verification),
        control_verdict=words.control_verdict(report.controls, report.metric_better),
        excluded=_by_reason(report.excluded),
        recipe=yaml.safe_dump(plain(report.recipe), sort_keys=False, allow_unicode=True),
        asked=[(words.remaining_words(k), _asked(v)) for k, v in report.asked.items()],
        environment=[(str(k), _fact(v)) for k, v in plain(report.environment).items()],
        n_scores=len(_scored(report)),
        n_weights=len(_weight_names(report)),
    )
    return page


def _asked(value: Any) -> str:
    """A budget as asked: a float is a fraction, anything else is shown as it was written."""
    if isinstance(value, float) and 0 < value <= 1:
        return f"at most {100 * value:.4g} %"
    return words.number(value) if isinstance(value, (int, float)) else str(value)


def _fact(value: Any) -> str:
    return words.MISSING if value is None else str(value)


def _by_reason(excluded: Sequence[Exclusion]) -> list[tuple[str, list[Exclusion]]]:
    """What was left whole, gathered by reason in order of first appearance."""
    groups: dict[str, list[Exclusion]] = {}
    for item in excluded:
        groups.setdefault(item.reason, []).append(item)
    return list(groups.items())


def _scored(report: Report) -> list[tuple[TargetRow, Histogram]]:
    """Targets with a score that can be drawn."""
    return [(t, t.histogram) for t in report.targets if t.histogram and t.histogram.counts]


def _weight_names(report: Report) -> list[str]:
    return list(dict.fromkeys([*report.weights_before, *report.weights_after]))


def _quantity(report: Report) -> Quantity | None:
    """What the schedule is drawn against: the asked quantity if the steps have it."""
    known = [
        key
        for key in (*report.asked, "macs", "params", "units")
        if key in ("macs", "params", "units")
        and any(words.finite(step.remaining.get(key)) for step in report.steps)
    ]
    return cast(Quantity, known[0]) if known else None


def _plots(report: Report) -> dict[str, list[dict[str, str]]]:
    """Every plot of the page by section: a name, its SVG and a caption in words."""
    return {
        "controls": _control_plots(report),
        "schedule": _schedule_plots(report),
        "scores": _score_plots(report),
        "weights": _weight_plots(report),
        "gradients": _gradient_plots(report),
    }


def _control_plots(report: Report) -> list[dict[str, str]]:
    from secateurs.report import plots

    if not any(words.finite(row.mean) for row in report.controls):
        return []
    label = "Mean and standard error of " + "; ".join(
        f"{row.name}: {words.number(row.mean)} ± {words.number(row.standard_error)}"
        for row in report.controls
    )
    svg = plots.control_plot(report.controls, metric=report.metric, key="controls", label=label)
    return [{"svg": svg, "name": "", "caption": ""}]


def _schedule_plots(report: Report) -> list[dict[str, str]]:
    from secateurs.report import plots

    quantity = _quantity(report)
    drawn = any(
        words.finite(step.metric_masked) or words.finite(step.metric_healed)
        for step in report.steps
    )
    if quantity is None or not drawn:
        return []
    what = words.remaining_words(quantity)
    undone = sum(step.rolled_back for step in report.steps)
    label = f"{report.metric} against {what} remaining, for {len(report.steps)} steps" + (
        f", {undone} of them rolled back" if undone else ""
    )
    svg = plots.schedule_plot(
        report.steps,
        quantity=quantity,
        metric=report.metric,
        dense=report.metric_dense,
        key="schedule",
        label=label,
    )
    return [{"svg": svg, "name": "", "caption": ""}]


def _score_plots(report: Report) -> list[dict[str, str]]:
    from secateurs.report import plots

    panels = []
    for i, (target, histogram) in enumerate(_scored(report)[:MAX_PANELS]):
        facts = [f"kept {target.n_kept:,} of {target.n_units:,}"]
        if words.finite(target.threshold):
            facts.append(f"threshold {words.number(target.threshold)}")
        if histogram.zeros:
            facts.append(f"{histogram.zeros:,} scores exactly zero, not drawn")
        if histogram.ignored:
            facts.append(f"{histogram.ignored:,} removed earlier")
        if histogram.scale == "log":
            facts.append("logarithmic")
        caption = ", ".join(facts)
        svg = plots.score_plot(
            histogram,
            target.threshold,
            key=f"score{i}",
            label=f"Scores of {target.name}: {caption}",
        )
        panels.append({"svg": svg, "name": target.name, "caption": caption})
    return panels


def _weight_plots(report: Report) -> list[dict[str, str]]:
    from secateurs.report import plots

    panels = []
    for i, name in enumerate(_weight_names(report)[:MAX_PANELS]):
        before, after = report.weights_before.get(name), report.weights_after.get(name)
        caption = words.weights_words(before, after)
        drawn = any(h is not None and h.counts for h in (before, after))
        label = f"Weights of {name}: {caption}"
        svg = plots.weight_plot(before, after, key=f"weight{i}", label=label) if drawn else ""
        panels.append({"svg": svg, "name": name, "caption": caption})
    return panels


def _gradient_plots(report: Report) -> list[dict[str, str]]:
    from secateurs.report import plots

    before, after = report.diagnosis_before, report.diagnosis_after
    if not before and not after:
        return []
    flags = [f"{row.layer}: {row.flag}" for row in (after or before) if row.flagged]
    label = "Gradient norm per layer before and after; " + (
        "flagged: " + "; ".join(flags) if flags else "no layer is flagged"
    )
    svg = plots.gradient_plot(before, after, key="gradients", label=label)
    return [{"svg": svg, "name": "", "caption": ""}]
