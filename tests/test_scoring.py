"""Scores against slow independent computations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jvp

from secateurs.criteria import Criterion, criterion, get_criterion
from secateurs.criteria.registry import CRITERIA
from secateurs.errors import ConfigError, DataError, ScoringError
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.statistics import removal_role
from secateurs.types import Graph, GroupTarget, Plan, Scores, WeightTarget
from tests.graphs import CASES, Case, bare_norm, build, conv, data, linear, lstm, mlp, residual

PER_CASE = pytest.mark.parametrize("name", CASES)


def run(case: Case, criterion: Any, **options: Any) -> Mapping[str, Tensor]:
    found: Scores = score(
        case.model, case.batches, case.loss_fn, criterion=criterion, graph=case.graph, **options
    )
    return found.values


def whole(case: Case) -> tuple[Tensor, Tensor]:
    x, y = zip(*case.batches, strict=True)
    return torch.cat(x), torch.cat(y)


def loss_of(case: Case, model: nn.Module) -> float:
    x, y = whole(case)
    with torch.no_grad():
        return float(case.loss_fn(copy.deepcopy(model).eval()(x), y))


def removed(case: Case, target: GroupTarget, unit: int) -> nn.Module:
    """The masked model: every row and column of the unit is zero, buffers too."""
    model = copy.deepcopy(case.model)
    tensors = model.state_dict()
    for m in target.members:
        rows = torch.from_numpy(m.index[m.unit == unit])
        tensors[m.tensor].index_fill_(m.dim, rows, 0.0)
    return model


def direction(case: Case, target: GroupTarget, unit: int) -> dict[str, Tensor]:
    """v = minus what alone removes the unit."""
    v = {n: torch.zeros_like(p) for n, p in case.model.named_parameters()}
    role = removal_role(target)
    for m in target.members:
        if m.learned and m.role == role and (m.outermost or role == "consumer"):
            rows = torch.from_numpy(m.index[m.unit == unit])
            weight = case.model.state_dict()[m.tensor]
            v[m.tensor].index_copy_(m.dim, rows, -weight.index_select(m.dim, rows))
    return v


# -- by hand -------------------------------------------------------------------------------


def two_units() -> Case:
    """y = 3 relu(2 x) + 5 relu(-1 x), L = y: x = 1 gives 6, x = -2 gives 10."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    for p, values in zip(net.parameters(), ([[2.0], [-1]], [0, 0], [[3, 5]], [0]), strict=True):
        p.data = torch.tensor(values, dtype=torch.float64)
    batches = [(torch.tensor([[1.0], [-2.0]], dtype=torch.float64), torch.zeros(2))]
    graph = build(net, [linear("0", 2, ["2"], "producers")], {})
    return Case(net, graph, batches, lambda out, _: out.mean())


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # gate of unit 0 is (6, 0) for the two samples, of unit 1 (0, 10)
        ("taylor", [36 / 2, 100 / 2]),
        ("taylor_batch", [(6 / 2) ** 2, (10 / 2) ** 2]),
        ("taylor_element", [(6 / 2) ** 2, (10 / 2) ** 2]),
        ("directional", [6 / 2, 10 / 2]),
        # the network is linear in each unit: the loss falls by exactly the gate
        ("finite_difference", [-6 / 2, -10 / 2]),
        ({"name": "finite_difference", "step": 0.5}, [-6 / 2, -10 / 2]),
        ({"name": "finite_difference", "of": "output"}, [6 / 2, 10 / 2]),
        ({"name": "directional", "of": "output"}, [6 / 2, 10 / 2]),
        # dL/dw = (3 * 1) / 2 and dL/db = 3 / 2; dL/dw = (5 * -2) / 2 and dL/db = 5 / 2
        ("gradient", [1.5 + 1.5, 5 + 2.5]),
        ({"name": "gradient", "members": "consumers"}, [2 / 2, 2 / 2]),
        ("magnitude", [2.0, 1.0]),
        ({"name": "magnitude", "members": "all"}, [5.0, 6.0]),
        ({"name": "l2_norm", "members": "all"}, [13**0.5, 26**0.5]),
        ("activation_mean", [2 / 2, 2 / 2]),
    ],
)
def test_by_hand(criterion: Any, expected: list[float]) -> None:
    torch.testing.assert_close(run(two_units(), criterion)["0:neuron"], torch.tensor(expected))


