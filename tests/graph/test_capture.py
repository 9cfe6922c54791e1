"""Capturing leaves the model as it was, and says plainly what it cannot do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.errors import CaptureError
from secateurs.graph.capture import export_module, tape_of
from secateurs.graph.rules import interpret
from secateurs.graph.tape import record_run
from secateurs.graph.units import find_targets
from secateurs.types import Inputs
from tests.graph.nets import Net, plan_of, randomized, rows, sequence, shrunk, tolerable, traced


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a caller could notice."""
    found: dict[str, Any] = {
        "mode": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "identity": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "names": list(model.state_dict()),
        "flat": [
            [id(w) for w in m._flat_weights] for m in model.modules() if isinstance(m, nn.RNNBase)
        ],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }
    found["values"] = [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]
    found["grads"] = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    found["random"] = torch.get_rng_state()
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def busy_model() -> nn.Module:
    """Train mode, dropout, batch norm, a frozen layer, gradients, a hook, one module in eval."""
    net = Net(
        lambda n, x: n.h(n.d(F.relu(n.bn(n.r(x)[0].transpose(1, 2)))).mean(2)),
        r=nn.LSTM(4, 6, num_layers=2, batch_first=True, dropout=0.1),
        bn=nn.BatchNorm1d(6), d=nn.Dropout(0.3), h=nn.Linear(6, 3),
    )  # fmt: skip
    randomized(net).train()
    net.get_submodule("d").eval()
    net.get_parameter("h.bias").requires_grad_(False)
    net(sequence()).sum().backward()
    net.get_submodule("h").register_forward_hook(lambda m, i, o: None)
    return net


