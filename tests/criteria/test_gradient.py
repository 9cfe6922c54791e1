"""Gradient criteria against plain loops: the order of the reductions, and windows of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.criteria import CRITERIA, get_criterion
from secateurs.errors import ConfigError, ScoringError
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.statistics import Pass, Run, Setting, Sums, check_fits, make_job
from secateurs.statistics.units import members_of
from secateurs.types import GroupTarget, Scores
from tests.graphs import CASES, Case, build, linear, mlp

PER_CASE = pytest.mark.parametrize("name", CASES)
FIRST_ORDER = (
    "gradient", "taylor", "taylor_batch", "taylor_element", "taylor_abs", "snip", "directional",
    "smoothed", "path_integral", "movement", "gradient_window", "gradient_ema",
)  # fmt: skip
Grads = Mapping[str, Tensor]


def run(case: Case, criterion: Any, **options: Any) -> Mapping[str, Tensor]:
    found: Scores = score(
        case.model, case.batches, case.loss_fn, criterion=criterion, graph=case.graph, **options
    )
    return found.values


def gradients(case: Case, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss of these samples."""
    params = dict(case.model.eval().named_parameters())
    found = torch.autograd.grad(case.loss_fn(case.model(x), y), [*params.values()])
    return dict(zip(params, found, strict=True))


def groups_of(case: Case, which: str) -> Iterator[tuple[GroupTarget, str, Any, int]]:
    """(target, parameter, place, unit) of every position that counts."""
    params = dict(case.model.named_parameters())
    for target in case.graph.groups():
        for m in members_of(target, which, params):
            for position, unit in zip(m.index, m.unit, strict=True):
                place: Any = (*[slice(None)] * m.dim, int(position))
                yield target, m.tensor, place, int(unit)


def summed(case: Case, which: str, values: Grads) -> dict[str, Tensor]:
    """Sums over the members of each unit, element by element."""
    out = {t.name: torch.zeros(t.n_units, dtype=torch.float64) for t in case.graph.groups()}
    for target, name, place, unit in groups_of(case, which):
        out[target.name][unit] += values[name][place].sum()
    return out


def weights(case: Case) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in case.model.named_parameters()}


# -- by hand -----------------------------------------------------------------------------------


