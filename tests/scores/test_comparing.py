"""Agreement: by hand, and beside scipy."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from secateurs.errors import ConfigError
from secateurs.scores import agreement
from secateurs.scores.units import ranks
from secateurs.types import Scores

from .made import INF, quick, scored, some, whole


@quick
@given(st.lists(st.one_of(some, st.sampled_from([0.0, -0.0, 1.0])), min_size=1, max_size=40))
def test_ranks_are_those_of_scipy(line: list[float]) -> None:
    assert ranks(torch.tensor(line)).tolist() == rankdata(line, method="average").tolist()


@quick
@given(st.lists(st.tuples(whole, some, st.sampled_from([0.0, 1.0])), min_size=3, max_size=40))
def test_correlation_is_that_of_scipy(rows: list[tuple[float, float, float]]) -> None:
    lines = [list(line) for line in zip(*rows, strict=True)]
    found = agreement([scored({"x": ln[:1], "y": ln[1:]}, str(i)) for i, ln in enumerate(lines)])
    for i, a in enumerate(lines):
        for j, b in enumerate(lines):
            constant = len(set(a)) == 1 or len(set(b)) == 1
            expected = math.nan if constant else float(spearmanr(a, b).statistic)
            assert found.correlation[i][j] == pytest.approx(expected, abs=1e-9, nan_ok=True)


UP = scored({"x": [1, 2, 3, 4]}, "up")
ODD = scored({"x": [2, 1, 4, 3]}, "odd")
DOWN = scored({"x": [4, 3, 2, 1]}, "down")


def test_agreement_by_hand() -> None:
    found = agreement([UP, ODD, DOWN])
    assert found.labels == ("up", "odd", "down")
    # 1 - 6 sum d^2 / (n (n^2 - 1)): d^2 is 4 for up and odd, 20 for up and down, 16 for the rest
    assert np.array(found.correlation) == pytest.approx(
        np.array([[1, 0.6, -1], [0.6, 1, -0.6], [-1, -0.6, 1]])
    )
    assert overlap(0.5) == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert overlap(0.25) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]  # of {0}, {1}, {3}
    # of {0, 1, 2}, {0, 1, 3}, {1, 2, 3}
    assert overlap(0.75) == [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]]
    assert (found.n_units, found.sparsity, found.within, found.notes) == (4, 0.5, "network", ())


def overlap(sparsity: float) -> list[list[float]]:
    return [list(row) for row in agreement([UP, ODD, DOWN], sparsity=sparsity).overlap]


def test_a_unit_on_the_cut_counts_by_its_share() -> None:
    tied = scored({"x": [1, 5, 5, 9]}, "tied")  # removes 1, 1/2, 1/2, 0 of each unit
    assert agreement([UP, tied]).overlap[0][1] == pytest.approx(1.5 / 2.5)
    assert agreement([UP, DOWN], sparsity=0.625).overlap[0][1] == pytest.approx(1 / 4)


def test_inside_targets_it_is_a_mean_weighted_by_units() -> None:
    a = scored({"x": [1, 2, 3, 4], "y": [10, 20]}, "a")
    b = scored({"x": [2, 1, 4, 3], "y": [2, 1]}, "b")
    found = agreement([a, b], within="target")
    assert found.correlation[0][1] == pytest.approx((4 * 0.6 + 2 * -1) / 6)
    assert found.overlap[0][1] == pytest.approx((4 * 1 + 2 * 0) / 6)
    over = agreement([a, b]).correlation[0][1]
    assert over == pytest.approx(float(spearmanr([1, 2, 3, 4, 10, 20], [2, 1, 4, 3, 2, 1])[0]))


def test_a_constant_score_agrees_with_nothing() -> None:
    flat_everywhere = scored({"x": [5, 5, 5, 5]}, "flat|5")
    found = agreement([UP, flat_everywhere])
    for matrix in (found.correlation, found.overlap):
        assert [math.isnan(x) for row in matrix for x in row] == [False, True, True, True]
    assert found.notes == ("flat|5: one score for all units, so nothing can be compared",)
    assert found.to_dict()["correlation"] == [[1.0, None], [None, None]]
    assert found.table().splitlines()[4:6] == [
        "| up      | +1.00 |       - |",
        "| flat\\|5 |     - |       - |",
    ]
    assert found.table().splitlines()[-1] == f"Note: {found.notes[0]}"


def test_a_target_with_one_score_is_left_out_of_the_mean() -> None:
    a = scored({"x": [1, 2, 3, 4], "y": [7, 7], "z": [-INF, 1]}, "a")
    b = scored({"x": [2, 1, 4, 3], "y": [2, 1], "z": [1, 1]}, "b")
    found = agreement([a, b], within="target")
    assert found.correlation[0][1] == pytest.approx(0.6)
    assert found.n_units == 7
    assert found.notes == (
        "units that any of the scores counts as removed earlier are left out of all",
        "a: one score for all units of y, z (2 of 3 targets), so nothing can be compared",
        "b: one score for all units of z (1 of 3 targets), so nothing can be compared",
    )


def test_the_figures_are_plain_data() -> None:
    found = agreement({"first": UP, "second": UP}, within="target", sparsity=0.3)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain == {
        "labels": ["first", "second"],
        "correlation": [[1.0, 1.0], [1.0, 1.0]],
        "overlap": [[1.0, 1.0], [1.0, 1.0]],
        "within": "target", "sparsity": 0.3, "n_units": 4, "notes": [],
    }  # fmt: skip
    assert found == agreement({"first": UP, "second": UP}, within="target", sparsity=0.3)
    assert "inside each target (4 units)" in found.table()
    assert "Overlap of the 30 % that would go first (Jaccard, by chance 0.18)" in found.table()


def test_columns_of_a_wide_table_are_numbered() -> None:
    named = {f"finite_difference(step=0.{i})": UP for i in range(4)}
    lines = agreement(named).table().splitlines()
    assert lines[2] == f"| {'':29} |     1 |     2 |     3 |     4 |"
    assert lines[4].startswith("| 1 finite_difference(step=0.0) | +1.00 |")
    assert len({len(line) for line in lines[2:8]}) == 1


@pytest.mark.parametrize(
    ("given_scores", "options", "message"),
    [
        ([UP], {}, "agreement needs two or more Scores in a list or dict, got 1"),
        ([UP, UP], {}, "labels must differ, got up more than once; give a dict"),
        ([UP, ODD], {"within": "layer"}, "unknown within 'layer'"),
        ([UP, ODD], {"sparsity": 90.0}, r"sparsity must be in \(0, 1\), got 90. Did you mean 0.9"),
        ([UP, ODD], {"sparsity": 0.0}, "got 0"),
        ([UP, ODD], {"sparsity": math.nan}, "got nan"),
    ],
)
def test_what_cannot_be_compared(
    given_scores: list[Scores], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        agreement(given_scores, **options)
