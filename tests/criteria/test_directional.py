"""Directions of removal against slow independent computations, and the identities that tie them."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateurs.criteria import get_criterion
from secateurs.errors import ConfigError, ScoringError
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.statistics import Request, Run, Setting, Sums, ablation, paths, slopes
from secateurs.statistics.ablation import OneByOne, agree, copies_for
from secateurs.statistics.removals import Removals, forward_mode
from secateurs.statistics.slopes import OutputSlope
from secateurs.statistics.units import check_fits, members_of
from secateurs.types import Graph, GroupTarget, Plan, Scores, Target, WeightTarget
from tests.graphs import CASES, Case, build, linear, member, mlp, randomise, residual, site

PER_CASE = pytest.mark.parametrize("name", CASES)
SMOOTH = ("sigmoid_mlp", "lstm")
"""Cases without a relu: the integrand does not jump, and few points are exact."""
MANY: list[dict[str, Any]] = [
    {"name": "finite_difference"},
    {"name": "finite_difference", "step": 0.3},
    {"name": "finite_difference", "of": "output"},
    {"name": "directional", "order": 2},
    {"name": "directional", "of": "output"},
    {"name": "path_integral", "path": "unit", "steps": 2},
]


def found(case: Case, criterion: Any, **options: Any) -> Scores:
    result: Scores = score(
        case.model, case.batches, case.loss_fn, criterion=criterion, graph=case.graph, **options
    )
    return result


def run(case: Case, criterion: Any, **options: Any) -> Mapping[str, Tensor]:
    return found(case, criterion, **options).values


def whole(case: Case) -> tuple[Tensor, Tensor]:
    x, y = zip(*case.batches, strict=True)
    return torch.cat(x), torch.cat(y)


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rtol: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[k], b[k], rtol=rtol, atol=rtol * float(b[k].abs().max())) for k in a
    )


def loss_of(case: Case, params: Mapping[str, Tensor] | None = None) -> Tensor:
    x, y = whole(case)
    held = {n: p.detach() for n, p in case.model.named_parameters()}
    return case.loss_fn(functional_call(case.model.eval(), {**held, **(params or {})}, (x,)), y)


def scaled(
    case: Case, targets: list[GroupTarget], factor: float, units: list[int] | None = None
) -> dict[str, Tensor]:
    """Parameters with what alone removes units scaled: all units, or some of each target."""
    params = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    for target in targets:
        for m in members_of(target, "removal", dict(case.model.named_parameters())):
            mine = np.isin(m.unit, range(target.n_units) if units is None else units)
            where: Any = (*[slice(None)] * m.dim, torch.from_numpy(m.index[mine]))
            params[m.tensor][where] *= factor
    return params


def slowly(case: Case, criterion: Any, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Tensor]:
    """The same, every unit in a run of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(Removals, "begin", lambda *_: None)
        return run(case, criterion)


# -- by hand ------------------------------------------------------------------------------------


