"""Curvature against the dense Hessian, Fisher matrices and inverses of tiny networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import secateurs.statistics.curvature as curvature_module
from secateurs.errors import ConfigError, ScoringError
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.statistics.blocks import obs_update, solve_blocks
from secateurs.statistics.collector import Setting, generator_for
from secateurs.statistics.curvature import Curvature
from secateurs.statistics.kronecker import _input_squares, patches
from secateurs.statistics.output_roots import roots, seen_outputs
from secateurs.statistics.removals import forward_mode
from secateurs.statistics.units import members_of
from secateurs.types import Batch, Graph, GroupTarget, Target, WeightTarget
from tests.graphs import CASES, Case, mlp

JACOBIAN: Any = torch.autograd.functional.jacobian
HESSIAN: Any = torch.autograd.functional.hessian
ORACLES = ["mlp", "sigmoid_mlp", "conv", "lstm", "residual"]


def values(case: Case, criterion: Any, **options: Any) -> dict[str, Tensor]:
    found = score(
        case.model, case.batches, case.loss_fn, criterion=criterion, graph=case.graph, **options
    )
    return {n: v.double() for n, v in found.values.items()}


class Dense:
    """Gradient and Hessian of the mean loss in all parameters, and the directions of all units."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.params = dict(case.model.named_parameters())
        self.x, self.y = (torch.cat(t) for t in zip(*case.batches, strict=True))
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.params.values()])
        self.g = self.each(JACOBIAN)
        self.h = self.each(HESSIAN)

    def loss(self, flat: Tensor, only: slice = slice(None)) -> Tensor:
        named, at = {}, 0
        for name, p in self.params.items():
            named[name] = flat[at : at + p.numel()].reshape(p.shape)
            at += p.numel()
        with forward_mode():
            out = functional_call(self.case.model.eval(), named, (self.x[only],))
        return self.case.loss_fn(out, self.y[only])

    def each(self, derivative: Callable[..., Any], only: slice = slice(None)) -> Tensor:
        found: Tensor = derivative(lambda f: self.loss(f, only), self.flat)
        return found

    def per_sample(self) -> Tensor:
        """(n, parameters) gradients."""
        every = [slice(i, i + 1) for i in range(len(self.x))]
        return torch.stack([self.each(JACOBIAN, one) for one in every])

    def directions(self, target: Target, which: str = "removal") -> Tensor:
        """(n_units, parameters): the weights of each unit, zero elsewhere."""
        rows = []
        for u in range(target.n_units):
            held = {n: torch.zeros_like(p) for n, p in self.params.items()}
            if isinstance(target, WeightTarget):
                p = self.params[target.name].detach().reshape(-1)
                held[target.name].view(-1)[u] = p[u]
            else:
                for m in members_of(target, which, self.params):
                    index = torch.from_numpy(m.index[m.unit == u])
                    place: Any = (*[slice(None)] * m.dim, index)
                    held[m.tensor][place] = self.params[m.tensor].detach()[place]
            rows.append(torch.cat([t.reshape(-1) for t in held.values()]))
        return torch.stack(rows)


def targets(case: Case, granularity: str = "structured") -> list[Target]:
    return case.graph.select(granularity)