def two_units() -> Case:
    """y = 3 relu(2 x) + 5 relu(-1 x), L = y: x = 1 gives 6, x = -2 gives 10."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    for p, values in zip(net.parameters(), ([[2.0], [-1]], [1, 0], [[3, 5]], [0]), strict=True):
        p.data = torch.tensor(values, dtype=torch.float64)
    batch = (torch.tensor([[1.0], [-2.0]], dtype=torch.float64), torch.zeros(2))
    graph = build(net, [linear("0", 2, ["2"], "producers")], {})
    return Case(net, graph, [batch], lambda y, _: y.mean())


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # unit 0 is on for x = 1 only: dy/dw = 3, dy/db = 3, w = 2, b = 1: w dy/dw + b dy/db = 9
        # unit 1 is on for x = -2 only: dy/dw = 5 * -2 = -10, dy/db = 5, w = -1, b = 0: 10
        ("gradient", [3 / 2 + 3 / 2, 10 / 2 + 5 / 2]),
        ("taylor", [81 / 2, 100 / 2]),
        ("taylor_batch", [81 / 4, 100 / 4]),
        ("taylor_element", [(36 + 9) / 4, 100 / 4]),
        ("taylor_abs", [9 / 2, 10 / 2]),
        ("directional", [9 / 2, 10 / 2]),
        ("snip", [(6 + 3) / 2, 10 / 2]),
        # one step of the window, at the weights themselves
        ("movement", [-9 / 2, -10 / 2]),
        ("gradient_window", [3 / 2 + 3 / 2, 10 / 2 + 5 / 2]),
        ({"name": "gradient_ema", "of": "movement"}, [-9 / 2, -10 / 2]),
    ],
)
def test_by_hand(criterion: Any, expected: list[float]) -> None:
    torch.testing.assert_close(run(two_units(), criterion)["0:neuron"], torch.tensor(expected))


def test_no_two_criteria_give_the_same_numbers() -> None:
    case = CASES["residual"]()
    found = {name: run(case, name)["stem:neuron"] for name in FIRST_ORDER}
    for first in FIRST_ORDER:
        for second in FIRST_ORDER[: FIRST_ORDER.index(first)]:
            assert not torch.allclose(found[first], found[second], rtol=1e-2), (first, second)


# -- the order of the reductions ---------------------------------------------------------------


@PER_CASE
def test_abs_of_each_sample(name: str) -> None:
    case = CASES[name]()
    total: dict[str, Tensor] = {}
    n = 0
    for x, y in case.batches:
        for i in range(len(x)):
            grads = gradients(case, x[i : i + 1], y[i : i + 1])
            products = {k: w * grads[k] for k, w in weights(case).items()}
            for target, values in summed(case, "removal", products).items():
                total[target] = total.get(target, torch.zeros_like(values)) + values.abs()
            n += 1
    for target, values in run(case, "taylor_abs").items():
        torch.testing.assert_close(values.double(), total[target] / n, rtol=1e-5, atol=1e-9)


@PER_CASE
def test_abs_of_each_weight(name: str) -> None:
    case = CASES[name]()
    x, y = (torch.cat(t) for t in zip(*case.batches, strict=True))
    grads = gradients(case, x, y)
    expected = summed(
        case, "producers", {k: (w * grads[k]).abs() for k, w in weights(case).items()}
    )
    for target, values in run(case, "snip").items():
        torch.testing.assert_close(values.double(), expected[target], rtol=1e-5, atol=1e-9)


def test_signs_cancel_in_a_unit_but_not_in_snip() -> None:
    case = mlp()
    signed = run(case, {"name": "directional", "members": "producers"})
    for target, values in run(case, "snip").items():
        assert (values >= signed[target] - 1e-7).all()
        assert (values > signed[target] + 1e-4).any()


def test_single_weights_by_snip_are_those_of_the_direction() -> None:
    case = mlp()
    snip, slope = (run(case, c, granularity="weight") for c in ("snip", "directional"))
    for name, values in snip.items():
        torch.testing.assert_close(values, slope[name])


# -- a weight without gradient -------------------------------------------------------------------


def blind() -> Case:
    """The second input is always zero: its weights cannot matter."""
    case = mlp()
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    return replace(case, batches=[(x * keep, y) for x, y in case.batches])


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_weight_without_gradient_scores_zero(name: str) -> None:
    options = {"epochs": 2} if "epochs" in CRITERIA[name].options else {}
    values = run(blind(), {"name": name, **options}, granularity="weight")["0.weight"]
    assert values.view(6, 4)[:, 1].tolist() == [0.0] * 6
    assert (values.view(6, 4)[:, 0] != 0).all()


def test_magnitude_does_not_see_it() -> None:
    values = run(blind(), "magnitude", granularity="weight")["0.weight"]
    assert (values.view(6, 4)[:, 1] > 0).all()


# -- windows of training ---------------------------------------------------------------------------


def exact(case: Case, criterion: dict[str, Any], epochs: int) -> dict[str, Tensor]:
    """Scores in float64, as they are before they are stored."""
    c, targets = get_criterion({**criterion, "epochs": epochs}), case.graph.groups()
    params = check_fits(case.model, targets)
    alive = {t.name: torch.arange(t.n_units) for t in targets}
    for p in case.model.parameters():
        p.requires_grad_(False)
    setting = Setting(case.model.eval(), params, case.loss_fn, case.graph, alive)
    job = make_job(c, [*targets], case.model, params, "structured")
    whole = Pass(setting, [job], Run(0, case.batches[0]), Sums())
    assert whole.turns == epochs
    for turn in range(whole.turns):
        for number, batch in enumerate(case.batches):
            whole.batch(turn, Run(number, batch))
    assert whole.n_samples == sum(len(x) for x, _ in case.batches)
    return {t.name: whole.result(job, t) for t in job.targets}


Each = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def by_sgd(case: Case, epochs: int, lr: float, each: Each) -> dict[str, Tensor]:
    """A real copy, a real optimizer: fold each step into one value per weight."""
    model = copy.deepcopy(case.model).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    held = {n: torch.zeros_like(p).detach() for n, p in model.named_parameters()}
    for step, (x, y) in enumerate(case.batches * epochs):
        optimizer.zero_grad()
        case.loss_fn(model(x), y).backward()  # type: ignore[no-untyped-call]
        for n, p in model.named_parameters():
            assert p.grad is not None
            held[n] = each(step, held[n], p.detach(), p.grad)
        optimizer.step()
    return summed(case, "producers", held)


WINDOWS: list[tuple[dict[str, Any], Each, float]] = [
    ({"name": "movement"}, lambda t, e, w, g: e - w * g, 1.0),
    ({"name": "gradient_window"}, lambda t, e, w, g: e + g.abs(), 1 / 6),
    (
        {"name": "gradient_ema", "decay": 0.7},
        lambda t, e, w, g: 0.7 * e + 0.3 * g.abs(),
        1 / (1 - 0.7**6),
    ),
    (
        {"name": "gradient_ema", "decay": 0.7, "of": "movement"},
        lambda t, e, w, g: 0.7 * e - 0.3 * w * g,
        1 / (1 - 0.7**6),
    ),
]


@PER_CASE
@pytest.mark.parametrize(("criterion", "each", "factor"), WINDOWS, ids=range(len(WINDOWS)))
def test_a_window_is_plain_gradient_descent(
    name: str, criterion: dict[str, Any], each: Each, factor: float
) -> None:
    case = CASES[name]()
    expected = by_sgd(case, 2, 0.05, each)
    for target, values in exact(case, {**criterion, "lr": 0.05}, 2).items():
        torch.testing.assert_close(values, expected[target] * factor, rtol=1e-12, atol=1e-12)


def test_the_oracle_sees_another_learning_rate() -> None:
    case = mlp()
    expected = by_sgd(case, 2, 0.05, WINDOWS[0][1])["0:neuron"]
    other = exact(case, {"name": "movement", "lr": 0.04}, 2)["0:neuron"]
    assert not torch.allclose(other, expected, rtol=1e-3)


def test_a_step_of_size_zero_stays_at_the_weights() -> None:
    """lr=0 and full batches: the window is the gradient itself."""
    case = mlp()
    x, y = (torch.cat(t) for t in zip(*case.batches, strict=True))
    whole = replace(case, batches=[(x, y)])
    window = run(whole, {"name": "gradient_window", "lr": 0, "epochs": 3})
    for target, values in run(whole, "gradient").items():
        torch.testing.assert_close(window[target], values)


def test_weights_that_grow_in_size_score_above_zero() -> None:
    """Movement is the change of w^2 / 2 per learning rate, for small steps."""
    case, lr = mlp(), 1e-4
    moved = exact(case, {"name": "movement", "lr": lr}, 1)
    model = copy.deepcopy(case.model)
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y in case.batches:
        optimizer.zero_grad()
        case.loss_fn(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    grown = {
        n: (p.detach().square() - case.model.get_parameter(n).square()) / (2 * lr)
        for n, p in model.named_parameters()
    }
    for target, values in summed(case, "producers", grown).items():
        torch.testing.assert_close(moved[target], values, rtol=1e-2, atol=1e-3)


def test_an_interrupted_window_goes_on(tmp_path: Path) -> None:
    case = mlp()
    criteria: list[Any] = [
        {"name": "movement", "epochs": 2},
        {"name": "gradient_ema", "epochs": 2},
        "gradient_window",
    ]

    def stop(done: int, total: int | None) -> None:
        if done == 4:
            raise KeyboardInterrupt

    def every(**options: Any) -> dict[str, Scores]:
        return score(
            case.model, case.batches, case.loss_fn, criterion=criteria, graph=case.graph, **options
        )

    whole, file = every(), tmp_path / "partial.safetensors"
    with pytest.raises(KeyboardInterrupt):
        every(resume=file, progress=stop)
    assert file.exists()
    for label, scores in every(resume=file).items():
        for target, values in scores.values.items():
            assert torch.equal(values, whole[label].values[target])
        assert scores.n_samples == 10


def test_training_that_diverges_is_named() -> None:
    case = mlp()
    with pytest.raises(ScoringError, match="choose a smaller lr"):
        run(
            replace(case, loss_fn=lambda out, _: out.square().sum().square()),
            {"name": "movement", "lr": 10.0, "epochs": 50},
        )
    nan = replace(case, loss_fn=lambda out, _: (out * float("nan")).sum())
    with pytest.raises(ScoringError, match="batch 0: the loss is nan"):
        run(nan, "movement")
    with pytest.raises(ScoringError, match="does not depend on the weights"):
        run(replace(case, loss_fn=lambda out, _: out.detach().sum()), "movement")


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ({"name": "movement", "epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"name": "movement", "epochs": 0}, r"epochs must be in \[1, 1000\], got 0"),
        ({"name": "gradient_ema", "decay": 1.0}, r"decay must be in \[0, 0.99999\], got 1.0"),
        ({"name": "gradient_ema", "of": "taylor"}, "choices: gradient, movement"),
        ({"name": "movement", "average": "sample"}, "is for criteria that need grad or gate"),
    ],
)
def test_options_that_are_refused(criterion: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(mlp(), criterion)


class Shared(nn.Module):
    """A tied weight and one that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.head, self.idle = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.b(torch.relu(self.a(x)))))
        return out