def two_units(loss: Any) -> Case:
    """y = 3 relu(2 x) + 5 relu(-1 x): x = 1 gives 6 from unit 0, x = -2 gives 10 from unit 1."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    for p, values in zip(net.parameters(), ([[2.0], [-1]], [0, 0], [[3, 5]], [0]), strict=True):
        p.data = torch.tensor(values, dtype=torch.float64)
    batch = (torch.tensor([[1.0], [-2.0]], dtype=torch.float64), torch.zeros(2))
    return Case(net, build(net, [linear("0", 2, ["2"], "producers")], {}), [batch], loss)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # L = y^2 / 2: slopes -36 / 2 and -100 / 2, curvatures 36 / 2 and 100 / 2
        ({"name": "directional"}, [18.0, 50.0]),
        ({"name": "directional", "order": 2}, [-9.0, -25.0]),
        ({"name": "directional", "order": "2", "finish": "abs"}, [9.0, 25.0]),
        ({"name": "directional", "of": "output"}, [3.0, 5.0]),
        ({"name": "finite_difference"}, [-9.0, -25.0]),
        ({"name": "finite_difference", "step": 0.5}, [-13.5, -37.5]),
        ({"name": "path_integral", "path": "unit", "steps": 1}, [-9.0, -25.0]),
        ({"name": "path_integral"}, [-9.0, -25.0]),
        ({"name": "path_integral", "path": "all"}, [-9.0, -25.0]),
        ({"name": "smoothed", "sigma": 0.0}, [18.0, 50.0]),
    ],
)
def test_a_quadratic_by_hand(criterion: dict[str, Any], expected: list[float]) -> None:
    case = two_units(lambda y, _: (y.square() / 2).mean())
    torch.testing.assert_close(run(case, criterion)["0:neuron"], torch.tensor(expected))


# -- many units in one run ----------------------------------------------------------------------


@PER_CASE
@pytest.mark.parametrize("criterion", MANY, ids=str)
def test_many_units_in_a_run_give_what_one_by_one_gives(
    name: str, criterion: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]()
    assert close(run(case, criterion), slowly(case, criterion, monkeypatch), rtol=1e-6)


def test_units_really_share_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one only the plain run and the check of one unit for each of the two targets."""
    case, runs = mlp(), []
    case.model.register_forward_hook(lambda *_: runs.append(1))
    run(case, "finite_difference")
    together = len(runs)
    runs.clear()
    slowly(case, "finite_difference", monkeypatch)
    assert len(runs) > 3 * 11  # 3 batches, 11 units
    assert together < 25


def test_the_number_of_copies_depends_on_sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 2))  # 8 samples: 3200 bytes
    assert copies_for(net, torch.zeros(8, 4)) == ablation.MOST
    monkeypatch.setitem(ablation.COPY_BYTES, "cpu", 32000)
    assert copies_for(net, torch.zeros(8, 4)) == 10
    assert copies_for(net, torch.zeros(1000, 4)) == 1
    case = CASES["conv"]()
    wide = run(case, "finite_difference")
    for budget in (1, 1500, 3000):  # one by one; ragged runs of a few
        monkeypatch.setitem(ablation.COPY_BYTES, "cpu", budget)
        for criterion in ("finite_difference", {"name": "directional", "order": 2}):
            found(case, criterion)
        assert close(run(case, "finite_difference"), wide, rtol=1e-6)


def test_agree_sees_a_difference() -> None:
    a = torch.tensor([1.0, 2.0])
    assert agree(a, a + 1e-5)
    assert not agree(a, a + 1e-2)
    assert not agree(a, a[:1])
    assert not agree(a, a * float("nan"))
    assert not agree(torch.tensor([1]), torch.tensor([2]))
    assert not agree((a, a), a)


class Mixing(nn.Module):
    """Samples see each other: the mean over the batch is taken out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.how = nn.Linear(4, 5), nn.Linear(5, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "refuses":
            assert len(x) in (1, 4, 2), "this model knows batches of 1, 2 and 4"
        h = torch.tanh(self.fc1(x))
        if self.how == "mixes":
            h = h - 0.5 * h.mean(0)
        out: Tensor = self.fc2(h)
        return out.sum(0, keepdim=True).expand(len(x), 3) if self.how == "sums" else out


def mixing(how: str) -> Case:
    net = Mixing(how).double()
    randomise(net, 3)
    return replace(mlp(), model=net, graph=build(net, [linear("fc1", 5, ["fc2"], "producers")], {}))


@pytest.mark.parametrize(
    ("how", "why"),
    [("mixes", "change the outputs"), ("refuses", "knows batches"), ("sums", "change the outputs")],
)
def test_a_model_that_changes_in_copies_goes_one_by_one(
    how: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = mixing(how)
    for criterion in [c for c in MANY if c.get("of") != "output" or c["name"] != "directional"]:
        result = found(case, criterion)
        note = result.notes[0]
        assert note.startswith("fc1:neuron: units measured one by one (")
        assert why in note
        assert close(result.values, slowly(case, criterion, monkeypatch), rtol=1e-9)


def test_slopes_of_a_model_that_mixes_samples_go_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, criterion = mixing("mixes"), {"name": "directional", "of": "output"}
    result = found(case, criterion)
    assert "the samples of a batch act on each other" in result.notes[0]
    assert close(result.values, slowly(case, criterion, monkeypatch), rtol=1e-9)


def test_batch_norm_in_train_mode_is_seen_where_it_matters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gates behind the norm do not move its statistics; gates before it do."""
    case = CASES["conv"]()
    assert not [n for n in found(case, "finite_difference", mode="train").notes if "by one" in n]
    net = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2),
        nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    randomise(net, 1)
    graph = build(net, [linear("0", 5, ["2"], "producers")], {})
    batches = [(x, y) for x, y in mlp().batches]
    case = Case(net, graph, batches, nn.functional.cross_entropy)
    for criterion in MANY:
        result = found(case, criterion, mode="train")
        assert "units measured one by one" in result.notes[0]