def near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Scores are float32."""
    return found.keys() == expected.keys() and all(
        bool(((found[n] - e).abs() <= 1e-5 * e.abs() + 2e-7 * e.abs().max() + 1e-12).all())
        for n, e in expected.items()
    )


def expected(case: Case, of: Callable[[Dense, Tensor], Tensor], kind: str) -> dict[str, Tensor]:
    """Target -> of(dense, directions of its units)."""
    dense = Dense(case)
    return {t.name: of(dense, dense.directions(t)) for t in targets(case, kind)}


# -- products with the Hessian -------------------------------------------------------------------


def one_hot(monkeypatch: pytest.MonkeyPatch, case: Case, kind: str) -> int:
    """Probe k sees unit k alone, so that the sum over all probes is exact."""
    first, total = {}, 0
    for t in targets(case, kind):
        first[t.name], total = total, total + t.n_units

    def sign(_: Any, target: Target, k: int) -> Tensor:
        at = torch.arange(target.n_units) + first[target.name]
        return (at == k).to(torch.int8)

    monkeypatch.setattr(Curvature, "_sign", sign)
    return total


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "structured") for n in ORACLES), ("mlp", "weight")]
)
def test_curvature_is_that_of_the_dense_hessian(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]()
    probes = one_hot(monkeypatch, case, kind)
    asked = {"obd": {"name": "obd", "probes": probes}}
    asked["taylor_second"] = {"name": "taylor_second", "probes": probes}
    half = expected(case, lambda d, v: 0.5 * ((v @ d.h) * v).sum(1) / probes, kind)
    assert near(values(case, asked["obd"], granularity=kind), half)
    both = expected(case, lambda d, v: -v @ d.g + 0.5 * ((v @ d.h) * v).sum(1) / probes, kind)
    found = values(case, asked["taylor_second"], granularity=kind)
    assert near(found, both)
    wrong = expected(case, lambda d, v: v @ d.g + 0.5 * ((v @ d.h) * v).sum(1) / probes, kind)
    assert not near(found, wrong)


@pytest.mark.parametrize("kind", ["structured", "weight"])
@pytest.mark.parametrize("name", ORACLES)
def test_random_signs_are_those_of_the_seed(name: str, kind: str) -> None:
    """z_u w_u' H sum_t z_t w_t, averaged over the probes."""
    case, seed, probes = CASES[name](), 3, 3
    dense = Dense(case)
    every = {t.name: dense.directions(t) for t in targets(case, kind)}
    fake: Any = Setting(case.model, {}, None, case.graph, {}, seed)
    sums = {n: torch.zeros(len(v), dtype=torch.float64) for n, v in every.items()}
    for k in range(probes):
        z = {}
        for n, v in every.items():
            g = generator_for(fake, "curvature", n, k)
            z[n] = 2.0 * torch.randint(0, 2, (len(v),), generator=g, dtype=torch.int8) - 1
        hv = dense.h @ sum(z[n].double() @ v for n, v in every.items())
        for n, v in every.items():
            sums[n] += z[n] * (v @ hv) / probes
    found = values(case, {"name": "obd", "probes": probes}, granularity=kind, seed=seed)
    assert near(found, {n: 0.5 * s for n, s in sums.items()})


def test_the_mean_over_all_signs_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp()
    graph = case.graph.only("2:neuron")
    case = Case(case.model, graph, case.batches, case.loss_fn)
    every = torch.cartesian_prod(*[torch.tensor([-1, 1], dtype=torch.int8)] * 5)
    monkeypatch.setattr(Curvature, "_sign", lambda _, target, k: every[k])
    exact = expected(case, lambda d, v: 0.5 * ((v @ d.h) * v).sum(1), "structured")
    assert near(values(case, {"name": "obd", "probes": 32}), exact)


@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_gates_and_weights_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    gated = values(case, "taylor_second")
    monkeypatch.setattr(curvature_module, "probe_gates", lambda *_: ({}, {}))
    assert near(values(case, "taylor_second"), gated)


def test_obd_by_hand() -> None:
    """L = 1/2 mean (w x - t)^2: the Hessian is the mean of x x'."""
    net = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, -2.0]]))
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # H = diag(2, 1/2)
    y = torch.tensor([[4.0], [0.0]], dtype=torch.float64)  # g = (2 * (6 - 4) / 2, -2 / 2) = (2, -1)
    graph = Graph({"weight": WeightTarget("weight", (1, 2))})
    case = Case(net, graph, [(x, y)], lambda o, t: 0.5 * (o - t).square().mean())
    assert values(case, "obd", granularity="weight")["weight"].tolist() == [9.0, 1.0]
    # -w g + 1/2 h w^2: 9 - 6, 1 - 2: exactly what the loss does
    assert values(case, "taylor_second", granularity="weight")["weight"].tolist() == [3.0, -1.0]
    exact = values(case, "finite_difference", granularity="weight")["weight"]
    assert exact.tolist() == [3.0, -1.0]
    # w (H g): (3 * 2 * 2, -2 * 1/2 * -1)
    assert values(case, "grasp", granularity="weight")["weight"].tolist() == [12.0, 1.0]
    # F = mean g_i^2 = (4^2 / 2, 2^2 / 2); 1/2 w^2 F
    assert values(case, "fisher", granularity="weight")["weight"].tolist() == [36.0, 4.0]


def test_an_operation_without_second_derivative_is_named() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Any:
            return g * 2

    apply: Any = Once.apply
    case = mlp()
    bad = Case(case.model, case.graph, case.batches, lambda o, t: cross_entropy(apply(o), t))
    for name in ("obd", "grasp", "gauss_newton"):
        with pytest.raises(ScoringError, match=r"batch 0: .* no second derivative"):
            values(bad, name)


def test_a_linear_loss_does_not_curve() -> None:
    net = nn.Linear(2, 1, bias=False)
    graph = Graph({"weight": WeightTarget("weight", (1, 2))})
    case = Case(net, graph, [(torch.ones(3, 2), torch.ones(3))], lambda o, _: o.mean())
    for name in ("obd", "grasp"):
        assert values(case, name, granularity="weight")["weight"].tolist() == [0.0, 0.0]


