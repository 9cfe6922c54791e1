"""The choice: every rule on rows that can be computed by hand, and its promise in simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from secateurs.errors import BudgetError
from secateurs.searching.choice import decide, families, front, judge
from secateurs.searching.config import Search
from secateurs.searching.results import Choice, Standing, Trial
from secateurs.searching.statistics import Design, family, floor_of, standing, student_tail
from tests.search.drops import asked, trial

T3 = 1.637744  # Student's t with 3 degrees of freedom at 0.9, from a table
DROPS = (0.0, 0.01, 0.02, 0.01)  # mean 0.01, deviation sqrt(0.0002 / 3) = 0.008165
FIXED = Design(4, overlap=0.0, samples=0)


def test_statistics_of_disjoint_folds_by_hand() -> None:
    one = standing(trial(0, DROPS, 0.5), Design(4, 0.0, 0, max_drop=0.02, level=0.1))
    assert one.drop == pytest.approx(0.01)
    assert one.spread == pytest.approx(0.00816497, abs=1e-7)
    assert one.se == pytest.approx(0.00408248, abs=1e-7)
    assert one.upper_mean == pytest.approx(0.01 + T3 * 0.00408248, abs=1e-6)
    assert one.upper == pytest.approx(0.01 + T3 * 0.00816497 * math.sqrt(1.25), abs=1e-6)
    assert one.metric == pytest.approx(0.89)
    assert not one.within


def test_training_parts_that_overlap_widen_the_bounds() -> None:
    """Nadeau and Bengio: 1/k becomes 1/k + held-out over training samples."""
    one = standing(trial(0, DROPS, 0.5), Design(4, 1 / 3, 0, level=0.1))
    assert one.se == pytest.approx(0.00816497 * math.sqrt(1 / 4 + 1 / 3), abs=1e-7)
    assert one.upper == pytest.approx(
        0.01 + T3 * 0.00816497 * math.sqrt(1 + 1 / 4 + 1 / 3), abs=1e-6
    )


def test_the_p_value_is_the_level_at_which_the_bound_meets_the_limit() -> None:
    one = standing(trial(0, DROPS, 0.5), Design(4, 1 / 3, 0, max_drop=0.02, level=0.1))
    assert one.p is not None
    at = standing(trial(0, DROPS, 0.5), Design(4, 1 / 3, 0, max_drop=0.02, level=one.p))
    assert at.upper == pytest.approx(0.02)
    assert student_tail(T3, 3) == pytest.approx(0.1, abs=1e-6)


def test_a_loss_drops_when_it_grows() -> None:
    losses = trial(0, [-d for d in DROPS], 0.5, dense=0.3)  # the loss grows by these amounts
    one = standing(losses, Design(4, 0.0, 0, maximize=False))
    assert one.drop == pytest.approx(0.01)
    assert standing(losses, FIXED).drop == pytest.approx(-0.01)


def test_equal_folds_of_a_share_have_a_spread_as_if_one_more_sample_had_changed() -> None:
    same = trial(0, (0.0, 0.0, 0.0, 0.0), 0.5, samples=100, share=True)
    design = Design(4, 0.0, 400, level=0.1)
    one = standing(same, design)
    assert one.spread == one.floor == pytest.approx(math.sqrt(1 / 402 / 100))
    assert one.upper == pytest.approx(T3 * math.sqrt(1 / 402 / 100 * 1.25), abs=1e-6)
    # Rule of three: with 0 of 400 changed, 3/400 bounds the expected drop at 0.95.
    bound = standing(same, Design(4, 0.0, 400, level=0.05)).upper
    assert bound is not None
    assert bound > 3 / 400


def test_the_floor_counts_the_samples_that_must_have_changed() -> None:
    """Two of 200 samples: rate (2 + 1) / (200 + 2), mean drop 0.01, in folds of 100."""
    lost = trial(0, (0.01, 0.01), 0.5, samples=100, share=True)
    floor = floor_of(lost.folds, Design(2, 0.0, 200))
    assert floor == pytest.approx(math.sqrt((3 / 202 - 0.01**2) / 100))


def test_counts_say_nothing_about_a_metric_that_does_not_count() -> None:
    same = trial(0, (0.0, 0.0), 0.5, samples=100, share=False)
    assert floor_of(same.folds, Design(2, 0.0, 200)) == 0.0


def test_equal_folds_of_another_metric_take_the_spread_of_the_steadiest_other() -> None:
    found = judge([trial(0, (0.0,) * 4, 0.8), trial(1, DROPS, 0.5)], asked(), FIXED)
    assert [s.spread for s in found] == pytest.approx([0.00816497, 0.00816497], abs=1e-7)
    alone = judge([trial(0, (0.0,) * 4, 0.8)], asked(), FIXED)
    assert (alone[0].spread, alone[0].upper) == (0.0, 0.0)
    assert "not known" in " ".join(decide(alone, asked()).why)


def test_a_family_is_everything_but_the_size() -> None:
    values = {"budget.macs": 0.5, "budget": {"macs": 1}, "threshold.k": 1.0, "criterion": "taylor"}
    assert family(values) == {"criterion": "taylor"}
    trials = [trial(i, DROPS, 0.5, criterion=c) for i, c in enumerate("aab")]
    assert families(trials) == 2


def steps(*means: float, spread: float = 0.001) -> list[Trial]:
    """A path of ever smaller candidates with these mean drops and four folds around each."""
    around = (-spread, spread, -spread, spread)
    return [
        trial(i, [m + a for a in around], round(0.9 - 0.1 * i, 1)) for i, m in enumerate(means)
    ]  # fmt: skip


def test_the_smallest_that_passed_is_taken_and_the_rest_is_explained() -> None:
    found = judge(steps(0.001, 0.005, 0.03, 0.001), asked(), FIXED)
    assert [(s.tested, s.within, s.passed) for s in found] == [
        (True, True, True),
        (True, True, True),
        (True, False, False),  # the sequence stops here
        (False, True, False),  # lucky, and not taken
    ]
    choice = decide(found, asked(), metric="accuracy")
    assert choice.candidate is not None
    assert choice.candidate.number == 1
    assert choice.level == pytest.approx(0.1)
    text = " ".join(choice.why)
    assert "Chosen, the smallest that passed: budget.macs=0.8" in text
    assert "Not budget.macs=0.7: its bound 0.03" in text
    assert "1 smaller ones after a failed one" in text


def test_the_order_of_the_trials_does_not_matter() -> None:
    trials = steps(0.001, 0.005, 0.03, 0.001)
    assert judge(trials[::-1], asked(), FIXED) == judge(trials, asked(), FIXED)


def test_families_share_the_error_and_each_has_its_own_sequence() -> None:
    trials = [
        trial(0, (0.001, 0.002, 0.001, 0.002), 0.8, criterion="a"),
        trial(1, (0.030, 0.031, 0.030, 0.031), 0.4, criterion="a"),
        trial(2, (0.001, 0.002, 0.001, 0.002), 0.7, criterion="b"),
        trial(3, (0.004, 0.005, 0.004, 0.005), 0.3, criterion="b"),
    ]
    found = judge(trials, asked(), FIXED)
    alone = judge(trials[:2], asked(), FIXED)
    assert found[0].upper is not None
    assert alone[0].upper is not None
    assert found[0].upper > alone[0].upper  # at 0.05 instead of 0.1
    choice = decide(found, asked())
    assert choice.candidate is not None
    assert choice.candidate.number == 3
    assert choice.level == pytest.approx(0.05)
    assert "2 families share the error of 0.1" in " ".join(choice.why)


def test_of_those_that_passed_at_one_size_the_better_metric_decides() -> None:
    trials = [
        trial(0, (0.002, 0.003, 0.002, 0.003), 0.400, criterion="a"),
        trial(1, (0.001, 0.002, 0.001, 0.002), 0.403, criterion="b"),  # 0.75 % larger
        trial(2, (0.000, 0.001, 0.000, 0.001), 0.405, criterion="c"),  # 1.25 % larger
    ]
    choice = decide(judge(trials, asked(), FIXED), asked())
    assert choice.candidate is not None
    assert choice.candidate.number == 1
    assert "2 that passed differ by at most 1 % in size" in " ".join(choice.why)


def test_nothing_passes_and_the_nearest_is_named() -> None:
    found = judge(steps(0.05, 0.03, 0.08), asked(), FIXED)
    choice = decide(found, asked(), metric="accuracy")
    assert choice.candidate is None
    with pytest.raises(BudgetError, match=r"drop of 0.02 .* Nearest: budget.macs=0.8 .* 0.0300"):
        choice.require()


def test_the_fastest_is_ordered_by_latency() -> None:
    trials = [
        trial(0, (0.001, 0.002, 0.001, 0.002), 0.2, latency=5.0),
        trial(1, (0.003, 0.004, 0.003, 0.004), 0.8, latency=3.0),
        trial(2, (0.030, 0.031, 0.030, 0.031), 0.5, latency=1.0),
    ]
    search = asked(goal="fastest")
    choice = decide(judge(trials, search, FIXED), search)
    assert choice.candidate is not None
    assert choice.candidate.number == 1
    assert "Not budget.macs=0.5" in " ".join(choice.why)


def test_without_a_latency_nothing_is_fastest() -> None:
    search = asked(goal="fastest")
    choice = decide(judge(steps(0.001), search, FIXED), search)
    assert "no candidate has a figure for latency" in choice.problem


def test_one_standard_error_takes_the_smallest_near_the_best() -> None:
    """The best has 0.88, 0.92, 0.88, 0.92, so its standard error is 0.0231 / 2 = 0.01155."""
    search = asked(rule="one_se", max_drop=None)
    trials = [
        trial(0, (0.02, -0.02, 0.02, -0.02), 0.8),  # 0.9 on average: the best
        trial(1, (0.011,) * 4, 0.5),  # 0.889: within
        trial(2, (0.012,) * 4, 0.2),  # 0.888: not within
    ]
    found = judge(trials, search, FIXED)
    assert [s.one_se for s in found] == [True, True, False]
    assert found[0].metric_se == pytest.approx(0.02309401 / 2)
    choice = decide(found, search, metric="accuracy")
    assert choice.candidate is not None
    assert choice.candidate.number == 1
    assert choice.level is None
    assert "2 are within one standard error" in " ".join(choice.why)


def test_one_standard_error_of_a_loss() -> None:
    search = asked(rule="one_se", max_drop=None)
    trials = [
        trial(0, (0.02, -0.02, 0.02, -0.02), 0.8),
        trial(1, (-0.011,) * 4, 0.5),
        trial(2, (-0.012,) * 4, 0.2),
        trial(3, (0.03,) * 4, 0.1, problem="budget out of reach"),
    ]
    found = judge(trials, search, Design(4, 0.0, 0, maximize=False))
    assert [s.one_se for s in found] == [True, True, False, False]


def test_a_limit_that_a_rule_does_not_test_is_told() -> None:
    search = asked(goal="best")
    choice = decide(judge(steps(0.001, -0.002), search, FIXED), search, metric="accuracy")
    assert choice.candidate is not None
    assert choice.candidate.number == 1
    assert "max_drop is not tested" in " ".join(choice.why)
    assert "0.0030 behind" in " ".join(choice.why)


def test_the_front_holds_what_nothing_beats() -> None:
    """Metric and MACs: (0.9, 0.8), (0.88, 0.8) beaten, (0.89, 0.5), (0.89, 0.6) beaten."""
    trials = [
        trial(0, (0.0,) * 4, 0.8),
        trial(1, (0.02,) * 4, 0.8),
        trial(2, (0.01,) * 4, 0.5),
        trial(3, (0.01,) * 4, 0.6),
        trial(4, (0.5,) * 4, 0.1, problem="unreachable"),
    ]
    search = asked(goal="pareto", max_drop=None)
    found = judge(trials, search, FIXED)
    assert front(found, True) == [0, 2]
    assert [s.front for s in found] == [True, False, True, False, False]
    choice = decide(found, search)
    assert choice.candidate is None
    assert not choice.problem
    assert "2 of them are not beaten" in " ".join(choice.why)


def test_a_slower_twin_is_beaten_only_where_all_were_timed() -> None:
    trials = [trial(0, (0.0,) * 4, 0.5, latency=2.0), trial(1, (0.0,) * 4, 0.5, latency=1.0)]
    assert front(judge(trials, asked(), FIXED), True) == [1]
    trials[1] = trial(1, (0.0,) * 4, 0.5)
    assert front(judge(trials, asked(), FIXED), True) == [0, 1]


def test_what_failed_or_is_unfinished_is_left_out_and_told() -> None:
    trials = steps(0.001, 0.002, 0.003)
    trials[1] = Trial(trials[1].candidate, trials[1].folds[:3])
    trials[2] = Trial(trials[2].candidate, (), "budget out of reach")
    found = judge(trials, asked(), FIXED)
    assert [s.problem for s in found] == ["", "not finished: 3 of 4 folds", "budget out of reach"]
    text = " ".join(decide(found, asked()).why)
    assert "2 could not be judged; the first: budget.macs=0.8: not finished" in text
    nothing = decide(judge(trials[1:], asked(), FIXED), asked())
    assert "budget out of reach" in nothing.problem


def test_an_adaptive_sampler_is_said_to_loosen_the_promise() -> None:
    search = asked(sampler="tpe", trials=2)
    choice = decide(judge(steps(0.001, 0.002), search, FIXED), search)
    assert "the confidence is not exact" in " ".join(choice.why)


def test_standing_and_choice_survive_json() -> None:
    found = judge(steps(0.001, 0.05), asked(), FIXED)
    for one in found:
        assert Standing.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    choice = decide(found, asked())
    assert Choice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice


# -- the promise, in simulation -------------------------------------------------------------------

LIMIT, K = 1.0, 5


def simulated(
    true: np.ndarray[Any, Any], repeats: int, common: float, seed: int
) -> Iterator[tuple[list[Standing], np.ndarray[Any, Any]]]:
    """Standings from noisy folds, and the drops of one more network of each candidate.

    `common` is the share of the variance that all candidates of a fold have together.
    """
    rng, search = np.random.default_rng(seed), asked(max_drop=LIMIT)
    for _ in range(repeats):
        noise = math.sqrt(common) * rng.normal(size=(1, K + 1))
        noise = 0.3 * (noise + math.sqrt(1 - common) * rng.normal(size=(len(true), K + 1)))
        drops = true[:, None] + noise
        trials = [
            trial(i, row[:K].tolist(), 1 - i / 100, dense=0.0) for i, row in enumerate(drops)
        ]  # fmt: skip
        yield judge(trials, search, Design(K, 0.0, 0)), drops[:, K]


def last(found: list[Standing], rule: str) -> int | None:
    """What a rule takes; "naive" picks the smallest that looks well, wherever it stands."""
    if rule == "bound":
        taken = [i for i, s in enumerate(found) if s.passed]
    elif rule == "naive":
        taken = [i for i, s in enumerate(found) if s.within]
    else:
        taken = []
        for i, s in enumerate(found):
            if s.upper_mean is None or s.upper_mean > LIMIT:
                break
            taken.append(i)
    return taken[-1] if taken else None


def most(n: int, rate: float = 0.1) -> float:
    """Errors that a rule of that rate stays below in all but one of a thousand tests."""
    return n * rate + 3.1 * math.sqrt(n * rate * (1 - rate))


def test_searching_many_candidates_errs_no_more_often_than_promised() -> None:
    """40 candidates are too small by a hair; each looks well now and then by chance."""
    true = np.array([0.0, 0.2, 0.4, *[1.01] * 40])
    wrong = {"bound": 0, "naive": 0, "expected": 0}
    for found, _ in simulated(true, 300, common=0.0, seed=0):
        for rule in wrong:
            taken = last(found, rule)
            wrong[rule] += taken is not None and true[taken] > LIMIT
    assert wrong["bound"] <= most(300)
    assert wrong["expected"] <= most(300)
    assert wrong["naive"] > most(300)  # this is what the fixed sequence prevents


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_the_one_network_that_is_handed_over_keeps_the_limit(common: float) -> None:
    """A bound on the expected drop is not enough for that: half of the networks are worse."""
    true = np.linspace(0.0, 2.0, 21)
    broken, made = {"bound": 0, "expected": 0}, {"bound": 0, "expected": 0}
    for found, drops in simulated(true, 400, common, seed=1):
        for rule in broken:
            taken = last(found, rule)
            made[rule] += taken is not None
            broken[rule] += taken is not None and bool(drops[taken] > LIMIT)
    assert made["bound"] > 300
    assert broken["bound"] <= most(made["bound"])
    assert broken["expected"] > most(made["expected"])


def test_the_levels_of_a_search_are_those_of_its_confidence() -> None:
    one = Search({"budget.macs": [0.5, 0.4]}, max_drop=0.02, confidence=0.95)
    found = judge([trial(0, (0.0, 0.01, 0.02, 0.01, 0.01), 0.5)], one, Design(5, 0.0, 0))
    assert found[0].upper == pytest.approx(0.01 + 2.131847 * 0.00707107 * math.sqrt(1.2), abs=1e-6)
