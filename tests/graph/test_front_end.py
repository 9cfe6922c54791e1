"""The light front end: what Python it takes, what it leaves behind (nothing), and what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.errors import ConfigError, PruningError
from secateurs.surgery import masked_copy, shrink
from secateurs.surgery.shrinking import info_of
from secateurs.types import Budget, Counts, Inputs, Scores
from tests.graph.law import proven, why
from tests.graph.nets import Net, plan_of, randomized, rows, sequence, shrunk, tolerable, traced
from tests.graph.test_capture import same, snapshot

EIGHT = {"a:neuron": 8}
MODULE, GRAPH = ("module",), ("graph",)


def mlp(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    return Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3), **parts)


# -- any Python ------------------------------------------------------------------------------


def branch(n: Any, x: Tensor) -> Tensor:
    h = F.relu(n.a(x))
    if x.sum() > 100:
        h = h * 2
    y: Tensor = n.c(h)
    return y


def number(n: Any, x: Tensor) -> Tensor:
    y: Tensor = n.c(F.relu(n.a(x)) * x.abs().max().item())
    return y


def steps(n: Any, x: Tensor) -> Tensor:
    h = n.a(x)
    for _ in range(int(x[0, 0].abs() * 0) + 2):
        h = torch.tanh(h)
    y: Tensor = n.c(h)
    return y


def through_numpy(n: Any, x: Tensor) -> Tensor:
    weights = torch.from_numpy(x.detach().numpy().mean(0, keepdims=True))
    y: Tensor = n.c(F.relu(n.a(x * weights)))
    return y


def lists(n: Any, x: Tensor) -> Tensor:
    scale = torch.tensor([2.0] * x.shape[0], dtype=x.dtype)[:, None]
    y: Tensor = n.c(F.relu(n.a(x)) * scale)
    return y


@pytest.mark.parametrize("forward", [branch, number, steps, through_numpy, lists])
def test_python_that_depends_on_data(forward: Callable[..., Any]) -> None:
    proven(mlp(forward), rows(), EIGHT, forms=MODULE)


def outside(change: Callable[[Any], Any]) -> nn.Module:
    """Units that leave as a numpy array and come back."""

    def forward(n: Any, x: Tensor) -> Tensor:
        h = n.a(x)
        y: Tensor = n.c(h + torch.from_numpy(change(h.detach().numpy()).copy()))
        return y

    return mlp(forward)


def test_values_that_leave_and_come_back() -> None:
    """Nobody sees what happens outside: the module form is proven by its numbers, or refused."""
    proven(outside(lambda h: 3 * h), rows(), EIGHT, forms=MODULE)
    net = randomized(outside(lambda h: h[:, ::-1]))
    graph = sc.trace(net, rows())
    if graph.units:
        with pytest.raises(PruningError):
            sc.shrink(net, plan_of(net, graph), rows())


# -- inputs and outputs -----------------------------------------------------------------------


@dataclass
class Result:
    """An output that is no pytree."""

    score: Tensor
    hidden: Tensor
    note: str = ""


def both(n: Any, x: Tensor) -> dict[str, Any]:
    h = F.relu(n.a(x))
    return {"score": n.c(h), "more": [h, {"deep": h.sum(1)}]}


def test_outputs_that_matter() -> None:
    graph = proven(mlp(both), rows(), {})
    assert why(graph, "a:neuron") == {"it is part of the model's output"}
    proven(mlp(both), rows(), EIGHT, outputs=["score"])
    net = mlp(lambda n, x: (n.c(F.relu(n.a(x))), n.a(x)))
    graph = sc.trace(net, rows(), outputs=["0"])
    assert graph.units == EIGHT
    assert graph.outputs == ("0",)
    assert sc.trace(net, rows()).units == {}


@pytest.mark.parametrize("name", ["scores", "more.hidden", "7"])
def test_outputs_that_are_not_there(name: str) -> None:
    with pytest.raises(PruningError, match=re.escape(name.rpartition(".")[2]) + ".*choices"):
        sc.trace(mlp(both), rows(), outputs=[name])


def test_tensors_inside_objects_are_outputs() -> None:
    def forward(n: Any, x: Tensor) -> tuple[Tensor, Result]:
        h = n.a(x)
        return n.c(F.relu(h)), Result(x, h)

    graph = sc.trace(mlp(forward), rows())
    assert graph.units == {}
    assert why(graph, "a:neuron") == {"it is part of the model's output"}


def test_nested_inputs() -> None:
    net = mlp(lambda n, x, more: n.c(F.relu(n.a(x[0]) + n.a(more["b"][1]))))
    for inputs in ({"x": [rows()], "more": {"b": (1, rows() + 1)}}, ([rows()], {"b": (1, rows())})):
        graph = traced(net, inputs)
        assert graph.units == EIGHT
        _, info = shrunk(net, plan_of(net, graph), inputs)
        assert tolerable(info.verification)


def test_shared_modules_count_their_calls() -> None:
    net = mlp(lambda n, x: n.c(n.b(F.relu(n.b(n.a(x))))), b=nn.Linear(8, 8))
    graph = proven(net, rows(), EIGHT)
    calls = {s.call for t in graph.groups() for s in t.sites if s.module == "b"}
    assert calls == {0, 1}


# -- writes ----------------------------------------------------------------------------------


def test_writes_through_views() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        h = n.a(x)
        h[:1].mul_(2)
        h.t().relu_()
        y: Tensor = n.c(h)
        return y

    proven(mlp(forward), rows(), EIGHT)


def test_writes_into_given_tensors() -> None:
    """`out=`: what is written into gets new labels."""

    def forward(n: Any, x: Tensor) -> Tensor:
        h = n.a(x)
        room = torch.empty_like(h)
        torch.tanh(h, out=room)
        y: Tensor = n.c(room)
        return y

    proven(mlp(forward), rows(), EIGHT, forms=MODULE)


def test_assignment_into_a_created_tensor() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        room = x.new_zeros(len(x), 2, 8)
        room[:, 0] = n.a(x)
        room[:, 1] = torch.sin(n.a(x))
        y: Tensor = n.c(room.sum(1))
        return y

    proven(mlp(forward), rows(), EIGHT, forms=GRAPH)


# -- what is left behind -----------------------------------------------------------------------


class Caching(nn.Module):
    """Keeps what it saw on itself, counts its calls in a buffer, and draws a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 3)
        self.seen: list[Tensor] = []
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        self.last = self.a(x)
        self.seen.append(self.last)
        self.count.add_(1)
        y: Tensor = self.c(F.relu(self.last))
        return y


