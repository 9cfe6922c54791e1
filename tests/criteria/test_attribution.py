"""Attribution criteria against their definitions, computed slowly without Captum."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateurs.errors import ConfigError, DataError, MissingDependencyError, ScoringError
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.types import Batch, Graph, LossFn, Plan
from tests.graphs import Case, conv, linear, lstm, mlp, residual

cross_entropy = nn.functional.cross_entropy


def mean_output(outputs: Tensor, _: Any) -> Tensor:
    return outputs.mean()


def found(case: Case, name: str, target: str, **options: Any) -> Tensor:
    spec = {"name": name, **options}
    graph = case.graph.only(include=target)
    scores = score(case.model, case.batches, case.loss_fn, criterion=spec, graph=graph)
    return scores.values[target].double()


def together(case: Case) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(t) for t in zip(*case.batches, strict=True))
    return x, y


def positive() -> Case:
    """y = 2 h0 + 3 h1 + 0 h2, h = relu(W x) with all positive, so that everything is linear."""
    first, last = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
    net = nn.Sequential(first, nn.ReLU(), last)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        last.weight.copy_(torch.tensor([[2.0, 3.0, 0.0]]))
    x = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 4.0]])
    batches: list[Batch] = [(x[:2], None), (x[2:], None)]
    return Case(net, trace(net, x), batches, mean_output)


# -- conductance -------------------------------------------------------------------------------


def test_conductance_of_a_linear_network_is_weight_times_activation() -> None:
    """Mean over samples of v h: 2 (1 + 2 + 3) / 3, 3 (1 + 1 + 4) / 3, 0."""
    assert found(positive(), "conductance", "0:neuron").tolist() == pytest.approx([4, 6, 0])


def _kept(module: nn.Module, name: str, seen: dict[str, Tensor]) -> RemovableHandle:
    """Keep the input of a module under a name."""

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen[name] = args[0]

    return module.register_forward_pre_hook(keep)


def path(case: Case, steps: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Signed conductance (n, ...) at the inputs of modules, by sums along the path."""
    x, y = together(case)
    model = case.model.eval()
    total: dict[str, Tensor] = {}
    before: dict[str, tuple[Tensor, Tensor]] = {}
    for k in range(steps + 1):
        seen: dict[str, Tensor] = {}
        hooks = [_kept(model.get_submodule(n), n, seen) for n in names]
        at = (x * k / steps).requires_grad_()
        loss = case.loss_fn(model(at), y) * len(x)
        for hook in hooks:
            hook.remove()
        grads = torch.autograd.grad(loss, [seen[n] for n in names])
        for name, grad in zip(names, grads, strict=True):
            now = seen[name].detach()
            if name in before:
                was, slope = before[name]
                step = slope * (now - was)
                total[name] = total.get(name, torch.zeros_like(step)) + step
            before[name] = now, grad
    return total


@pytest.mark.parametrize("steps", [5, 16])
def test_conductance_along_the_path_step_by_step(steps: int) -> None:
    case = mlp()
    slow = path(case, steps, ("2", "4"))
    for target, reader in (("0:neuron", "2"), ("2:neuron", "4")):
        expected = slow[reader].abs().mean(0)
        torch.testing.assert_close(
            found(case, "conductance", target, steps=steps), expected, rtol=1e-5, atol=1e-7
        )


def test_conductance_of_channels_read_after_flattening() -> None:
    """A channel is the sum of its four positions in the flat input of the reader."""
    case = conv()
    expected = path(case, 16, ("5",))["5"].view(10, 4, 4).sum(2).abs().mean(0)
    torch.testing.assert_close(found(case, "conductance", "0:channel"), expected, rtol=1e-5, atol=0)


def test_conductance_of_a_stream_is_the_mean_over_its_readers() -> None:
    case = residual()
    slow = path(case, 16, ("fc1", "head"))
    expected = (slow["fc1"].abs() + slow["head"].abs()).mean(0) / 2
    torch.testing.assert_close(
        found(case, "conductance", "stem:neuron"), expected, rtol=1e-5, atol=0
    )