# -- gradient flow -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["structured", "weight"])
@pytest.mark.parametrize("name", ORACLES)
def test_grasp_is_the_dense_product(name: str, kind: str) -> None:
    case = CASES[name]()
    exact = expected(case, lambda d, v: v @ (d.h @ d.g), kind)
    assert near(values(case, "grasp", granularity=kind), exact)
    wrong = {n: -v for n, v in exact.items()}
    assert not near(values(case, "grasp", granularity=kind), wrong)
    absolute = expected(case, lambda d, v: (v @ (d.h @ d.g)).abs(), kind)
    assert near(values(case, "grasp_abs", granularity=kind), absolute)


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_the_sign_of_grasp(name: str) -> None:
    """Shrinking a unit with a positive score shrinks the gradient, at the rate of the score."""
    case, step = CASES[name](), 1e-6
    dense, found = Dense(case), values(CASES[name](), "grasp")

    def flow(flat: Tensor) -> float:
        g: Tensor = JACOBIAN(dense.loss, flat)
        return float(g @ g) / 2

    base = flow(dense.flat)
    for target in targets(case):
        for v, s in zip(dense.directions(target), found[target.name].tolist(), strict=True):
            change = (flow(dense.flat - step * v) - base) / step
            assert change == pytest.approx(-s, rel=1e-3, abs=1e-4)


def test_removing_the_lowest_of_grasp_keeps_the_gradient() -> None:
    """Weights are really removed: the lowest scores go with the largest gradient afterwards."""
    case = mlp(seed=1)
    dense = Dense(case)
    found = torch.cat(list(values(case, "grasp", granularity="weight").values()))
    every = torch.cat([dense.directions(t) for t in targets(case, "weight")])
    order = found.argsort()

    def flow(gone: Tensor) -> float:
        flat = dense.flat - every[gone].sum(0)
        g: Tensor = JACOBIAN(dense.loss, flat)
        return float(g @ g)

    assert flow(order[:6]) > float(dense.g @ dense.g) > flow(order[-6:])


# -- the empirical Fisher ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["structured", "weight"])
@pytest.mark.parametrize("name", ORACLES)
def test_fisher_by_sample(name: str, kind: str) -> None:
    case = CASES[name]()

    def of(d: Dense, v: Tensor) -> Tensor:
        return 0.5 * (v.square() @ d.per_sample().square().mean(0))

    assert near(values(case, "fisher", granularity=kind), expected(case, of, kind))


def test_fisher_by_batch() -> None:
    case = mlp()
    dense = Dense(case)
    cuts = [slice(0, 4), slice(4, 8), slice(8, 10)]
    squares = [dense.each(JACOBIAN, c).square() for c in cuts]
    mean = (4 * squares[0] + 4 * squares[1] + 2 * squares[2]) / 10
    exact = {t.name: 0.5 * dense.directions(t).square() @ mean for t in targets(case)}
    assert near(values(case, "fisher_batch"), exact)
    element = values(case, "taylor_element")
    assert near({n: v / 2 for n, v in element.items()}, exact)


def test_taylor_is_the_fisher_information_of_a_gate() -> None:
    """Half of it, that is; for single weights both are one."""
    case = mlp()
    half = {n: v / 2 for n, v in values(case, "taylor", granularity="weight").items()}
    assert near(values(case, "fisher", granularity="weight"), half)
    dense = Dense(case)
    gate = {
        t.name: 0.5 * (dense.per_sample() @ dense.directions(t).T).square().mean(0)
        for t in targets(case)
    }
    assert near({n: v / 2 for n, v in values(case, "taylor").items()}, gate)


# -- Gauss-Newton --------------------------------------------------------------------------------


def gauss_newton(d: Dense, v: Tensor) -> Tensor:
    """j' H_i j with dense Jacobians of the outputs, the mean over samples."""
    p = d.params

    def outputs(flat: Tensor) -> Tensor:
        named, at = {}, 0
        for name, tensor in p.items():
            named[name] = flat[at : at + tensor.numel()].reshape(tensor.shape)
            at += tensor.numel()
        with forward_mode():
            found: Tensor = functional_call(d.case.model, named, (d.x,))
        return found

    j: Tensor = JACOBIAN(outputs, d.flat) @ v.T  # (n, classes, units)
    out = outputs(d.flat).detach()
    total = torch.zeros(len(v), dtype=torch.float64)
    for i in range(len(out)):
        h: Tensor = HESSIAN(
            lambda o: d.case.loss_fn(o[None], d.y[i : i + 1]),  # noqa: B023
            out[i],
        )
        total += torch.einsum("cu,cd,du->u", j[i], h, j[i]) / len(out)
    return total


