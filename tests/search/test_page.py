"""The report of a search: the choice first, words that fit the goal, everything escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from secateurs.allocation.curves import Curve
from secateurs.report.search import Point, _side_by_side, candidates_plot
from secateurs.searching.config import Candidate
from secateurs.searching.importance import effects
from secateurs.searching.page import render_search, search_summary, write_search
from secateurs.searching.results import SearchResult, Standing
from secateurs.searching.telling import drop_words, final_words, headline, untried_words, verdict
from secateurs.sensitivities import MeasuredSensitivity
from tests.search.made import made

VOID = {"meta", "br", "wbr", "path", "use", "rect", "line", "circle", "polyline", "ellipse"}


class Page(HTMLParser):
    """Tags that are opened and closed in turn, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> str:
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    return re.sub(r"\s+", " ", page.text)


NONE = {"max_drop": None}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {},
            "Chosen: budget.macs=0.45, criterion=taylor: mean drop 0.83 points (95 % upper bound "
            "2.9 points, promised 3 points) at 2.2x fewer MACs.",
        ),
        (
            {"goal": "fastest"},
            "Chosen: budget.macs=0.45, criterion=taylor: mean drop 0.83 points (95 % upper bound "
            "2.9 points, promised 3 points) at 2.8 ms a call.",
        ),
        (
            {"size": "bytes"},
            "Chosen: budget.macs=0.45, criterion=taylor: mean drop 0.83 points (95 % upper bound "
            "2.9 points, promised 3 points) at 1.9x smaller.",
        ),
        (
            {"goal": "best", **NONE},
            "Chosen: budget.macs=0.6, criterion=taylor: the best mean accuracy, 0.9668 (dense "
            "0.97), at 1.7x fewer MACs. Nothing is promised.",
        ),
        (
            {"rule": "one_se", **NONE},
            "Chosen: budget.macs=0.6, criterion=taylor: the smallest within one standard error of "
            "the best accuracy, mean drop 0.32 points at 1.7x fewer MACs. Nothing is promised.",
        ),
        (
            {"goal": "pareto", **NONE},
            "4 candidates are beaten by no other, from budget.macs=0.6, criterion=taylor (drop "
            "0.32 points at 1.7x fewer MACs) to budget.macs=0.15, criterion=taylor (drop 3.1 "
            "points at 6.7x fewer MACs). Which one to take is for you to say.",
        ),
        (
            {"share": False, "maximize": False},
            "Chosen: budget.macs=0.3, criterion=taylor: mean drop 0.017 (95 % upper bound 0.022, "
            "promised 0.03) at 3.3x fewer MACs.",
        ),
    ],
    ids=["smallest", "fastest", "bytes", "best", "one_se", "pareto", "a loss"],
)  # fmt: skip
def test_the_headline_says_what_the_goal_asked_for(settings: dict[str, Any], words: str) -> None:
    result = made(**settings)
    assert headline(result) == words
    text = read(render_search(result))
    assert words in text
    assert search_summary(result).splitlines()[2] == words
    assert ("Why this one" in text) == (result.choice.candidate is not None)


def test_without_a_choice_it_says_why() -> None:
    result = made(max_drop=0.0001)
    assert headline(result).startswith("Nothing was chosen: no candidate keeps accuracy within")
    assert final_words(result) == "The test split was not touched: no candidate was chosen."
    assert "What was compared" in read(render_search(result))


def test_the_test_split_is_told_once() -> None:
    assert final_words(made()) == (
        "Test split, touched once (359 samples): accuracy 0.97 before, 0.96 after: drop 1 point, "
        "within the promised 3 points."
    )
    assert "drop 5 points, ABOVE the promised 3 points. A promise with 95 % confidence may fail " \
        "in about one case of 20" in final_words(made(final=False))  # fmt: skip
    assert "has not been made yet" in final_words(made(final=None))
    assert final_words(made(goal="best", max_drop=None)).endswith("drop 1 point.")
    kept, missed = render_search(made()), render_search(made(final=False))
    assert "✓ promise kept on the test split" in kept
    assert "✗ promise not kept on the test split" in missed
    assert "promise kept" not in render_search(made(goal="best", max_drop=None))


def test_every_candidate_has_a_verdict() -> None:
    result = made()
    assert [verdict(result, s) for s in result.standings] == [
        "passed, on the front",
        "passed",
        "chosen, on the front",
        "above the limit",
        "above the limit, on the front",
        "not judged: MACs cannot go below 31 %: conv1 is excluded",
        "not tested, a larger one of its family failed, on the front",
        "not tested, a larger one of its family failed",
    ]
    one_se = made(rule="one_se", max_drop=None)
    assert verdict(one_se, one_se.standings[0]) == "chosen, on the front"
    assert verdict(one_se, one_se.standings[1]) == "beaten by another"


