"""Masks by Fisher information as a stage: what `search_masks` finds, and what may stand beside."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.errors import BudgetError, ConfigError
from secateurs.finetuning import Finetune
from secateurs.pipeline import Stage, prune, prune_stages
from secateurs.posttraining import FisherMasks, FisherSearch, any_output, search_masks
from secateurs.schedules import Schedule
from secateurs.tickets import AtInit, TicketSearch
from secateurs.types import Budget, LossFn, Threshold
from tests.posttraining.test_fisher_gates import texts, tiny

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
HALF = Budget(macs=0.5)
HEAL = Finetune(epochs=2, lr=0.01)


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def learned(model: nn.Module, inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What a network says of its inputs, and some noise: it has learned all but that."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        said = [model(x) for x in inputs]
    return [
        (x, y + 0.3 * torch.randn(y.shape, generator=draw).to(y))
        for x, y in zip(inputs, said, strict=True)
    ]


BATCHES = learned(mlp(), torch.split(X, 16))


def run(model: nn.Module, **options: Any) -> Any:
    given = {"example_inputs": X, "budget": HALF, "fisher_masks": FisherSearch(), **options}
    return prune(model, BATCHES, F.mse_loss, **given)


def timeless(text: str) -> str:
    return re.sub(r"[\d.]+ s\)", "s)", text)


def quality(model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return {"mean": float(model(texts(24)[0][0]).mean())}


@pytest.mark.parametrize(
    ("how", "by_hand", "steps"),
    [
        (FisherSearch(), {}, ["units rearranged", "layers solved again"]),
        (FisherSearch(tune="scales", damping=0.1), {"tune": "scales", "damping": 0.1},
         ["units rearranged"]),  # a note has the figures of the scales, which lost
        (FisherSearch(rearrange=False, tune=None, n_samples=7),
         {"rearrange": False, "tune": None, "n_samples": 7}, []),
        (FisherSearch(shrink=0.0, importance="any_output"),
         {"shrink": 0.0, "importance": any_output(5)},
         ["units rearranged", "layers solved again"]),
    ],
)  # fmt: skip
def test_a_stage_finds_what_the_search_finds(
    how: FisherSearch, by_hand: dict[str, Any], steps: list[str]
) -> None:
    """Heads and neurons of a transformer; searched on the calibration data."""
    dense, samples = tiny(), learned(tiny(), [x for x, _ in texts(24)])
    others = learned(tiny(), [texts(3, seed=9)[0][0]])
    x = samples[0][0]
    whole = copy.deepcopy(dense.state_dict())
    budget = Budget(macs=0.6)
    result = prune(
        dense, others, F.mse_loss, calibration=samples, example_inputs=x, budget=budget,
        granularity=("head", "neuron"), fisher_masks=how, seed=5,
        evaluate=quality,
    )  # fmt: skip
    assert all(torch.equal(whole[name], value) for name, value in dense.state_dict().items())

    searched = tiny()
    found = search_masks(
        searched, samples, F.mse_loss, graph=sc.trace(dense, x), budget=budget,
        granularity=("head", "neuron"), seed=5, evaluate=quality, **by_hand,
    )  # fmt: skip
    assert [won.what for won in found.won] == ["units cut", *steps]
    assert {n: r.tolist() for n, r in result.plan.removed.items()} == {
        n: r.tolist() for n, r in found.plan.removed.items()
    }
    assert result.masked.state_dict().keys() == searched.state_dict().keys()
    for name, value in searched.state_dict().items():
        assert torch.equal(result.masked.state_dict()[name], value)
    diagonal = found.fisher.scores(result.scores.graph)
    assert result.scores.criterion == diagonal.criterion
    for name, line in diagonal.values.items():
        assert torch.equal(result.scores.values[name], line)
    assert result.counts.kept == found.counts.kept
    # what was tuned is in the smaller model, too
    sc.verify(searched, result.model, found.plan, x)
    # and what a reader is told
    told = [timeless(note) for note in result.report.notes]
    assert [n for n in told if n.startswith("fisher masks: ")] == [
        f"fisher masks: {timeless(won.text())}" for won in found.won
    ]
    assert "mean" in found.won[0].before
    assert {timeless(note) for note in found.notes} <= set(told)
    assert len(told) == len(set(told))
    assert (result.report.reached["macs"] or 1.0) <= 0.6
    assert result.report.met
    (row,) = result.report.steps
    assert (row.step, row.fraction, row.metric_healed) == (1, 1.0, None)


def test_the_cases_above_tune() -> None:
    """Weights are changed that no mask names; without that, a stage could forget them."""
    dense, result = mlp(), run(mlp())
    last = result.masked.get_parameter("4.weight")
    kept = last != 0
    assert not torch.equal(last[kept], dense.get_parameter("4.weight")[kept])
    plain = run(mlp(), fisher_masks=FisherSearch(tune=None)).masked.get_parameter("4.weight")
    kept = plain != 0
    assert torch.equal(plain[kept], dense.get_parameter("4.weight")[kept])


def test_the_search_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes no difference to two outputs of a network without dropout, too."""
    given: dict[str, Any] = {}

    def search(*arguments: Any, **options: Any) -> FisherMasks:
        given.update(options)
        return search_masks(*arguments, **options)

    def outputs_matter(*arguments: Any, **options: Any) -> LossFn:
        given["any_output"] = arguments, options
        return any_output(*arguments, **options)

    monkeypatch.setattr("secateurs.pipeline.fisher.search_masks", search)
    monkeypatch.setattr("secateurs.pipeline.fisher.any_output", outputs_matter)
    how = FisherSearch(shrink=0.25, importance="any_output")
    run(mlp(), fisher_masks=how, seed=5, granularity="neuron")
    assert (given["seed"], given["shrink"], given["granularity"]) == (5, 0.25, "neuron")
    assert given["any_output"] == ((5,), {"outputs": ()})
    assert given["importance"] is not None
    run(mlp())
    assert given["importance"] is None


