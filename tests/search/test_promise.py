"""The count of kept promises: its interval, and what simpler rules would have chosen."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.search_promise import exact_interval, picks, summarise


def test_the_exact_interval_of_clopper_and_pearson() -> None:
    low, high = exact_interval(100, 100)
    assert low == pytest.approx(0.025 ** (1 / 100))
    assert high == 1.0
    assert exact_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)


def candidate(
    budget: float, drop: float, upper_mean: float, test: float, **more: Any
) -> dict[str, Any]:
    return {
        "budget": budget, "remaining": budget, "drop": drop, "upper_mean": upper_mean,
        "one_se": False, "problem": "", "test": {"dense": 0.9, "pruned": 0.9 - test}, **more,
    }  # fmt: skip


def row(chosen: int | None, *candidates: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": "t", "metric": "accuracy", "max_drop": 0.02, "confidence": 0.9, "chosen": chosen,
        "candidates": list(candidates), "sizes": {}, "seconds": 1.0,
    }  # fmt: skip


ROWS = [
    row(
        0,
        candidate(0.8, 0.00, 0.010, test=0.00, one_se=True),
        candidate(0.4, 0.01, 0.019, test=0.03),
        candidate(0.2, 0.03, 0.040, test=0.05),
        candidate(0.1, 0.02, 0.015, test=0.06),
    ),
    row(None, candidate(0.8, 0.03, 0.040, test=0.01, one_se=True)),
]


def test_simpler_rules_choose_from_the_same_folds() -> None:
    assert list(picks(ROWS[0]).values()) == [0, 1, 3, 0]
    assert list(picks(ROWS[1]).values()) == [None, None, None, 0]


def test_a_promise_counts_where_one_was_made() -> None:
    by_rule = {line["rule"]: line for line in summarise(ROWS)}
    ours = by_rule["bound (the default)"]
    assert (ours["outer"], ours["promised"], ours["kept"], ours["share"]) == (2, 1, 1, 1.0)
    naive = by_rule["mean drop within the limit"]
    assert (naive["promised"], naive["kept"]) == (1, 0)
    assert naive["worst_test_drop"] == pytest.approx(0.06)
    assert by_rule["one_se"]["kept"] == 2
