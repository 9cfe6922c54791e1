"""The guard and what may be missed: rolled back exactly, and told with figures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.errors import BudgetError, ConfigError
from secateurs.finetuning import Finetune
from secateurs.masks import check_masks
from secateurs.pipeline import PruneResult, Stage, prune, prune_stages
from secateurs.pipeline import run as run_room
from secateurs.schedules import Schedule
from secateurs.types import Batch, Budget, Threshold

N = 20


def net() -> nn.Sequential:
    """With a batch norm, whose buffers must be rolled back too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, N), nn.BatchNorm1d(N), nn.ReLU(), nn.Linear(N, 2))


def data() -> list[Batch]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] + x[:, 1] > 0).long()
    return list(zip(torch.split(x, 16), torch.split(y, 16), strict=True))


BATCHES = data()
X = BATCHES[0][0]
HEAL = Finetune(epochs=1, lr=0.01)
FIVE = Schedule("linear", steps=5)


def alive(model: nn.Module) -> int:
    """Units that are left, masked or shrunk."""
    weight = model.get_parameter("0.weight")
    return int((weight != 0).any(dim=1).sum())


def planted(drops: dict[int, float], *, error: bool = False) -> Callable[[nn.Module], float]:
    """A metric of 0.9 that is worse by what the table says for so many units."""

    def evaluate(model: nn.Module) -> float:
        drop = drops.get(alive(model), 0.0)
        return 0.1 + drop if error else 0.9 - drop

    return evaluate


def run(**options: Any) -> PruneResult:
    """From 20 units to 5 in steps of three: 17, 14, 11, 8, 5."""
    given: dict[str, Any] = {
        "budget": Budget(units=0.25), "schedule": FIVE, "finetune": HEAL, "example_inputs": X,
        **options,
    }  # fmt: skip
    return prune(net(), BATCHES, F.cross_entropy, **given)


