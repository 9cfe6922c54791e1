"""Write `docs/criteria/`: one page for each criterion, from the registry.

python docs/make_criteria.py
"""

from __future__ import annotations

from pathlib import Path

from secateurs.criteria import CRITERIA
from secateurs.criteria.pages import index, page

HERE = Path(__file__).resolve().parent / "criteria"


def pages() -> dict[str, str]:
    """File name -> what stands in it."""
    return {"index.md": index()} | {f"{c.name}.md": page(c) for c in CRITERIA.values()}


def main() -> None:
    HERE.mkdir(exist_ok=True)
    wanted = pages()
    for old in HERE.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