def test_nothing_stays() -> None:
    net = randomized(Caching()).train()
    before = snapshot(net)
    graph = sc.trace(net, rows())
    assert graph.units == EIGHT
    assert same(before, snapshot(net))
    assert net.seen == []
    assert not hasattr(net, "last")
    assert all(not hasattr(p, "__wrapped__") for p in net.parameters())


def test_a_table_that_renormalises_itself_is_left_alone() -> None:
    """max_norm writes into the weight at every lookup."""
    net = Net(lambda n, x: n.c(n.e(x)), e=nn.Embedding(10, 8, max_norm=0.1), c=nn.Linear(8, 3))
    before = net.get_parameter("e.weight").detach().clone()
    sc.trace(net, torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal(net.get_parameter("e.weight"), before)


def test_hooks_and_grad_mode() -> None:
    net = mlp(lambda n, x: n.c(F.relu(n.a(x))))
    calls: list[int] = []
    handle = net.get_submodule("a").register_forward_hook(lambda *a: calls.append(1))
    graph = sc.trace(net, rows())
    assert graph.units == EIGHT
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    handle.remove()
    assert not net.get_submodule("a")._forward_hooks
    net(rows()).sum().backward()
    assert net.get_parameter("a.weight").grad is not None


def test_aliased_inputs() -> None:
    x = rows()
    net = Net(lambda n, x, y: n.c(n.a(x.add_(1)) * n.b(y)), a=nn.Linear(6, 8), b=nn.Linear(6, 8),
              c=nn.Linear(8, 2))  # fmt: skip
    before = x.clone()
    assert sc.trace(net, (x, x)).units == EIGHT
    assert torch.equal(x, before)


# -- precisions and devices -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precisions(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).to(dtype)
    graph = traced(net, rows().to(dtype))
    assert graph.units == {"0:neuron": 8}
    small, info = shrunk(net, plan_of(net, graph), rows().to(dtype))
    assert tolerable(info.verification)
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_the_meta_device_takes_real_inputs() -> None:
    with torch.device("meta"):
        net = nn.LSTM(4, 6, batch_first=True)
        head = nn.Linear(6, 3)
    model = Net(lambda n, x: n.h(n.r(x)[0]), r=net, h=head)
    assert sc.trace(model, sequence()).units == {"r:hidden": 6}


# -- compiled models --------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models() -> None:
    """Their code is no Python any more, but their operators pass by all the same."""
    net: nn.Module = torch.jit.script(randomized(plain()))
    assert sc.trace(net, rows()).units in ({}, {"0:neuron": 8})


def test_compiled_models() -> None:
    """What is compiled is a wrapper: pruned as it is, or an error that says so."""
    net: Any = torch.compile(randomized(plain()), backend="eager")
    assert [t.n_units for t in sc.trace(net, rows()).groups()] in ([], [8])


# -- what it says ------------------------------------------------------------------------------


def test_the_line_is_that_of_the_user() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        y: Tensor = n.c(n.a(x).cumsum(1))  # this line
        return y

    graph = sc.trace(mlp(forward), rows())
    (found,) = [e for e in graph.excluded if e.name == "a:neuron"]
    lines = Path(__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "# this line" in text)
    assert f"(test_front_end.py:{line})" in found.where


@pytest.mark.parametrize("inputs", [rows(features=5), (), {"y": rows()}])
def test_inputs_that_do_not_fit(inputs: Inputs) -> None:
    with pytest.raises(PruningError):
        sc.trace(mlp(lambda n, x: n.c(n.a(x))), inputs)


class Routed(nn.Module):
    """Experts that get the tokens which a router sends them: sizes depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.router = nn.Linear(4, 6), nn.Linear(6, 3)
        self.up = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.outer = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        share, chosen = self.router(x).softmax(-1).topk(1, -1)
        out = torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, place = torch.where(chosen == number)
            made = down(torch.relu(up(x[token]))) * share[token, place, None]
            out.index_add_(0, token, made)
        found: Tensor = self.outer(out)
        return found


@pytest.mark.parametrize("seed", range(4))
def test_routed_experts_keep_their_class(seed: int) -> None:
    """The masked model routes as the small one does; the dense one may route otherwise."""
    torch.manual_seed(seed)
    model, x = Routed().eval(), torch.randn(5, 4)
    graph = sc.trace(model, x)
    groups = graph.groups()
    scores = Scores(graph, {t.name: torch.rand(t.n_units) for t in groups}, "random")
    counts = Counts({t.name: t.n_units // 2 for t in groups}, Budget(units=0.5))
    plan = sc.select(scores, counts)
    small = shrink(model, plan, x, form="module")
    other = torch.randn(9, 4)
    torch.testing.assert_close(small(other), masked_copy(model, plan)(other))


def test_a_model_that_cannot_be_copied_is_left_without_what_a_run_sets_on_it(
    tmp_path: Path,
) -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)
            self.log = (tmp_path / "log").open("w")
            self.seen: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.relu(self.inner(x))
            out: Tensor = self.outer(self.seen)
            return out

    model = Open()
    assert sc.trace(model, torch.randn(2, 4)).units == {"inner:neuron": 8}
    assert model.seen is None
    model.log.close()


def test_a_tensor_that_a_module_holds_as_neither_can_follow_a_cut() -> None:
    """It is cut in the graph form; the module form, whose tensor stays long, is refused."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)
            self.scale = torch.linspace(1, 2, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.outer(torch.relu(self.inner(x)) * self.scale)
            return out

    model, x = Scaled().eval(), torch.randn(3, 4)
    graph = sc.trace(model, x)
    assert graph.units == {"inner:neuron": 8}
    plan = sc.select(
        Scores(graph, {"inner:neuron": torch.arange(8.0)}, "number"),
        Counts({"inner:neuron": 4}, Budget(units=0.5)),
    )
    small = shrink(model, plan, x)
    assert info_of(small).form == "graph"
    other = torch.randn(5, 4)
    torch.testing.assert_close(small(other), masked_copy(model, plan)(other))


def test_a_single_tensor_has_no_named_outputs() -> None:
    with pytest.raises(ConfigError, match="one Tensor, without named parts; leave outputs away"):
        sc.trace(nn.Linear(3, 2), torch.randn(2, 3), outputs=("logits",))
