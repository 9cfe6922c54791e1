"""Training before the first cut, inside `prune`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.allocation import allocate
from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune, finetune
from secateurs.graph import trace
from secateurs.penalties import Penalty, UnitPenalty
from secateurs.pipeline import PruneResult, Stage, prune, prune_stages
from secateurs.pipeline.preparing import FRESH
from secateurs.schedules import Schedule
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.types import Budget, Plan

LOSS = functional.cross_entropy


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(),
        nn.Linear(10, 3),
    )  # fmt: skip


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=g)
    return [(x[i : i + 20], (x[i : i + 20, 0] > 0).long()) for i in (0, 20)]


CONFIG = Finetune(epochs=6, lr=0.02)


def pruned(**options: Any) -> PruneResult:
    batches = data()
    return prune(
        net(), batches, LOSS, example_inputs=batches[0][0], criterion="l2_norm",
        budget=Budget(units=0.5), **options,
    )  # fmt: skip


def chosen(model: nn.Module, x: Tensor) -> Plan:
    scores = score(model, criterion="l2_norm", graph=trace(model, x), granularity="structured")
    return select(scores, allocate(scores, Budget(units=0.5)))


@pytest.mark.parametrize("rule", ["group_lasso", "norm_scale", None])
def test_it_is_a_training_with_the_penalty_and_then_the_cut(rule: str | None) -> None:
    penalty = None if rule is None else Penalty(rule, strength=0.01)
    found = pruned(schedule=Schedule("one_shot", 1), prepare=CONFIG, penalty=penalty)
    model, batches = net(), data()
    graph = trace(model, batches[0][0])
    parts = [] if penalty is None else [UnitPenalty(penalty, graph)]
    finetune(model, batches, LOSS, CONFIG, seed=FRESH, parts=parts)
    plan = chosen(model, batches[0][0])
    for name, mask in plan.masks.items():
        assert torch.equal(found.plan.masks[name], mask)
    state = found.masked.state_dict()
    for name, tensor in model.state_dict().items():
        kept = plan.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(state[name][kept], tensor[kept]), name
    note = "stage 1: 12 optimizer steps before its first cut"
    under = "" if rule is None else f" under the penalty rule={rule}, strength=0.01"
    assert note + under in found.report.notes
    assert len(found.history) == 1


@pytest.mark.parametrize("schedule", [Schedule("one_shot", 1), Schedule("cubic", 3)])
def test_growing_cuts_the_units_that_it_made_small(schedule: Schedule) -> None:
    found = pruned(
        schedule=schedule, prepare=CONFIG, penalty=Penalty("growing", every=1),
        finetune=Finetune(epochs=1),
    )  # fmt: skip
    batches = data()
    before = chosen(net(), batches[0][0])  # what the dense network says
    for name, units in before.removed.items():
        assert torch.equal(found.plan.removed[name], units)
    plain = pruned(schedule=schedule, prepare=CONFIG, finetune=Finetune(epochs=1))
    assert any(
        not torch.equal(plain.plan.removed[name], units) for name, units in before.removed.items()
    )


def test_growing_with_cuts_inside_one_training() -> None:
    found = pruned(
        schedule=Schedule("linear", 2, every="2 steps"), prepare=CONFIG,
        penalty=Penalty("growing"), finetune=CONFIG,
    )  # fmt: skip
    before = chosen(net(), data()[0][0])
    for name, units in before.removed.items():
        assert torch.equal(found.plan.removed[name], units)


def test_what_an_earlier_stage_removed_stays_zero_and_is_not_chosen_again() -> None:
    batches, model = data(), net()
    stages = [
        Stage(Budget(units=0.8), criterion="l2_norm", schedule=Schedule("one_shot", 1)),
        Stage(
            Budget(units=0.5), criterion="l2_norm", schedule=Schedule("one_shot", 1),
            prepare=CONFIG, penalty=Penalty("growing"),
        ),
    ]  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    found = prune_stages(model, batches, LOSS, stages, example_inputs=batches[0][0])
    for name, mask in found.plan.masks.items():
        assert not found.masked.state_dict()[name][~mask].any()
    assert sum(len(units) for units in found.plan.removed.values()) == 11
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": Penalty("group_lasso")}, "give prepare="),
        ({"penalty": Penalty("group_lasso"), "prepare": Finetune(epochs=0)}, "give prepare="),
        (
            {"penalty": Penalty("group_lasso"), "prepare": CONFIG, "granularity": "weight"},
            "only single weights are pruned",
        ),
        ({"penalty": "group_lasso", "prepare": CONFIG}, "penalty must be a Penalty"),
        (
            {"penalty": Penalty("growing"), "prepare": CONFIG, "allocation": "sensitivity"},
            "measures again after it",
        ),
    ],
)
def test_stages_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stage(Budget(units=0.5), **options)


def test_growing_needs_to_know_the_size_and_the_steps() -> None:
    for budget in (Budget(units=0.5, latency_ms=1.0), Budget(metric_drop=0.1), "auto"):
        with pytest.raises(ConfigError, match="must know which units go"):
            Stage(budget, prepare=CONFIG, penalty=Penalty("growing"))
    with pytest.raises(ConfigError, match="prepare: patience and restore_best need evaluate"):
        pruned(prepare=Finetune(epochs=2, restore_best=True))