def test_the_signed_values_of_a_layer_sum_to_the_change_of_the_loss() -> None:
    """What the criterion takes the size of is complete, the better the more steps."""
    case = mlp()
    x, y = together(case)
    loss = cross_entropy(case.model(x), y, reduction="none")
    change = loss - cross_entropy(case.model(0 * x), y, reduction="none")
    errors = [
        (path(case, steps, ("4",))["4"].sum(1) - change).abs().max().item() for steps in (50, 500)
    ]
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.02


def test_conductance_of_dict_inputs_with_a_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            out: Tensor = self.b(torch.tanh(self.a(x)) * keep[:, None])
            return out

    torch.manual_seed(0)
    net = Masked()
    x, keep, y = torch.randn(6, 4), torch.tensor([1, 1, 0, 1, 0, 1]), torch.arange(6) % 3
    graph = Graph({"a:neuron": linear("a", 6, ["b"], "producers")})
    both: list[Batch] = [({"x": x, "keep": keep}, y)]
    only = keep == 1
    kept: list[Batch] = [({"x": x[only], "keep": keep[only]}, y[only])]
    masked = found(Case(net, graph, both, cross_entropy), "conductance", "a:neuron")
    alone = found(Case(net, graph, kept, cross_entropy), "conductance", "a:neuron")
    torch.testing.assert_close(masked, alone * 4 / 6)


def test_tokens_have_no_path_from_zero() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.arange(6).view(3, 2)
    graph = trace(net, x)
    with pytest.raises(DataError, match="For tokens, use criterion 'shapley'"):
        score(net, [(x, None)], mean_output, criterion="conductance", graph=graph)
    values = score(net, [(x, None)], mean_output, criterion="shapley", graph=graph).values
    assert values.keys() == {"1:neuron"}


def test_what_captum_cannot_see_is_not_scored() -> None:
    case = lstm()
    (group,) = case.graph.groups()
    made = type(group)(group.name, group.kind, 5, group.members, (group.sites[0],))
    with pytest.raises(ConfigError, match="nested outputs of lstm"):
        score(
            case.model, case.batches, case.loss_fn,
            criterion="conductance", graph=Graph({made.name: made}),
        )  # fmt: skip

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.relu(self.a(x))) + self.b(torch.tanh(self.a(-x)))
            return out

    net, x = Twice(), torch.ones(4, 3)
    graph = trace(net, x)
    with pytest.raises(ConfigError, match="b is called several times"):
        score(net, [(x, None)], mean_output, criterion="conductance", graph=graph)


def test_a_unit_that_the_loss_does_not_see_is_named() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(torch.relu(self.a(x))), self.c(x)

    net, x = Side(), torch.ones(4, 3)
    loss: LossFn = lambda outputs, _: outputs[1].mean()  # noqa: E731
    with pytest.raises(ScoringError, match="Captum cannot attribute the loss to a:neuron"):
        score(net, [(x, None)], loss, criterion="conductance", graph=trace(net, x))


# -- Shapley -----------------------------------------------------------------------------------


def losses(case: Case, target: str) -> dict[frozenset[int], float]:
    """Set of units that stay -> loss, for all sets; producers set to zero by hand."""
    group = next(g for g in case.graph.groups() if g.name == target)
    x, y = together(case)
    state = {k: v.clone() for k, v in case.model.state_dict().items()}
    result = {}
    for size in range(group.n_units + 1):
        for stay in combinations(range(group.n_units), size):
            gone = [u for u in range(group.n_units) if u not in stay]
            case.model.load_state_dict(state)
            with torch.no_grad():
                for name in ("weight", "bias"):
                    case.model.get_parameter(f"{target.split(':')[0]}.{name}")[gone] = 0
                result[frozenset(stay)] = case.loss_fn(case.model(x), y).item()
    case.model.load_state_dict(state)
    return result


def exact(loss: Mapping[frozenset[int], float], n: int) -> list[float]:
    """Shapley values of lowering the loss, by the formula over all subsets."""
    values = []
    for u in range(n):
        others = [v for v in range(n) if v != u]
        total = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for s in combinations(others, size):
                total += weight * (loss[frozenset(s)] - loss[frozenset({*s, u})])
        values.append(total)
    return values