@pytest.mark.parametrize("name", ORACLES)
def test_gauss_newton_is_right_on_average(name: str) -> None:
    case = CASES[name]()
    exact = expected(case, lambda d, v: -v @ d.g + 0.5 * gauss_newton(d, v), "structured")
    found = values(case, {"name": "gauss_newton", "probes": 150})
    for n, e in exact.items():
        torch.testing.assert_close(found[n], e, rtol=0.06, atol=0.06 * float(e.abs().max()))
        shifted = e + 0.4 * e.abs().max()
        assert not torch.allclose(found[n], shifted, rtol=0.06, atol=0.06 * float(e.abs().max()))


def test_gauss_newton_of_one_output_is_exact() -> None:
    """One output has one eigenvector; in a relu network the Hessian of a gate is all of it."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    x = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batches: list[Batch] = [(x[:7], x[:7].sum(1, keepdim=True)), (x[7:], x[7:, :1])]
    case = Case(net, trace(net, x), batches, nn.functional.mse_loss)
    exact = expected(case, lambda d, v: -v @ d.g + 0.5 * ((v @ d.h) * v).sum(1), "structured")
    assert near(values(case, "gauss_newton"), exact)
    assert near(values(case, "finite_difference"), exact)  # a parabola


def signs(seed: int) -> Callable[[int, int], Tensor]:
    def of(sample: int, count: int) -> Tensor:
        g = torch.Generator().manual_seed(1000 * seed + sample)
        return 2 * torch.randint(0, 2, (count,), generator=g, dtype=torch.int8) - 1

    return of


def ignoring(o: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(o.transpose(1, 2), t, ignore_index=0, weight=torch.arange(30.0).double())


LOSSES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], int]] = {
    "small": ((3, 4), lambda o: cross_entropy(o, torch.tensor([0, 1, 1])), 1),
    "small, bent down": ((3, 4), lambda o: (o.sin().sum(1) + o[:, 0] * o[:, 1]).mean(), 2),
    "softmax": ((2, 90), lambda o: cross_entropy(o, torch.tensor([5, 70])), 1),
    "tokens": ((2, 5, 30), lambda o: ignoring(o, torch.arange(10).reshape(2, 5)), 1),
    "pixels": ((2, 9, 8), lambda o: cross_entropy(o, torch.arange(16).reshape(2, 8) % 9), 1),
    "diagonal": ((2, 70), lambda o: o.square().mean(), 1),
    "diagonal, bent down": ((2, 70), lambda o: o.sin().sum(1).mean(), 2),
    "other": ((2, 70), lambda o: o.square().sum(1).square().mean(), 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_roots_are_roots_on_average(name: str) -> None:
    """The signed squares of r' j have j' H j as their mean, for each sample apart."""
    shape, loss, n_roots = LOSSES[name]
    g = torch.Generator().manual_seed(0)
    out = torch.randn(shape, dtype=torch.float64, generator=g).requires_grad_()
    h: Any = HESSIAN(loss, out.detach())
    n, size = shape[0], out[0].numel()
    blocks = torch.stack([h.reshape(n, size, n, size)[i, :, i] for i in range(n)])
    j = torch.randn(n, size, dtype=torch.float64, generator=g)
    exact = torch.einsum("na,nab,nb->n", j, blocks, j)
    seen = seen_outputs((out * 1, "names"), lambda y: loss(y[0]), n, "batch 0")
    draws = []
    for seed in range(400):
        found = roots(seen, signs(seed))
        assert len(found) == n_roots
        draws.append(sum(s * (r[0].reshape(n, -1) * j).sum(1).square() for r, s in found))
    each = torch.stack(draws)  # type: ignore[arg-type]
    error = each.std(0) / len(draws) ** 0.5
    assert ((each.mean(0) - exact).abs() < 4 * error + 1e-9 * exact.abs()).all()
    assert not ((each.mean(0) + 9 * error - exact).abs() < 4 * error).all()


def test_a_loss_without_curvature_in_the_outputs_is_refused() -> None:
    case = mlp()
    bad = Case(case.model, case.graph, case.batches, lambda o, _: o.mean())
    with pytest.raises(ScoringError, match=r"linear in the outputs .* 'taylor'"):
        values(bad, "gauss_newton")
    mixed = torch.ones(2, 3, requires_grad=True) * 1
    with pytest.raises(ScoringError, match=r"shapes \[\(2, 3\)\].* the 4 samples"):
        seen_outputs(mixed, lambda o: o.square().sum(), 4, "batch 0")


# -- Kronecker factors ---------------------------------------------------------------------------


def factors(case: Case, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A with a one for the bias, S, and [W b], from plain autograd and unfold."""
    path = name.rpartition(".")[0]
    layer: Any = case.model.get_submodule(path)
    a = s = torch.zeros(())
    n = positions = 0
    for x, y in case.batches:
        held: list[Tensor] = []

        def keep(_: nn.Module, args: Any, out: Tensor, held: list[Tensor] = held) -> Tensor:
            held.extend([args[0].detach().clone(), out])
            return out * 1  # what follows may work in place

        handle = layer.register_forward_hook(keep)
        losses = [case.loss_fn(case.model.eval()(x), y) * len(x)]
        handle.remove()
        (g,) = torch.autograd.grad(losses, [held[1]])
        if isinstance(layer, nn.Conv2d):
            cols = nn.functional.unfold(held[0], (3, 3), padding=1)
            rows, g = cols.transpose(1, 2).flatten(0, 1), g.flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            rows = held[0]
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        a, s = a + rows.T @ rows, s + g.T @ g
        n, positions = n + len(x), positions + len(rows)
    w = torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], 1)
    return a / n, s / positions, w


