"""`Budget(metric_drop=)`: planted metrics whose answer is known, and a real network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs.errors import BudgetError
from secateurs.finetuning import Finetune, finetune
from secateurs.masks import check_masks
from secateurs.pipeline import PruneResult, Stage, prune, prune_stages
from secateurs.schedules import Schedule
from secateurs.tasks import get_task
from secateurs.types import Batch, Budget

N = 64


def net() -> nn.Sequential:
    """MACs are 6 for each of 64 units, so the share of units is the share of MACs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, N), nn.ReLU(), nn.Linear(N, 2))


def data() -> list[Batch]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return [(x, (x[:, 0] > 0).long())]


BATCHES = data()
X = BATCHES[0][0]


def alive(model: nn.Module) -> int:
    return int((model.get_parameter("0.weight") != 0).any(dim=1).sum())


def by_size(cost: Callable[[float], float]) -> Callable[[nn.Module], float]:
    """A metric of 1 that falls by a planted function of the share of units that is gone."""
    return lambda model: 1 - cost(1 - alive(model) / N)


def run(**options: Any) -> PruneResult:
    given: dict[str, Any] = {
        "budget": Budget(metric_drop=0.3), "evaluate": by_size(lambda gone: gone),
        "example_inputs": X, **options,
    }  # fmt: skip
    return prune(net(), BATCHES, F.cross_entropy, **given)


# --- the answer is known -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "limit", "smallest"),
    [
        (lambda gone: gone, 0.3, 45),  # 19 / 64 = 0.297 are gone; 20 / 64 = 0.3125
        (lambda gone: gone, 0.5, 32),
        (lambda gone: gone**4, 0.1, 28),  # (36/64)^4 = 0.1001 is too much, (35/64)^4 = 0.0894 not
        (lambda gone: 0.0 if gone < 0.9 else 1.0, 0.01, 7),  # a cliff: 57 / 64 are gone
        (lambda gone: max(0.0, gone - 0.1), 0.0, 58),  # 6 / 64 = 0.094
    ],
)
def test_the_smallest_is_found_but_for_two_percent(
    cost: Callable[[float], float], limit: float, smallest: int
) -> None:
    result = run(evaluate=by_size(cost), budget=Budget(metric_drop=limit))
    assert result.report.met
    units = alive(result.model)
    assert smallest <= units <= max(smallest + 1, smallest * 1.04)
    assert cost(1 - units / N) <= limit + 1e-9
    check_masks(result.masked, result.plan.masks)
    assert result.report.asked == {"metric_drop": limit}
    kept = [s for s in result.report.steps if not s.rolled_back]
    assert kept[-1].remaining["macs"] == units / N
    sizes = [s.remaining["units"] or 0 for s in kept]
    assert all(later < earlier for earlier, later in pairwise(sizes))


def test_the_row_of_tries_by_hand() -> None:
    """Steps of 80 %: 51 units, 40 (too few); halves of the gap: 46, 43, 44, then 45."""
    result = run()
    tries = [(round((s.remaining["units"] or 0) * N), s.rolled_back) for s in result.report.steps]
    assert tries == [(51, False), (40, True), (46, False), (43, True), (44, True), (45, False)]
    assert alive(result.model) == 45
    notes = result.report.notes
    assert sum("was rolled back" in note for note in notes) == 3
    assert any(
        note.startswith("macs=0.7031 with metric 0.7031, 0.2969 worse than dense (at most 0.3 ")
        and "macs=0.6875 was too small" in note
        for note in notes
    )


def test_weights_are_counted_in_units() -> None:
    def evaluate(model: nn.Module) -> float:
        weights = [p for p in model.parameters() if p.dim() > 1]
        return sum(int((w != 0).sum()) for w in weights) / (6 * N)

    result = run(granularity="weight", criterion="magnitude", evaluate=evaluate)
    left = result.report.reached["units"]
    assert left is not None
    assert 0.7 <= left <= 0.7 * 1.03


