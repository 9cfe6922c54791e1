"""What all plots of the pages share: a plain panel, colours by role, and the SVG that results.

Colours are named by role and resolved by the page's style sheet, so that light, dark and print need
no second drawing. No pyplot: nothing global is left behind.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from html import escape
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secateurs.report.words import number

__all__ = ["ROLES", "make_axes", "make_figure", "plain_style", "to_svg", "tick_text"]

# Drawn in colours that nothing else uses; the style sheet gives each role its real one.
ROLES = {
    "ink": "#010203",
    "muted": "#040506",
    "grid": "#070809",
    "kept": "#0a0b0c",
    "removed": "#0d0e0f",
    "flag": "#101112",
    "card": "#131415",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateurs",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
    "axes.unicode_minus": True,
}
plain_style = style.context(["default", _STYLE])
"""Decorates every plot: the user's own matplotlib settings neither reach it nor are changed."""


def make_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")


def make_axes(figure: Figure, size: float = 12) -> Axes:
    """One plain panel: a faint grid, no box, text in the ink of the page."""
    axes: Axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(ROLES["muted"])
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.tick_params(
        colors=ROLES["muted"], labelcolor=ROLES["ink"], labelsize=size, length=3, which="both"
    )
    axes.set_axisbelow(True)
    return axes


def to_svg(figure: Figure, key: str, label: str, titles: Mapping[str, str] | None = None) -> str:
    """The figure as an inline SVG element, with ids of its own and no drawing of its text."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # a name may use characters that the measuring font lacks: the browser has others
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator"), None))
    text = buffer.getvalue()
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"\s+", " ", body.replace("xlink:href", "href"))
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for role, colour in ROLES.items():
        body = body.replace(colour, f"var(--{role})")
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", body)) | set(titles or {})
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r"(url\(|href=\")#", rf"\1#{key}-", body)
    for name, title in (titles or {}).items():
        tag = f'<g id="{key}-{name}">'
        body = body.replace(tag, f"{tag}<title>{escape(title)}</title>")
    body = re.sub(r"<[^>]*>", _round_tag, body).replace("> <", "><")
    return (
        f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{body.strip()}</svg>"
    )


def _round_tag(tag: re.Match[str]) -> str:
    """A tag with its coordinates rounded to hundredths; the text between tags is left alone."""
    return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", tag[0])


def tick_text(value: float, _position: int | None = None) -> str:
    return number(float(f"{value:.6g}"))