ROWS = {"mlp": ["0.weight", "2.weight"], "conv": ["0.weight"], "residual": ["stem.weight"]}


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_kfac_of_units_is_the_dense_product(name: str) -> None:
    """1/2 w' F w, and 1/2 w' ([F^-1]_uu)^-1 w, with F = S (x) A written out."""
    case, damping = CASES[name](), 0.05
    plain = values(case, "kfac")
    inverse = values(case, {"name": "kfac", "compensate": "others", "damping": damping})
    for tensor, target in zip(ROWS[name], case.graph.groups(), strict=True):
        a, s, w = factors(case, tensor)
        fisher = torch.kron(s, a)
        eye = torch.eye(len(s), dtype=torch.float64)
        damped = torch.kron(s + damping * s.diagonal().mean() * eye, a)
        damped += 1e-10 * torch.eye(len(damped), dtype=torch.float64)  # A may be singular
        inverted = torch.linalg.inv(damped)
        for u in range(target.n_units):
            row = slice(u * len(a), (u + 1) * len(a))
            exact = 0.5 * w[u] @ fisher[row, row] @ w[u]
            assert plain[target.name][u].item() == pytest.approx(exact.item(), rel=1e-5)
            block = torch.linalg.inv(inverted[row, row])
            exact = 0.5 * w[u] @ block @ w[u]
            assert inverse[target.name][u].item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_kfac_of_weights_is_the_dense_product(name: str) -> None:
    case, damping = CASES[name](), 0.05
    plain = values(case, "kfac", granularity="weight")
    asked = {"name": "kfac", "compensate": "others", "damping": damping}
    inverse = values(case, asked, granularity="weight")
    for tensor in ROWS[name]:
        a, s, w = factors(case, tensor)
        a, w = a[:-1, :-1], w[:, :-1]  # single weights: without the bias
        exact = 0.5 * w.square() * s.diagonal()[:, None] * a.diagonal()[None]
        assert near({"w": plain[tensor]}, {"w": exact.reshape(-1)})
        lines = []
        for m in (s, a):
            eye = torch.eye(len(m), dtype=torch.float64)
            lines.append(torch.linalg.inv(m + damping * m.diagonal().mean() * eye).diagonal())
        exact = 0.5 * w.square() / (lines[0][:, None] * lines[1][None])
        assert near({"w": inverse[tensor]}, {"w": exact.reshape(-1)})


def test_kfac_of_one_sample_is_the_fisher_itself() -> None:
    case = mlp()
    one = Case(case.model, case.graph, [(case.batches[0][0][:1], case.batches[0][1][:1])],
               case.loss_fn)  # fmt: skip
    assert near(
        values(one, "kfac", granularity="weight"), values(one, "fisher", granularity="weight")
    )
    gate = values(one, "taylor")
    assert near(values(one, "kfac"), {n: v / 2 for n, v in gate.items()})


