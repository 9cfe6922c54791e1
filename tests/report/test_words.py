"""Numbers in words, each against a literal."""

from __future__ import annotations

import math

import pytest

from secateurs.report import ControlRow, Histogram, MetricRow, VerificationRow
from secateurs.report import words as w

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1234567.0, "1,234,567"),
        (-12, f"{MINUS}12"),
        (0.98765, "0.9877"),
        (12.3456, "12.35"),
        (1234.56, "1,234.6"),
        (123456.7, f"1.23e{5}"),
        (0.000123456, "0.000123"),
        (1.5e-7, f"1.5e{MINUS}7"),
        (-1.5e-7, f"{MINUS}1.5e{MINUS}7"),
        (None, "not available"),
        (math.nan, "not available"),
        (-math.inf, "not available"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert w.number(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (999, "bytes", "999 bytes"),
        (1000, "bytes", "1 kB"),
        (1_234_000, "bytes", "1.23 MB"),
        (7_654_000_000, "bytes", "7.65 GB"),
        (0.5, "ms", "0.5 ms"),
        (5, "", "5"),
        (None, "ms", "not available"),
    ],
)
def test_quantity(value: float | None, unit: str, text: str) -> None:
    assert w.quantity(value, unit) == text


@pytest.mark.parametrize(
    ("row", "text", "verdict"),
    [
        (MetricRow("MACs", "", 1000, 100), "10.0x fewer MACs", "better"),
        (MetricRow("MACs", "", 5000.5, 2000.25), "2.5x fewer MACs", "better"),
        (MetricRow("Parameters", "", 100, 130), "1.3x more parameters", "worse"),
        (MetricRow("size", "bytes", 400, 100), "4.0x smaller", "better"),
        (MetricRow("size", "bytes", 400, 0), f"{MINUS}400 bytes", "better"),
        (MetricRow("latency", "ms", 3.0, 2.0), "1.5x faster", "better"),
        (MetricRow("latency", "ms", 2.0, 2.02), "1.01x slower", "worse"),
        (MetricRow("MACs", "", 250_000, 1000), "250x fewer MACs", "better"),
        (MetricRow("accuracy", "", 0.9, 0.925, "higher"), "+0.025", "better"),
        (MetricRow("loss", "", 0.25, 0.5), "+0.25", "worse"),
        (MetricRow("error", "%", 2.5, 2.0), f"{MINUS}0.5 %", "better"),
        (MetricRow("MACs", "", 7, 7), "unchanged", "same"),
        (MetricRow("memory", "bytes", 7, None), "not available", "unknown"),
        (MetricRow("loss", "", math.inf, 1.0), "not available", "unknown"),
    ],
)
def test_change(row: MetricRow, text: str, verdict: str) -> None:
    assert w.change(row) == w.Change(text, verdict)  # type: ignore[arg-type]


def test_change_within_the_spread_claims_nothing() -> None:
    row = MetricRow("t", "ms", 3.0, 2.0, "lower", "", (2.0, 4.0), (1.5, 2.5))
    assert w.change(row) == w.Change("1.5x faster, but the spreads overlap", "unclear")
    apart = MetricRow("t", "ms", 3.0, 2.0, "lower", "", (2.8, 4.0), (1.5, 2.5))
    assert w.change(apart).verdict == "better"


def test_spread() -> None:
    assert w.spread((1.0, 2.5), "ms") == "1 to 2.5 ms"
    assert w.spread((1000.0, 2500.0), "bytes") == "1 kB to 2.5 kB"
    assert w.spread(None, "ms") == w.spread((math.nan, 1.0), "ms") == ""


def test_shorten_keeps_the_end() -> None:
    assert w.shorten("short", 10) == "short"
    assert w.shorten("a" * 50 + "END", 10) == "a…aaaaaEND"
    assert w.shorten("a\nb\x00\tc", 10) == "a b c"
    assert all(len(w.shorten("x" * 99, n)) == n for n in range(3, 60))


def test_shortened_layers_of_a_stack_stay_apart() -> None:
    names = [f"model.encoder.layers.{i}.self_attn.q_proj" for i in range(100)]
    assert len({w.shorten(name, 23) for name in names}) == 100


def test_weights_words_name_the_zeros() -> None:
    before, after = Histogram((0.0, 1.0), (10,)), Histogram((0.0, 1.0), (4,), zeros=6)
    text = w.weights_words(before, after)
    assert text == "before: 10 weights, none zero; after: 10 weights, 6 exactly zero (60.0 %)"
    assert w.weights_words(before, before) == "before and after: 10 weights, none zero"
    assert "not in the pruned model" in w.weights_words(before, None)
    assert w.weights_words(None, before).startswith("only after")
    assert w.weights_words(None, None) == "not available"


def _controls(gap: float, error: float | None) -> list[ControlRow]:
    return [
        ControlRow("ours", 0.5 + gap, error, role="method"),
        ControlRow("random", 0.5, error),
        ControlRow("worse", 0.4, error),
    ]


def test_control_verdict_asks_for_two_standard_errors() -> None:
    better = w.control_verdict(_controls(0.1, 0.03), "higher")  # 2 x 0.0424 < 0.1
    assert better.startswith("ours is better than its best control, random: +0.1 (")
    assert "0.042)" in better
    assert "cannot be told apart" in w.control_verdict(_controls(0.1, 0.04), "higher")
    assert "worse than a control, random" in w.control_verdict(_controls(-0.2, 0.03), "higher")


def test_control_verdict_respects_the_direction() -> None:
    rows = [ControlRow("ours", 1.0, 0.01, role="method"), ControlRow("random", 2.0, 0.01)]
    assert f"better than its best control, random: {MINUS}1" in w.control_verdict(rows, "lower")
    assert "worse than a control" in w.control_verdict(rows, "higher")


def test_control_verdict_without_evidence() -> None:
    assert "says little" in w.control_verdict(_controls(0.1, None), "higher")
    assert w.control_verdict(_controls(math.nan, 0.1), "higher") == ""
    assert w.control_verdict([], "higher") == ""


def test_verification_words() -> None:
    good = VerificationRow(2e-7, 1e-5, "graph", "float32")
    assert w.verification_words(good).startswith("Yes: ")
    assert "within the tolerance" in w.verification_words(good)
    assert "rewritten graph module" in w.verification_words(good)
    bad = w.verification_words(VerificationRow(2e-3, 1e-5, "module"))
    assert bad.startswith("No: ")
    assert "ABOVE the tolerance" in bad
    assert w.verification_words(VerificationRow(None, None, comparable=False)).startswith(
        "Not comparable: the model draws random numbers"
    )
    assert w.verification_words(VerificationRow(math.nan, 1e-5)).startswith("Not available")