def test_single_weights_by_hand() -> None:
    found = run(two_units(), "taylor", granularity="weight")
    torch.testing.assert_close(found["0.weight"], torch.tensor([18.0, 50.0]))
    torch.testing.assert_close(found["2.weight"], torch.tensor([18.0, 50.0]))


def test_squares_do_not_hide_opposite_samples() -> None:
    """Gates (+1, -1): the mean gradient is zero, the per-sample score is not."""
    case = two_units()
    x = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    case = Case(case.model, case.graph, [(x, sign)], lambda out, y: (out * y).mean())
    assert run(case, "directional")["0:neuron"].tolist() == [0, 0]
    assert run(case, "taylor_batch")["0:neuron"].tolist() == [0, 0]
    assert run(case, "taylor")["0:neuron"].tolist() == [36, 0]


# -- per-sample gates ------------------------------------------------------------------------


def slow_taylor(case: Case, target: GroupTarget) -> Tensor:
    """Mean over samples of <g_i, v>^2, with one backward pass for each sample."""
    x, y = whole(case)
    model = copy.deepcopy(case.model).eval()
    total = torch.zeros(target.n_units, dtype=torch.float64)
    for i in range(len(x)):
        names, params = zip(*model.named_parameters(), strict=True)
        loss = case.loss_fn(model(x[i : i + 1]), y[i : i + 1])
        grads = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
        for unit in range(target.n_units):
            inner = 0.0
            for n, v in direction(case, target, unit).items():
                inner += float((grads[n] * v).sum())
            total[unit] += inner**2
    return (total / len(x)).float()


@PER_CASE
def test_taylor_equals_one_sample_at_a_time(name: str) -> None:
    case = CASES[name]()
    found = score(case.model, case.batches, case.loss_fn, graph=case.graph)
    for target in case.graph.groups():
        torch.testing.assert_close(
            found.values[target.name], slow_taylor(case, target), rtol=1e-5, atol=1e-9
        )
    assert bool(found.notes) == (name == "lstm")
    assert found.n_samples == 10


@PER_CASE
def test_fast_and_slow_path_agree(name: str) -> None:
    """Without sites the library goes sample by sample, says so, and finds the same."""
    case = CASES[name]()
    blind = [
        GroupTarget(t.name, t.kind, t.n_units, t.members, (), t.removal)
        for t in case.graph.groups()
    ]
    slow = score(case.model, case.batches, case.loss_fn, graph=build(case.model, blind, {}))
    assert all("no gate, so by the gradients of its weights" in note for note in slow.notes)
    assert len(slow.notes) == len(blind)
    for target, values in run(case, "taylor").items():
        torch.testing.assert_close(values, slow.values[target], rtol=1e-5, atol=1e-9)


def test_a_wrong_site_is_told_apart() -> None:
    """The oracle fails when the site is that of another layer."""
    case = conv()
    (t,) = case.graph.groups()
    inner = next(s for s in t.sites if s.role == "producer")
    turned = type(inner)("1", 0, "output", 0, 1, inner.index, inner.unit[::-1].copy(), "producer")
    wrong = build(case.model, [GroupTarget(t.name, t.kind, 4, t.members, (turned,))], {})
    found = score(case.model, case.batches, case.loss_fn, graph=wrong).values[t.name]
    truth = slow_taylor(case, t)
    assert not torch.allclose(found, truth, rtol=1e-2)
    torch.testing.assert_close(found.flip(0), truth, rtol=1e-5, atol=1e-9)


class Shared(nn.Module):
    """One layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(4, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.again(x) + x)
        out: Tensor = self.last(torch.tanh(self.again(x) + x))
        return out


def test_a_module_called_twice_goes_one_by_one_unless_both_calls_are_sites() -> None:
    net = Shared().double()
    t = linear("first", 5, ["again", "last"], "producers")
    u = np.arange(5)
    more = linear("again", 5, [], "producers")
    group = GroupTarget(t.name, "neuron", 5, t.members + more.members, t.sites + more.sites)
    batches = data((4,), 3, (4, 3), 0, torch.float64)
    case = Case(net, build(net, [group], {}), batches, nn.functional.cross_entropy)
    one = score(net, batches, case.loss_fn, graph=case.graph)
    assert one.notes == (
        "first:neuron: no gate, so by the gradients of its weights (again is called 2 times)",
    )
    second = type(t.sites[0])("again", 1, "output", 0, 1, u, u, "producer")
    both = GroupTarget(t.name, "neuron", 5, group.members, (*group.sites, second))
    two = score(net, batches, case.loss_fn, graph=build(net, [both], {}))
    assert two.notes == ()
    torch.testing.assert_close(one.values[t.name], two.values[t.name])


class TimeFirst(nn.Module):
    """The hidden layer sees (time, batch, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x.transpose(0, 1)))).mean(0)
        return out