def test_units_of_several_rows() -> None:
    """Two rows each: the cross terms inside a unit count."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    whole = trace(net, torch.randn(2, 3, dtype=torch.float64)).groups()[0]
    pairs = tuple(type(m)(m.tensor, m.dim, m.index, m.unit // 2, m.role) for m in whole.members)
    target = GroupTarget("pairs", "head", 2, pairs)
    x = torch.randn(5, 3, dtype=torch.float64)
    case = Case(net, Graph({"pairs": target}), [(x, torch.tensor([0, 1, 1, 0, 1]))], cross_entropy)
    a, s, w = factors(case, "0.weight")
    fisher = torch.kron(s, a)
    flat = w.reshape(-1)
    found = values(case, "kfac")["pairs"]
    inverse = values(case, {"name": "kfac", "compensate": "others", "damping": 1.0})["pairs"]
    damped = torch.kron(s + s.diagonal().mean() * torch.eye(4).double(), a)
    inverted = torch.linalg.inv(damped)
    for u in range(2):
        rows = slice(u * 8, u * 8 + 8)
        exact = 0.5 * flat[rows] @ fisher[rows, rows] @ flat[rows]
        assert found[u].item() == pytest.approx(exact.item(), rel=1e-5)
        exact = 0.5 * flat[rows] @ torch.linalg.inv(inverted[rows, rows]) @ flat[rows]
        assert inverse[u].item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1), groups=2, padding=(2, 1)),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(4, 2, 2, stride=2),
        nn.Linear(7, 3),
    ],
)
def test_patches_are_what_a_layer_reads(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer.double()
    sizes = () if isinstance(layer, nn.Linear) else (7,) * len(layer.kernel_size)
    x = torch.randn((3, *sizes, 7) if not sizes else (3, 4, *sizes), dtype=torch.float64)
    groups = getattr(layer, "groups", 1)
    for room in (1, 2**24):  # one sample at a time, or all
        monkeypatch.setattr("secateurs.statistics.kronecker.PATCH_ELEMENTS", room)
        read = torch.cat(list(patches(layer, x)), 1)  # (groups, positions, columns)
        w = layer.weight.detach().reshape(groups, len(layer.weight) // groups, -1)
        y = (read @ w.mT).movedim(0, 1).flatten(1)
        y = y if layer.bias is None else y + layer.bias.detach()
        out = layer(x).detach()
        rows = out if not sizes else out.flatten(2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(y, rows)
        torch.testing.assert_close(_input_squares(layer, x), read.square().sum(1))


def test_what_has_no_factors_says_so() -> None:
    case = CASES["lstm"]()
    with pytest.raises(ConfigError, match="no Kronecker factors for weight_ih_l0 of LSTM lstm"):
        values(case, "kfac")
    net = CASES["conv"]()
    with pytest.raises(ConfigError, match="units are rows of their layers"):
        values(net, {"name": "kfac", "members": "consumers"})


# -- blocks --------------------------------------------------------------------------------------


def dense_blocks(case: Case, name: str, block: int, damping: float) -> Tensor:
    """The damped Fisher of one parameter, zero outside of its blocks."""
    dense = Dense(case)
    sizes = [p.numel() for p in dense.params.values()]
    at = list(dense.params).index(name)
    g = dense.per_sample()[:, sum(sizes[:at]) : sum(sizes[: at + 1])]
    fisher = g.T @ g / len(g)
    fisher += damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
    columns = dense.params[name].shape[1:].numel()
    i = torch.arange(len(fisher))
    home = i // columns * 1000 + i % columns // block
    return torch.where(home[:, None] == home[None], fisher, 0)


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize(("name", "tensor"), [("mlp", "2.weight"), ("conv", "0.weight"),
                                              ("lstm", "lstm.weight_ih_l0")])  # fmt: skip
def test_obs_is_the_dense_inverse(name: str, tensor: str, block: int) -> None:
    case = CASES[name]()
    asked = {"name": "obs", "block": block, "damping": 0.1}
    found = values(case, asked, granularity="weight")[tensor]
    fisher = dense_blocks(case, tensor, block, 0.1)
    w = case.model.get_parameter(tensor).detach().reshape(-1)
    exact = w.square() / (2 * torch.linalg.inv(fisher).diagonal())
    assert near({"w": found}, {"w": exact})
    if block == 1:  # nothing can answer: the damped diagonal
        assert near({"w": found}, {"w": 0.5 * w.square() * fisher.diagonal()})
    wrong = w.square() / torch.linalg.inv(fisher).diagonal()
    assert not near({"w": found}, {"w": wrong})


def test_the_recursion_of_woodbury_gives_the_same() -> None:
    case, name = mlp(), "2.weight"
    dense = Dense(case)
    sizes = [p.numel() for p in dense.params.values()]
    at = list(dense.params).index(name)
    every = dense.per_sample()[:, sum(sizes[:at]) : sum(sizes[: at + 1])]
    w = case.model.get_parameter(name).detach()
    level = 0.01 * every.square().mean()
    lines = []
    for row in every.reshape(len(every), *w.shape).unbind(1):  # one block for each row
        inverse = torch.eye(row.shape[1], dtype=torch.float64) / level
        for g in row:
            pull = inverse @ g
            inverse = inverse - torch.outer(pull, pull) / (len(every) + g @ pull)
        lines.append(inverse.diagonal())
    exact = w.square() / (2 * torch.stack(lines))
    assert near({"w": values(case, "obs", granularity="weight")[name]}, {"w": exact.reshape(-1)})


def test_obs_does_not_depend_on_the_cut() -> None:
    case = mlp()
    x, y = (torch.cat(t) for t in zip(*case.batches, strict=True))
    whole = values(
        Case(case.model, case.graph, [(x, y)], case.loss_fn), "obs", granularity="weight"
    )
    parts: list[Batch] = [(x[i : i + 1], y[i : i + 1]) for i in range(10)]
    single = Case(case.model, case.graph, parts, case.loss_fn)
    assert near(values(single, "obs", granularity="weight"), whole)
    by_batch = {"name": "obs", "gradients": "batch"}
    assert near(values(single, by_batch, granularity="weight"), whole)
    assert not near(values(case, by_batch, granularity="weight"), whole)


def masks_of(case: Case, name: str, share: float = 0.4) -> dict[str, Tensor]:
    p = case.model.get_parameter(name)
    g = torch.Generator().manual_seed(5)
    return {name: torch.rand(p.shape, generator=g) > share}


@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize(("name", "tensor"), [("mlp", "2.weight"), ("conv", "0.weight"),
                                              ("conv", "5.weight")])  # fmt: skip
def test_the_update_is_the_best_answer(name: str, tensor: str, block: int) -> None:
    case, damping = CASES[name](), 0.1
    before = {n: t.clone() for n, t in case.model.state_dict().items()}
    masks = masks_of(case, tensor)
    new = obs_update(case.model, masks, case.batches, case.loss_fn, block=block, damping=damping)
    assert list(new) == [tensor]
    assert (new[tensor][~masks[tensor]] == 0).all()
    assert all(torch.equal(t, before[n]) for n, t in case.model.state_dict().items())
    fisher = dense_blocks(case, tensor, block, damping)
    w, gone = before[tensor].reshape(-1), ~masks[tensor].reshape(-1)
    inverse = torch.linalg.inv(fisher)
    pull = torch.linalg.solve(inverse[gone][:, gone], w[gone])
    exact = w - inverse[:, gone] @ pull  # d = -F^-1 E_Q ([F^-1]_QQ)^-1 w_Q
    torch.testing.assert_close(new[tensor].reshape(-1), exact, rtol=1e-7, atol=1e-9)
    change = new[tensor].reshape(-1) - w
    raised, plain = change @ fisher @ change, (w * gone) @ fisher @ (w * gone)
    assert raised.item() == pytest.approx((w[gone] @ pull).item(), rel=1e-9)
    assert raised < plain
    wrong = exact + 0.01 * ~gone
    assert (wrong - w) @ fisher @ (wrong - w) > raised


def test_one_removed_weight_raises_the_model_by_its_score() -> None:
    case, name = mlp(), "2.weight"
    found = values(case, "obs", granularity="weight")[name]
    fisher = dense_blocks(case, name, 64, 0.01)
    w = case.model.get_parameter(name).detach()
    for q in range(0, 30, 7):
        mask = torch.ones(30, dtype=torch.bool)
        mask[q] = False
        new = obs_update(case.model, {name: mask.reshape(w.shape)}, case.batches, case.loss_fn)
        d = (new[name] - w).reshape(-1)
        assert (0.5 * d @ fisher @ d).item() == pytest.approx(found[q].item(), rel=1e-5)


def test_the_update_of_a_square_loss_is_its_minimum() -> None:
    """Linear regression with exact targets: the loss after the update is below that without."""
    net = nn.Linear(6, 2).double()
    x = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    noise = torch.randn(40, 2, dtype=torch.float64)
    batches: list[Batch] = [(x, net(x).detach() + noise)]
    loss = nn.functional.mse_loss
    masks = {"weight": torch.tensor([[True, False, True, True, False, True]] * 2)}
    new = obs_update(net, masks, batches, loss)
    start = {"weight": net.weight.detach() * masks["weight"], "bias": net.bias.detach()}
    with_update = loss(functional_call(net, {**start, **new}, (x,)), batches[0][1])
    without = loss(functional_call(net, start, (x,)), batches[0][1])
    assert with_update < 0.8 * without


def test_biases_buffers_and_plans() -> None:
    case = CASES["conv"]()
    from secateurs.allocation import allocate
    from secateurs.selection import select
    from secateurs.types import Budget

    graph = case.graph
    found = score(case.model, criterion="magnitude", graph=graph)
    plan = select(found, allocate(found, Budget(units=0.5)))
    case.model.train()
    case.model.get_parameter("0.bias").requires_grad_(False)
    new = obs_update(case.model, plan, case.batches, case.loss_fn)
    assert not case.model.get_parameter("0.bias").requires_grad
    assert case.model.training
    assert new.keys() == {n for n, m in plan.masks.items() if not m.all()}
    assert all(bool((new[n][~plan.masks[n]] == 0).all()) for n in new)
    state = case.model.state_dict()
    kept = plan.masks["0.weight"]
    assert torch.equal(new["0.weight"][kept], state["0.weight"][kept])  # whole rows: no answer
    kept = plan.masks["5.weight"]
    assert not torch.equal(new["5.weight"][kept], state["5.weight"][kept])
    case.model.load_state_dict(new, strict=False)


def test_what_the_update_refuses() -> None:
    case = mlp()
    good = masks_of(case, "2.weight")
    for masks, options, message in (
        ({"2.weigth": good["2.weight"]}, {}, "Did you mean '2.weight'"),
        ({"2.weight": good["2.weight"][:2]}, {}, r"bool of shape \(5, 6\)"),
        ({"2.weight": good["2.weight"].float()}, {}, "must be bool"),
        (good, {"block": 0}, "block must be at least 1"),
        (good, {"damping": 0.0}, "damping above 0"),
        (good, {"gradients": "epoch"}, "unknown gradients"),
    ):
        with pytest.raises(ConfigError, match=message):
            obs_update(case.model, masks, case.batches, case.loss_fn, **options)
    assert obs_update(case.model, {}, case.batches, case.loss_fn) == {}


def test_a_block_is_solved_by_hand() -> None:
    """F = [[2, 1], [1, 1]]: removing the second adds 1/2 of it to the first."""
    f = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    w, keep = torch.tensor([[3.0, 5.0]]), torch.tensor([[True, False]])
    assert solve_blocks(f, w, keep).tolist() == [[5.5, 0.0]]
    assert solve_blocks(f, w, ~keep).tolist() == [[0.0, 8.0]]
    assert solve_blocks(f, w, torch.tensor([[False, False]])).tolist() == [[0.0, 0.0]]


def test_blocks_that_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateurs.statistics.blocks.MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="use a smaller block than 64"):
        values(mlp(), "obs", granularity="weight")


# -- real models ---------------------------------------------------------------------------------

ALL = ["fisher_batch", "obd", "taylor_second", "gauss_newton", "grasp", "grasp_abs"]


class Encoder(nn.Module):
    """A transformer layer between an embedding and a head, called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.layer(self.embed(tokens)).mean(1))}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


