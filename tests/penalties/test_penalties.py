"""Penalties on units: by hand, against autograd, with masks, and what they do to a network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.allocation import allocate
from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune, Training, finetune
from secateurs.graph import trace
from secateurs.masks import apply_masks_, hold_masks
from secateurs.penalties import RULES, Penalty, UnitPenalty, penalty_value
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.testing.nets import NETS, case
from secateurs.types import Budget, Graph, Plan


def started(
    model: nn.Module, graph: Graph, config: Penalty, n_steps: int | None = 100, **options: Any
) -> UnitPenalty:
    """A penalty in a loop of one's own."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = UnitPenalty(config, graph, **options)
    with hold_masks(model, sgd, {}) as held:
        penalty.start(Training(model, sgd, held, n_steps))
    return penalty


def two_units() -> tuple[nn.Sequential, Graph]:
    """1 -> relu 2 -> 1; the units have the weights (3, 4) and (0, 2)."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net.get_parameter("0.weight").copy_(torch.tensor([[3.0], [0.0]]))
        net.get_parameter("2.weight").copy_(torch.tensor([[4.0, 2.0]]))
    return net, trace(net, torch.ones(1, 1))


def test_group_lasso_by_hand() -> None:
    net, graph = two_units()
    penalty = started(net, graph, Penalty("group_lasso", strength=0.1))
    penalty.gradients(0)
    root = 2**0.5  # of the size of each unit; their norms are 5 and 2
    assert penalty.value() == pytest.approx(0.1 * root * (5 + 2))
    first, second = (net.get_parameter(f"{i}.weight").grad for i in (0, 2))
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    torch.testing.assert_close(first, 0.1 * root * torch.tensor([[3 / 5], [0.0]]))
    torch.testing.assert_close(second, 0.1 * root * torch.tensor([[4 / 5, 1.0]]))


def test_growing_by_hand() -> None:
    net, graph = two_units()
    config = Penalty("growing", strength=0.5, every=10, delta=0.2)
    name = next(iter(graph.units))
    penalty = started(net, graph, config, units={name: torch.tensor([0])})
    lambdas = []
    for step in (0, 9, 10, 20, 1000):
        net.zero_grad()
        penalty.gradients(step)
        lambdas.append(penalty.strength)
        found = net.get_parameter("2.weight").grad
        assert found is not None
        torch.testing.assert_close(found, penalty.strength * torch.tensor([[4.0, 0.0]]))
    assert lambdas == pytest.approx([0.2, 0.2, 0.4, 0.5, 0.5])
    assert penalty.value() == pytest.approx(0.5 / 2 * 25)


def test_growing_without_delta_ends_after_three_quarters() -> None:
    config = Penalty("growing", strength=1.0, every=5)
    assert config.at(0, 100) == pytest.approx(1 / 15)
    assert config.at(69, 100) < 1.0
    assert config.at(70, 100) == pytest.approx(1.0)
    assert config.at(99, 100) == 1.0
    with pytest.raises(ConfigError, match="needs the number of steps"):
        config.at(0, None)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
def test_the_gradient_is_that_of_autograd(name: str, rule: str) -> None:
    net = case(name)
    model, config = net.model, Penalty(rule, strength=0.3)
    units = {t.name: torch.arange(0, t.n_units, 2) for t in net.graph.groups()}
    options: dict[str, Any] = {"units": units} if rule == "growing" else {}
    if rule == "norm_scale":
        options["granularity"] = ["structured", "embedding"]
        if not any("norm" in n for n, _ in model.named_parameters()):
            with pytest.raises(ConfigError, match="no norm of the model has a scale"):
                penalty_value(model, net.graph, config, **options)
            return
    value = penalty_value(model, net.graph, config, **options)
    params = dict(model.named_parameters())
    expected = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    for p in params.values():
        p.grad = torch.ones_like(p)  # what the loss has left there
    penalty = started(model, net.graph, config, **options)
    penalty.gradients(10**6)
    assert penalty.value() == pytest.approx(float(value.detach()), rel=1e-5)
    changed = 0
    for (n, p), g in zip(params.items(), expected, strict=True):
        assert p.grad is not None
        found = p.grad - 1
        torch.testing.assert_close(
            found, torch.zeros_like(p) if g is None else g, rtol=1e-4, atol=1e-6, msg=n
        )
        changed += bool(found.any())
    assert changed


def test_the_comparison_with_autograd_can_fail() -> None:
    net, graph = two_units()
    value = penalty_value(net, graph, Penalty("group_lasso", strength=0.1))
    (expected,) = torch.autograd.grad(value, [net.get_parameter("0.weight")])
    penalty = started(net, graph, Penalty("group_lasso", strength=0.2))
    penalty.gradients(0)
    found = net.get_parameter("0.weight").grad
    assert found is not None
    assert not torch.allclose(found, expected)


def cut(model: nn.Module, graph: Graph, share: float, previous: Plan | None = None) -> Plan:
    """Units with the smallest norm go."""
    scores = score(model, criterion="l2_norm", graph=graph, previous=previous)
    return select(scores, allocate(scores, Budget(units=share)), previous=previous)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_removed_gets_no_gradient(rule: str) -> None:
    net = case("cnn")
    plan = cut(net.model, net.graph, 0.6)
    apply_masks_(net.model, plan.masks)
    units = {t.name: torch.arange(t.n_units) for t in net.graph.groups()}
    penalty = started(net.model, net.graph, Penalty(rule), units=units)
    penalty.gradients(0)
    touched = 0
    for name, p in net.model.named_parameters():
        if p.grad is not None and name in plan.masks:
            assert not p.grad[~plan.masks[name]].any(), name
            touched += bool(p.grad.any())
    assert touched


def test_frozen_parameters_are_left_alone_and_others_get_a_gradient() -> None:
    net, graph = two_units()
    net.get_parameter("0.weight").requires_grad_(False)
    penalty = started(net, graph, Penalty("group_lasso"))
    penalty.gradients(0)
    assert net.get_parameter("0.weight").grad is None
    assert net.get_parameter("2.weight").grad is not None


def noisy(seed: int = 0) -> tuple[nn.Module, Graph, list[tuple[Tensor, Tensor]]]:
    """A network with more units than its task needs."""
    torch.manual_seed(seed)
    x = torch.randn(96, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2))
    return net, trace(net, x), [(x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)]


def loss_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    with torch.no_grad():
        return float(
            torch.stack([functional.cross_entropy(model(x), y) for x, y in batches]).mean()
        )


@pytest.mark.parametrize(
    ("rule", "strength"), [("group_lasso", 1e-2), ("norm_scale", 3e-2), ("growing", 1.0)]
)
def test_what_will_be_cut_is_small_and_costs_less(rule: str, strength: float) -> None:
    dense, graph, batches = noisy()
    finetune(dense, batches, functional.cross_entropy, Finetune(epochs=20, lr=0.01), seed=0)
    plan = cut(dense, graph, 0.4)
    config = Finetune(epochs=40, lr=0.01)
    losses, shares = {}, {}
    for name in ("with", "without"):
        model = copy.deepcopy(dense)
        units = plan.removed if rule == "growing" else None
        penalty = UnitPenalty(Penalty(rule, strength=strength), graph, units=units)
        finetune(
            model, batches, functional.cross_entropy, config, seed=1,
            parts=[penalty] if name == "with" else [],
        )  # fmt: skip
        chosen = plan if rule == "growing" else cut(model, graph, 0.4)
        gone = next(iter(chosen.removed.values()))
        scale = model.get_parameter("1.weight").detach().abs()
        shares[name] = float(scale[gone].mean() / scale.mean())
        before = loss_of(model, batches)
        apply_masks_(model, chosen.masks)
        losses[name] = loss_of(model, batches) - before
    assert shares["with"] < 0.5 * shares["without"]
    assert losses["with"] < losses["without"]


def test_a_penalty_goes_on_from_its_state() -> None:
    net, graph = two_units()
    config, name = Penalty("growing", every=1), next(iter(graph.units))
    units = {name: torch.tensor([1])}
    first = started(net, graph, config, units=units)
    first.gradients(7)
    second = started(net, graph, config, units=units)
    assert second.value() != first.value()
    second.load(first.state())
    assert second.value() == first.value()


def test_targets_without_a_norm_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)
    )
    penalty = started(net, trace(net, torch.ones(2, 3)), Penalty("norm_scale"))
    assert penalty.notes == ["3:neuron: no norm with a scale, so norm_scale leaves it as it is"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "lasso"}, "Did you mean 'group_lasso'"),
        ({"strength": 0.0}, "strength must be above 0, got 0.0"),
        ({"strength": True}, "strength must be above 0"),
        ({"rule": "growing", "every": 0}, "every must be a whole number, at least 1"),
        ({"rule": "growing", "delta": -1}, "delta must be above 0"),
        ({"rule": "group_lasso", "every": 3}, "belong to rule='growing', not 'group_lasso'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Penalty(**options)


def test_what_cannot_be_penalised() -> None:
    net, graph = two_units()
    name = next(iter(graph.units))
    with pytest.raises(ConfigError, match="needs units="):
        started(net, graph, Penalty("growing"))
    with pytest.raises(ConfigError, match=r"must be in \[0, 2\), got \[2\]"):
        started(net, graph, Penalty("group_lasso"), units={name: torch.tensor([2])})
    with pytest.raises(ConfigError, match="unknown target"):
        started(net, graph, Penalty("group_lasso"), units={"nowhere": torch.tensor([0])})
    with pytest.raises(ConfigError, match="units= is empty"):
        started(
            net, graph, Penalty("group_lasso"), units={name: torch.tensor([], dtype=torch.int64)}
        )
    with pytest.raises(ConfigError, match="acts on structural units"):
        started(net, graph, Penalty("group_lasso"), granularity=["weight", "neuron"])
    with pytest.raises(ConfigError, match="must be started"):
        UnitPenalty(Penalty("group_lasso"), graph).gradients(0)
    with pytest.raises(ConfigError, match="does not belong to this model"):
        started(nn.Sequential(nn.Linear(3, 3)), graph, Penalty("group_lasso"))


def test_a_wrapped_model_has_the_units_of_the_plain_one() -> None:
    net, graph = two_units()
    wrapped = nn.DataParallel(net, device_ids=[])
    penalty = started(wrapped, graph, Penalty("group_lasso", strength=0.1))
    penalty.gradients(0)
    assert penalty.value() == pytest.approx(0.1 * 2**0.5 * 7)
    assert net.get_parameter("0.weight").grad is not None