def test_activations_that_do_not_begin_with_the_samples_go_one_by_one() -> None:
    net = TimeFirst().double()
    t = linear("up", 5, ["down"], "producers")
    sites = tuple(type(s)(s.module, 0, s.side, 0, 2, s.index, s.unit, s.role) for s in t.sites)
    group = GroupTarget(t.name, "neuron", 5, t.members, sites)
    batches = data((4, 4), 3, (4, 4), 0, torch.float64)  # as many steps as samples
    case = Case(net, build(net, [group], {}), batches, nn.functional.cross_entropy)
    found = score(net, batches, case.loss_fn, graph=case.graph)
    assert "does not begin with the samples" in found.notes[0]
    torch.testing.assert_close(found.values[t.name], slow_taylor(case, group))


class Encoder(nn.Module):
    """An encoder layer, whose fused kernel would skip the hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x).mean(1))
        return out


def test_a_traced_encoder_takes_the_fast_path() -> None:
    net = Encoder().double()
    batches = data((5, 8), 3, (4, 4, 2), 0, torch.float64)
    graph = trace(net, batches[0][0])
    case = Case(net, graph, batches, nn.functional.cross_entropy)
    found = score(net, batches, case.loss_fn, graph=graph, granularity="neuron")
    assert found.notes == ()
    assert found.values
    for name, values in found.values.items():
        target = graph.targets[name]
        assert isinstance(target, GroupTarget)
        torch.testing.assert_close(values, slow_taylor(case, target), rtol=1e-5, atol=1e-12)


# -- directions ------------------------------------------------------------------------------


@PER_CASE
def test_directional_of_the_loss_is_a_jvp(name: str) -> None:
    """<dL/dtheta, v> from one backward pass equals forward-mode differentiation of the loss."""
    case = CASES[name]()
    x, y = whole(case)
    model = copy.deepcopy(case.model).eval()
    point = {n: p.detach() for n, p in model.named_parameters()}
    found = run(case, "directional")
    for target in case.graph.groups():
        for unit in range(target.n_units):
            with forward_mode_kernels():
                slope = jvp(
                    lambda d: case.loss_fn(functional_call(model, d, (x,)), y),
                    (point,),
                    (direction(case, target, unit),),
                )[1]
            assert float(found[target.name][unit]) == pytest.approx(abs(float(slope)), rel=1e-6)


def forward_mode_kernels() -> Any:
    from secateurs.statistics.removals import forward_mode

    return forward_mode()


@PER_CASE
@pytest.mark.parametrize("of", ["loss", "output"])
def test_finite_differences_converge_to_the_derivative(name: str, of: str) -> None:
    """The error falls with the first power of the step, or is none where f is linear."""
    case = CASES[name]()
    limit = run(
        case, {"name": "directional", "of": of, "finish": "none" if of == "loss" else "abs"}
    )
    errors = []
    for step in (1e-2, 1e-3):
        found = run(case, {"name": "finite_difference", "of": of, "step": step})
        errors.append(sum(float((found[t] - limit[t]).abs().max()) for t in limit))
    assert errors[1] < 1e-2
    assert max(errors) < 1e-5 or 5 < errors[0] / errors[1] < 20


@PER_CASE
def test_a_whole_step_is_the_exact_ablation(name: str) -> None:
    """Against deepcopy, zero everything that belongs to the unit, evaluate."""
    case = CASES[name]()
    found = run(case, "finite_difference")
    base = loss_of(case, case.model)
    for target in case.graph.groups():
        expected = [loss_of(case, removed(case, target, u)) - base for u in range(target.n_units)]
        torch.testing.assert_close(found[target.name], torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_the_ablation_oracle_sees_a_wrong_removal() -> None:
    """Zeroing the producers before a sigmoid is not the removal."""
    case = CASES["sigmoid_mlp"]()
    (t,) = case.graph.groups()
    naive = GroupTarget(t.name, t.kind, 6, t.members, t.sites, "producers")
    wrong = run(
        Case(case.model, build(case.model, [naive], {}), case.batches, case.loss_fn),
        "finite_difference",
    )
    base = loss_of(case, case.model)
    expected = torch.tensor([loss_of(case, removed(case, t, u)) - base for u in range(6)])
    assert not torch.allclose(wrong[t.name], expected, rtol=1e-2)


def test_a_norm_without_scale_is_removed_at_its_readers() -> None:
    assert removal_role(bare_norm().graph.groups()[0]) == "consumer"
    assert removal_role(conv().graph.groups()[0]) == "producer"


def test_ablation_of_single_weights() -> None:
    case = mlp()
    found = run(case, "finite_difference", granularity="weight")["4.weight"]
    base = loss_of(case, case.model)
    expected = []
    for i in range(15):
        model = copy.deepcopy(case.model)
        model.get_parameter("4.weight").data.view(-1)[i] = 0
        expected.append(loss_of(case, model) - base)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-7)


class Tied(nn.Module):
    """One matrix embeds and reads out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embed(tokens)))
        return out


