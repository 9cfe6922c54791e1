"""Which residual branches can be removed whole, which not and why, and what that costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import secateurs as sc
from secateurs.cost import cost_of_kept, dense_cost
from secateurs.graph.layers import LAYER_TARGET, find_branches
from secateurs.graph.rules import interpret
from secateurs.graph.tape import record_run
from secateurs.graph.zeroing import zero_cuts
from secateurs.types import Graph, GroupTarget
from tests.zoo import mixed, transformers, vision, vision_dense, vision_mobile
from tests.zoo.case import Case, randomise_

CASES: dict[str, Case] = {
    c.name: c
    for zoo in (mixed, transformers, vision, vision_dense, vision_mobile)
    for c in zoo.CASES
}
UNITS = {
    "resnet-basic": ("layers.0", "layers.1", "layers.3"),
    "resnet-bottleneck": ("layers.1",),
    "mobilenet-v2": ("features.2.conv", "features.4.conv"),
    "mlp-mixer": ("blocks.0.tokens", "blocks.0.channels", "blocks.1.tokens", "blocks.1.channels"),
    "convnext": ("2", "5"),
    "conformer": ("ff1", "attn", "pointwise2", "ff2"),
    "encoder-post-norm": (
        "encoder.layers.0.self_attn", "encoder.layers.0.linear2",
        "encoder.layers.1.self_attn", "encoder.layers.1.linear2",
    ),
    "shared-block": ("block",),
    "instance-norm-style": ("blocks.0", "blocks.1"),
    "densenet": (),
    "repvgg": (),
}  # fmt: skip


class Block(nn.Module):
    """A function of a feature map, and layers that it may use."""

    def __init__(self, run: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.full((6,), 0.5))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.run(self, self.inp(x)))
        return y


def nested(n: Block, x: Tensor) -> Tensor:
    y: Tensor = n.a(x)
    z: Tensor = n.b(F.relu(y))
    return x + (y + z)


def in_place(n: Block, x: Tensor) -> Tensor:
    y = n.a(F.relu(x))
    y += x
    z: Tensor = F.relu_(y) + x
    return z


# What is removable: the parameters that make each branch zero.
FOUND: dict[str, tuple[Callable[[Block, Tensor], Tensor], list[set[str]]]] = {
    "plain": (lambda n, x: x + n.a(x), [{"a.weight", "a.bias"}]),
    "other order": (lambda n, x: n.a(x) + x, [{"a.weight", "a.bias"}]),
    "scaled": (lambda n, x: torch.add(x, n.a(x), alpha=0.3) * 2, [{"a.weight", "a.bias"}]),
    "difference": (lambda n, x: x - n.a(x), [{"a.weight", "a.bias"}]),
    "layer scale": (lambda n, x: x + n.gamma * n.a(x), [{"gamma"}]),
    "scalar scale": (lambda n, x: x + n.scalar * n.a(x), [{"a.weight", "a.bias"}]),
    "tanh": (lambda n, x: x + torch.tanh(n.a(x)), [{"a.weight", "a.bias"}]),
    "gated": (lambda n, x: x + torch.sigmoid(n.b(x)) * n.a(x), [{"a.weight", "a.bias"}]),
    "parallel": (
        lambda n, x: x + n.a(x) + n.b(x), [{"a.weight", "a.bias"}, {"b.weight", "b.bias"}],
    ),
    "two in one": (
        lambda n, x: x + (n.a(x) + n.b(x)), [{"a.weight", "a.bias", "b.weight", "b.bias"}],
    ),
    "nested": (
        nested, [{"b.weight", "b.bias"}, {"a.weight", "a.bias", "b.weight", "b.bias"}],
    ),
    "shared": (lambda n, x: (y := x + n.a(x)) + n.a(y), [{"a.weight", "a.bias"}]),
    "in place": (in_place, [{"a.weight", "a.bias"}]),
    "both are skips": (lambda n, x: n.b(x + (y := n.a(x))) + y, [{"b.weight", "b.bias"}]),
    "sigmoid": (lambda n, x: x + torch.sigmoid(n.a(x)), []),
    "no skip": (lambda n, x: n.a(x) + n.b(x), []),
    "by hand": (lambda n, x: x + 0.04 * x**3, []),
    "scaled skip": (lambda n, x: torch.add(n.a(x), x, alpha=0.5), []),
    "broadcast": (lambda n, x: x + n.a(x).mean(0), []),
}  # fmt: skip

WHY: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "used twice": (lambda n, x: (x + (y := n.a(x))) * y, "its value is also used elsewhere"),
    "shared producer": (
        lambda n, x: n.a(x + n.a(x)), "what makes it zero is also used outside of it",
    ),
    "sigmoid": (lambda n, x: x + torch.sigmoid(n.a(x)), "no parameters of its last layers"),
    "projected": (lambda n, x: n.a(x) + n.b(x), "its skip goes through layers of its own"),
}  # fmt: skip


def traced(run: Callable[[Block, Tensor], Tensor]) -> tuple[nn.Module, Tensor, Graph]:
    torch.manual_seed(0)
    model = randomise_(Block(run)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    return model, x, sc.trace(model, x)


def layers(graph: Graph) -> GroupTarget | None:
    found = graph.targets.get(LAYER_TARGET)
    assert found is None or isinstance(found, GroupTarget)
    return found


def producers(target: GroupTarget, unit: int) -> set[str]:
    return {m.tensor for m in target.members if (m.unit == unit).all()}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_removable_and_by_which_parameters(name: str) -> None:
    run, expected = FOUND[name]
    target = layers(traced(run)[2])
    found = [] if target is None else [producers(target, u) for u in range(target.n_units)]
    assert found == expected


@pytest.mark.parametrize("name", WHY)
def test_why_a_branch_stays(name: str) -> None:
    run, reason = WHY[name]
    graph = traced(run)[2]
    reasons = [e.reason for e in graph.excluded if e.name.endswith(":layer")]
    assert layers(graph) is None
    assert any(r.startswith(reason) for r in reasons), reasons


@pytest.mark.parametrize("name", UNITS)
def test_units_of_architectures(name: str) -> None:
    model, x = CASES[name].build()
    target = layers(sc.trace(model, x))
    assert (() if target is None else target.unit_names) == UNITS[name]


def test_projection_shortcuts_are_listed() -> None:
    model, x = CASES["resnet-basic"].build()
    listed = [e for e in sc.trace(model, x).excluded if e.name == "layers.2:layer"]
    assert len(listed) == 1
    assert "goes through layers of its own" in listed[0].reason


def branch_values(model: nn.Module, x: Tensor, zeroed: set[str]) -> dict[int, Tensor]:
    """Oracle: run the model with these parameters at zero, keep every summand of every sum."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in zeroed:
                p.zero_()
    seen: list[Tensor] = []
    real = torch.overrides.resolve_name

    class Keep(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            name = str(real(func) or func).rpartition(".")[2].strip("_").removeprefix("i")
            if name in ("add", "sub") and all(isinstance(a, Tensor) for a in args[:2]):
                seen.extend(a.detach().clone() for a in args[:2])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Keep():
        other.eval()(x)
    return dict(enumerate(seen))


@pytest.mark.parametrize("name", [n for n in FOUND if FOUND[n][1]])
def test_producers_at_zero_make_the_branch_exactly_zero(name: str) -> None:
    model, x, graph = traced(FOUND[name][0])
    labels = interpret(record_run(model, x))
    records = labels.tape.records
    sums = [n for n, r in enumerate(records) if r.op in ("add", "sub")]
    target = layers(graph)
    assert target is not None
    for number, unit in enumerate(find_branches(labels).units):
        values = branch_values(model, x, producers(target, number))
        dense = branch_values(model, x, set())
        for record, skip in unit.sums:
            branch = 2 * sums.index(record) + (1 - skip)
            assert bool((values[branch] == 0).all())
            assert not bool((dense[branch] == 0).all())


def test_fewer_parameters_do_not_make_it_zero() -> None:
    model, x, _ = traced(FOUND["two in one"][0])
    values = branch_values(model, x, {"a.weight", "a.bias", "b.weight"})
    assert not bool((values[3] == 0).all())


def test_a_cut_is_lost_when_an_alias_is_written_to() -> None:
    def run(n: Block, x: Tensor) -> Tensor:
        y: Tensor = n.a(x)
        y[:, 0].add_(1.0)
        return x + y

    model, x, graph = traced(run)
    assert layers(graph) is None
    cuts = zero_cuts(interpret(tape := record_run(model, x)))
    last = next(r for r in reversed(tape.records) if r.op == "add")
    assert (last.index, last.args[0].id) in cuts
    assert (last.index, last.args[1].id) not in cuts


def test_costs_of_nested_branches_are_not_counted_twice() -> None:
    graph = traced(nested)[2]
    linear = 6 * 6 + 6
    rest = 4 * 6 + 6 + 6 * 3 + 3 + linear + 6 + 1  # three of them are not used
    assert dense_cost(graph).params == rest + 2 * linear
    for keep, left in (([0, 1], linear), ([1, 0], 0), ([0, 0], 0)):
        cost = cost_of_kept(graph, {LAYER_TARGET: np.array(keep, dtype=np.bool_)})
        assert cost.params == rest + left
        assert cost.macs == 4 * 6 + 6 * 3 + (36 if left else 0)


def test_buffers_that_nothing_reads_go_with_their_norm() -> None:
    model, x = CASES["resnet-basic"].build()
    target = layers(sc.trace(model, x))
    assert target is not None
    mine = {n for n in model.state_dict() if n.startswith("layers.0.")}
    assert set(target.unit_tensors[0]) == mine
    assert "layers.0.bn1.num_batches_tracked" in mine


def test_layers_are_no_part_of_structured() -> None:
    graph = traced(FOUND["plain"][0])[2]
    assert LAYER_TARGET not in graph.units
    assert [t.name for t in graph.select("layer")] == [LAYER_TARGET]


# -- scores ----------------------------------------------------------------------------------


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


@pytest.mark.parametrize("name", ["plain", "layer scale", "two in one", "nested", "shared"])
def test_ablation_is_the_loss_without_the_branch(name: str) -> None:
    model, x, graph = traced(FOUND[name][0])
    y = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = sc.score(
        model, [(x, y)], loss_fn, criterion="finite_difference", graph=graph, granularity="layer"
    )
    target = layers(graph)
    assert target is not None
    with torch.no_grad():
        dense = loss_fn(model(x), y)
        for unit in range(target.n_units):
            other = copy.deepcopy(model)
            for tensor in producers(target, unit):
                other.get_parameter(tensor).zero_()
            change = float(loss_fn(other(x), y) - dense)
            assert float(scores.values[LAYER_TARGET][unit]) == pytest.approx(change, rel=1e-6)


def test_gates_equal_gradients_of_the_producers() -> None:
    model, x, graph = traced(FOUND["parallel"][0])
    target = layers(graph)
    assert target is not None
    assert len(target.sites) == 2
    y = torch.zeros(3, 3, dtype=torch.float64)
    scores = sc.score(
        model, [(x, y)], loss_fn, criterion="taylor", graph=graph, granularity="layer"
    )
    expected = torch.zeros(2, dtype=torch.float64)
    for i in range(3):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
        params = {n: p for n, p in model.named_parameters() if n[:2] in ("a.", "b.")}
        grads = torch.autograd.grad(loss, list(params.values()))
        for unit, letter in enumerate("ab"):
            whole = sum(
                (p * g).sum()
                for (n, p), g in zip(params.items(), grads, strict=True)
                if n[0] == letter
            )
            expected[unit] += torch.as_tensor(whole).detach() ** 2 / 3
    assert torch.allclose(scores.values[LAYER_TARGET].double(), expected, rtol=1e-5)
