"""Scores on shuffled labels, and the threshold that compares with them, in a whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.allocation import preview
from secateurs.controls import null_scores, shuffled_targets
from secateurs.errors import BudgetError, ConfigError
from secateurs.pipeline import Stage
from secateurs.recipe import parse_recipe
from secateurs.types import Batch, Graph, Threshold

ASKED = Threshold("permutation", fdr=0.1)
INFORMATION = "mutual_information"


def useful_and_idle() -> nn.Module:
    """Four hidden units see the feature that decides the label, eight see noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 2))
    first = model[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight[:4] = torch.tensor([[1.0, 0.0, 0.0]]) * torch.tensor([[1.0], [-1], [2], [-2]])
        first.weight[4:, 0] = 0.0
        first.bias.zero_()
    return model


def data(n: int = 200, size: int = 64) -> list[Batch]:
    """Ragged batches; the label is the sign of the first feature."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


BATCHES = data()
X = BATCHES[0][0]


def traced(model: nn.Module) -> Graph:
    return sc.trace(model, X)


def test_each_repeat_is_a_score_on_shuffled_labels() -> None:
    model = useful_and_idle()
    graph = traced(model)
    drawn = null_scores(model, BATCHES, F.cross_entropy, criterion="snip", graph=graph, repeats=3,
                        seed=5)  # fmt: skip
    again = null_scores(model, BATCHES, F.cross_entropy, criterion="snip", graph=graph, repeats=3,
                        seed=5)  # fmt: skip
    other = null_scores(model, BATCHES, F.cross_entropy, criterion="snip", graph=graph, repeats=3,
                        seed=6)  # fmt: skip
    lines = [s.values["0:neuron"] for s in drawn]
    assert all(torch.equal(a, b.values["0:neuron"]) for a, b in zip(lines, again, strict=True))
    assert not any(torch.equal(a, b) for a in lines for b in lines if a is not b)
    assert not any(torch.equal(a, b.values["0:neuron"]) for a in lines for b in other)
    real = sc.score(model, BATCHES, F.cross_entropy, criterion="snip", graph=graph)
    assert {s.criterion for s in drawn} == {real.criterion}
    seeds = np.random.SeedSequence(5).generate_state(3)
    for seed, line in zip(seeds, lines, strict=True):
        batches = shuffled_targets(BATCHES, model, int(seed))
        one = sc.score(model, batches, F.cross_entropy, criterion="snip", graph=graph, seed=5)
        assert torch.equal(one.values["0:neuron"], line)


def test_units_that_know_the_label_stay() -> None:
    model = useful_and_idle()
    graph = traced(model)
    scores = sc.score(model, BATCHES, F.cross_entropy, criterion=INFORMATION, graph=graph)
    null = null_scores(model, BATCHES, F.cross_entropy, criterion=INFORMATION, graph=graph)
    assert len(null) == 20
    counts = sc.allocate(scores, ASKED, null=null)
    assert counts.kept == {"0:neuron": 4}
    plan = sc.select(scores, counts)
    assert plan.removed["0:neuron"].tolist() == list(range(4, 12))
    assert "permutation(fdr=0.1) per target" in plan.reasons["0:neuron"]
    (row,) = preview(scores, ASKED, null=null).rows
    assert (row.goes, row.problem) == (8, "")
    # without a relation between inputs and labels hardly anything stays: the check can fail
    shuffled = shuffled_targets(BATCHES, model, 3)
    nothing = sc.score(model, shuffled, F.cross_entropy, criterion=INFORMATION, graph=graph)
    assert preview(nothing, ASKED, null=null).goes >= 11


def test_units_removed_earlier_stay_out_of_the_null() -> None:
    model = useful_and_idle()
    graph = traced(model)
    given: dict[str, Any] = {"criterion": INFORMATION, "graph": graph}
    first = sc.score(model, BATCHES, F.cross_entropy, **given)
    plan = sc.select(first, sc.allocate(first, sc.Budget(units=10)))
    (one,) = null_scores(model, BATCHES, F.cross_entropy, previous=plan, repeats=1, **given)
    assert one.values["0:neuron"].isinf().nonzero().flatten().tolist() == (
        plan.removed["0:neuron"].tolist()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magnitude"}, "'magnitude' does not see the targets"),
        ({"criterion": "entropy"}, "'entropy' does not see the targets"),
        ({"criterion": {"combine": "rank", "of": ["snip", "taylor"]}}, "use one criterion with"),
        ({"criterion": "snip", "repeats": 0}, "repeats must be a whole number, at least 1, got 0"),
        ({"criterion": "snip", "repeats": True}, "repeats must be a whole number"),
        ({"criterion": "snipp"}, "Did you mean 'snip'"),
    ],
)
def test_nulls_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    model = useful_and_idle()
    with pytest.raises(ConfigError, match=message):
        null_scores(model, BATCHES, F.cross_entropy, **options)


def test_targets_that_cannot_be_shuffled() -> None:
    model = useful_and_idle()
    odd = [(x, {"label": y}) for x, y in BATCHES]
    with pytest.raises(
        ConfigError, match=r"threshold \"permutation\"\) needs targets that are one"
    ):
        null_scores(model, odd, lambda out, t: F.cross_entropy(out, t["label"]), criterion="snip")


def test_prune_scores_the_null_by_itself() -> None:
    seen = []
    result = sc.prune(
        useful_and_idle(), BATCHES, F.cross_entropy, example_inputs=X, threshold=ASKED,
        criterion=INFORMATION, progress=lambda what, done, total: seen.append(what),
    )  # fmt: skip
    assert result.counts.kept == {"0:neuron": 4}
    assert isinstance(result.model, nn.Sequential)
    assert result.model[0].out_features == 4
    assert sum(what == "score shuffled labels: batch 4 of 4" for what in seen) == 20  # 2 / fdr
    assert "threshold permutation (scope=target, fdr=0.1)" in result.report.headline


def test_the_shuffle_control_keeps_the_number_of_units() -> None:
    result = sc.prune(
        useful_and_idle(), BATCHES, F.cross_entropy, example_inputs=X, threshold=ASKED,
        criterion=INFORMATION, control="shuffle",
    )  # fmt: skip
    assert result.counts.kept == {"0:neuron": 4}
    assert result.scores.criterion == f"shuffle({INFORMATION})"


def test_gradients_of_a_fitted_model_are_refused_with_the_reason() -> None:
    """Wrong labels pull harder at a model that has learned the right ones."""
    model = useful_and_idle()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = (torch.cat([b[i] for b in BATCHES]) for i in (0, 1))
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with pytest.raises(BudgetError, match="gradients of a trained model"):
        sc.prune(
            model, BATCHES, F.cross_entropy, example_inputs=X, threshold=ASKED, criterion="taylor"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magnitude"}, "does not see the targets"),
        ({"criterion": {"combine": "sum", "of": ["snip", "taylor"]}}, "use one criterion with"),
        ({"criterion": "snip", "control": "random-labels"}, "nothing would stay"),
        ({"criterion": "snip", "control": "invert"}, "changes the values"),
    ],
)
def test_stages_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stage(threshold=ASKED, **options)


@pytest.mark.parametrize(("fdr", "repeats"), [(0.1, 20), (0.05, 40), (0.5, 4), (0.3, 7)])
def test_repeats_follow_from_the_rate(fdr: float, repeats: int) -> None:
    assert Stage(threshold=Threshold("permutation", fdr=fdr)).null_repeats == repeats
    assert Stage(threshold=Threshold("mean")).null_repeats == 0


@pytest.mark.parametrize(
    "block", [{"rule": "otsu", "log": True}, {"rule": "permutation", "fdr": 0.05},
              {"rule": "mad", "k": -1}, {"rule": "knee", "scope": "global"}],
)  # fmt: skip
def test_recipes_know_all_rules(block: dict[str, Any]) -> None:
    recipe = parse_recipe({"task": "digits-mlp", "criterion": "snip", "threshold": block})
    assert recipe.stage().threshold == Threshold(**block)
    resolved = recipe.resolved()["threshold"]
    assert resolved == {"scope": "target", **block}
    assert parse_recipe({"task": "digits-mlp", "criterion": "snip", "threshold": resolved}) == (
        recipe
    )