def test_tied_weights_are_scaled_and_summed_once() -> None:
    net = Tied().double()
    u = np.arange(5)
    m = type(mlp().graph.groups()[0].members[0])
    group = GroupTarget(
        "embed:neuron",
        "neuron",
        5,
        (m("embed.weight", 1, u, u, "producer"), m("head.weight", 1, u, u, "consumer")),
    )
    graph = Graph({group.name: group})
    tokens = torch.arange(7)
    batches = [(tokens, tokens.flip(0))]
    case = Case(net, graph, batches, nn.functional.cross_entropy)
    every = run(case, {"name": "magnitude", "members": "all"})[group.name]
    torch.testing.assert_close(every, net.embed.weight.detach().abs().sum(0).float())
    base = float(case.loss_fn(net(tokens), tokens.flip(0)).detach())
    found = run(case, {"name": "finite_difference", "members": "all", "step": 0.5})[group.name]
    half = copy.deepcopy(net)
    half.embed.weight.data[:, 0] *= 0.5
    expected = (float(case.loss_fn(half(tokens), tokens.flip(0)).detach()) - base) / 0.5
    assert float(found[0]) == pytest.approx(expected, rel=1e-6)


# -- does it mean anything? ---------------------------------------------------------------------


def trained() -> Case:
    """A small classifier, trained until it is right about two spirals of blobs."""
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(6, 8, generator=g) * 2
    y = torch.arange(300) % 3
    x = centres[torch.arange(300) % 6] + torch.randn(300, 8, generator=g)
    y = torch.arange(300) % 6 % 3
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    graph = build(net, [linear("0", 24, ["2"], "producers")], {})
    return Case(net, graph, [(x[:200], y[:200]), (x[200:], y[200:])], nn.functional.cross_entropy)


def test_taylor_ranks_units_as_leaving_them_out_does(capsys: pytest.CaptureFixture[str]) -> None:
    case = trained()
    torch.set_grad_enabled(True)
    names = ["taylor", "directional", "magnitude", "activation_mean", "random"]
    found = score(
        case.model,
        case.batches,
        case.loss_fn,
        criterion=["finite_difference", *names],
        graph=case.graph,
    )
    truth = found["finite_difference"].values["0:neuron"].abs()
    rank = {n: float(spearmanr(found[n].values["0:neuron"], truth).statistic) for n in names}
    with capsys.disabled():
        print("\nrank correlation with leave-one-out:", {n: round(r, 2) for n, r in rank.items()})
    assert rank["taylor"] > 0.6
    assert rank["taylor"] > rank["random"]


# -- the request ---------------------------------------------------------------------------------


def test_no_data_needed() -> None:
    case = mlp()
    found = score(case.model, graph=case.graph, criterion="l2_norm")
    assert found.n_samples == 0
    assert found.criterion == "l2_norm"


def test_the_graph_is_traced_when_it_is_not_given() -> None:
    case = mlp()
    found = score(case.model, case.batches, case.loss_fn)
    assert found.values.keys() == {"0:neuron", "2:neuron"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "taylor", "batches": None}, "'taylor' needs batches; give them"),
        ({"criterion": "taylor", "loss_fn": None}, "'taylor' needs loss_fn"),
        ({"criterion": "activation_mean", "batches": None}, "needs batches"),
        ({"criterion": "activation_mean", "granularity": "weight"}, "can score nothing at gran"),
        ({"criterion": "taylor", "granularity": "head"}, "the graph has no such targets"),
        ({"criterion": "taylor", "granularity": "neurone"}, "Did you mean 'neuron'"),
        ({"criterion": "taylor", "max_batches": 0}, "max_batches must be at least 1"),
        ({"criterion": "magnitude", "batches": None, "graph": None}, "a graph is needed"),
        ({"criterion": "finite_difference", "max_seconds": 0.0}, "11 units one by one on 3 batch"),
    ],
)
def test_requests_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    case = mlp()
    given = {"batches": case.batches, "loss_fn": case.loss_fn, "graph": case.graph, **arguments}
    with pytest.raises(ConfigError, match=message):
        score(case.model, given.pop("batches"), given.pop("loss_fn"), **given)