def real(name: str) -> Case:
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 1])
    if name == "encoder":
        net: nn.Module = Encoder()
        x: Any = {"tokens": torch.randint(11, (4, 6))}
        return Case(net.eval(), trace(net, x), [(x, y)], lambda o, t: cross_entropy(o["logits"], t))
    if name == "recurrent":
        net, x = Recurrent(), torch.randn(4, 6, 4)
    else:
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 3),
        )  # fmt: skip
        x = torch.randn(4, 3, 8, 8)
    return Case(net.eval(), trace(net, x), [(x, y)], cross_entropy)


@pytest.mark.parametrize("name", ["cnn", "encoder", "recurrent"])
def test_traced_models(name: str) -> None:
    """In float32, with the kernels that people have: as in float64, and near the exact ablation."""
    case = real(name)
    with warnings.catch_warnings():
        found = score(case.model, case.batches, case.loss_fn, criterion=ALL, graph=case.graph)
        wide = real(name)
        wide.model.double()
        inputs = wide.batches[0][0]
        doubled = inputs if isinstance(inputs, dict) else inputs.double()
        again = score(
            wide.model, [(doubled, wide.batches[0][1])], wide.loss_fn, criterion=ALL,
            graph=wide.graph,
        )  # fmt: skip
    for label in ALL:
        assert found[label].values.keys() == again[label].values.keys()
        for target, v in again[label].values.items():
            scale = float(v.abs().max())
            torch.testing.assert_close(
                found[label].values[target], v, rtol=1e-2, atol=2e-3 * scale + 1e-9
            )