@pytest.mark.parametrize("criterion", MANY, ids=str)
def test_a_wrong_site_is_found(criterion: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that show another unit do not make wrong scores."""
    case = mlp()
    first, second = case.graph.groups()
    turned = site("2", "output", np.array([1, 0, 3, 4, 2]))
    wrong = replace(second, sites=(turned, second.sites[1]))
    bad = replace(case, graph=build(case.model, [first, wrong], {}))
    result = found(bad, criterion)
    assert result.notes[0].startswith("2:neuron: units measured one by one (unit")
    assert close(result.values, slowly(case, criterion, monkeypatch), rtol=1e-6)


@pytest.mark.parametrize("cost", [0, 1000], ids=["forward", "backward"])
@PER_CASE
def test_slopes_of_outputs_forward_and_backward(
    name: str, cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways equal dy/dt of the plain model, differentiated numerically."""
    monkeypatch.setattr(slopes, "PRODUCT_COST", cost)
    case = CASES[name]()
    x, _ = whole(case)
    values = run(case, {"name": "directional", "of": "output"})
    for target in case.graph.groups():
        for unit in range(target.n_units):
            up, down = (
                functional_call(case.model.eval(), scaled(case, [target], 1 - t, [unit]), (x,))
                for t in (1e-5, -1e-5)
            )
            slope = ((up - down) / 2e-5).norm(dim=1).mean()
            assert float(values[target.name][unit]) == pytest.approx(float(slope), rel=1e-4)


def test_the_guard_counts_all_units() -> None:
    case = mlp()
    for criterion in [c for c in MANY if c.get("path") != "target"]:
        with pytest.raises(ConfigError, match=r"11 units .* on 3 batches would take about"):
            run(case, criterion, max_seconds=1e-9)


def test_a_removal_that_breaks_the_loss_is_named() -> None:
    case = two_units(lambda y, _: (1 / y).mean())
    with pytest.raises(ScoringError, match="removing unit 0 of 0:neuron changes the loss by inf"):
        run(case, "finite_difference")
    nan = replace(case, loss_fn=lambda y, _: (y * float("nan")).mean())
    with pytest.raises(ScoringError, match="the loss is nan"):
        run(nan, "finite_difference")
    flat = replace(case, loss_fn=lambda y, _: y.detach().sum())
    for criterion in ({"name": "directional", "order": 2}, "smoothed", MANY[-1]):
        with pytest.raises(ScoringError, match="does not depend on the weights"):
            run(flat, criterion)


# -- second order -------------------------------------------------------------------------------


def direction(case: Case, target: GroupTarget, unit: int) -> Tensor:
    """v = minus what alone removes the unit, flat."""
    gone = scaled(case, [target], 0.0, [unit])
    pairs = [(gone[n] - p).reshape(-1) for n, p in case.model.named_parameters()]
    return torch.cat(pairs).detach()


@PER_CASE
def test_second_order_is_that_of_the_dense_hessian(name: str) -> None:
    case = CASES[name]()
    params = {n: p.detach() for n, p in case.model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in params.values()])
        return loss_of(case, {n: v.view_as(params[n]) for n, v in zip(params, parts, strict=True)})

    flat = torch.cat([p.reshape(-1) for p in params.values()])
    functional: Any = torch.autograd.functional
    gradient, hessian = functional.jacobian(loss, flat), functional.hessian(loss, flat)
    second = run(case, {"name": "directional", "order": 2})
    first = run(case, {"name": "directional", "finish": "none"})
    for target in case.graph.groups():
        for unit in range(target.n_units):
            v = direction(case, target, unit)
            assert float(first[target.name][unit]) == pytest.approx(float(gradient @ v), rel=1e-5)
            expected = float(gradient @ v + v @ hessian @ v / 2)
            assert float(second[target.name][unit]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_differences_leave_the_second_order_at_first_order() -> None:
    """(FD(t) - D) / t tends to v'Hv / 2, with an error that falls as t does."""
    case = CASES["lstm"]()
    slope = run(case, {"name": "directional", "finish": "none"})["lstm:hidden"].double()
    curve = run(case, {"name": "directional", "order": 2})["lstm:hidden"].double() - slope
    errors = []
    for t in (0.1, 0.05):
        quotient = run(case, {"name": "finite_difference", "step": t})["lstm:hidden"].double()
        errors.append(float(((quotient - slope) / t - curve).abs().max()))
    assert 1.6 < errors[0] / errors[1] < 2.4


def test_second_order_beats_first_order() -> None:
    """Units that are half as large: the error falls with the third power, not the second."""
    case, errors = CASES["sigmoid_mlp"](), []
    group = case.graph.groups()[0]
    for factor in (0.1, 0.5):
        with torch.no_grad():
            for name, p in scaled(case, [group], factor).items():
                case.model.get_parameter(name).copy_(p)
        exact = run(case, "finite_difference")[group.name]
        first = run(case, {"name": "directional", "finish": "none"})[group.name]
        second = run(case, {"name": "directional", "order": 2})[group.name]
        errors.append([float((p - exact).abs().max()) for p in (first, second)])
    assert 3.4 < errors[0][0] / errors[1][0] < 4.6
    assert 6.5 < errors[0][1] / errors[1][1] < 9.5


def test_second_order_of_single_weights() -> None:
    """A linear layer and a squared error: the expansion is exact."""
    net = nn.Linear(2, 1, bias=False).double()
    net.weight.data = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    graph = Graph({"weight": WeightTarget("weight", (1, 2))})
    batch = (torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.zeros(1))
    case = Case(net, graph, [batch], lambda y, _: y.square().mean())
    # L = (3 - 4)^2 = 1; without the first (-4)^2 = 16, without the second 3^2 = 9
    for criterion in ({"name": "directional", "order": 2}, "finite_difference"):
        assert run(case, criterion, granularity="weight")["weight"].tolist() == [15.0, 8.0]


# -- path integrals -----------------------------------------------------------------------------


@PER_CASE
def test_a_path_of_a_unit_alone_ends_at_the_exact_ablation(name: str) -> None:
    case = CASES[name]()
    exact = run(case, "finite_difference")
    errors = []
    for steps in (1, 32):
        value = run(case, {"name": "path_integral", "path": "unit", "steps": steps})
        errors.append(max(float((value[t] - exact[t]).abs().max()) for t in exact))
    assert errors[1] < (1e-6 if name in SMOOTH else 1e-2)
    assert errors[1] < 0.2 * errors[0]


@PER_CASE
@pytest.mark.parametrize("members", ["removal", "all"])
def test_a_path_of_a_target_adds_up(name: str, members: str) -> None:
    """The scores sum to L(without the target) - L(full): nothing is lost on the way."""
    case, within = CASES[name](), 1e-6 if name in SMOOTH else 1e-2
    full = float(loss_of(case))
    groups = case.graph.groups()
    criterion = {"name": "path_integral", "steps": 32, "members": members}
    for target, values in run(case, criterion).items():
        (group,) = [g for g in groups if g.name == target]
        expected = float(loss_of(case, scaled(case, [group], 0.0))) - full
        assert float(values.sum()) == pytest.approx(expected, abs=within)
    together = run(case, {**criterion, "path": "all"})
    expected = float(loss_of(case, scaled(case, groups, 0.0))) - full
    assert sum(float(v.sum()) for v in together.values()) == pytest.approx(expected, abs=within)


def test_too_few_steps_do_not_add_up() -> None:
    case = mlp()
    (first, _) = case.graph.groups()
    expected = float(loss_of(case, scaled(case, [first], 0.0)) - loss_of(case))
    rough = run(case, {"name": "path_integral", "steps": 1})["0:neuron"].sum()
    assert abs(float(rough) - expected) > 1e-2


@pytest.mark.parametrize("path", ["target", "all"])
def test_a_path_by_plain_loops(path: str) -> None:
    """Midpoints and autograd over the scaled network, unit by unit."""
    case, steps = residual(), 100
    groups = case.graph.groups()
    values = run(case, {"name": "path_integral", "path": path, "steps": 32})
    for target in groups:
        family = groups if path == "all" else [target]
        expected = torch.zeros(target.n_units, dtype=torch.float64)
        for i in range(steps):
            point = scaled(case, family, (i + 0.5) / steps)
            for p in point.values():
                p.requires_grad_()
            grads = dict(
                zip(
                    point, torch.autograd.grad(loss_of(case, point), [*point.values()]), strict=True
                )
            )
            for m in members_of(target, "removal", dict(case.model.named_parameters())):
                weight = case.model.get_parameter(m.tensor).detach()
                lines = (weight * grads[m.tensor]).reshape(len(weight), -1).sum(1)
                expected[torch.from_numpy(m.unit)] -= lines[torch.from_numpy(m.index)] / steps
        torch.testing.assert_close(values[target.name].double(), expected, rtol=2e-2, atol=2e-3)


def test_paths_of_single_weights_add_up() -> None:
    case = mlp()
    values = run(case, {"name": "path_integral", "path": "all", "steps": 64}, granularity="weight")
    params = {n: p.detach() * (0 if p.dim() > 1 else 1) for n, p in case.model.named_parameters()}
    expected = float(loss_of(case, params) - loss_of(case))
    assert sum(float(v.sum()) for v in values.values()) == pytest.approx(expected, abs=2e-3)


def test_units_removed_earlier_stay_out_of_the_path() -> None:
    case = mlp()
    plan = Plan({}, {}, {"0:neuron": torch.tensor([1, 4])}, {})
    with torch.no_grad():
        for name, p in scaled(case, case.graph.groups()[:1], 0.0, [1, 4]).items():
            case.model.get_parameter(name).copy_(p)
    values = run(case, "path_integral", previous=plan)["0:neuron"]
    assert values[[1, 4]].tolist() == [-float("inf")] * 2
    rest = [0, 2, 3, 5]
    torch.testing.assert_close(values[rest], run(case, "path_integral")["0:neuron"][rest])


def test_points_and_weights_integrate_polynomials() -> None:
    for degree in range(8):
        total = sum(w * x**degree for x, w in paths.nodes(4))
        assert total == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert sum(w * x**8 for x, w in paths.nodes(4)) != pytest.approx(1 / 9, abs=1e-9)


def test_a_long_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 paths of 8 steps on 3 batches would take about"):
        run(mlp(), "path_integral", max_seconds=1e-9)


# -- smoothed -----------------------------------------------------------------------------------


@PER_CASE
def test_smoothed_by_plain_loops(name: str) -> None:
    case, seed = CASES[name](), 5
    values = run(case, {"name": "smoothed", "samples": 3, "sigma": 0.2}, seed=seed)
    params = {n: p.detach() for n, p in case.model.named_parameters()}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for i in range(3):
        point = {}
        for n, p in params.items():
            noise = torch.Generator().manual_seed(zlib.crc32(f"{seed}/noisy/{i}/{n}".encode()))
            z = torch.randn(p.shape, generator=noise).double()
            point[n] = (p * (1 + 0.2 * z)).requires_grad_()
        grads = torch.autograd.grad(loss_of(case, point), [*point.values()])
        for n, g in zip(point, grads, strict=True):
            total[n] += g / 3
    flat = torch.cat([g.reshape(-1) for g in total.values()])
    for target in case.graph.groups():
        expected = [abs(float(flat @ direction(case, target, u))) for u in range(target.n_units)]
        torch.testing.assert_close(values[target.name], torch.tensor(expected), rtol=1e-5, atol=0)


def test_smoothing_depends_on_the_seed_and_not_on_the_targets() -> None:
    case = mlp()
    first, _ = case.graph.groups()
    one = replace(case, graph=build(case.model, [first], {}))
    values = run(case, "smoothed", seed=1)["0:neuron"]
    assert torch.equal(values, run(one, "smoothed", seed=1)["0:neuron"])
    assert not torch.allclose(values, run(case, "smoothed", seed=2)["0:neuron"])
    plain = run(case, {"name": "smoothed", "sigma": 0, "samples": 1})
    assert close(plain, run(case, "directional"), rtol=1e-6)


# -- requests that are refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ({"name": "directional", "order": 3}, "unknown order of criterion 'directional' '3'"),
        ({"name": "directional", "order": 2, "of": "output"}, "order=2 is of the loss"),
        ({"name": "path_integral", "steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"name": "path_integral", "steps": 2.5, "path": "unit"}, "steps must be a whole number"),
        ({"name": "path_integral", "steps": 0}, r"steps must be in \[1, 128\], got 0"),
        ({"name": "path_integral", "path": "units"}, "Did you mean 'unit'"),
        ({"name": "smoothed", "samples": 1.5}, "samples must be a whole number, got 1.5"),
        ({"name": "smoothed", "sigma": -0.1}, r"sigma must be in \[0, 10\], got -0.1"),
    ],
)
def test_options_that_are_refused(criterion: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(mlp(), criterion)


def test_labels_of_the_variants() -> None:
    assert get_criterion("directional", order=2).label == "directional(order=2)"
    assert get_criterion("directional", order=2).cost == "per unit"
    assert get_criterion("path_integral", path="unit").cost == "per unit"
    assert get_criterion("path_integral").cost == "backward"
    assert get_criterion("directional", order=1).needs == {"gate"}


# -- models as they come ------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention through the fused kernel, then a classifier of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        y = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = self.head(torch.relu(y).mean(1))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


class Images(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        )  # fmt: skip


@pytest.mark.parametrize("build_model", [Attention, Recurrent, Images])
def test_traced_models_in_single_precision(build_model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build_model()
    x, y = torch.randn(6, 5, 8), torch.randint(3, (6,))
    loss = nn.functional.cross_entropy
    graph = trace(model, x)
    criteria: list[Any] = [
        "finite_difference",
        {"name": "path_integral", "path": "unit", "steps": 24},
        {"name": "directional", "order": 2},
        {"name": "directional", "of": "output"},
        "path_integral",
        "smoothed",
        "directional",
    ]
    every = score(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss, criterion=criteria, graph=graph)
    assert torch.backends.mkldnn.enabled
    exact, path, second, *_ = (every[label].values for label in every)
    assert exact
    for name, values in exact.items():
        torch.testing.assert_close(path[name], values, rtol=0.05, atol=2e-3)
        torch.testing.assert_close(second[name], values, rtol=0.8, atol=0.05)


def test_fast_convolutions_stay_on_where_nothing_is_recurrent() -> None:
    with forward_mode(Images()):
        assert torch.backends.mkldnn.enabled
    for model in (Recurrent(), None):
        with forward_mode(model):
            assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out


def test_a_tied_weight_goes_as_one() -> None:
    torch.manual_seed(1)
    model = Tied().double()
    x, y = torch.randn(5, 3).double(), torch.randint(3, (5,))
    loss = nn.functional.cross_entropy
    u = np.arange(3)
    rows = GroupTarget(
        "a:neuron", "neuron", 3, (member("a.weight", 0, u), member("b.weight", 1, u)), ()
    )
    graph = Graph({"a:neuron": rows, "a.weight": WeightTarget("a.weight", (3, 3))})
    base = float(loss(model(x), y).detach())
    for granularity, criterion in (
        ("weight", {"name": "finite_difference"}),
        ("neuron", {"name": "finite_difference", "members": "all"}),
        ("weight", {"name": "path_integral", "path": "unit", "steps": 16}),
    ):
        found = score(
            model, [(x, y)], loss, criterion=criterion, graph=graph, granularity=granularity
        )
        for i in range(3):
            other = copy.deepcopy(model)
            where: Any = (slice(None), slice(None))
            with torch.no_grad():
                if granularity == "weight":
                    other.a.weight.view(-1)[i] = 0
                else:
                    where = i
                    other.a.weight[where] = 0
                    other.a.weight[:, where] = 0
                expected = float(loss(other(x), y)) - base
            assert float(found.values[next(iter(found.values))][i]) == pytest.approx(
                expected, rel=1e-4
            )


# -- identities that all of them share ----------------------------------------------------------


@PER_CASE
def test_a_gate_is_the_sum_over_its_weights(name: str) -> None:
    """Activation x gradient at the sites equals -sum w dL/dw over what alone removes the unit."""
    case = CASES[name]()
    gate = run(case, {"name": "directional", "finish": "none"})
    params = {n: p.detach().clone().requires_grad_() for n, p in case.model.named_parameters()}
    grads = torch.autograd.grad(loss_of(case, params), [*params.values()])
    flat = torch.cat([g.reshape(-1) for g in grads])
    for target in case.graph.groups():
        expected = [float(flat @ direction(case, target, u)) for u in range(target.n_units)]
        torch.testing.assert_close(gate[target.name], torch.tensor(expected), rtol=1e-5, atol=1e-9)


def bias_free(seed: int = 0) -> Case:
    net = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    ).double()  # fmt: skip
    randomise(net, seed)
    return replace(mlp(), model=net, graph=build(net, [], {}))


def test_conservation() -> None:
    """Without biases every layer sees the same total: <dL/dy, y>."""
    case = bias_free()
    values = run(case, {"name": "directional", "finish": "none"}, granularity="weight")
    x, y = whole(case)
    out = case.model(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(case.loss_fn(out, y), out)
    for layer in values.values():
        assert float(layer.sum()) == pytest.approx(-float((slope * out).sum().detach()), rel=1e-5)


def test_conservation_fails_with_biases() -> None:
    values = run(mlp(), {"name": "directional", "finish": "none"}, granularity="weight")
    sums = [float(layer.sum()) for layer in values.values()]
    assert max(sums) - min(sums) > 1e-2


def test_collectors_are_usable_alone() -> None:
    """The slow way is public: outputs of the model with one unit half gone."""
    case = mlp()
    targets: list[Target] = [*case.graph.groups()]
    params = check_fits(case.model, targets)
    setting = Setting(case.model, params, case.loss_fn, case.graph, {})
    x, _ = case.batches[0]
    half = torch.tensor([0.5], dtype=torch.float64)
    _, (outputs,) = OneByOne(setting, "removal").removed(x, 4, targets[0], [2], half)
    expected = functional_call(case.model, scaled(case, case.graph.groups()[:1], 0.5, [2]), (x,))
    torch.testing.assert_close(outputs, expected)
    collector = OutputSlope(
        setting, Request("jvp_output", {}, "removal", targets), Sums().under("")
    )
    assert collector.n_samples == 0
    assert Run(0, case.batches[0]).n == 4