def test_the_page_has_all_that_was_found() -> None:
    text = read(render_search(made()))
    for words in (
        "2 families share the error of 0.05",  # why
        "folds: 0.83, 1, 0.63, 0.93, 0.73",  # of the chosen one
        "budget.macs explains 92 % of the differences between candidates",
        "mean drop 1.5 points with taylor, 2.1 points with magnitude",
        "5, stratified (class proportions kept), seed 0",
        "fixed: the given dense network",
        "8 by sampler grid, 7 judged",
        "35 fold runs, 18 min in all",
        "1 candidate: MACs cannot go below 31 %: conv1 is excluded",
        "Held fixed, as the recipe says: granularity (channel)",
        "latency is that of one thread",
        "task: digits-cnn",
    ):
        assert words in text, words
    assert "MACs that remain" in text  # the picture
    assert "limit \N{MINUS SIGN}3" in text


def test_ends_of_what_was_tried_are_named() -> None:
    best = made(goal="best", max_drop=None)
    assert untried_words(best)[0] == (
        "The chosen budget.macs = 0.6 is the largest that was tried: what lies beyond may be "
        "better."
    )
    drawn = made(sampler="random", trials=8)
    asked = replace(drawn, settings={**drawn.settings, "trials": 20})
    assert "12 of the candidates that were asked for were not tried." in untried_words(asked)
    assert any(w.startswith("Between the 8 candidates") for w in untried_words(asked))


def test_drops_of_shares_are_points() -> None:
    assert [drop_words(made(), d) for d in (0.01, 0.0123, -0.004, 0.0, None)] == [
        "1 point", "1.2 points", "\N{MINUS SIGN}0.4 points", "0 points", "not available",
    ]  # fmt: skip
    assert drop_words(made(share=False), 0.0123) == "0.012"


def test_names_are_escaped_and_curves_are_drawn(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    curves = {evil: Curve((0, 0.5, 0.9), (0, 0.001, 0.2))}
    found = MeasuredSensitivity(curves, "drop of accuracy", dense=0.9, notes=("a <b> note",))
    base = made()
    result = replace(base, title=evil, notes=(evil,), metric=f"acc{evil}")
    html, summary = write_search(result, tmp_path / "new", found)
    text = html.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "A &lt;b&gt; note." in text
    assert "Where the dense network is sensitive" in read(text)
    assert re.findall(r"https?://", text) == []  # it asks for nothing
    assert "Sensitivity of the dense network" in summary.read_text(encoding="utf-8")


def test_a_summary_is_a_markdown_table() -> None:
    rows = [line for line in search_summary(made()).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 8
    assert {row.count("|") for row in rows} == {6}
    assert "| budget.macs=0.45, criterion=taylor | 45 % MACs" in rows[4]


def test_a_result_from_json_gives_the_same_page() -> None:
    result = made()
    assert render_search(SearchResult.from_dict(result.to_dict())) == render_search(result)


# --- importance ----------------------------------------------------------------------------------


def standing(number: int, drop: float, **values: Any) -> Standing:
    return Standing(Candidate(number, values), drop=drop)


def test_importance_is_the_share_of_the_variance_between_groups() -> None:
    # Drops 0 2 4 6: a explains (2^2) of (9 + 1 + 1 + 9) / 4 = 5, b explains 1 of 5.
    rows = [standing(0, 0.0, a=1, b="x"), standing(1, 2.0, a=1, b="y"),
            standing(2, 4.0, a=2, b="x"), standing(3, 6.0, a=2, b="y")]  # fmt: skip
    found = effects(rows)
    assert [(e.key, e.share) for e in found] == [("a", 0.8), ("b", 0.2)]
    assert found[0].groups == (("1", 1.0, 2), ("2", 5.0, 2))
    assert effects(rows[:2]) == []
    assert effects([standing(i, 1.0, a=1) for i in range(5)]) == []


def test_many_numbers_are_grouped_by_quarters() -> None:
    rows = [standing(i, float(i >= 6), lr=10.0 ** (-i)) for i in range(12)]
    (effect,) = effects(rows)
    assert [g[2] for g in effect.groups] == [3, 3, 3, 3]
    assert effect.share == 1.0


# --- the picture ---------------------------------------------------------------------------------


def test_candidates_of_one_size_stand_side_by_side() -> None:
    points = [
        Point(f"c{i}", size, -0.1 * i, None, None, (), "other", False)
        for i, size in enumerate((50.0, 50.0, 10.0))
    ]
    svg = candidates_plot(
        points, x="MACs", y="change", percent=True, limit=None, key="k", label="L"
    )
    assert svg.startswith("<svg")
    assert "limit" not in svg
    assert len({p.size for p in _side_by_side(points)}) == 3
    alone = _side_by_side(points[:1])
    assert alone[0].size == 50.0