@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_second_order_predicts_the_exact_ablation(name: str) -> None:
    case = real(name)
    options: Any = {"graph": case.graph}
    exact = score(case.model, case.batches, case.loss_fn, criterion="finite_difference", **options)
    newton = {"name": "gauss_newton", "probes": 20}
    found = score(case.model, case.batches, case.loss_fn, criterion=newton, **options)
    a, b = (torch.cat(list(s.values.values())).numpy() for s in (exact, found))
    assert np.corrcoef(a, b)[0, 1] > 0.9


def test_kfac_of_a_traced_model() -> None:
    """Inside an attention layer the projection is not called: the reason is given."""
    case = real("encoder")
    found = score(case.model, case.batches, case.loss_fn, criterion="kfac", graph=case.graph)
    assert any("linear1" in n for n in found.values)
    assert found.not_scored
    assert all(reason for reason in found.not_scored.values())


def test_what_is_not_finite_is_named() -> None:
    case = mlp()
    (x, y), *rest = case.batches
    bad = Case(case.model, case.graph, [(x, y), *rest], lambda o, t: cross_entropy(o, t) + (
        0 * (o - o.detach()).square().sum().sqrt()))  # fmt: skip
    for name in ("obd", "grasp", "gauss_newton", "kfac"):
        with pytest.raises(ScoringError, match=r"batch 0.* not finite"):
            values(bad, name)
    with pytest.raises(ScoringError, match=r"batch 0.* not finite"):
        values(bad, "obs", granularity="weight")