def test_labels_must_differ() -> None:
    case = mlp()
    with pytest.raises(ConfigError, match="given twice: magnitude"):
        score(case.model, criterion=["magnitude", {"name": "magnitude"}], graph=case.graph)
    with pytest.raises(ConfigError, match="no criterion"):
        score(case.model, criterion=[], graph=case.graph)


def test_without_labels_and_loss() -> None:
    case = lstm()
    score(case.model, [(x, None) for x, _ in case.batches], criterion="activation_mean",
          graph=case.graph)  # fmt: skip
    found = score(
        case.model,
        [(x, None) for x, _ in case.batches],
        criterion={"name": "directional", "of": "output"},
        graph=case.graph,
    )
    assert found.n_samples == 10


def test_a_graph_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not belong to this model: 0.weight of target"):
        score(residual().model, graph=mlp().graph, criterion="magnitude")
    wide = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ConfigError, match=r"has shape \(3, 4\)"):
        score(wide, graph=mlp().graph, criterion="magnitude")


def test_a_target_that_cannot_be_scored_is_named() -> None:
    case = mlp()
    first, second = case.graph.groups()
    blind = GroupTarget(first.name, "neuron", 6, first.members)
    found = score(
        case.model, case.batches, criterion="activation_mean",
        graph=build(case.model, [blind, second], {}),
    )  # fmt: skip
    assert found.values.keys() == {"2:neuron"}
    assert found.not_scored == {"0:neuron": "no activation can be seen from outside"}


def test_units_removed_earlier_are_out() -> None:
    case = mlp()
    plan = Plan({}, {}, {"0:neuron": torch.tensor([1, 4])}, {})
    for name in ("taylor", "finite_difference", "magnitude"):
        values = run(case, name, previous=plan)["0:neuron"]
        assert (values == float("-inf")).nonzero().reshape(-1).tolist() == [1, 4]
        rest = [0, 2, 3, 5]
        torch.testing.assert_close(values[rest], run(case, name)["0:neuron"][rest])
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[2, 3] = False
    masked = Plan({}, {"0.weight": mask}, {}, {"0.weight": (6, 4)})
    values = run(case, "magnitude", previous=masked, granularity="weight")["0.weight"]
    assert (values == float("-inf")).nonzero().reshape(-1).tolist() == [11]


def test_progress_and_max_batches() -> None:
    case = mlp()
    seen: list[tuple[int, int | None]] = []
    found = score(
        case.model, case.batches, case.loss_fn, graph=case.graph, max_batches=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 2), (2, 2)]
    assert found.n_samples == 8


def poison(make: Callable[[], Case], name: str) -> Case:
    case = make()
    case.model.state_dict()[name].view(-1)[0] = float("nan")
    return case


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("magnitude", "the score of unit 0 of 0:neuron is nan"),
        ("taylor", "the loss is nan"),
        ("activation_mean", "batch 0: the input of 2 holds values that are not finite"),
    ],
)
def test_weights_that_are_not_finite(criterion: str, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        run(poison(mlp, "0.weight"), criterion)


def root(outputs: Tensor, _: Tensor) -> Tensor:
    """A finite loss whose gradient is infinite."""
    return (outputs * 0).sum().sqrt() + outputs.mean()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("taylor", "batch 0: the gradient at 0:neuron is not finite"),
        ("directional", "batch 0: the gradient at 0:neuron is not finite"),
        ("gradient", "batch 0: the gradient of 2.bias is not finite"),
        ({"name": "taylor", "members": "all"}, "batch 0, sample 0: the gradient of 0.weight"),
    ],
)
def test_gradients_that_are_not_finite(criterion: Any, message: str) -> None:
    case = mlp()
    with pytest.raises(ScoringError, match=message):
        score(case.model, case.batches, root, criterion=criterion, graph=case.graph)


def test_a_removal_that_breaks_the_loss_is_named() -> None:
    case = two_units()

    def reciprocal(outputs: Tensor, _: Tensor) -> Tensor:
        return (1 / outputs).mean()

    with pytest.raises(ScoringError, match="removing unit 0 of 0:neuron changes the loss by inf"):
        score(case.model, case.batches, reciprocal, criterion="finite_difference", graph=case.graph)


