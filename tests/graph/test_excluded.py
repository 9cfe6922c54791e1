"""What is left whole says why, in words a user understands, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.types import Graph
from tests.graph.nets import Net, image, plan_of, rows, sequence, shrunk, traced


def reasons(graph: Graph, name: str) -> list[str]:
    return [e.reason for e in graph.excluded if e.name == name]


def two_layers(between: object, **parts: nn.Module) -> nn.Module:
    return Net(
        lambda n, x: n.c(between(n, n.a(x))),  # type: ignore[operator]
        a=nn.Linear(6, 8), c=nn.Linear(8, 4), **parts,
    )  # fmt: skip


EYE = torch.eye(8)
COUNT = torch.arange(8.0)
ORDER = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
PINNED = {
    "softmax runs over it": lambda n, x: F.softmax(x, 1),
    "cumsum runs over it": lambda n, x: x.cumsum(1),
    "operator cdist has no rule": lambda n, x: torch.cdist(x, COUNT.expand(8, 8)),
    "it is normalised over and nothing makes it zero": lambda n, x: F.layer_norm(x.exp(), (8,)),
    "it is summed over with a tensor that is fixed": lambda n, x: x @ EYE,
    "its entries are picked by number": lambda n, x: x[:, ORDER],
    "it is sliced with a step": lambda n, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "log of a removed unit would be infinite or undefined": lambda n, x: x.abs().log(),
    "div of a removed unit would be infinite or undefined": lambda n, x: x / x.relu(),
    "rsqrt of a removed unit would be infinite or undefined": lambda n, x: x.abs().rsqrt(),
    "argmax is taken over it": lambda n, x: x - x.argmax(1, keepdim=True),
    "it meets a tensor whose entries cannot be removed": lambda n, x: x * COUNT,
    "two prunable dimensions are merged into one": lambda n, x: (
        n.b(x)[:, :, None] * x[:, None, :]
    ).reshape(-1, 64)[:, :8],
    "it is joined with a tensor that is fixed": lambda n, x: torch.stack(
        [x, COUNT * x[:, :1]]
    ).sum(0),
}  # fmt: skip


@pytest.mark.parametrize("reason", PINNED)
def test_reason_and_place(reason: str) -> None:
    graph = traced(two_layers(PINNED[reason], b=nn.Linear(8, 8)), rows())
    found = [e for e in graph.excluded if e.name == "a:neuron" and e.reason == reason]
    assert len(found) == 1, graph.summary()
    assert ".py:" in found[0].where  # the line in a forward method
    assert reasons(graph, "c:neuron") == ["it is part of the model's output"]


def test_an_operator_without_a_rule_is_named_once_with_its_count() -> None:
    graph = traced(two_layers(lambda n, x: torch.cdist(x, torch.cdist(x, EYE))), rows(8))
    assert graph.unknown_ops == ("cdist",)
    assert reasons(graph, "operator cdist") == [
        "no rule yet (2 calls); what it touches is left whole"
    ]


def test_an_operator_that_touches_nothing_prunable_is_not_reported() -> None:
    net = Net(
        lambda n, x: n.c(F.relu(n.a(torch.cdist(x, x) @ x))), a=nn.Linear(6, 8), c=nn.Linear(8, 4)
    )
    graph = traced(net, rows())
    assert graph.unknown_ops == ()
    assert graph.units == {"a:neuron": 8}


def test_parameters_without_a_target_are_listed_under_their_module() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 6))
            self.h = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.h(x) + self.table.argmax()
            return y

    graph = traced(Root(), sequence())
    assert graph.units == {}
    assert reasons(graph, "table") == ["argmax is taken over it"]


def test_an_unused_layer_and_a_branch_without_effect() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.get_submodule("a")(x)
        torch.cdist(net.get_submodule("b")(h), h)  # dead: must not pin anything
        y: Tensor = net.get_submodule("c")(F.relu(h))
        return y

    parts = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 4), "u": nn.Linear(9, 9)}
    net = Net(forward, **parts)
    graph = traced(net, rows())
    assert graph.units == {"a:neuron": 8}
    _, info = shrunk(net, plan_of(net, graph), rows())
    assert info.form == "graph"  # plain Python still runs the dead branch
    assert "module form does not work here" in info.notes[0]


def test_a_view_over_the_join_with_the_input() -> None:
    net = Net(
        lambda n, x: n.c((torch.cat([n.a(x), x], 1).view(-1, 2, 6) * 2).flatten(1)),
        a=nn.Linear(6, 6), c=nn.Linear(12, 4),
    )  # fmt: skip
    graph = traced(net, rows())
    assert reasons(graph, "a:neuron") == ["it is one block with entries that are fixed"]


def test_the_only_unit_of_a_piece_cannot_go() -> None:
    net = two_layers(lambda n, x: torch.cat([*x.split([1, 7], 1)][::-1], 1))
    graph = traced(net, rows())
    assert graph.units == {"a:neuron": 7}
    why = ["one index of the dimension is picked out"]
    assert reasons(graph, "a:neuron") == why


def test_entries_of_constants_are_no_units() -> None:
    net = Net(lambda n, x: n.c(torch.ones(5, 6)) + n.a(x).argmax(), a=nn.Linear(6, 8),
              c=nn.Linear(6, 4))  # fmt: skip
    graph = traced(net, rows())
    assert graph.units == {}
    table = Net(lambda n, x: F.linear(n.t, n.c.weight).mean(0) + x[:, :4], c=nn.Linear(6, 4),
                t=nn.Parameter(torch.ones(5, 6)))  # fmt: skip
    graph = traced(table, rows())
    assert graph.units == {}
    why = "no layer produces it: it belongs to a constant or to a parameter used as data"
    assert why in reasons(graph, "t")


def test_joined_with_the_input() -> None:
    net = Net(
        lambda n, x: n.h((x + n.c(F.relu(n.a(x)))).mean((2, 3))),
        a=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 3, 1), h=nn.Linear(3, 4),
    )  # fmt: skip
    graph = traced(net, image())
    assert reasons(graph, "c:channel") == ["it meets a tensor whose entries cannot be removed"]
    assert graph.units == {"a:channel": 8}


def test_initial_state() -> None:
    rnn = Net(
        lambda n, x, h: n.h(n.r(x, h)[0][:, -1]),
        r=nn.GRU(4, 6, batch_first=True), h=nn.Linear(6, 2),
    )  # fmt: skip
    graph = traced(rnn, (sequence(), torch.randn(1, 2, 6)))
    assert reasons(graph, "r:hidden") == ["its initial state comes from outside"]


def test_a_sum_that_nothing_makes_zero_is_pinned() -> None:
    """sigmoid(removed) = 0.5 times a weight that is computed as weight + 1."""
    net = Net(
        lambda n, x: F.linear(torch.sigmoid(n.a(x)), n.c.weight + 1),
        a=nn.Linear(6, 8), c=nn.Linear(8, 4),
    )  # fmt: skip
    graph = traced(net, rows())
    assert graph.units == {}
    assert reasons(graph, "a:neuron") == ["it is summed over and nothing makes it zero"]


def test_summary_reads_as_lines() -> None:
    text = sc.trace(two_layers(lambda n, x: x.cumsum(1)), rows()).summary()
    assert "a:neuron" in text
    assert "left whole: cumsum runs over it" in text
