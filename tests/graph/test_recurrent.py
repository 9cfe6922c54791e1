"""Recurrent layers and cells: one hidden size, packed sequences, states from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.graph.law import proven, why
from tests.graph.nets import Net, rows, sequence

LENGTHS = torch.tensor([5, 3])
CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
    "rnn relu": lambda i, h: nn.RNNCell(i, h, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("start", ["default", "zeros", "layer"])
def test_cells_in_a_loop(name: str, start: str) -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        first = n.e(x[:, 0]) if start == "layer" else x.new_zeros(len(x), 6)
        state: Any = (first, first) if name == "lstm" else first
        if start == "default":
            state = None
        for step in x.unbind(1):
            state = n.cell(step, state)
        y: Tensor = n.h(state[0] if name == "lstm" else state)
        return y

    net = Net(forward, e=nn.Linear(4, 6), cell=CELLS[name](4, 6), h=nn.Linear(6, 3))
    units = {"e:hidden" if start == "layer" else "cell:hidden": 6}
    proven(net, sequence(), units, forms=("graph",))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: Callable[..., nn.RNNBase]) -> None:
    """torch.export does not take them: the module form."""

    def forward(n: Any, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(F.relu(n.e(x)), LENGTHS, batch_first=True)
        y = pad_packed_sequence(n.r(packed)[0], batch_first=True)[0]
        found: Tensor = n.h(y[:, 2])
        return found

    net = Net(forward, e=nn.Linear(4, 7), r=kind(7, 6, batch_first=True), h=nn.Linear(6, 3))
    proven(net, sequence(), {"e:neuron": 7, "r:hidden": 6}, forms=("module",))


def test_stacked_layers_share_their_units_only_within() -> None:
    net = Net(
        lambda n, x: n.h(n.b(n.a(x)[0])[1][0].flatten(0, 1)),
        a=nn.GRU(4, 6, 2, batch_first=True, bidirectional=True),
        b=nn.LSTM(12, 5, batch_first=True), h=nn.Linear(5, 3),
    )  # fmt: skip
    proven(net, sequence(), {"a:hidden": 6, "b:hidden": 5})


def test_states_from_outside() -> None:
    why_not = {"its initial state comes from outside"}
    net = Net(lambda n, x, h: n.h(n.r(x, h)[0][:, -1]), r=nn.GRU(4, 6, batch_first=True),
              h=nn.Linear(6, 3))  # fmt: skip
    assert why(proven(net, (sequence(), torch.randn(1, 2, 6)), {}), "r:hidden") == why_not
    net = Net(lambda n, x, h: n.h(n.r(x, h)), r=nn.GRUCell(6, 6), h=nn.Linear(6, 3))
    assert why(proven(net, (rows(), torch.randn(3, 6)), {}), "r:hidden") == why_not


def test_a_state_that_is_partly_fixed() -> None:
    start = torch.linspace(-1, 1, 6).double()

    def forward(n: Any, x: Tensor) -> Tensor:
        state = torch.cat([n.e(x[:, 0])[:, :3], start[:3].expand(2, 3)], 1)
        y: Tensor = n.h(n.r(x, state[None])[0])
        return y

    net = Net(
        forward,
        r=nn.GRU(4, 6, batch_first=True), e=nn.Linear(4, 6), h=nn.Linear(6, 3),
    )  # fmt: skip
    graph = proven(net, sequence(), {"e:hidden": 3, "e:neuron": 3}, forms=("graph",))
    assert "its initial state is fixed" in why(graph, "r:hidden") | why(graph, "e:neuron")


def test_hand_written_weights() -> None:
    """A recurrent layer whose first weight is a constant."""
    fixed = torch.linspace(-1, 1, 24).view(6, 4).double()

    def forward(n: Any, x: Tensor) -> Tensor:
        w = [fixed, n.w, n.b, n.b]
        y: Tensor = torch.rnn_tanh(x, torch.zeros(1, 2, 6).double(), w, True, 1, 0.0, False, False,
                                   True)[0]  # fmt: skip
        out: Tensor = n.h(y)
        return out

    net = Net(forward, w=nn.Parameter(torch.randn(6, 6)), b=nn.Parameter(torch.randn(6)),
              h=nn.Linear(6, 3))  # fmt: skip
    graph = proven(net, sequence(), {})
    assert "a recurrent weight is a fixed tensor" in why(graph, "w:hidden")


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("layers", [1, 2])
def test_projections(layers: int) -> None:
    """Six cells, projected to three that the next layer and the output read."""
    net = Net(
        lambda n, x: n.h(n.r(x)[0][:, -1]), h=nn.Linear(3, 2),
        r=nn.LSTM(4, 6, layers, proj_size=3, batch_first=True),
    )  # fmt: skip
    proven(net, sequence(), {"r:hidden": 3, "r:hidden#2": 6})


def test_one_hidden_unit() -> None:
    net = Net(lambda n, x: n.h(n.r(x)[0]), r=nn.GRU(4, 1, batch_first=True), h=nn.Linear(1, 3))
    graph = proven(net, sequence(), {})
    assert "a recurrent layer needs at least one unit" in why(graph, "r:hidden") | why(graph, "r")
    net = Net(lambda n, x: n.h(n.r(x, x.new_zeros(2, 1))), r=nn.GRUCell(4, 1), h=nn.Linear(1, 3))
    graph = proven(net, sequence()[:, 0], {})
    assert "a recurrent layer needs at least one unit" in why(graph, "r:hidden") | why(graph, "r")