def test_a_loss_without_gradient_is_named() -> None:
    case = mlp()
    with pytest.raises(ScoringError, match="does not depend on the weights"):
        score(case.model, case.batches, lambda out, _: out.detach().sum(), graph=case.graph)


def test_a_parameter_without_gradient_is_noted() -> None:
    case = mlp()
    net = case.model
    extra = nn.ModuleDict({"net": net})
    extra.forward = lambda x: net(x)
    extra["idle"] = nn.Linear(2, 2).double()
    graph = Graph({"idle.weight": WeightTarget("idle.weight", (2, 2)),
                   "net.0.weight": WeightTarget("net.0.weight", (6, 4))})  # fmt: skip
    found = score(extra, case.batches, case.loss_fn, criterion="gradient", graph=graph,
                  granularity="weight")  # fmt: skip
    assert found.notes == ("idle.weight: no gradient arrives in any batch, counted as 0",)
    assert found.values["idle.weight"].tolist() == [0, 0, 0, 0]


def test_units_that_no_batch_touches_are_noted() -> None:
    """An expert that no sample is sent to."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = (
                nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.left(x) + (x[:, :1] > 100) * self.right(x)
            return out

    case = mlp()
    model = Routed().double()
    found = score(model, case.batches, case.loss_fn, graph=trace(model, case.batches[0][0]))
    assert found.notes == ("right.0:neuron: no gradient arrives in any batch, counted as 0",)
    assert not found.values["right.0:neuron"].any()
    assert found.values["left.0:neuron"].any()


def test_targets_that_cannot_be_cut_into_samples() -> None:
    case = lstm()
    batches = [(x, y.tolist()) for x, y in case.batches]

    def loss(outputs: Tensor, labels: list[int]) -> Tensor:
        return nn.functional.cross_entropy(outputs, torch.tensor(labels))

    with pytest.raises(DataError, match="first dimension is the 4 samples"):
        score(case.model, batches, loss, graph=case.graph)
    score(case.model, batches, loss, criterion="directional", graph=case.graph)


def test_hostile_batches() -> None:
    case = mlp()
    with pytest.raises(DataError, match="empty"):
        score(case.model, [], case.loss_fn, graph=case.graph)
    with pytest.raises(DataError, match="read only once"):
        score(case.model, iter(case.batches), case.loss_fn, graph=case.graph)
    with pytest.raises(DataError, match="expected a pair"):
        score(case.model, [case.batches[0][0]], case.loss_fn, graph=case.graph)


def test_tuple_and_dict_inputs_and_no_grad() -> None:
    case = mlp()
    expected = run(case, "taylor")
    tuples = [((x,), y) for x, y in case.batches]
    dicts = [({"input": x}, y) for x, y in case.batches]
    with torch.no_grad():
        for batches in (tuples, dicts):
            found = score(case.model, batches, case.loss_fn, graph=case.graph).values
            for target in expected:
                torch.testing.assert_close(found[target], expected[target])


def test_a_seed_fixes_random_criteria_and_targets_are_independent() -> None:
    case = mlp()
    first = score(case.model, graph=case.graph, criterion="random", seed=1).values
    again = score(case.model, graph=case.graph, criterion="random", seed=1).values
    other = score(case.model, graph=case.graph, criterion="random", seed=2).values
    option = score(case.model, graph=case.graph, criterion={"name": "random", "seed": 5}, seed=1)
    assert torch.equal(first["0:neuron"], again["0:neuron"])
    assert not torch.equal(first["0:neuron"], other["0:neuron"])
    assert not torch.equal(first["0:neuron"], option.values["0:neuron"])
    assert not torch.equal(first["0:neuron"][:5], first["2:neuron"])


def test_a_criterion_of_ones_own() -> None:
    """One function and one decorator line are enough."""

    @criterion("mine", needs={"weight", "grad"}, family="user", finish="abs", average="sample")
    def mine(stats: Mapping[str, Tensor]) -> Tensor:
        return stats["weight"] * stats["grad"]

    try:
        case = conv()
        own = get_criterion("mine")
        assert isinstance(own, Criterion)
        found = score(case.model, case.batches, case.loss_fn, criterion=own, graph=case.graph)
        same = run(case, {"name": "taylor", "members": "producers", "finish": "abs"})
        torch.testing.assert_close(found.values["0:channel"], same["0:channel"])
    finally:
        del CRITERIA["mine"]