def test_an_error_that_must_not_rise() -> None:
    result = run(evaluate=lambda m: 1 - alive(m) / N, maximize=False)
    assert alive(result.model) == 45


def test_everything_may_go() -> None:
    """No size hurts: every target keeps its fewest units, and the note says that this is why."""
    result = run(evaluate=lambda m: 1.0, min_keep=2)
    assert alive(result.model) == 2
    assert any("every target keeps its fewest units" in note for note in result.report.notes)


def test_the_limit_of_steps_is_said() -> None:
    result = run(evaluate=lambda m: 1.0, schedule=Schedule("exponential", steps=3))
    assert alive(result.model) == 32  # 51, 40, 32
    assert result.report.met
    (note,) = [n for n in result.report.notes if "limit of 3 steps" in n]
    assert 'Schedule("exponential", steps=6)' in note


def test_nothing_can_be_cut() -> None:
    with pytest.raises(BudgetError) as caught:
        run(evaluate=by_size(lambda gone: float(gone > 0)), allow_missed=True)
    text = str(caught.value)
    assert text.startswith("nothing can be cut: step ")
    assert "metric 0 is 1 worse than the dense 1, at most 0.3 is allowed" in text
    assert text.endswith("Take a longer fine-tuning, metric_drop above 0.3")


# --- with sizes ----------------------------------------------------------------------------------


def test_sizes_that_are_reached_end_it() -> None:
    result = run(budget=Budget(macs=0.8, metric_drop=0.3))
    assert alive(result.model) == 51
    assert len(result.report.steps) == 1
    assert result.report.met
    assert result.report.asked == {"macs": 0.8, "metric_drop": 0.3}


def test_equal_factors_to_the_sizes() -> None:
    """Half of the MACs is four steps of 0.5^(1/4) = 0.841: 53.8, 45.3, 38.1 and 32 units."""
    result = run(budget=Budget(macs=0.5, metric_drop=0.6))
    found = [round((s.remaining["units"] or 0) * N) for s in result.report.steps]
    assert found == [53, 45, 38, 32]


def test_a_schedule_of_ones_own_to_the_sizes() -> None:
    result = run(budget=Budget(macs=0.5, metric_drop=0.6), schedule=Schedule("linear", 2))
    assert [s.remaining["units"] for s in result.report.steps] == [0.75, 0.5]
    assert [s.fraction for s in result.report.steps] == [0.5, 1.0]


def test_sizes_out_of_reach_are_an_error_with_the_nearest() -> None:
    with pytest.raises(BudgetError) as caught:
        run(budget=Budget(macs=0.5, metric_drop=0.3))
    text = str(caught.value)
    assert text.startswith(
        "Budget(macs=0.5, metric_drop=0.3): the nearest that was reached is macs=0.7031 with "
        "metric 0.7031, 0.2969 worse than dense (at most 0.3 worse is allowed). Beyond it: step "
    )
    assert text.endswith(
        "Ask for that, take a longer fine-tuning or metric_drop above 0.3, or take it with "
        "allow_missed=True"
    )


def test_sizes_that_may_be_missed() -> None:
    result = run(budget=Budget(macs=0.5, metric_drop=0.3), allow_missed=True)
    assert alive(result.model) == 45
    assert not result.report.met
    assert any("missed, which was allowed" in note for note in result.report.notes)


def test_sizes_below_what_can_be_reached_at_all() -> None:
    with pytest.raises(BudgetError, match="allows 1 of"):
        run(budget=Budget(macs=1, metric_drop=1.0))
    result = run(budget=Budget(macs=1, metric_drop=1.0), allow_missed=True)
    assert alive(result.model) == 1
    assert not result.report.met


# --- several stages, scored once, auto -----------------------------------------------------------


