"""Numbers and facts of a report in words. Pure functions, text in the end; nothing is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from secateurs.report.data import ControlRow, Histogram, MetricRow, VerificationRow

__all__ = [
    "MISSING",
    "Change",
    "budget_words",
    "change",
    "control_verdict",
    "number",
    "percent",
    "plus_minus",
    "quantity",
    "remaining_words",
    "sentence",
    "shorten",
    "signed",
    "spread",
    "verification_words",
    "weights_words",
]

MISSING = "not available"

_WORDS = {"macs": "MACs", "params": "parameters", "units": "units", "bytes": "bytes"}
_COMPARED = {"bytes": ("smaller", "larger")} | dict.fromkeys(
    ("us", "ms", "s"), ("faster", "slower")
)


def finite(value: float | None) -> TypeGuard[float]:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """At most four significant digits; whole numbers in full.

    Example:
        >>> number(1234567), number(0.97123), number(1.5e-7), number(float("nan"))
        ('1,234,567', '0.9712', '1.5e\N{MINUS SIGN}7', 'not available')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if float(value).is_integer() and abs(value) < 1e12:
        text = f"{int(value):,}"
    elif 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.4g}" if abs(value) < 1e3 else f"{value:,.1f}"
    else:
        digits, _, power = f"{value:.3g}".partition("e")
        text = f"{digits}e{int(power)}" if power else digits
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float | None) -> str:
    """A difference with its sign.

    Example:
        >>> signed(0.01), signed(0.0)
        ('+0.01', '±0')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "±0"
    return ("+" if value > 0 else "") + number(float(f"{value:.3g}"))


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit.

    Example:
        >>> quantity(1_840_000, "bytes"), quantity(0.4123, "ms"), quantity(61706, "")
        ('1.84 MB', '0.4123 ms', '61,706')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if unit == "bytes":
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return f"{value:.0f} bytes"
    return f"{number(value)} {shorten(unit, 12)}".rstrip()


def spread(limits: tuple[float | None, float | None] | None, unit: str) -> str:
    """A range, e.g. the quartiles; "" when there is none."""
    if limits is None or not all(map(finite, limits)):
        return ""
    low, high = limits
    if unit == "bytes":
        return f"{quantity(low, unit)} to {quantity(high, unit)}"
    return f"{number(low)} to {number(high)} {shorten(unit, 12)}".rstrip()


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with one decimal; two digits when that would be too few.

    Example:
        >>> percent(0.1962), percent(1.0), percent(0.00041), percent(None)
        ('19.6 %', '100.0 %', '0.041 %', 'not available')
    """
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    value = 100 * fraction
    return f"{value:.1f} %" if abs(value) >= 1 else f"{value:.2g} %"


def shorten(text: str, width: int = 40) -> str:
    """`text` on one line of at most `width` characters.

    A dotted name first loses the tails of its leading parts, never its numbers, so that the layers
    of a stack stay apart; what is still too long gets an ellipsis near its beginning.

    Example:
        >>> shorten("model.encoder.layers.11.attention", 20)
        'm.e.l.11.attention'
        >>> shorten("exceedingly_long", 10)
        'e…gly_long'
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    parts = [] if " " in line else line.split(".")
    for i in range(len(parts) - 1):
        if len(line) > width and not parts[i].isdigit():
            parts[i] = parts[i][:1]
            line = ".".join(parts)
    if len(line) <= width:
        return line
    tail = 4 * width // 5  # the end of a name tells more than its beginning
    return f"{line[: width - tail - 1]}…{line[-tail:]}"


def plus_minus(error: float | None) -> str:
    """A standard error behind its value, to two digits; "" when there is none."""
    return f"± {number(float(f'{error:.2g}'))}" if finite(error) else ""


def sentence(text: str) -> str:
    """`text` with a capital first letter and nothing else changed."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Change:
    """From before to after, in words and as a verdict for the eye."""

    text: str
    verdict: Literal["better", "worse", "same", "unclear", "unknown"]


def _ratio(large: float, small: float) -> str:
    ratio = large / small
    if ratio < 1.1:
        return f"{ratio:.3g}x"
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:,.0f}x"


def _overlap(row: MetricRow) -> bool:
    if row.spread_before is None or row.spread_after is None:
        return False
    (a, b), (c, d) = row.spread_before, row.spread_after
    if a is None or b is None or c is None or d is None:
        return False
    return max(a, c) <= min(b, d)