def test_tied_and_idle_weights_in_a_window() -> None:
    torch.manual_seed(0)
    model = Shared().double()
    case = mlp()
    graph = trace(model, case.batches[0][0])
    found = score(
        model, case.batches, case.loss_fn, criterion="movement", graph=graph, granularity="weight"
    )
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    total = torch.zeros(4, 4, dtype=torch.float64)
    for x, y in case.batches:
        optimizer.zero_grad()
        case.loss_fn(trained(x), y).backward()  # type: ignore[no-untyped-call]
        assert trained.a.weight.grad is not None
        total -= trained.a.weight.detach() * trained.a.weight.grad
        optimizer.step()
    name = next(n for n in found.values if n in ("a.weight", "b.weight"))
    torch.testing.assert_close(found.values[name].double(), total.view(-1), rtol=1e-5, atol=1e-7)
    if "idle.weight" in found.values:
        assert found.values["idle.weight"].tolist() == [0.0] * 16


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.rnn(h)[0][:, -1])
        return out


def test_a_traced_model_in_train_mode() -> None:
    torch.manual_seed(0)
    model = Small()
    x, y = torch.randn(6, 1, 5, 5), torch.randint(3, (6,))
    graph, batches = trace(model, x), [(x[:4], y[:4]), (x[4:], y[4:])]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    whole = [c for c in FIRST_ORDER if get_criterion(c).average != "sample"]
    assert len(FIRST_ORDER) > len(whole) > 3
    every = score(
        model, batches, nn.functional.cross_entropy, criterion=whole, graph=graph, mode="train",
    )  # fmt: skip
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for name, scores in every.items():
        assert set(scores.values) == set(graph.units), name
        for values in scores.values.values():
            assert torch.isfinite(values).all()
            assert (values != 0).any()
    assert every["movement"].n_samples == 6