@pytest.fixture
def busy() -> Iterator[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield busy_model()


def test_the_model_is_left_as_it_was(busy: nn.Module) -> None:
    before = snapshot(busy)
    graph = sc.trace(busy, sequence())
    assert same(before, snapshot(busy))
    plan = plan_of(busy, graph)
    for form in ("module", "graph"):
        small = sc.shrink(busy, plan, sequence(), form=form)
        assert same(before, snapshot(busy))
        assert small.training
        assert not small.get_parameter("h.bias").requires_grad
        assert all(p.grad is None for p in small.parameters())
        sc.verify(busy, small, plan, sequence())
    assert same(before, snapshot(busy))


def test_the_model_is_left_as_it_was_after_a_failure(busy: nn.Module) -> None:
    graph = sc.trace(busy, sequence())
    plan = plan_of(busy, graph)
    before = snapshot(busy)
    with pytest.raises(CaptureError):
        sc.trace(busy, sequence(features=5))
    with pytest.raises(CaptureError):
        sc.shrink(busy, plan, sequence(features=5), form="graph")
    small = sc.shrink(busy, plan, sequence(), form="module")
    with torch.no_grad():
        small.get_parameter("h.weight").mul_(2)
    with pytest.raises(sc.PruningError):
        sc.verify(busy, small, plan, sequence())
    assert same(before, snapshot(busy))


def failing(net: Any, x: Tensor) -> Tensor:
    raise ValueError("no such day")


BAD: dict[str, tuple[nn.Module, Inputs]] = {
    "the model refuses example_inputs: no such day": (Net(failing), rows()),
    "the model returns float, no tensor": (Net(lambda n, x: 1.0), rows()),
    "the model returns NoneType, no tensor": (Net(lambda n, x: None), rows()),
    "the model refuses example_inputs: mat1 and mat2": (nn.Linear(5, 2), rows()),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_captured(message: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = BAD[message]
    with pytest.raises(CaptureError, match=message):
        sc.trace(model, inputs)
    assert capfd.readouterr() == ("", "")  # the exporter would print a whole graph


NO_GRAPH: dict[str, Callable[[], nn.Module]] = {
    "branches on, or sizes by, the values of tensors": lambda: Net(
        lambda n, x: n.c(F.relu(n.a(x) if x.sum() > 0 else n.a(-x))),
        a=nn.Linear(6, 8), c=nn.Linear(8, 2),
    ),
    "rename the submodule 'graph'": lambda: Net(
        lambda n, x: n.c(F.relu(n.graph(x))), graph=nn.Linear(6, 8), c=nn.Linear(8, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", NO_GRAPH)
def test_what_has_a_module_form_only(message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The exporter refuses it: traced and pruned all the same, and the graph form says why not."""
    model = NO_GRAPH[message]()
    graph = traced(model, rows())
    assert sum(graph.units.values()) == 8
    plan = plan_of(model, graph)
    _, info = shrunk(model, plan, rows())
    assert info.form == "module"
    assert tolerable(info.verification)
    with pytest.raises(CaptureError, match=message):
        sc.shrink(model, plan, rows(), form="graph")
    with pytest.raises(CaptureError, match=message):
        export_module(model, rows(), training=False)
    assert capfd.readouterr() == ("", "")  # the exporter would print a whole graph


def test_both_front_ends_say_the_same() -> None:
    """The same operators in the same order, the same units."""
    net = randomized(busy_model())
    light = record_run(net, sequence())
    heavy, _ = tape_of(export_module(net, sequence(), training=False), net, sequence())
    views = {"alias", "detach"}
    assert [r.op for r in light.records if r.op not in views] == [
        r.op for r in heavy.records if r.op not in views and r.outputs
    ]
    assert light.front_end == "run"
    assert heavy.front_end == "torch.export"
    assert light.batch_size == heavy.batch_size == 2
    found = [find_targets(interpret(tape), net).targets for tape in (light, heavy)]
    kept = [{n: t.n_units for n, t in targets.items() if t.kind != "weight"} for targets in found]
    assert kept[0] == kept[1] == {"r:hidden": 6}


def test_tied_parameters_have_the_first_of_their_names() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    net = nn.Sequential(nn.Linear(6, 8), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(8, 2))
    graph = traced(net, rows())
    named = dict(net.named_parameters())
    assert all(m.tensor in named for t in graph.groups() for m in t.members)
    assert "3.weight" not in graph.targets
    plan = plan_of(net, graph)
    for form in ("module", "graph"):
        small, info = shrunk(net, plan, rows(), form)
        assert tolerable(info.verification)
        assert small.get_parameter("1.weight") is small.get_parameter("3.weight")


def test_inputs_without_a_batch() -> None:
    net = Net(
        lambda n, s: n.c(F.relu(n.a(torch.ones(3, 6) * s))), a=nn.Linear(6, 8), c=nn.Linear(8, 2)
    )
    for inputs in (torch.tensor(2.0), (2.0,)):
        graph = traced(net, inputs)
        assert graph.units == {"a:neuron": 8}
        _, info = shrunk(net, plan_of(net, graph), inputs)
        assert tolerable(info.verification)


def test_variable_arguments() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, *xs: Tensor, scale: float = 1.0) -> Tensor:
            y: Tensor = self.c(F.relu(sum((self.a(x) for x in xs), torch.zeros(())) * scale))
            return y

    net = Several()
    for inputs in ((rows(), rows() + 1), (rows(),)):
        graph = traced(net, inputs)
        _, info = shrunk(net, plan_of(net, graph), inputs, "graph")
        assert tolerable(info.verification)
        assert not info.notes  # the batch size is free


def test_shapes_suffice_to_trace() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        x = torch.empty(3, 6)
    graph = sc.trace(net, x)
    assert graph.units == {"0:neuron": 8}
    plan = plan_of(net, graph)
    with pytest.raises(CaptureError, match="meta device, without values"):
        sc.shrink(net, plan, x)


def test_example_tensors_may_be_the_same_object() -> None:
    """An exporter would merge them; then the graph would be wrong for two different ones."""
    net = Net(lambda n, x, y: n.c(n.a(x) * n.b(y)), a=nn.Linear(6, 8), b=nn.Linear(6, 8),
              c=nn.Linear(8, 2))  # fmt: skip
    x = rows()
    graph = traced(net, (x, x))
    plan = plan_of(net, graph)
    small, _ = shrunk(net, plan, (x, x), "graph")
    sc.verify(net, small, plan, (x, -2 * x))


def test_a_copy_of_a_traced_model_still_works() -> None:
    net = nn.LSTM(4, 6)
    sc.trace(net, sequence())
    twin = copy.deepcopy(net)
    assert torch.equal(net(sequence())[0], twin(sequence())[0])