def change(row: MetricRow) -> Change:
    """How a metric changed: a ratio for times, bytes and counts, a difference for the rest.

    Example:
        >>> change(MetricRow("MACs", "", 5300, 1000)).text
        '5.3x fewer MACs'
        >>> change(MetricRow("latency", "ms", 2.0, 3.0))
        Change(text='1.5x slower', verdict='worse')
        >>> change(MetricRow("accuracy", "", 0.97, 0.96, better="higher")).text
        '\N{MINUS SIGN}0.01'
    """
    before, after = row.before, row.after
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return Change(MISSING, "unknown")
    if before == after:
        return Change("unchanged", "same")
    good = (after < before) == (row.better == "lower")
    verdict: Literal["better", "worse", "unclear"] = "better" if good else "worse"
    whole = float(before).is_integer() and float(after).is_integer()
    count = row.unit == "" and row.better == "lower" and (whole or min(before, after) >= 1000)
    if min(before, after) <= 0 or not (count or row.unit in _COMPARED):
        text = f"{signed(after - before)} {shorten(row.unit, 12)}".rstrip()
    else:
        down, up = _COMPARED.get(row.unit, ("fewer", "more"))
        name = f" {shorten(_in_sentence(row.name), 30)}" if count else ""
        word = down if after < before else up
        text = f"{_ratio(max(before, after), min(before, after))} {word}{name}"
    if _overlap(row):
        return Change(f"{text}, but the spreads overlap", "unclear")
    return Change(text, verdict)


def _in_sentence(name: str) -> str:
    """A row name inside a sentence: "Parameters" loses its capital, "MACs" keeps it."""
    return name[:1].lower() + name[1:] if name[1:2].islower() else name


def budget_words(given: Mapping[str, float], sizes: Mapping[str, float]) -> list[str]:
    """Each limit of a budget in words.

    Args:
        given: every limit; `sizes`: those on sizes, where a float is a fraction.

    Example:
        >>> budget_words({"macs": 0.25, "metric_drop": 0.01}, {"macs": 0.25})
        ['at most 25.0% of the MACs may remain', 'the metric may drop by at most 0.01']
    """
    texts = []
    for key, value in given.items():
        if key in sizes:
            amount = sizes[key]
            share = f"{amount:.1%}" if isinstance(amount, float) else f"{amount:,}"
            texts.append(f"at most {share} of the {remaining_words(key)} may remain")
        elif key == "latency_ms":
            texts.append(f"a call may take at most {value:g} ms")
        else:
            texts.append(f"the metric may drop by at most {value:g}")
    return texts


def remaining_words(key: str) -> str:
    """The word for a key of `asked` and `reached`."""
    return _WORDS.get(key, key.replace("_", " "))


def verification_words(row: VerificationRow) -> str:
    """One sentence: is it the same function?"""
    what = {"module": "your own module class, smaller", "graph": "a rewritten graph module"}
    form = what.get(row.form, row.form or "the small model")
    if not row.comparable:
        return f"Not comparable: the model draws random numbers in its forward pass. Form: {form}."
    if not (finite(row.error) and finite(row.tolerance)):
        return f"Not available: no finite error was recorded. Form: {form}."
    relation = "within" if row.passed else "ABOVE"
    dtype = f" in {row.dtype}" if row.dtype else ""
    answer = "Yes" if row.passed else "No"
    return (
        f"{answer}: on the example inputs the small model differs from the masked model by "
        f"{number(row.error)}{dtype}, {relation} the tolerance of {number(row.tolerance)} "
        f"(largest difference over 1 + largest output). Form: {form}."
    )


def weights_words(before: Histogram | None, after: Histogram | None) -> str:
    """How many weights are exactly zero, and how many there are, before and after."""

    def part(histogram: Histogram) -> str:
        zeros, total = histogram.zeros, histogram.total
        bad = f", {histogram.ignored:,} not finite" if histogram.ignored else ""
        if not zeros:
            return f"{total:,} weights, none zero{bad}"
        return f"{total:,} weights, {zeros:,} exactly zero ({percent(zeros / total)}){bad}"

    if before is None:
        return f"only after: {part(after)}" if after else MISSING
    if after is None:
        return f"before: {part(before)}; not in the pruned model"
    if (before.total, before.zeros, before.ignored) == (after.total, after.zeros, after.ignored):
        return f"before and after: {part(before)}"
    return f"before: {part(before)}; after: {part(after)}"


def control_verdict(rows: Sequence[ControlRow], better: str) -> str:
    """Whether the method beats its best control, by their standard errors; "" if unanswerable."""
    scale = 1 if better == "higher" else -1
    methods = [r for r in rows if r.role == "method" and finite(r.mean)]
    others = [r for r in rows if r.role == "control" and finite(r.mean)]
    if not methods or not others:
        return ""
    method = methods[0]
    best = max(others, key=lambda r: scale * (r.mean or 0.0))
    gap = scale * ((method.mean or 0.0) - (best.mean or 0.0))
    if not (finite(method.standard_error) and finite(best.standard_error)):
        return (
            f"{method.name} against its best control, {best.name}: {signed(scale * gap)}. "
            "Without standard errors (at least three seeds) this says little."
        )
    error = math.hypot(method.standard_error or 0.0, best.standard_error or 0.0)
    facts = (
        f"{signed(scale * gap)} (standard error of the difference {number(float(f'{error:.2g}'))})"
    )
    if gap > 2 * error:
        return f"{method.name} is better than its best control, {best.name}: {facts}."
    if gap < -2 * error:
        return f"{method.name} is worse than a control, {best.name}: {facts}."
    return f"{method.name} cannot be told apart from its best control, {best.name}: {facts}."
