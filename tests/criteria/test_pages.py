"""Every criterion has a page, a row of the command and a complete description."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateurs.cli import app
from secateurs.criteria import CRITERIA, get_criterion
from secateurs.criteria.pages import describe, kinds_text, measured, page

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_says_what_it_is_and_when_to_use_it(name: str) -> None:
    c = CRITERIA[name]
    assert c.summary.endswith(".")
    assert c.words, "the docstring has no paragraph of plain words"
    assert c.use.startswith("Use it")
    assert c.avoid.startswith("Avoid it")
    assert c.formula
    assert c.reference


def test_the_pages_are_those_of_the_registry() -> None:
    wanted = runpy.run_path(str(DOCS / "make_criteria.py"))["pages"]()
    held = {f.name: f.read_text(encoding="utf-8") for f in (DOCS / "criteria").glob("*.md")}
    stale = sorted(
        name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name)
    )
    assert not stale, f"run python docs/make_criteria.py: {', '.join(stale)} changed"


def test_a_page_by_hand() -> None:
    text = page(get_criterion("magnitude"))
    assert text.startswith("# `magnitude`\n\n")
    assert "    score = sum over the unit of |w|\n" in text
    assert "| looks at | weights |" in text
    assert "| then | the absolute value, of each element |" in text
    assert "## Reference\n\nHan et al." in text


def test_what_a_criterion_looks_at() -> None:
    assert describe(get_criterion("taylor"))["sees"] == "inputs, labels, loss"
    assert describe(get_criterion("directional", of="output"))["sees"] == "inputs"
    assert describe(get_criterion("mutual_information"))["sees"] == "inputs, labels"
    assert kinds_text(get_criterion("l2_norm")) == "all but weight"


def test_measured_figures_are_of_criteria() -> None:
    assert set(measured()) <= set(CRITERIA)


# -- the command -------------------------------------------------------------------------------


def test_the_list() -> None:
    rows = json.loads(CliRunner().invoke(app, ["criteria", "--json"]).stdout)
    assert {r["name"] for r in rows} == set(CRITERIA)
    text = CliRunner().invoke(app, ["criteria"]).stdout
    assert all(name in text for name in CRITERIA)
    some = json.loads(CliRunner().invoke(app, ["criteria", "--json", "--family", "weight"]).stdout)
    assert {r["family"] for r in some} == {"weight"}


def test_one_criterion() -> None:
    result = CliRunner().invoke(app, ["criteria", "taylor"])
    assert "arXiv:1906.10771" in result.stdout
    row = json.loads(CliRunner().invoke(app, ["criteria", "taylor", "--json"]).stdout)
    assert row["average"] == "sample"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["taylr"], "Did you mean 'taylor'"), (["--family", "wieght"], "Did you mean 'weight'")],
)
def test_what_is_not_there(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["criteria", *arguments])
    assert result.exit_code != 0
    assert message in str(result.exception)