def hash_of(model: nn.Module) -> str:
    """Of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class Watched:
    """A metric that remembers the masked states that it was asked about last, by units left."""

    def __init__(self, drops: dict[int, float]) -> None:
        self.inner = planted(drops)
        self.states: dict[int, str] = {}

    def __call__(self, model: nn.Module) -> float:
        if model.get_parameter("0.weight").shape[0] == N:
            self.states[alive(model)] = hash_of(model)
        return self.inner(model)


# --- the guard -----------------------------------------------------------------------------------


def test_without_a_loss_the_guard_changes_nothing() -> None:
    plain, guarded = run(evaluate=planted({})), run(evaluate=planted({}), max_drop=0.01)
    assert hash_of(plain.masked) == hash_of(guarded.masked)
    assert guarded.report.met
    assert not any(step.rolled_back for step in guarded.report.steps)


def test_the_step_that_loses_too_much_is_undone_bit_for_bit() -> None:
    watched = Watched({11: 0.05, 8: 0.06})
    result = run(evaluate=watched, max_drop=0.02)
    assert [alive(m) for m in (result.masked, result.model)] == [14, 14]
    assert hash_of(result.masked) == watched.states[14]
    assert result.counts.kept == {"0:neuron": 14}
    assert len(result.plan.removed["0:neuron"]) == 6
    check_masks(result.masked, result.plan.masks)
    assert [s.rolled_back for s in result.report.steps] == [False, False, True]
    assert [s.remaining["units"] for s in result.report.steps] == [17 / 20, 14 / 20, 11 / 20]
    assert len(result.history) == 3
    assert not result.report.met
    assert result.report.asked == {"units": 0.25}
    assert result.report.reached["units"] == 0.7
    (note,) = [n for n in result.report.notes if "max_drop" in n]
    assert note.startswith(
        "stopped at step 3 of 5 by max_drop: step 3 was rolled back: metric 0.85 is 0.05 worse "
        "than the dense 0.9, at most 0.02 is allowed (55.0% of the units"
    )
    assert note.endswith("the model is that of step 2 again")


def test_the_state_is_that_of_a_run_that_stopped_there() -> None:
    """Two steps of the same sizes, and no third."""
    guarded = run(evaluate=planted({11: 0.05}), max_drop=0.02)
    short = run(
        evaluate=planted({}), budget=Budget(units=0.7), schedule=Schedule("linear", steps=2)
    )
    assert hash_of(guarded.masked) == hash_of(short.masked)
    assert hash_of(guarded.model) == hash_of(short.model)


def test_a_drop_of_exactly_the_limit_is_allowed() -> None:
    """0.9 - 0.85 is 0.050000000000000044."""
    assert run(evaluate=planted({5: 0.05}), max_drop=0.05).report.met
    assert not run(evaluate=planted({5: 0.0500001}), max_drop=0.05).report.met


def test_smaller_may_be_better() -> None:
    drops = {8: 0.05}
    result = run(evaluate=planted(drops, error=True), maximize=False, max_drop=0.02)
    assert alive(result.model) == 11
    # The same figures with larger is better: the metric has risen.
    assert run(evaluate=planted(drops, error=True), max_drop=0.02).report.met


def test_nothing_is_cut_when_the_first_step_fails() -> None:
    model, before = net(), torch.get_rng_state()
    with pytest.raises(BudgetError) as caught:
        prune(
            model, BATCHES, F.cross_entropy, example_inputs=X, budget=Budget(units=0.25),
            schedule=FIVE, finetune=HEAL, evaluate=planted({17: 0.3}), max_drop=0.02,
        )  # fmt: skip
    text = str(caught.value)
    assert text.startswith("nothing can be cut: step 1 was rolled back: metric 0.6 is 0.3 worse")
    assert text.endswith(
        "the model is the dense one again. Take a smaller first step (more steps, or a larger "
        "budget), a longer fine-tuning, or max_drop above 0.02"
    )
    assert hash_of(model) == hash_of(net())
    torch.set_rng_state(before)


def test_without_training_the_metric_after_the_cut_counts() -> None:
    assert alive(run(evaluate=planted({11: 0.05}), max_drop=0.02, finetune=None).model) == 14


def test_a_later_stage_goes_back_to_the_earlier_one() -> None:
    stages = [
        Stage(Budget(units=0.7), schedule=Schedule("linear", 2), finetune=HEAL),
        Stage(Budget(units=0.25), schedule=Schedule("linear", 2), finetune=HEAL, max_drop=0.02),
    ]
    result = prune_stages(
        net(), BATCHES, F.cross_entropy, stages, example_inputs=X,
        evaluate=planted({12: 0.05, 5: 0.05}),
    )  # fmt: skip
    assert alive(result.model) == 14
    assert result.counts.kept == {"0:neuron": 14}
    assert [s.rolled_back for s in result.report.steps] == [False, False, True]
    assert not result.report.met
    assert not any("removed nothing" in note for note in result.report.notes)


def test_a_threshold_has_a_guard_too() -> None:
    options: dict[str, Any] = {"budget": None, "criterion": "magnitude"}
    threshold = Threshold("quantile", q=0.5)  # 10, 5, then 3 units
    plain = run(threshold=threshold, schedule=Schedule("linear", 3), **options)
    assert alive(plain.model) < 5
    result = run(
        threshold=threshold, schedule=Schedule("linear", 3), max_drop=0.02,
        evaluate=lambda m: 0.9 if alive(m) >= 5 else 0.1, **options,
    )  # fmt: skip
    assert alive(result.model) == 5
    assert not result.report.met


# --- a budget that may be missed -----------------------------------------------------------------


def test_the_nearest_reachable_is_given_when_that_is_allowed() -> None:
    with pytest.raises(BudgetError, match="allows 1 of"):
        run(budget=Budget(macs=1))
    result = run(budget=Budget(macs=1), allow_missed=True, min_keep=3)
    assert alive(result.model) == 3
    assert not result.report.met
    assert result.report.asked == {"macs": 1}
    (note,) = [n for n in result.report.notes if "missed" in n]
    assert note.startswith("stage 1: the budget was missed, which was allowed: Budget(macs=1)")
    assert "18 (0.15 of the model) remain" in note


def test_a_budget_that_is_reached_is_not_missed() -> None:
    strict, lenient = run(), run(allow_missed=True)
    assert hash_of(strict.masked) == hash_of(lenient.masked)
    assert lenient.report.met
    assert not [n for n in lenient.report.notes if "missed" in n]


@pytest.mark.parametrize(
    "asked",
    [Budget(bytes=0.5), Budget(units=0.6, bytes=0.5), Budget(params="80", macs=0.9)],
    ids=str,
)
def test_every_size_leads_step_by_step_to_its_limit(asked: Budget) -> None:
    result = run(budget=asked)
    for name in asked.sizes:
        left = [step.remaining[name] or 0 for step in result.report.steps]
        assert left == sorted(left, reverse=True)
        assert left[-1] < left[0] < 1
        dense = {"params": 20 * 4 + 20 + 40 + 40 + 2}.get(name, 1)
        assert left[-1] <= asked.fraction(name, dense)


# --- arguments -----------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no metric": ({"max_drop": 0.01}, "max_drop limits how much worse .* needs evaluate="),
    "no metric for a drop": (
        {"budget": Budget(metric_drop=0.1)}, r"Budget\(metric_drop=\) limits .* needs evaluate=",
    ),
    "no metric for auto": ({"budget": "auto"}, 'budget="auto" limits .* needs evaluate='),
    "another word": ({"budget": "atuo"}, "budget must be a Budget"),
    "negative": ({"max_drop": -0.1}, "at least 0, in the unit"),
    "a text": ({"max_drop": "1 %"}, "at least 0, in the unit"),
    "twice": (
        {"max_drop": 0.1, "budget": Budget(metric_drop=0.1), "schedule": None}, "the same twice",
    ),
    "missed threshold": (
        {"budget": None, "threshold": Threshold("mean"), "allow_missed": True}, "no size to miss",
    ),
    "missed by word": ({"allow_missed": "yes"}, "allow_missed must be True or False"),
    "reinit": ({"max_drop": 0.1, "control": "reinit"}, "no cut is known to be the last"),
    "curve without an end": (
        {"budget": Budget(metric_drop=0.1), "schedule": Schedule("cubic", 5)},
        r'no end that a curve could lead to.*Schedule\("exponential", steps=20\)',
    ),
    "latency of weights": (
        {"budget": Budget(latency_ms=1.0), "granularity": "weight"},
        r"zeros among single weights save no time",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_found_before_anything_expensive(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*_: Any, **__: Any) -> None:
        raise AssertionError("scoring has begun")

    monkeypatch.setattr(run_room, "score", score)
    options, message = BAD[case]
    if case.startswith("no metric"):
        options = {"schedule": None, **options}
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_a_state_that_differs_has_another_hash() -> None:
    model = net()
    before = hash_of(model)
    mean: Tensor = model.get_buffer("1.running_mean")
    mean[3] += 1e-6
    assert hash_of(model) != before
