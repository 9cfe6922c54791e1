"""From scores to the cut below which units go: `fn(scores, p, null) -> cut`.

    scores   (n,) float64, ascending: those of the units that are left, of one target or of all
    p        the parameters of the rule by name, checked, defaults filled in
    null     (m,) float64, ascending: scores on shuffled labels; empty for rules that need none

A unit goes when its score is strictly below the cut, so equal scores share their fate. Scores that
are all equal are never told apart: all stay, or (only with "value", "rate_mean" and "permutation")
all would go, which is an error of `allocate`. A rule that finds no place to cut returns the lowest
score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from secateurs.asked import RULES, THRESHOLD_FIELDS, Rule
from secateurs.errors import BudgetError, ConfigError, choose

__all__ = ["THRESHOLDS", "CutRule", "Line", "threshold", "two_gaussians"]

Line = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
CutRule = Callable[[Line, Mapping[str, float], Line], float]

THRESHOLDS: dict[str, CutRule] = {}
"""The registry: rule -> function; `secateurs.asked.RULES` holds what the rules take."""

MAD_TO_STD = 1.4826
"""Standard deviation of a normal distribution / its median absolute deviation."""
FITTED = 10_000
"""A mixture is fitted to at most that many scores, evenly spaced in rank."""
ROUNDS, TOLERANCE, VARIANCE = 2000, 1e-9, 1e-6
"""Rounds of EM at most, the gain in mean log-likelihood at which it stops, and what every variance
is raised by, so that a single value is no component of infinite likelihood."""
GRADIENTS = (
    ". Scores on shuffled labels are the higher ones, as gradients of a trained model are: wrong "
    "labels pull harder; use a criterion such as mutual_information"
)
STRAIGHT = 1e-6
"""Sorted scores nearer than this to their chord, as a share of their range, have no corner."""


def threshold(name: str, rule: Rule | None = None) -> Callable[[CutRule], CutRule]:
    """Register a function as the threshold rule `name`.

    Args:
        name: how `Threshold` asks for it.
        rule: what it takes; not for the rules that `RULES` lists already. Its parameters are fields
            of `Threshold`.

    Raises:
        ConfigError: the name is taken, or a parameter is not a field of `Threshold`.

    Example:
        >>> from secateurs.asked import RULES, Rule, Threshold
        >>> @threshold("half_of_largest", Rule("half of the largest score"))
        ... def half_of_largest(scores, p, null):
        ...     return scores[-1] / 2
        >>> Threshold("half_of_largest").text
        'half_of_largest() per target'
        >>> del THRESHOLDS["half_of_largest"], RULES["half_of_largest"]
    """

    def register(fn: CutRule) -> CutRule:
        if name in THRESHOLDS or (rule is not None and name in RULES):
            raise ConfigError(f"threshold rule {name!r} is already registered; choose another name")
        if rule is not None:
            for parameter in rule.parameters:
                choose(parameter, THRESHOLD_FIELDS, f"parameter of threshold rule {name!r}")
            RULES[name] = rule
        THRESHOLDS[choose(name, RULES, "threshold rule")] = fn
        return fn

    return register


# -- fixed figures and moments ---------------------------------------------------------------------


@threshold("value")
def value(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """The given figure."""
    return p["value"]


@threshold("quantile")
def quantile(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """The score with floor(q n) scores before it; of equal scores at the cut none goes."""
    first = math.floor(p["q"] * len(scores) * (1 + 1e-12))  # 0.29 * 100 is 28.999999999999996
    return float(scores[min(first, len(scores) - 1)])


@threshold("mean")
def mean(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """The mean."""
    return float(scores.mean())


@threshold("k_std")
def k_std(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """Mean + k standard deviations (over all n scores, not n - 1)."""
    return float(scores.mean() + p["k"] * scores.std())


@threshold("mad")
def mad(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """Median + k x 1.4826 x the median of |score - median|: scores with a robust z below k go.

    When more than half of the scores are equal the deviation is 0 and the cut is their value,
    whatever k.
    """
    middle = np.median(scores)
    return float(middle + p["k"] * MAD_TO_STD * np.median(np.abs(scores - middle)))


@threshold("rate_mean")
def rate_mean(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """Rate x mean; above equal scores when the rate is above 1 or they are negative."""
    return p["rate"] * float(scores.mean())


# -- the shape of the distribution -----------------------------------------------------------------


@threshold("otsu")
def otsu(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """The first score of the upper class, where w0 w1 (m1 - m0)^2 is largest.

    w are the shares of the two classes and m their means. Every place between two different scores
    is tried, not the bins of a histogram; of equally good ones the lowest is taken. With log=True
    on the logarithms: a score of 0 is then below every cut, and a negative one is an error.

    Raises:
        ConfigError: log=True and a score is negative.
    """
    if scores[0] == scores[-1]:
        return float(scores[0])
    if not p["log"]:
        return float(scores[_split(scores)])
    positive = _positive(scores)
    return float(positive[_split(np.log(positive))])


def _split(line: Line) -> int:
    """Index of the first entry of the upper of Otsu's classes; 0 if all are equal."""
    n = len(line)
    places = np.flatnonzero(line[1:] > line[:-1]) + 1
    if not len(places):
        return 0
    middle = line - line.mean()  # smaller sums lose fewer digits
    lower = np.cumsum(middle)[places - 1]
    # w0 w1 (m1 - m0)^2 n^2, with the sum of the lower class L and of all T
    between = (n * lower - places * middle.sum()) ** 2 / (places * (n - places))
    return int(places[_first_largest(between)])