def test_what_is_left_is_healed_under_the_masks() -> None:
    cut, result = run(mlp()), run(mlp(), finetune=replace(HEAL, distill=0.5))
    assert result.history[0].steps == 8
    assert all(torch.equal(result.plan.removed[n], r) for n, r in cut.plan.removed.items())
    for name, mask in result.plan.masks.items():
        weight = result.masked.get_parameter(name)
        assert not weight[~mask].any()
        assert not torch.equal(weight[mask], cut.masked.get_parameter(name)[mask])
    sc.verify(result.masked, result.model, result.plan, X)


def test_counts_are_exact_unless_they_are_to_be_rounded() -> None:
    notes = run(mlp()).report.notes
    assert "the least importance that macs allow, exact by a sweep" not in notes  # two widths meet
    units = run(mlp(), budget=Budget(units=17))
    assert sum(units.counts.kept.values()) == 17
    assert "the least importance that units allow, exact by a sweep" in units.report.notes
    rounded = run(mlp(), budget=Budget(units=17), round_to=4)
    assert {kept % 4 for kept in rounded.counts.kept.values()} == {0}
    few = run(mlp(), budget=Budget(units=8))
    wide = run(mlp(), budget=Budget(units=8), min_keep=4)
    assert min(few.counts.kept.values()) < 4
    assert set(wide.counts.kept.values()) == {4}


def test_a_later_stage_goes_on() -> None:
    stages = [
        Stage(HALF, fisher_masks=FisherSearch(), finetune=HEAL),
        Stage(Budget(macs=0.25), schedule=Schedule("one_shot", 1)),
    ]
    result = prune_stages(mlp(), BATCHES, F.mse_loss, stages, example_inputs=X)
    first = run(mlp(), finetune=HEAL)
    assert (result.report.reached["macs"] or 1.0) <= 0.25
    for name, gone in first.plan.removed.items():
        assert set(gone.tolist()) <= set(result.plan.removed[name].tolist())
    with pytest.raises(ConfigError, match="stage 2: fisher_masks begins with a whole network"):
        prune_stages(mlp(), BATCHES, F.mse_loss, stages[::-1], example_inputs=X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({name: value}, f"does not read {name}: leave it away")
            for name, value in {
                "criterion": "magnitude", "allocation": "global", "control": "random",
                "schedule": Schedule("one_shot", 1), "max_drop": 0.1, "allow_missed": True,
                "prepare": HEAL, "repair": ("reconstruct",), "homogeneous": True,
            }.items()
        ),
        ({"regrow": sc.Regrow("set"), "finetune": HEAL}, "does not read regrow"),
        ({"budget": None, "threshold": Threshold("mean")}, "does not read threshold"),
        ({"budget": "auto"}, "cuts once, to a size.*give a size, as in Budget"),
        ({"budget": Budget(macs=0.5, metric_drop=0.1)}, "cuts once, to a size"),
        ({"budget": Budget(latency_ms=1.0)}, "times none.*a budget in macs"),
        ({"granularity": ("weight", "neuron")}, "no single weights"),
        ({"at_init": AtInit()}, "at_init and fisher_masks each say"),
        ({"ticket": TicketSearch(), "finetune": HEAL}, "ticket and fisher_masks each say"),
        ({"fisher_masks": {"tune": None}}, "must be a FisherSearch, as in"),
    ],
)  # fmt: skip
def test_what_it_does_not_read_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(mlp(), **options)


def test_a_budget_that_removes_nothing_or_too_much_is_said_before_the_search() -> None:
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.mse_loss(outputs, targets)

    for budget, message in ((Budget(macs=1.0), "removes nothing"), (Budget(macs=0.001), "least")):
        with pytest.raises(BudgetError, match=message):
            prune(
                mlp(), BATCHES, loss, example_inputs=X, budget=budget,
                fisher_masks=FisherSearch(),
            )  # fmt: skip
    assert calls <= 2  # one batch to see that it fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "weigths"}, "Did you mean 'weights'"),
        ({"importance": "outputs"}, "unknown importance 'outputs'"),
        ({"rearrange": "no"}, "rearrange must be True or False"),
        ({"shrink": 1.5}, r"shrink must be in \[0, 1\]"),
        ({"n_samples": 0}, "n_samples must be a whole number"),
        ({"tune": "scales", "damping": -1.0}, "damping must be at least 0"),
        ({"damping": 0.5}, "damping= is of tune='scales'"),
        ({"shrink": 0.5, "rearrange": False}, "shrink= is of the rearranging"),
    ],
)
def test_options_are_those_of_the_search(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FisherSearch(**options)
    if "importance" in options:
        return  # a function there
    model, before = mlp(), mlp().state_dict()
    with pytest.raises(ConfigError, match=message):
        search_masks(
            model, [], F.mse_loss, graph=sc.trace(model, X), budget=HALF, **options
        )  # before the batches are looked at
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
