"""What the pages of results share: files, tables, text of a width, and how figures look."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREY",
    "INK",
    "MUTED",
    "RED",
    "ROOT",
    "STYLE",
    "read",
    "save",
    "table",
    "wrapped",
]

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent
INK, MUTED, GREY, BLUE, RED = "#1f2933", "#61707d", "#b3bac2", "#0b6bcb", "#c2410c"
STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "secateurs",
}  # fmt: skip


def read(name: str) -> Any:
    """A file of results, a list of rows for JSON lines; None if nothing was measured."""
    path = RESULTS / name
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def wrapped(text: str) -> str:
    """The same Markdown with paragraphs of at most 100 columns; tables and headings as they are."""
    fill = textwrap.TextWrapper(width=100, break_long_words=False, break_on_hyphens=False).fill
    blocks = text.strip().split("\n\n")
    return "\n\n".join(
        b if b.lstrip().startswith(("|", "#", "!", "- ", "```")) else fill(" ".join(b.split()))
        for b in blocks
    )


def save(figure: Figure, name: str) -> None:
    """A picture in `docs/images` that is the same whenever it is drawn from the same figures."""
    figure.savefig(ROOT / "docs" / "images" / f"{name}.png", metadata={"Software": None})