def _first_largest(values: Line) -> int:
    """The first of the largest values, those within rounding of it included."""
    return int(np.flatnonzero(values >= values.max() * (1 - 1e-12))[0])


def _positive(scores: Line) -> Line:
    """The scores that have a logarithm; at least one, since they are not all 0."""
    if scores[0] < 0:
        raise ConfigError(
            f"logarithms need scores that are not negative, the lowest is {scores[0]:.6g}; use "
            "another rule, or a criterion that ends in an absolute value or a square"
        )
    return scores[scores > 0]


@threshold("gaussian_mixture")
def gaussian_mixture(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """Where the lower and the upper of two Gaussians on the log scores are equally responsible.

    Fitted by expectation-maximisation from Otsu's two classes, without random numbers, to at most
    10,000 scores evenly spaced in rank. The cut lies between the two means; where one component is
    responsible for both of them the scores show no two groups, and the cut is the lowest positive
    score. A score of 0 has no logarithm: it takes no part and is below every cut.

    Raises:
        ConfigError: a score is negative.
    """
    if scores[0] == scores[-1]:
        return float(scores[0])
    positive = _positive(scores)
    line = np.log(positive)
    if len(line) > FITTED:
        line = line[((np.arange(FITTED) + 0.5) * (len(line) / FITTED)).astype(np.int64)]
    if line[0] == line[-1]:
        return float(positive[0])
    share, middle, variance = two_gaussians(line)

    def lower_wins(x: float) -> bool:
        joint = _log_joint(np.array([x]), share, middle, variance)
        return bool(joint[0, 0] > joint[1, 0])

    low, high = float(middle[0]), float(middle[1])
    if not lower_wins(low) or lower_wins(high):
        return float(positive[0])
    for _ in range(100):
        between = (low + high) / 2
        low, high = (between, high) if lower_wins(between) else (low, between)
    return math.exp(high)


def two_gaussians(line: Line) -> tuple[Line, Line, Line]:
    """Shares, means and variances, each (2,), the smaller mean first; `line` ascending."""
    first = _split(line)
    belongs = np.zeros((2, len(line)))
    belongs[0, :first] = belongs[1, first:] = 1.0
    before = -math.inf
    for _ in range(ROUNDS):
        weight = belongs.sum(axis=1)
        weight = np.maximum(weight, np.finfo(np.float64).tiny)
        share = weight / weight.sum()
        middle = belongs @ line / weight
        variance = (belongs * (line - middle[:, None]) ** 2).sum(axis=1) / weight + VARIANCE
        joint = _log_joint(line, share, middle, variance)
        both = np.logaddexp(joint[0], joint[1])
        belongs = np.exp(joint - both)
        now = float(both.mean())
        if now - before < TOLERANCE:
            break
        before = now
    order = np.argsort(middle, kind="stable")
    return share[order], middle[order], variance[order]


def _log_joint(x: Line, share: Line, middle: Line, variance: Line) -> Line:
    """(2, n) log of share x density."""
    distance = (x - middle[:, None]) ** 2 / variance[:, None]
    joint: Line = np.log(share)[:, None] - 0.5 * (np.log(2 * np.pi * variance)[:, None] + distance)
    return joint


@threshold("knee")
def knee(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """At the score farthest from the chord between the first and the last of the sorted scores.

    Rank and score are scaled to [0, 1]. Below the chord (most scores are low) the corner ends the
    flat part: it goes, and the cut is the next larger score. Above it (most scores are high) the
    corner begins the flat part, and stays. Of two equally far the lower one counts. A straight
    line, such as any two scores, has no corner: nothing goes. There is no smoothing and no
    sensitivity: one corner, the farthest.
    """
    lowest, largest = scores[0], scores[-1]
    if lowest == largest:
        return float(lowest)
    above = (scores - lowest) / (largest - lowest) - np.linspace(0.0, 1.0, len(scores))
    if np.abs(above).max() < STRAIGHT:
        return float(lowest)
    corner = _first_largest(np.abs(above))
    if above[corner] > 0:
        return float(scores[corner])
    return float(scores[np.searchsorted(scores, scores[corner], side="right")])


# -- against shuffled labels -----------------------------------------------------------------------


@threshold("permutation")
def permutation(scores: Line, p: Mapping[str, float], null: Line) -> float:
    """The lowest score that beats shuffled labels at a false-discovery rate of fdr.

        p-value of a unit = (1 + number of null scores at or above its own) / (1 + m)
        kept: the units up to the last rank i with p_(i) <= fdr i / n, p ascending

    The null scores of all units are pooled, so a unit is compared with what any unit of its target
    (with scope="global": of any target) scores on shuffled labels.

    Raises:
        BudgetError: no unit beats the null, or there are too few null scores to tell.
    """
    n, m, fdr = len(scores), len(null), p["fdr"]
    best_first = scores[::-1]
    p_values = (1 + m - np.searchsorted(null, best_first, side="left")) / (1 + m)
    if 1 / (1 + m) > fdr:
        raise BudgetError(
            f"{m} null scores give no p-value below {1 / (1 + m):.3g}, so none is within a "
            f"false-discovery rate of {fdr:g}; score more shuffles"
        )
    within = np.flatnonzero(p_values <= fdr * np.arange(1, n + 1) / n * (1 + 1e-12))
    if not len(within):
        higher = np.median(null) > np.median(scores)
        raise BudgetError(
            f"none of {n} scores beats shuffled labels at a false-discovery rate of {fdr:g}: the "
            f"largest is {best_first[0]:.6g} (p-value {p_values[0]:.3g}), that of shuffled labels "
            f"{null[-1]:.6g}" + GRADIENTS * bool(higher)
        )
    return float(best_first[within[-1]])
