"""`Graph.only`: what a pattern names, and what is said about it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError
from secateurs.graph import trace
from secateurs.types import Exclusion, Graph


class Block(nn.Module):
    """x + expand and contract."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Net(nn.Module):
    """A convolution, ten blocks in two stages, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 1)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.layer2 = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), Block(5))
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.conv(x).relu().mean(-1))
        out: Tensor = self.head(self.layer2(self.layer1(x)))
        return out


NET = Net()
GRAPH = trace(NET, torch.randn(2, 3, 4))
ALL = {
    "conv:channel",
    "embed:neuron",
    "layer1.0.up:neuron",
    "layer1.1.up:neuron",
    "layer2.0:neuron",
    "layer2.2.up:neuron",
}
UPS = {name for name in ALL if "up" in name}


def groups(graph: Graph) -> set[str]:
    return {t.name for t in graph.groups()}


def test_the_net_is_what_the_cases_assume() -> None:
    assert groups(GRAPH) == ALL
    assert [e.name for e in GRAPH.excluded] == ["head:neuron"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv:channel", {"conv:channel"}),
        ("channel", {"conv:channel"}),  # a kind
        ("neuron", ALL - {"conv:channel"}),
        ("*:channel", {"conv:channel"}),
        ("*.up:neuron", UPS),
        ("layer1.0.up:neuron", {"layer1.0.up:neuron"}),
        # a module, with what it reads
        ("layer1.0.up", {"layer1.0.up:neuron", "embed:neuron"}),
        ("conv", {"conv:channel"}),
        ("head", {"layer2.0:neuron"}),  # the units that it reads
        # a module around
        ("layer1", {"layer1.0.up:neuron", "layer1.1.up:neuron", "embed:neuron"}),
        ("layer1.*", {"layer1.0.up:neuron", "layer1.1.up:neuron", "embed:neuron"}),
        ("layer2.[0-9]*.up", {"layer2.2.up:neuron", "layer2.0:neuron"}),
        ("layer?", ALL - {"conv:channel"}),
        ("re:^layer[12]\\.\\d\\.up:", UPS),
        (re.compile("UP:", re.IGNORECASE), UPS),
        (["conv", "*.up:neuron"], UPS | {"conv:channel"}),
        (("conv",), {"conv:channel"}),
        (nn.Conv1d, {"conv:channel"}),
        (Block, UPS | {"embed:neuron", "layer2.0:neuron"}),
        (NET.layer2, {"layer2.0:neuron", "layer2.2.up:neuron", "embed:neuron"}),
        ([NET.conv, NET.layer1[1].up], {"conv:channel", "embed:neuron", "layer1.1.up:neuron"}),
    ],
)
def test_patterns(pattern: Any, expected: set[str]) -> None:
    assert groups(GRAPH.only(include=pattern, model=NET)) == expected
    if expected != ALL:
        assert groups(GRAPH.only(exclude=pattern, model=NET)) == ALL - expected


def test_names_go_before_kinds() -> None:
    """A module may be called like a kind."""
    model = nn.Sequential()
    model.add_module("channel", nn.Linear(2, 3))
    model.add_module("conv", nn.Linear(3, 4))
    model.add_module("last", nn.Linear(4, 2))
    graph = trace(model, torch.randn(2, 2))
    assert groups(graph.only(exclude="channel")) == {"conv:neuron"}


def test_include_and_exclude_together() -> None:
    graph = GRAPH.only(include=["conv", "*.up:neuron"], exclude="layer2")
    assert groups(graph) == {"conv:channel", "layer1.0.up:neuron", "layer1.1.up:neuron"}


def test_weights_follow_their_module() -> None:
    graph = GRAPH.only(exclude="layer1")
    names = [t.name for t in graph.select("weight")]
    assert names == ["conv.weight", "layer2.0.weight", "layer2.2.up.weight",
                     "layer2.2.down.weight", "embed.weight", "head.weight"]  # fmt: skip


def test_what_is_taken_out_is_listed_with_the_pattern() -> None:
    graph = GRAPH.only(exclude=[nn.Conv1d, re.compile("^layer1.0"), NET.head], model=NET)
    assert graph.excluded[0] == GRAPH.excluded[0]
    found = {e.name: e.reason for e in graph.excluded[1:]}
    assert found == {
        "conv:channel": "excluded by the user: Conv1d",
        "embed:neuron": "excluded by the user: re:^layer1.0",
        "layer1.0.up:neuron": "excluded by the user: re:^layer1.0",
        "layer2.0:neuron": "excluded by the user: head",
        "layers:layer": "excluded by the user: re:^layer1.0",
    }
    assert "conv:channel" in graph.summary()
    (only, *_) = GRAPH.only(include=["layer1", "layer2"]).excluded[1:]
    assert only == Exclusion("conv:channel", "excluded by the user: not in layer1, layer2")


def test_everything_else_of_the_graph_stays() -> None:
    graph = GRAPH.only(exclude="conv")
    assert (graph.costs, graph.detail, graph.device) == (GRAPH.costs, GRAPH.detail, GRAPH.device)
    assert GRAPH.only().targets == GRAPH.targets
    assert groups(GRAPH) == ALL


def test_a_part_that_is_left_whole_anyway_may_be_excluded() -> None:
    assert groups(GRAPH.only(exclude="head:neuron")) == ALL
    with pytest.raises(ConfigError, match="must be left whole: head:neuron: it is part of the"):
        GRAPH.only(include="head:neuron")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "layr1"}, r"exclude 'layr1' matches no target\. Did you mean 'layer1'\?"),
        ({"include": "conv:chanel"}, "include 'conv:chanel' .* Did you mean 'conv:channel'"),
        ({"exclude": "layer3.*"}, r"exclude 'layer3\.\*' matches no target\. Did you mean 'layer"),
        ({"exclude": "chanel"}, "Did you mean 'channel'"),
        ({"exclude": re.compile("^x")}, r"exclude 're:\^x' matches no target"),
        ({"exclude": ["aa", "bb"]}, "(?s)'aa' matches no target.*'bb' matches no target"),
        ({"include": "aa", "exclude": "bb"}, "(?s)include 'aa' .*exclude 'bb' "),
        ({"exclude": "re:("}, r"exclude 're:\(': not a regular expression"),
        ({"exclude": nn.GRU, "model": NET}, "exclude 'GRU': the model has no such module"),
        ({"exclude": nn.Linear(2, 2), "model": NET}, "exclude 'Linear': the model has no such"),
        ({"exclude": nn.Linear}, "exclude 'Linear' is a module or a module class: give model="),
        ({"exclude": NET.head}, "give model="),
        ({"exclude": 5}, "exclude: a pattern is a name.*got 5"),
        ({"exclude": [""]}, "a pattern is a name.*got ''"),
        ({"exclude": int}, "a pattern is a name.*got <class 'int'>"),
        ({"include": []}, "include is empty"),
        ({"exclude": "*"}, "include and exclude leave no target"),
        ({"include": "conv", "exclude": "conv"}, "include and exclude leave no target"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRAPH.only(**options)
