"""Rank fusion, sums and products: by hand, and what they must not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.errors import ConfigError, ScoringError
from secateurs.scores import agreement, combine
from secateurs.types import Scores

from .made import INF, flat, quick, scored, some, whole

A = scored({"x": [1.0, 2.0], "y": [3.0, -INF, 6.0]}, "a", n_samples=9, notes=("slow",))
B = scored({"x": [4.0, 4.0], "y": [0.0, -INF, 8.0]}, "b")


@pytest.mark.parametrize(
    ("how", "weights", "expected", "label"),
    [
        # ranks of a: 1 2 3 4, of b: 2.5 2.5 1 4, out of 4
        ("rank", None, [3.5 / 8, 4.5 / 8, 0.5, -INF, 1.0], "rank(a, b)"),
        ("rank", [3, 1], [5.5 / 16, 8.5 / 16, 10 / 16, -INF, 1.0], "rank(3*a, 1*b)"),
        # means: 3 and 4
        ("sum", None, [1 / 3 + 1, 2 / 3 + 1, 1.0, -INF, 4.0], "sum(a, b)"),
        ("sum", [0.75, 0.25], [0.5, 0.75, 0.75, -INF, 2.0], "sum(0.75*a, 0.25*b)"),
        ("product", None, [2.0, 8**0.5, 0.0, -INF, 48**0.5], "product(a, b)"),
        ("product", [1, 2], [16 ** (1 / 3), 32 ** (1 / 3), 0.0, -INF, 384 ** (1 / 3)],
         "product(1*a, 2*b)"),
        ("product", [1, 0], [1.0, 2.0, 3.0, -INF, 6.0], "product(1*a, 0*b)"),
    ],
)  # fmt: skip
def test_combinations_by_hand(
    how: Any, weights: list[float] | None, expected: list[float], label: str
) -> None:
    both = combine([A, B], how, weights)
    assert flat(both) == pytest.approx(expected, rel=1e-6)
    assert (list(both.values), both.criterion) == (["x", "y"], label)
    assert (both.n_samples, both.notes) == (9, ("a: slow",))
    assert both.graph is A.graph
    assert all(v.dtype == torch.float32 for v in both.values.values())


def test_a_mapping_gives_the_labels_and_one_criterion_may_come_twice() -> None:
    assert combine({"first": A, "second": A}).criterion == "rank(first, second)"
    assert combine([A, A, B], weights=[1, 1, 2]).criterion == "rank(1*a, 1*a, 2*b)"


def test_what_a_combination_notes() -> None:
    left = scored({"x": [1.0, -INF, 3.0, 2.0]}, "left", n_samples=9)
    right = scored({"x": [-INF, 1.0, 1.0, 1.0]}, "right", n_samples=7)
    both = combine([left, right])
    assert flat(both) == [-INF, -INF, (2 + 1.5) / 4, (1 + 1.5) / 4]
    assert both.n_samples == 7
    assert both.notes == (
        "units that any of the scores counts as removed earlier are left out of all",
        "different numbers of samples: left 9, right 7",
        "right: the same score for every unit, it decides nothing",
    )


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([A, B], {"how": "mean"}, "unknown how 'mean'"),
        ([A], {}, "combine needs two or more Scores in a list or dict, got 1"),
        ([A, "b"], {}, "got a str among them"),
        ([A, B], {"weights": [1]}, "one for each of the 2 scores, got 1"),
        ([A, B], {"weights": [1, -1]}, "not negative and not all zero, got 1, -1"),
        ([A, B], {"weights": [1, math.nan]}, "must be finite, .*got 1, nan"),
        ([A, B], {"weights": [0, 0]}, "not all zero, got 0, 0"),
        ([A, scored({"x": [1, 2], "y": [-1, 0, 0]}, "c")], {"how": "product"},
         'c goes down to -1. Use how="rank" or "sum"'),
        ([A, scored({"x": [0, 0], "y": [0, 0, 0]}, "c")], {"how": "sum"}, "c scores every unit 0"),
        ([A, scored({"x": [0, 0], "y": [0, 0, 0]}, "c")], {"how": "product"}, "every unit 0"),
        ([A, scored({"x": [-INF, -INF], "y": [-INF, 1, -INF]})], {}, "no unit left to compare"),
        ([scored({}), scored({})], {}, "no target has any"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined(parts: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combine(parts, **options)


def test_a_sum_beyond_float32_is_an_error() -> None:
    with pytest.raises(ScoringError, match="leaves the range of float32; use smaller weights"):
        combine([A, B], "sum", [1e39, 1])
    with pytest.raises(ScoringError, match="nan or inf in x"):
        combine([A, replace(B, values={**B.values, "x": torch.tensor([1.0, math.nan])})])


@pytest.mark.parametrize("verb", [combine, agreement])
def test_different_targets_are_all_named(verb: Callable[[list[Scores]], object]) -> None:
    other = scored({"x": [1.0, 2.0, 3.0], "z": [1.0], "y": [0.0] * 3}, "c")
    values = {n: v for n, v in other.values.items() if n != "y"}
    with pytest.raises(ConfigError, match="take the targets that all have with subset") as caught:
        verb([A, replace(other, values=values, not_scored={"y": "no site"})])
    assert str(caught.value).splitlines()[1:] == [
        "  x: a channel (2,), c channel (3,)",
        "  y: a channel (3,), c nothing (no site)",
        "  z: a nothing, c channel (1,)",
    ]


pairs = st.lists(st.tuples(whole, some, st.booleans()), min_size=2, max_size=30)


def two(rows: Sequence[tuple[float, float, bool]], change: Callable[[float], float]) -> Scores:
    """The mean rank of two scores, the first of them changed; some units removed earlier."""
    cut = len(rows) // 2
    first = [change(a) if alive else -INF for a, _, alive in rows]
    second = [b for _, b, _ in rows]
    parts = [scored({"x": line[:cut], "y": line[cut:]}, "s") for line in (first, second)]
    return combine(parts, "rank", [2, 1])


@quick
@given(pairs.filter(lambda rows: any(alive for *_, alive in rows)))
def test_rank_fusion_knows_only_the_order_of_each(rows: list[tuple[float, float, bool]]) -> None:
    expected = flat(two(rows, lambda a: a))
    assert flat(two(rows, lambda a: a**3 - 7)) == expected
    assert flat(two(rows, lambda a: math.exp(a / 20))) == expected


@quick
@given(st.lists(st.tuples(whole, whole), min_size=1, max_size=30), st.sampled_from([0.125, 8, 1e6]))
def test_a_sum_knows_no_scale(rows: list[tuple[float, float]], factor: float) -> None:
    a, b = ([row[i] + 0.5 for row in rows] for i in (0, 1))
    plain = combine([scored({"x": a}), scored({"x": b})], "sum")
    scaled = combine([scored({"x": [factor * x for x in a]}), scored({"x": b})], "sum")
    assert flat(scaled) == pytest.approx(flat(plain), rel=1e-5, abs=1e-6)


def test_the_laws_can_fail() -> None:
    """A sum does not survive a monotone map, nor a sum of raw scores a factor."""
    a, b = scored({"x": [1, 2, 3]}), scored({"x": [3, 1, 2]})
    assert flat(combine([replace(a, values={"x": a.values["x"] ** 3}), b], "sum")) != pytest.approx(
        flat(combine([a, b], "sum"))
    )
