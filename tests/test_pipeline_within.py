"""Cuts inside one fine-tuning: the textbook loop bit for bit, and what cannot be combined."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs import scoring, selection
from secateurs.errors import BudgetError, ConfigError, DataError
from secateurs.finetuning import Finetune
from secateurs.masks import check_masks
from secateurs.pipeline import PruneResult, Stage, prune, prune_stages
from secateurs.pipeline import run as run_room
from secateurs.schedules import Schedule
from secateurs.types import Batch, Budget, Threshold


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Dropout(dropout), nn.Linear(10, 2))


def data(sizes: tuple[int, ...] = (8, 8, 8, 8, 4)) -> list[Batch]:
    x = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] + x[:, 1] > 0).long()
    return list(zip(torch.split(x, list(sizes)), torch.split(y, list(sizes)), strict=True))


BATCHES = data()
X = BATCHES[0][0]
TRAIN = Finetune(epochs=4, lr=0.02, weight_decay=0.01, lr_schedule="cosine", accumulate=2)
INSIDE = Schedule("linear", steps=3, every="3 steps", begin="2 steps")


def run(model: nn.Module | None = None, batches: Any = BATCHES, **options: Any) -> PruneResult:
    """Weights by magnitude to 40 %, with three cuts inside one training of twelve steps."""
    given: dict[str, Any] = {
        "budget": Budget(units=0.4), "criterion": "magnitude", "granularity": "weight",
        "schedule": INSIDE, "finetune": TRAIN, "example_inputs": X, **options,
    }  # fmt: skip
    return prune(model or net(), batches, given.pop("loss_fn", F.cross_entropy), **given)


def accuracy(model: nn.Module) -> float:
    hits = [float((model(x).argmax(1) == y).float().sum()) for x, y in BATCHES]
    return sum(hits) / 36


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[k], other[k]) for k in mine)


# --- the textbook --------------------------------------------------------------------------------


def largest(weight: Tensor, n: int) -> Tensor:
    """A mask of the n largest magnitudes."""
    order = weight.detach().abs().reshape(-1).argsort(descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:n]] = True
    return mask.reshape(weight.shape)


def textbook() -> nn.Sequential:
    """Gradual magnitude pruning as a plain loop over a dense network with masks.

    Twelve optimizer steps (four epochs of groups of 2, 2 and 1 batches); after 2, 5 and 8 of them
    the weights that are largest now stay: 80, 60 and 40 % of 40 and of 20.
    """
    model = net().train()
    weights = [model[0].get_parameter("weight"), model[3].get_parameter("weight")]
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    adam = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.01)
    plan = {2: (32, 16), 5: (24, 12), 8: (16, 8)}
    done = 0
    for _ in range(4):
        for group in (BATCHES[:2], BATCHES[2:4], BATCHES[4:]):
            for i, n in enumerate(plan.get(done, ())):
                masks[i] &= largest(weights[i], n)
                weights[i].data *= masks[i]
                for moment in ("exp_avg", "exp_avg_sq"):
                    adam.state[weights[i]][moment] *= masks[i]
            adam.zero_grad()
            for x, y in group:
                torch.autograd.backward(F.cross_entropy(model(x), y) * len(y))
            for p in model.parameters():
                assert p.grad is not None
                p.grad /= sum(len(y) for _, y in group)
            for w, mask in zip(weights, masks, strict=True):
                assert w.grad is not None
                w.grad *= mask
            adam.param_groups[0]["lr"] = 0.02 * (0.5 * (1 + math.cos(math.pi * (done / 12))))
            adam.step()
            for w, mask in zip(weights, masks, strict=True):
                w.data *= mask
                for moment in ("exp_avg", "exp_avg_sq"):
                    adam.state[w][moment] *= mask
            done += 1
    assert done == 12
    return model


def test_gradual_magnitude_pruning_is_the_textbook_loop_bit_for_bit() -> None:
    result = run()
    expected = textbook()
    assert same(result.masked, expected)
    assert [int((result.masked.get_parameter(f"{i}.weight") != 0).sum()) for i in (0, 3)] == [16, 8]
    assert [s.optimizer_step for s in result.report.steps] == [2, 5, 8]
    assert [s.remaining["units"] for s in result.report.steps] == pytest.approx([0.8, 0.6, 0.4])
    (history,) = result.history
    assert history.steps == 12


def test_the_comparison_notices_one_step_too_many() -> None:
    """Counting batches in place of optimizer steps, or cutting one step later, is seen."""
    expected = textbook()
    later = replace(INSIDE, begin="3 steps")
    assert not same(run(schedule=later).masked, expected)
    assert not same(run(finetune=replace(TRAIN, accumulate=1)).masked, expected)


# --- the clock -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "finetune", "expected"),
    [
        (Schedule("cubic", 3, every="1 epoch"), TRAIN, [0, 3, 6]),
        (Schedule("cubic", 2, every="2 epochs", begin="1 step"), TRAIN, [1, 7]),
        (Schedule("cubic", 4, every="restart"), replace(TRAIN, cycles=4), [0, 3, 6, 9]),
        (Schedule("one_shot", 1, every="1 step", begin="2 epochs"), TRAIN, [6]),
        (Schedule("linear", 2, every="1 epoch"), Finetune(epochs=2, full_batch=True), [0, 1]),
        (Schedule("linear", 2, every="7 steps"), Finetune(steps=9), [0, 7]),
    ],
)
def test_cuts_are_made_where_the_schedule_says(
    schedule: Schedule, finetune: Finetune, expected: list[int]
) -> None:
    result = run(schedule=schedule, finetune=finetune)
    assert [s.optimizer_step for s in result.report.steps] == expected
    assert [s.fraction for s in result.report.steps] == list(schedule.fractions())
    assert result.report.reached["units"] == pytest.approx(0.4)
    check_masks(result.masked, result.plan.masks)


def test_looking_does_not_disturb_the_training() -> None:
    """Dropout draws the same numbers whether or not somebody evaluates in between."""
    model = net(dropout=0.5)
    blind = run(model)
    seen = run(model, evaluate=accuracy)
    assert same(blind.masked, seen.masked)
    for step in seen.report.steps:
        assert step.metric_masked is not None
        assert step.metric_healed is not None
    assert seen.report.steps[-1].metric_healed == accuracy(seen.masked.eval())


def test_structure_and_several_stages() -> None:
    stages = [
        Stage(Budget(units=0.5), criterion="magnitude", granularity="weight", schedule=INSIDE,
              finetune=TRAIN),
        Stage(Budget(units=0.5), granularity="neuron", schedule=INSIDE, finetune=TRAIN),
    ]  # fmt: skip
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = net()
    dense = copy.deepcopy(model.state_dict())
    torch.set_rng_state(before)
    result = prune_stages(model, BATCHES, F.cross_entropy, stages, example_inputs=X)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(dense[k], v) for k, v in model.state_dict().items())
    assert result.model.get_parameter("0.weight").shape == (5, 4)
    check_masks(result.model, result.masks)
    assert [s.step for s in result.report.steps] == [1, 2, 3, 4, 5, 6]
    assert len(result.history) == 2


def test_plans_only_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, set[int]]] = []
    select = selection.select

    def spy(*args: Any, **kwargs: Any) -> Any:
        plan = select(*args, **kwargs)
        seen.append({k: set(v.tolist()) for k, v in plan.removed.items()})
        return plan

    monkeypatch.setattr(run_room, "select", spy)
    run(criterion="taylor", budget=Budget(units=0.2))
    assert len(seen) == 3
    for earlier, later in pairwise(seen):
        assert all(units < later[name] for name, units in earlier.items())


def test_a_threshold_that_becomes_too_high_stops_the_cuts_not_the_training() -> None:
    """Each step of this decay takes a fifth of every weight: at the second cut all are too low."""
    decay = Finetune(epochs=4, optimizer="sgd", lr=0.1, weight_decay=2.0, accumulate=2)
    result = run(
        budget=None, threshold=Threshold("value", value=0.2), finetune=decay,
        schedule=replace(INSIDE, begin=None),
    )  # fmt: skip
    assert not result.report.met
    assert [s.optimizer_step for s in result.report.steps] == [0]
    (note,) = [n for n in result.report.notes if n.startswith("stopped after step 1 of 3")]
    assert "would leave too little" in note
    assert result.history[0].steps == 12


# --- scores once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, "3 steps"])
@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_scored_once_keeps_the_first_ranking(
    every: str | None, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    score = scoring.score

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return score(*args, **kwargs)

    monkeypatch.setattr(run_room, "score", spy)
    schedule = Schedule("linear", 3, every=every, rescore=False)
    options: dict[str, Any] = {"granularity": granularity, "criterion": "taylor"}
    once = run(schedule=schedule, **options)
    assert len(calls) == 1
    at_once = run(schedule=Schedule("one_shot", 1), **options)
    assert once.counts.kept == at_once.counts.kept
    assert {k: v.tolist() for k, v in once.plan.removed.items()} == {
        k: v.tolist() for k, v in at_once.plan.removed.items()
    }
    calls.clear()
    run(schedule=replace(schedule, rescore=True), **options)
    assert len(calls) == 3


# --- what cannot be ------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no training": ({"finetune": None}, "give finetune="),
    "no epochs": ({"finetune": Finetune(epochs=0)}, "give finetune="),
    "patience": ({"finetune": Finetune(epochs=9, patience=1)}, "leave patience away"),
    "guard": ({"max_drop": 0.1}, "leave every away"),
    "drop": (
        {"budget": Budget(units=0.4, metric_drop=0.1)}, "leave every away",
    ),
    "reinit": ({"control": "reinit"}, "trains after the last cut"),
    "too short": ({"finetune": Finetune(epochs=1)}, "has 5: nothing is left to heal"),
    "no restarts": (
        {"schedule": Schedule("linear", 2, every="restart")}, "never starts again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_an_error_before_anything_expensive(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*_: Any, **__: Any) -> None:
        raise AssertionError("scoring has begun")

    monkeypatch.setattr(run_room, "score", score)
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_batches_without_a_length_and_loaders_that_start_over() -> None:
    class Unsized:
        def __iter__(self) -> Iterator[Batch]:
            return iter(BATCHES)

    with pytest.raises(ConfigError, match="have no length"):
        run(batches=Unsized())
    assert run(batches=Unsized(), finetune=Finetune(steps=12)).history[0].steps == 12

    class Persistent(list[Batch]):
        persistent_workers = True

    with pytest.raises(ConfigError, match="give calibration="):
        run(batches=Persistent(BATCHES))
    run(batches=Persistent(BATCHES), calibration=BATCHES)


def test_fewer_batches_than_their_length_says() -> None:
    class Short(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            return iter(BATCHES[:2])

    with pytest.raises(DataError, match="ended after 4 optimizer steps, before the cut at 5"):
        run(batches=Short(BATCHES))


def test_a_budget_out_of_reach_is_found_before() -> None:
    with pytest.raises(BudgetError, match="allows 1 of"):
        run(budget=Budget(units=1))
