"""Operators of other libraries: pinned and named, or taught by `register_rule`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.errors import ConfigError
from secateurs.graph import register_rule
from secateurs.graph.labels import Labels
from secateurs.graph.records import Record
from secateurs.graph.rules import RULES
from tests.graph.law import proven, why
from tests.graph.nets import Net, rows


@torch.library.custom_op("secateurs_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("secateurs_test::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Not a linear layer: the weight is added, and what is not positive becomes one."""
    y = x + weight.sum(0)
    return torch.where(y > 0, y, torch.ones_like(y))


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def twice(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.get_submodule("c")(torch.ops.secateurs_test.doubled(net.get_submodule("a")(x)))
    return y


@pytest.fixture
def taught() -> Iterator[None]:
    @register_rule("secateurs_test::doubled")
    def rule(labels: Labels, record: Record) -> None:
        labels.assign(record.outputs[0], labels.factors(record.args[0]))

    yield
    del RULES["secateurs_test::doubled"]


def test_without_a_rule_it_is_pinned_and_named() -> None:
    graph = proven(Net(twice, a=nn.Linear(6, 8), c=nn.Linear(8, 3)), rows(), {})
    assert graph.unknown_ops == ("secateurs_test::doubled",)
    assert why(graph, "a:neuron") == {"operator secateurs_test::doubled has no rule"}
    assert why(graph, "operator secateurs_test::doubled")


@pytest.mark.usefixtures("taught")
def test_with_a_rule_it_is_pruned() -> None:
    graph = proven(Net(twice, a=nn.Linear(6, 8), c=nn.Linear(8, 3)), rows(), {"a:neuron": 8})
    assert graph.unknown_ops == ()


def test_a_name_that_another_library_uses_too() -> None:
    net = Net(
        lambda n, x: n.c(torch.ops.secateurs_test.linear(n.a(x), n.b.weight)),
        a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3),
    )  # fmt: skip
    graph = proven(net, rows(), {})
    assert graph.unknown_ops == ("secateurs_test::linear",)


@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("doubled", "namespace"),
        ("aten::linear", "belongs to torch"),
        ("secateurs_test::doubled", "already has a rule"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_rule(name)
    assert "linear" in RULES


@pytest.mark.parametrize("fails", [ValueError("no such argument"), IndexError("out of range")])
def test_a_rule_that_fails_pins(fails: Exception) -> None:
    @register_rule("secateurs_test::doubled")
    def rule(labels: Labels, record: Record) -> None:
        raise fails

    try:
        net = Net(twice, a=nn.Linear(6, 8), c=nn.Linear(8, 3))
        (reason,) = why(sc.trace(net, rows()), "a:neuron")
    finally:
        del RULES["secateurs_test::doubled"]
    assert reason == f"the rule for secateurs_test::doubled does not fit this call ({fails})"


def test_what_a_rule_leaves_unsaid_is_pinned() -> None:
    @register_rule("secateurs_test::doubled")
    def rule(labels: Labels, record: Record) -> None:
        labels.assign(record.outputs[0], [])

    try:
        net = Net(twice, a=nn.Linear(6, 8), c=nn.Linear(8, 3))
        (reason,) = why(sc.trace(net, rows()), "a:neuron")
    finally:
        del RULES["secateurs_test::doubled"]
    assert reason == "operator secateurs_test::doubled has no rule for this dimension"