def test_a_second_stage_goes_on_from_the_first() -> None:
    stages = [
        Stage(Budget(units=0.8), schedule=Schedule("one_shot", 1)),
        Stage(Budget(metric_drop=0.3), criterion="magnitude"),
    ]
    result = prune_stages(
        net(), BATCHES, F.cross_entropy, stages, example_inputs=X,
        evaluate=by_size(lambda gone: gone),
    )  # fmt: skip
    assert alive(result.model) == 45
    first = result.report.steps[0]
    assert first.remaining["units"] == 51 / N
    assert result.report.asked.keys() == {"stage 1", "stage 2"}


def test_scored_once() -> None:
    once = Schedule("exponential", steps=20, rescore=False)
    result = run(schedule=once)
    at_once = run(budget=Budget(units=45), schedule=Schedule("one_shot", 1))
    assert result.plan.removed["0:neuron"].tolist() == at_once.plan.removed["0:neuron"].tolist()


def test_auto_loses_at_most_a_hundredth() -> None:
    """The first step is too much already: finer ones between it and the dense model."""
    result = run(budget="auto", evaluate=by_size(lambda gone: 0.1 * gone))
    assert 58 <= alive(result.model) <= 59  # 0.1 x 6 / 64 = 0.0094
    assert result.report.asked == {"metric_drop": 0.01}


def test_auto_keeps_twice_what_lost_too_much() -> None:
    """51, 40, 32, 26 and 20 of 64 units are good, 16 are not: back to 32."""
    result = run(budget="auto", evaluate=by_size(lambda gone: 0.02 * (gone > 0.7)))
    assert [row.metric_masked for row in result.report.steps] == [1, 1, 1, 1, 1, 0.98]
    assert [row.rolled_back for row in result.report.steps] == [False] * 3 + [True] * 3
    assert alive(result.model) == 32
    assert any("a margin for noise" in note for note in result.report.notes)


def test_auto_keeps_a_margin_where_nothing_was_bad() -> None:
    """Down to a single unit of 64 nothing is lost: two units are twice as large."""
    result = run(budget="auto", evaluate=by_size(lambda gone: 0.0))
    assert alive(result.model) == 2
    assert result.report.steps[-1].rolled_back


def test_auto_with_no_room_for_a_margin() -> None:
    """The second step is bad: nothing is twice as large, so the first one it is."""
    result = run(budget="auto", evaluate=by_size(lambda gone: 0.02 * (gone > 0.3)))
    assert [row.rolled_back for row in result.report.steps] == [False, True]
    assert any("no room for a margin" in note for note in result.report.notes)


def test_progress_never_goes_beyond_its_end() -> None:
    seen: list[tuple[str, int, int]] = []
    run(progress=lambda *told: seen.append(told))
    assert all(done <= total == 26 for _, done, total in seen)
    assert [done for _, done, _ in seen[:-1]] == sorted(done for _, done, _ in seen[:-1])


# --- a real network ------------------------------------------------------------------------------


def test_digits_within_one_point() -> None:
    """A trained network becomes several times smaller for at most one point of accuracy."""
    task = get_task("digits-mlp")
    split = task.load(0)
    torch.manual_seed(0)
    model = task.build()
    finetune(model, split.train, task.loss_fn, Finetune(epochs=10, lr=0.003))
    state = torch.get_rng_state()

    def evaluate(m: nn.Module) -> dict[str, float]:
        return task.metric(m, split.validation)

    result = prune(
        model, split.train, task.loss_fn, example_inputs=split.example_inputs,
        budget=Budget(metric_drop=0.01), finetune=Finetune(epochs=1, lr=0.003), evaluate=evaluate,
    )  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())
    row = result.report.rows[0]
    assert row.before is not None
    assert row.after is not None
    assert row.before > 0.9
    assert row.after >= row.before - 0.01 - 1e-9
    assert row.after == evaluate(result.model)["accuracy"]
    assert (result.report.reached["macs"] or 1) < 0.5
    assert any(step.rolled_back for step in result.report.steps)