def test_shapley_values_of_a_sum_are_its_terms() -> None:
    """The loss is the mean output: keeping a unit raises it by its mean term, so minus that."""
    assert found(positive(), "shapley", "0:neuron").tolist() == pytest.approx([-4, -6, 0], abs=1e-5)


def test_a_unit_that_lowers_the_loss_is_positive() -> None:
    case = positive()
    lower = Case(case.model, case.graph, case.batches, lambda out, _: -out.mean())
    assert found(lower, "shapley", "0:neuron").tolist() == pytest.approx([4, 6, 0], abs=1e-5)


def test_shapley_values_converge_to_the_exact_ones() -> None:
    case = mlp()
    case = Case(case.model, case.graph, [together(case)], case.loss_fn)
    expected = torch.tensor(exact(losses(case, "2:neuron"), 5), dtype=torch.float64)
    scale = expected.abs().max().item()
    near = found(case, "shapley", "2:neuron", permutations=400)
    assert (near - expected).abs().max().item() < 0.05 * scale
    few = found(case, "shapley", "2:neuron", permutations=1)
    assert (few - expected).abs().max().item() > 0.05 * scale


@pytest.mark.parametrize("permutations", [1, 7])
def test_shapley_values_sum_to_the_loss_without_all_minus_the_loss(permutations: int) -> None:
    case = mlp()
    loss = losses(case, "2:neuron")
    values = found(case, "shapley", "2:neuron", permutations=permutations)
    whole = loss[frozenset()] - loss[frozenset(range(5))]
    assert values.sum().item() == pytest.approx(whole, rel=1e-5)
    # One unit alone does not: the sum says something.
    assert values[0].item() != pytest.approx(whole, rel=1e-2)


def test_units_that_were_removed_earlier_do_not_play() -> None:
    case = mlp()
    gone = Plan({}, {}, {"2:neuron": torch.tensor([1, 3])}, {})
    loss = losses(case, "2:neuron")
    scores = score(
        case.model, case.batches, case.loss_fn,
        criterion={"name": "shapley", "permutations": 3}, graph=case.graph, previous=gone,
    )  # fmt: skip
    values = scores.values["2:neuron"].double()
    assert values[[1, 3]].tolist() == [float("-inf")] * 2
    whole = loss[frozenset({1, 3})] - loss[frozenset(range(5))]
    assert values[[0, 2, 4]].sum().item() == pytest.approx(whole, rel=1e-5)


def test_the_permutations_follow_the_seed() -> None:
    case = mlp()

    def run(seed: int) -> Tensor:
        scores = score(
            case.model, case.batches, case.loss_fn,
            criterion={"name": "shapley", "permutations": 2}, graph=case.graph, seed=seed,
        )  # fmt: skip
        return scores.values["0:neuron"]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_a_loss_that_breaks_without_units_is_named() -> None:
    case = positive()
    broken = Case(case.model, case.graph, case.batches, lambda out, _: out.mean().log())
    with pytest.raises(ScoringError, match="without some units of 0:neuron the loss is -inf"):
        found(broken, "shapley", "0:neuron")


# -- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conductance", "shapley"])
def test_captum_is_asked_for_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'secateurs\[attribution\]'"):
        found(mlp(), name, "0:neuron")


@pytest.mark.parametrize("name", ["conductance", "shapley"])
def test_what_would_take_too_long_is_refused(name: str) -> None:
    case = mlp()
    with pytest.raises(ConfigError, match=r"on 3 batches would take about .* max_seconds=1e-06"):
        score(
            case.model, case.batches, case.loss_fn,
            criterion=name, graph=case.graph, max_seconds=1e-6,
        )  # fmt: skip


def test_a_traced_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).eval()  # fmt: skip
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    scores = score(
        net, [(x[:4], y[:4]), (x[4:], y[4:])], cross_entropy,
        criterion=["conductance", "shapley"], graph=trace(net, x),
    )  # fmt: skip
    for one in scores.values():
        assert one.values.keys() == {"0:channel", "3:channel"}
        assert all((v != 0).all() for v in one.values.values())
