"""Paired differences over seeds, and what may be said about them. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from secateurs.ablation.rows import Row
from secateurs.report.words import plus_minus, signed

__all__ = ["MIN_SEEDS", "RULE", "Comparison", "Difference", "compare", "difference", "verdict"]

MIN_SEEDS = 3
SAME = 1e-9  # of the largest value: below this a difference is rounding
SAME_DENSITY = 0.01  # of the units of a layer
RULE = (
    "differences are paired by seed; one counts if it is more than two standard errors from zero, "
    "over at least three seeds"
)

Outcome = Literal["better", "worse", "unclear", "equal", "no spread", "too few"]


@dataclass(frozen=True)
class Difference:
    """The criterion minus a control, paired by seed.

    Attributes:
        values: one for each seed, in the unit of the metric.
        mean: of the values.
        error: standard error of the mean, the sample deviation over the root of n; None for a
            single seed.
        outcome: of the criterion: "better" or "worse" by more than two standard errors;
            "unclear"; "equal", no difference in any seed; "no spread", the same difference in all
            seeds, so that there is no error to compare it with; "too few" seeds.
    """

    values: tuple[float, ...]
    mean: float
    error: float | None
    outcome: Outcome

    @property
    def text(self) -> str:
        """The mean and its standard error."""
        return f"{signed(self.mean)} {plus_minus(self.error)}".rstrip()


@dataclass(frozen=True)
class Comparison:
    """One control beside the criterion.

    Attributes:
        control: its name.
        seeds: those of which both runs are there.
        test: difference of the test metric, at the very end.
        after_cut: difference of the validation metric right after the last cut, before the
            training that follows; None for "reinit", which begins after that cut.
        shown: whether the criterion is better on test data; None if the runs do not answer that.
        text: what the differences say, one sentence.
    """

    control: str
    seeds: tuple[int, ...]
    test: Difference
    after_cut: Difference | None
    shown: bool | None
    text: str


def difference(pairs: Sequence[tuple[float, float]], *, maximize: bool = True) -> Difference:
    """The paired difference of (criterion, control) values, one pair for each seed.

    Example:
        >>> found = difference([(0.9, 0.5), (0.8, 0.5), (0.7, 0.5)])
        >>> round(found.mean, 3), round(found.error, 3), found.outcome
        (0.3, 0.058, 'better')
        >>> difference([(0.9, 0.9), (0.8, 0.8), (0.7, 0.7)]).outcome
        'equal'
    """
    rounding = SAME * max((abs(v) for pair in pairs for v in pair), default=0.0)
    values = [ours - other for ours, other in pairs]
    values = [0.0 if abs(v) <= rounding else v for v in values]
    center = mean(values)
    deviation = stdev(values) if len(values) > 1 else None
    if deviation is not None and deviation <= rounding:
        deviation = 0.0
    error = None if deviation is None else deviation / math.sqrt(len(values))
    outcome: Outcome
    if len(values) < MIN_SEEDS or error is None:
        outcome = "too few"
    elif error == 0:
        outcome = "no spread" if center else "equal"
    elif abs(center) <= 2 * error:
        outcome = "unclear"
    else:
        outcome = "better" if (center > 0) == maximize else "worse"
    return Difference(tuple(values), center, error, outcome)


def compare(
    rows: Sequence[Row], control: str, *, method: str, maximize: bool = True
) -> Comparison | None:
    """One control against the criterion over the seeds of which both runs are there.

    Args:
        rows: of the criterion (`control=None`) and of its controls.
        control: one of them.
        method: what the criterion is called.
        maximize: whether a larger metric is better.

    Returns:
        None if no seed has both.
    """
    ours = {row.seed: row for row in rows if row.control is None}
    theirs = {row.seed: row for row in rows if row.control == control}
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return None
    test = difference([(ours[s].test, theirs[s].test) for s in seeds], maximize=maximize)
    cut = None
    if control != "reinit":
        pairs = [(ours[s].after_cut, theirs[s].after_cut) for s in seeds]
        cut = difference(pairs, maximize=maximize)
    shown = None if test.outcome in ("too few", "no spread") else test.outcome == "better"
    text = _reading(control, test, method)
    if control == "shuffle" and test.outcome == "better":
        drift = _drift([(ours[s], theirs[s]) for s in seeds])
        if drift:
            shown = None
            text = (
                f"no verdict on per-layer density: {method} is better, but {drift}, so the two do "
                "not differ in the choice alone. schedule: {curve: one_shot, steps: 1} or "
                "allocation: uniform keeps the numbers equal"
            )
    return Comparison(control, seeds, test, cut, shown, text + _after_cut(test, cut, method))


_READINGS: Mapping[str, tuple[str, str, str]] = {
    "shuffle": (
        "{m} knows more than per-layer density: which units go matters, not only how many",
        "not shown that {m} knows more than per-layer density: the same scores, shuffled inside "
        "each layer, do as well within two standard errors",
        "not shown that {m} knows more than per-layer density: the same scores, shuffled inside "
        "each layer, do better",
    ),
    "random": (
        "{m} beats chance",
        "not shown that {m} beats chance: random scores do as well within two standard errors",
        "{m} is worse than chance: random scores do better",
    ),
    "invert": (
        "the order of the scores matters: taking the best units first does harm",
        "no sign that the scores carry information here: taking the best units first does as well "
        "within two standard errors",
        "the scores carry no information here, or point the wrong way: taking the best units "
        "first does better",
    ),
    "random-labels": (
        "the labels are used: scores from shuffled labels do worse",
        "no sign that the labels are used: scores from shuffled labels do as well within two "
        "standard errors",
        "the labels do not help: scores from shuffled labels do better",
    ),
    "reinit": (
        "the inherited weights matter: the same structure, trained as long from fresh weights, "
        "does worse",
        "no sign that the inherited weights matter, only the structure: trained from fresh "
        "weights it does as well within two standard errors",
        "the structure matters, not the inherited weights: trained from fresh weights it does "
        "better",
    ),
}
"""For each control: what it says if the criterion is better, not told apart, and worse."""


def _reading(control: str, found: Difference, method: str) -> str:
    better, same, worse = (text.format(m=method) for text in _READINGS[control])
    n = len(found.values)
    if found.outcome == "too few":
        return f"no verdict: it needs at least three seeds, and there {_are(n)}"
    if found.outcome == "no spread":
        return (
            f"no verdict: the difference is {signed(found.mean)} in all {n} seeds. Without any "
            "spread it counts as one run: the seeds change nothing here, or the metric is coarse"
        )
    if found.outcome == "equal":
        return f"{same} (exactly the same in all {n} seeds)"
    return {"better": better, "worse": worse, "unclear": same}[found.outcome]


def _are(n: int) -> str:
    return "is 1" if n == 1 else f"are {n}"


def _after_cut(test: Difference, cut: Difference | None, method: str) -> str:
    """What was seen before training healed it, where that says something else."""
    if cut is None or test.outcome == cut.outcome or cut.outcome not in ("better", "worse"):
        return ""
    return f". Right after the last cut {method} is {cut.outcome}: {cut.text}"


def _drift(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Where the shuffled run kept another number of units of a layer; "" if nowhere."""
    worst, text = SAME_DENSITY, ""
    for ours, other in pairs:
        for name, total in ours.units.items():
            kept, theirs = ours.kept[name], other.kept.get(name, total)
            share = abs(kept - theirs) / total
            if share > worst:
                worst = share
                text = (
                    f"with seed {ours.seed} it kept {kept:,} of {total:,} units of {name}, and the "
                    f"shuffled run {theirs:,}"
                )
    return text


def verdict(
    comparisons: Sequence[Comparison], method: str, missing: Mapping[str, str]
) -> tuple[bool | None, str]:
    """Whether the criterion knows more than per-layer density, and the same in words.

    Args:
        comparisons: one for each control that was run.
        method: what the criterion is called.
        missing: control -> why it was not run.

    Returns:
        `shown` of the comparison with "shuffle", None without one; and the sentence.
    """
    for found in comparisons:
        if found.control == "shuffle":
            return found.shown, found.text
    why = missing.get("shuffle", "it was not asked for")
    return None, f"no verdict on per-layer density: that needs the control shuffle ({why})"
