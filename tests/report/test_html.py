"""The page: everything shown, escaped, self-contained, and honest about what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest

from secateurs.errors import MissingDependencyError
from secateurs.report import (
    DiagnosisRow,
    Histogram,
    MetricRow,
    Report,
    StepRow,
    TargetRow,
    check_available,
    render,
    write,
)
from secateurs.report.html import MAX_PANELS

from .fake import fake_report, hostile_report

VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page read by a parser that knows nothing of how it was made."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.faults: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._cell = False
        self.feed(text)
        self.faults += [f"{tag} is never closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> closes another element")
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data

    @property
    def table(self) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.rows]

    @property
    def headings(self) -> list[str]:
        return [v for t, a in self.tags if t == "h2" and (v := a.get("id"))]


@pytest.fixture(scope="module")
def page() -> str:
    return render(fake_report())


@pytest.fixture(scope="module")
def hostile() -> str:
    return render(hostile_report())


def faults(text: str) -> list[str]:
    """What makes a page depend on something outside, run something, or clash with itself."""
    parsed = Page(text)
    found = list(parsed.faults)
    ids = [value for _, attrs in parsed.tags if (value := attrs.get("id"))]
    found += [f"id {value!r} twice" for value in sorted({i for i in ids if ids.count(i) > 1})]
    for tag, attrs in parsed.tags:
        if tag in ("script", "link", "iframe", "object", "embed", "img", "image", "base"):
            found.append(f"<{tag}>")
        for key, value in attrs.items():
            if key.startswith("on"):
                found.append(f"{key}= on <{tag}>")
            if key in ("src", "href", "xlink:href", "action", "data", "srcset"):
                if not (value or "").startswith("#"):
                    found.append(f"{key}={value}")
                elif (value or "")[1:] not in ids:
                    found.append(f"{key}={value} has no target")
    found += [f"url({u})" for u in re.findall(r"url\((?!#)([^)]*)\)", text)]
    found += [f"#{u}" for u in re.findall(r"url\(#([^)]*)\)", text) if u not in ids]
    found += ["@import"] if "@import" in text else []
    return found


def test_faults_finds_faults() -> None:
    bad = (
        '<p id="a"></p><p id="a"></p><script></script><img src="http://x"><b onclick="x"></b>'
        '<i style="fill:url(http://y)"></i><use href="#gone"></use><em>'
    )
    found = " ".join(faults(bad))
    for part in ("id 'a' twice", "<script>", "src=http://x", "onclick=", "url(http://y)"):
        assert part in found
    assert "#gone has no target" in found
    assert "em is never closed" in found


def test_page_stands_alone(page: str, hostile: str) -> None:
    assert faults(page) == []
    assert faults(hostile) == []
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page


def test_page_is_small_and_repeats(page: str) -> None:
    assert len(page.encode()) < 200_000
    assert render(fake_report()) == page


def test_sections_come_in_reading_order(page: str) -> None:
    assert Page(page).headings == [
        "s-table",
        "s-same",
        "s-controls",
        "s-steps",
        "s-kept",
        "s-scores",
        "s-weights",
        "s-gradients",
        "s-excluded",
        "s-notes",
        "s-next",
        "s-recipe",
    ]
    assert page.index("<h1>") < page.index("target met") < page.index("s-table")


def test_numbers_of_the_table(page: str) -> None:
    named = {row[0]: row[1:] for row in Page(page).table}
    assert named["test accuracy360 images, read once"] == [
        "0.9889",
        "0.9822",
        "\N{MINUS SIGN}0.0067worse",
    ]
    assert named["parameters"] == ["1,234,568", "283,950", "4.3x fewer parameters"]
    assert named["MACsmultiply-adds for one sample"] == [
        "41,652,000",
        "8,172,000",
        "5.1x fewer MACs",
    ]
    assert named["size on disksafetensors"] == ["4.95 MB", "1.15 MB", "4.3x smaller"]
    slow = next(row for row in Page(page).table if row[0].startswith("latency, batch 1m"))
    assert slow[1:] == [
        "1.214 ms1.18 to 1.26 ms",
        "1.187 ms1.15 to 1.23 ms",
        "1.02x faster, but the spreads overlap",
    ]
    assert named["peak memorythe runtime does not say"] == [
        "61 MB",
        "not available",
        "not available",
    ]


def test_numbers_of_controls_steps_and_targets(page: str) -> None:
    table = Page(page).table
    minus = "\N{MINUS SIGN}"
    assert ["magnitude", "0.9741 ± 0.0019", f"{minus}0.0158 ± 0.0017", "30, 1, 2"] in table
    assert ["2", "40.0 %", "49.0 %", "43.0 %", "39.0 %", "0.943", "0.987", "0.063"] in table
    kept = next(row for row in table if row[0].startswith("stages.1.blocks.1.conv1:channel"))
    assert kept[1] == "3 of 64"
    assert 'width="4.69"' in page  # 3 of 64, in percent


def test_plots_show_the_true_tick_texts(page: str) -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert "0.975" in texts  # not cut to hundredths with the coordinates
    assert "validation accuracy" in texts
    assert "⚑ vanishing" in texts
    assert "⚑ collapsed" in texts


def test_every_plot_is_labelled(page: str) -> None:
    plots = [attrs for tag, attrs in Page(page).tags if tag == "svg"]
    assert len(plots) > 15
    assert all(a.get("role") == "img" and a.get("aria-label") for a in plots)
    assert page.count("<title>") >= 15


def test_tables_have_scopes(page: str) -> None:
    heads = [attrs for tag, attrs in Page(page).tags if tag == "th"]
    assert heads
    assert all(a.get("scope") in ("row", "col") for a in heads)


def test_plot_colours_come_from_the_style_sheet(page: str) -> None:
    body = page[page.index("</style>") :]
    assert re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", body) == []
    roles = set(re.findall(r"var\(--(\w+)\)", page))
    assert roles <= set(re.findall(r"--(\w+):", page))


def test_missed_target_and_failed_verification_are_said() -> None:
    report = fake_report()
    assert report.verification is not None
    worse = replace(report.verification, error=0.3)
    text = Page(render(replace(report, met=False, verification=worse))).text
    assert "target missed" in text
    assert "target met" not in text
    assert "No: on the example inputs" in text


def test_names_are_escaped(hostile: str) -> None:
    assert "<script" not in hostile
    assert "&lt;script&gt;" in hostile
    parsed = Page(hostile)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "<script>alert(1)</script>" in parsed.text


def test_markup_in_every_field_stays_text() -> None:
    nasty = "<blink x='1' onload=alert(1)>"
    swapped = render(
        replace(
            hostile_report(),
            title=nasty,
            headline=nasty,
            metric=nasty,
            notes=(nasty,),
            diagnosis_after=(DiagnosisRow(nasty, 1.0, 1.0, 1.0, nasty),),
        )
    )
    assert "blink" not in {t for t, _ in Page(swapped).tags}
    assert "<blink" not in swapped


def test_missing_numbers_are_said(hostile: str) -> None:
    text = Page(hostile).text
    assert "not available" in text
    words = re.findall(r"\b(?:nan|inf|None|NaN)\b", text)
    assert words == []


def test_long_names_are_short_with_the_full_name_in_the_title() -> None:
    name = "encoder." + "deep." * 30 + "last.weight"
    report = Report("t", "h", True, targets=(TargetRow(name, "channel", 4, 2),))
    parsed = Page(render(report))
    assert name in {a.get("title") for t, a in parsed.tags if t == "span"}
    assert name not in parsed.text


def test_empty_report_has_only_what_was_excluded() -> None:
    parsed = Page(render(Report("t", "h", True)))
    assert parsed.headings == ["s-excluded"]
    assert "Nothing was excluded." in parsed.text
    assert "svg" not in {tag for tag, _ in parsed.tags}


def small_report() -> Report:
    """Every section, little in each: quick to draw."""
    report = fake_report()
    first = next(iter(report.weights_before.items()))
    return replace(
        report,
        targets=report.targets[:1],
        weights_before=dict([first]),
        weights_after={},
        diagnosis_before=report.diagnosis_before[:1],
        diagnosis_after=(),
    )


def test_the_small_report_has_every_section(page: str) -> None:
    assert Page(render(small_report())).headings == Page(page).headings


SECTIONS: Sequence[tuple[str, dict[str, object]]] = [
    ("s-table", {"rows": ()}),
    ("s-same", {"verification": None}),
    ("s-controls", {"controls": ()}),
    ("s-steps", {"steps": ()}),
    ("s-kept", {"targets": ()}),
    ("s-scores", {"targets": ()}),
    ("s-weights", {"weights_before": {}, "weights_after": {}}),
    ("s-gradients", {"diagnosis_before": (), "diagnosis_after": ()}),
    ("s-notes", {"notes": ()}),
    ("s-next", {"next_steps": ()}),
    ("s-recipe", {"recipe": {}}),
]


@pytest.mark.parametrize(("section", "without"), SECTIONS)
def test_a_section_without_data_is_left_out(section: str, without: dict[str, object]) -> None:
    whole = small_report()
    text = render(replace(whole, **without))  # type: ignore[arg-type]
    assert section not in Page(text).headings
    assert faults(text) == []


def test_steps_without_metric_have_a_table_and_no_plot() -> None:
    steps = (StepRow(1, 1.0, {"macs": 0.5}),)
    parsed = Page(render(Report("t", "h", True, steps=steps)))
    assert parsed.headings[0] == "s-steps"
    assert "svg" not in {tag for tag, _ in parsed.tags}


def test_small_multiples_are_capped_and_counted() -> None:
    histogram = Histogram((0.0, 1.0, 2.0), (3, 1))
    many = MAX_PANELS + 6
    report = Report(
        "t",
        "h",
        True,
        targets=tuple(
            TargetRow(f"layer{i}", "channel", 4, 2, (), histogram, 1.0) for i in range(many)
        ),
        weights_before={f"layer{i}.weight": histogram for i in range(many)},
    )
    text = render(report)
    assert text.count('class="panel"') == 2 * MAX_PANELS
    assert text.count(f"6 more of {many} are not drawn") == 2
    assert text.count('class="bar"') == many
    assert len(text.encode()) < 500_000
    assert faults(text) == []


def test_exclusions_are_gathered_by_reason(page: str) -> None:
    assert Page(page).text.count("its outputs are the outputs of the model") == 1
    assert Page(page).text.count("head.out.weight") == 1


def test_write_makes_folders(tmp_path: Path) -> None:
    path = write(Report("t", "h", True), tmp_path / "deep" / "report.html")
    assert path.read_text("utf-8").startswith("<!doctype html>")


def test_drawing_ignores_and_keeps_the_users_matplotlib_settings(page: str) -> None:
    with mpl.rc_context({"axes.grid": True, "font.size": 40, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert render(fake_report()) == page
        assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_available()
    monkeypatch.setitem(sys.modules, package, None)
    for use in (check_available, lambda: render(fake_report())):
        with pytest.raises(MissingDependencyError, match=rf"{package}.*secateurs\[report\]"):
            use()


def test_data_needs_no_drawing_package() -> None:
    code = (
        "import sys; sys.modules['jinja2'] = sys.modules['matplotlib'] = None\n"
        "from secateurs.report import Report\n"
        "Report.from_dict(Report('t', 'h', True).to_dict())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drawing_leaves_pyplot_unimported() -> None:
    code = (
        "import sys\n"
        "from secateurs.report import ControlRow, Report, render\n"
        "render(Report('t', 'h', True, controls=(ControlRow('a', 0.5),)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unit_and_name_of_a_row_cannot_break_the_table() -> None:
    row = MetricRow("a" * 500, "b" * 500, 2.0, 1.0)
    text = Page(render(Report("t", "h", True, rows=(row,)))).text
    assert "b" * 13 not in text
    assert "a" * 80 not in text
