"""What a stage does around its cuts: repairs, masks that move, training before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs import prune
from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune
from secateurs.pipeline import Stage, prune_stages
from secateurs.recipe import parse_recipe
from secateurs.regrowth import Regrow
from secateurs.schedules import Schedule
from secateurs.types import Budget

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()
BATCHES = [(x, y) for x, y in zip(torch.split(X, 16), torch.split(Y, 16), strict=True)]
ONCE = Schedule("one_shot", 1)
WEIGHTS: dict[str, Any] = {"granularity": "weight", "criterion": "magnitude", "schedule": ONCE}


def mlp(norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    middle = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(nn.Linear(6, 24), *middle, nn.ReLU(), nn.Linear(24, 2))


def loss_of(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return F.cross_entropy(model(X), Y).item()


def run(model: nn.Module, **options: Any) -> Any:
    return prune(model, BATCHES, F.cross_entropy, example_inputs=X, **options)


def test_a_repair_brings_the_cut_model_back_to_the_dense_one() -> None:
    model = mlp()
    away = {}
    for repair in ((), ("bias",), ("reconstruct",)):
        result = run(
            model, budget=Budget(units=0.5), criterion="l2_norm", schedule=ONCE, repair=repair
        )
        with torch.no_grad():
            away[repair] = (result.model(X) - model(X)).square().mean().item()
    assert away["reconstruct",] < 0.5 * away[()]
    assert away["bias",] < away[()]


def test_norms_are_measured_again_and_the_report_says_what_it_won() -> None:
    result = run(
        mlp(norm=True), budget=Budget(units=0.5), criterion="l2_norm",
        schedule=Schedule("linear", 2), repair=("reconstruct", "norms"),
        evaluate=lambda m: -loss_of(m),
    )  # fmt: skip
    notes = [note for note in result.report.notes if note.startswith("after cut")]
    assert [note.split(":")[0] for note in notes] == ["after cut 1", "after cut 1", "after cut 2",
                                                      "after cut 2"]  # fmt: skip
    assert "->" in notes[0]


@pytest.mark.parametrize("rule", ["rigl", "set", "dpf", "dns"])
def test_masks_that_moved_are_those_of_the_plan(rule: str) -> None:
    result = run(
        mlp(), budget=Budget(params=0.3), finetune=Finetune(epochs=10, lr=0.02),
        regrow=Regrow(rule, every=4), **WEIGHTS,
    )  # fmt: skip
    still = run(mlp(), budget=Budget(params=0.3), finetune=Finetune(epochs=10, lr=0.02), **WEIGHTS)
    plan = result.plan
    assert (
        plan.n_removed == still.plan.n_removed == sum(int((~m).sum()) for m in plan.masks.values())
    )
    assert any(not torch.equal(plan.masks[n], still.plan.masks[n]) for n in plan.masks)
    for name, mask in plan.masks.items():
        weight = dict(result.model.named_parameters())[name]
        assert not weight[~mask].any()
        assert plan.removed[name].tolist() == (~mask).reshape(-1).nonzero().reshape(-1).tolist()
    assert any(note.startswith(f"{rule}: masks moved") for note in result.report.notes)


def test_the_best_epoch_has_the_masks_of_its_own_time() -> None:
    calls = iter([0.5, 0.5, 0.9, *[0.1] * 20])
    result = run(
        mlp(), budget=Budget(params=0.3), evaluate=lambda m: next(calls),
        finetune=Finetune(epochs=8, lr=0.02, restore_best=True),
        regrow=Regrow("set", every=4, until=1.0), **WEIGHTS,
    )  # fmt: skip
    for name, mask in result.plan.masks.items():
        assert not dict(result.masked.named_parameters())[name][~mask].any()


def test_weights_that_moved_and_then_structure() -> None:
    heal = Finetune(epochs=2, lr=0.01)
    stages = [
        Stage(Budget(params=0.5), finetune=heal, regrow=Regrow("rigl", every=2), **WEIGHTS),
        Stage(Budget(units=0.5), criterion="l2_norm", schedule=ONCE, finetune=heal),
    ]
    result = prune_stages(mlp(), BATCHES, F.cross_entropy, stages, example_inputs=X)
    assert result.model.get_submodule("0").out_features == 12
    with pytest.raises(ConfigError, match="put the weights first"):
        prune_stages(mlp(), BATCHES, F.cross_entropy, stages[::-1], example_inputs=X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repair": ("bais",)}, "Did you mean 'bias'"),
        ({"repair": "bias"}, "repair is a list"),
        ({"repair": ("norms",)}, "no norm with running statistics"),
        (
            {"repair": ("bias",), "schedule": Schedule("linear", 2, every="2 steps"),
             "finetune": Finetune(epochs=4)},
            "leave every away",
        ),
        ({"regrow": Regrow("set")}, "granularity='weight'"),
        ({"regrow": Regrow("set"), **WEIGHTS}, "give finetune="),
        ({"repair": ("bias",), "control": "reinit", "finetune": Finetune()}, "nothing to repair"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_the_first_cut(
    options: dict[str, Any], message: str
) -> None:
    given = {"criterion": "l2_norm", "budget": Budget(units=0.5), **options}
    with pytest.raises(ConfigError, match=message):
        run(mlp(), **given)


def test_all_of_it_from_a_recipe() -> None:
    recipe = parse_recipe(
        {
            "task": "digits-mlp",
            "stages": [
                {
                    "granularity": "weight", "budget": {"params": 0.3},
                    "schedule": {"curve": "one_shot", "steps": 1},
                    "finetune": {"epochs": 2, "distill": 0.5},
                    "regrow": {"rule": "rigl", "every": 50},
                },
                {
                    "budget": {"macs": 0.25}, "prepare": {"epochs": 1},
                    "penalty": {"rule": "growing", "strength": 1.0},
                    "repair": ["reconstruct"],
                    "finetune": {"epochs": 2, "hidden": 1.0, "hidden_at": ["layers.1"]},
                },
            ],
        }
    )  # fmt: skip
    first, second = recipe.all_stages()
    assert first.regrow == Regrow("rigl", every=50)
    assert second.repair == ("reconstruct",)
    assert second.prepare == Finetune(epochs=1)
    assert second.penalty is not None
    assert second.finetune is not None
    assert second.finetune.hidden_at == ("layers.1",)
    assert parse_recipe(recipe.resolved()).resolved() == recipe.resolved()
