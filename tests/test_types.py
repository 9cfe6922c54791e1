"""The nouns: budgets, thresholds, granularities, plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from secateurs.asked import RULES, Parameter
from secateurs.errors import ConfigError
from secateurs.types import (
    KINDS,
    STRUCTURED,
    Budget,
    Exclusion,
    Graph,
    GroupTarget,
    Plan,
    Threshold,
    WeightTarget,
    expand_granularity,
)


@pytest.mark.parametrize(
    ("given", "amount"),
    [
        (0.5, 0.5),
        (1.0, 1.0),
        (1, 1),
        (5000, 5000),
        ("120M", 120_000_000),
        ("1.5k", 1500),
        (" 2G ", 2_000_000_000),
        ("5000", 5000),
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("1e-1", 0.1),  # YAML reads 1e-1 as a text
        ("1e6", 1_000_000),
        ("1.5e6", 1_500_000),
        (np.float32(0.5), 0.5),
        (np.int64(500), 500),
    ],
)
def test_an_amount_is_a_fraction_or_absolute(given: Any, amount: float) -> None:
    found = Budget(macs=given).sizes["macs"]
    assert found == amount
    assert type(found) is type(amount)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (90.0, r"Budget\(macs=90\.0\): a float is .* Did you mean 0\.9\?"),
        ("90.0", r"Did you mean 0\.9\?"),
        (-0.1, r"in \(0, 1\]\. \(an absolute"),
        ("-0.1", r"in \(0, 1\]\. \(an absolute"),
        (0.0, r"in \(0, 1\]"),
        (200.0, r"in \(0, 1\]\. \(an absolute"),
        (float("inf"), r"in \(0, 1\]"),
        (0, "at least 1"),
        (-5, "at least 1"),
        ("0.0001k", "at least 1"),
        (float("nan"), "not a number"),
        ("nan", "not a number"),
        ("inf", "not a number"),
        ("", "not a number"),
        ("lots", "not a number"),
        ("M", "not a number"),
        (True, "not a number"),
        ([1], "not a number"),
    ],
)
def test_an_amount_out_of_range(given: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Budget(macs=given)


def test_a_budget_has_one_limit_or_several() -> None:
    assert Budget(params=0.5).given == {"params": 0.5}
    both = Budget(units=0.5, macs="1k", metric_drop=0.01)
    assert both.sizes == {"units": 0.5, "macs": 1000}
    assert repr(both) == "Budget(units=0.5, macs='1k', metric_drop=0.01)"
    with pytest.raises(ConfigError, match=r"at least one of units, .*, metric_drop; got none"):
        Budget()


@pytest.mark.parametrize("given", [0, -1.0, float("inf"), float("nan"), True, "5"])
def test_latency_and_drop_are_absolute_numbers(given: Any) -> None:
    with pytest.raises(ConfigError, match="milliseconds of one call, above 0"):
        Budget(latency_ms=given)
    if given == 0 and given is not True:
        assert Budget(metric_drop=given).given == {"metric_drop": 0}
        return
    with pytest.raises(ConfigError, match="how much worse the metric may get"):
        Budget(metric_drop=given)


def test_a_budget_as_a_fraction_of_the_dense_model() -> None:
    assert Budget(macs=0.25).fraction("macs", 1000) == 0.25
    assert Budget(macs=250).fraction("macs", 1000) == 0.25
    assert Budget(macs="1k").fraction("macs", 500) == 1.0
    assert Budget(macs="1k", units=0.29).limit("units", 100) == 29


GOOD: dict[str, dict[str, float]] = {
    "value": {"value": -1.0}, "mean": {}, "k_std": {"k": -2.0}, "mad": {"k": -2.0}, "otsu": {},
    "rate_mean": {"rate": 0.5}, "quantile": {"q": 0.0}, "gaussian_mixture": {}, "knee": {},
    "permutation": {"fdr": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_threshold_rule_takes_its_parameters_and_no_other(rule: str) -> None:
    asked = Threshold(rule, **GOOD[rule])  # type: ignore[arg-type]
    assert asked.parameters.keys() == RULES[rule].parameters.keys()
    if GOOD[rule]:
        with pytest.raises(ConfigError, match=f"needs {next(iter(GOOD[rule]))}=, got none"):
            Threshold(rule)
    other = "rate" if rule != "rate_mean" else "q"
    takes = ", ".join(RULES[rule].parameters) or "no parameter"
    with pytest.raises(ConfigError, match=f"takes no {other}; it takes {takes}$"):
        Threshold(rule, **{**GOOD[rule], other: 0.5})  # type: ignore[arg-type]


def test_defaults_of_a_threshold_are_filled_in() -> None:
    assert Threshold("otsu").parameters == {"log": False}
    assert Threshold("otsu", log=True).parameters == {"log": True}
    assert Threshold("k_std", k=1).parameters == {"k": 1}


def test_a_threshold_as_text() -> None:
    assert Threshold("k_std", k=-0.5).text == "k_std(k=-0.5) per target"
    assert Threshold("otsu", log=True, scope="global").text == "otsu(log=True) over all targets"
    assert Threshold("mean").text == "mean() per target"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rule": "quantil", "q": 0.5}, "Did you mean 'quantile'"),
        ({"rule": "otsoo"}, "Did you mean 'otsu'"),
        ({"rule": "mean", "scope": "all"}, "unknown threshold scope 'all'"),
        ({"rule": "quantile", "q": 90}, r"q must be in \[0, 1\)\. Did you mean 0\.9\?"),
        ({"rule": "quantile", "q": 1.0}, r"q must be in \[0, 1\)"),
        ({"rule": "permutation", "fdr": 5}, r"fdr must be in \(0, 1\)\. Did you mean 0\.05\?"),
        ({"rule": "permutation", "fdr": 0.0}, r"fdr must be in \(0, 1\)$"),
        ({"rule": "rate_mean", "rate": -1}, "rate must be at least 0"),
        ({"rule": "value", "value": float("nan")}, "must be finite"),
        ({"rule": "k_std", "k": "1"}, "k must be a number"),
        ({"rule": "k_std", "k": True}, "k must be a number"),
        ({"rule": "otsu", "log": 1}, "log must be True or False"),
        ({"rule": "otsu", "log": True, "k": 1}, "takes no k; it takes log"),
    ],
)
def test_a_threshold_out_of_range(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Threshold(**arguments)


@pytest.mark.parametrize(
    ("parameter", "good", "bad", "text"),
    [
        (Parameter(low=0.0, high=1.0), [0, 0.5, 1.0], [-0.1, 1.1], r"x must be in [0, 1]"),
        (Parameter(low=0.0, high=1.0, ends="(]"), [0.1, 1], [0], "x must be in (0, 1]"),
        (Parameter(low=0.0, ends="(]"), [1e-9], [0], "x must be above 0"),
    ],
)
def test_ranges_of_parameters(
    parameter: Parameter, good: list[float], bad: list[float], text: str
) -> None:
    assert [parameter.problem("x", v) for v in good] == [None] * len(good)
    assert [parameter.problem("x", v) for v in bad] == [text] * len(bad)


def test_granularities() -> None:
    assert expand_granularity("structured") == STRUCTURED == set(KINDS) - {
        "weight", "embedding", "layer"
    }  # fmt: skip
    assert expand_granularity(("weight", "head")) == {"weight", "head"}
    with pytest.raises(ConfigError, match="Did you mean 'neuron'"):
        expand_granularity("neurons")


def test_a_graph_selects_by_kind_and_tells_what_it_left() -> None:
    graph = Graph(
        {
            "a:neuron": GroupTarget("a:neuron", "neuron", 3, ()),
            "a.weight": WeightTarget("a.weight", (3, 2)),
        },
        excluded=(Exclusion("b", "it is part of the model's output"),),
    )
    assert graph.units == {"a:neuron": 3}
    assert [t.name for t in graph.select("weight")] == ["a.weight"]
    assert graph.targets["a.weight"].n_units == 6
    assert graph.groups("weight") == []
    assert "b" in graph.summary()
    assert "left whole: it is part of the model's output" in graph.summary()


def test_a_plan_counts_what_it_removes() -> None:
    empty = Plan({}, {}, {}, {})
    assert (empty.n_removed, empty.structural) == (0, False)
    plan = Plan({"w": {0: torch.tensor([0])}}, {}, {"a": torch.tensor([1, 2])}, {"w": (3, 2)})
    assert (plan.n_removed, plan.structural) == (2, True)
