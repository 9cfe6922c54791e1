"""Watching the user's own training, against records made by hand in the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import secateurs as sc
from secateurs.errors import ConfigError, ScoringError
from secateurs.masks import hold_masks
from secateurs.scoring import score
from secateurs.types import Graph, Plan, Scores, WeightTarget
from secateurs.watching import watch
from tests.graphs import CASES, Case, mlp

CRITERIA: list[Any] = [
    "movement",
    "gradient_window",
    {"name": "gradient_ema", "decay": 0.5},
    {"name": "gradient_ema", "of": "movement", "decay": 0.5},
]
Seen = list[dict[str, tuple[Tensor, Tensor]]]


def backward(case: Case, model: nn.Module, i: int) -> None:
    x, y = case.batches[i]
    case.loss_fn(model(x), y).backward()  # type: ignore[no-untyped-call]


def train(
    case: Case, optimizer: Optimizer, steps: int, touch: Callable[[], None] | None = None
) -> Seen:
    """A training loop that writes down weights and gradients before each step."""
    seen: Seen = []
    for step in range(steps):
        optimizer.zero_grad()
        backward(case, case.model, step % 3)
        if touch is not None:
            touch()
        now = {}
        for name, p in case.model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            now[name] = (p.detach().clone(), grad.clone())
        seen.append(now)
        optimizer.step()
    return seen


def expected(seen: Seen, name: str) -> list[Tensor]:
    """The four criteria of one parameter from the written record."""
    moved = -sum((w * g for w, g in (now[name] for now in seen)), torch.zeros(()))
    sizes = [now[name][1].abs() for now in seen]
    moves = [-now[name][0] * now[name][1] for now in seen]
    shares = torch.tensor([0.5 ** (len(seen) - t) for t in range(len(seen))]) / (
        1 - 0.5 ** len(seen)
    )
    return [
        moved,
        torch.stack(sizes).mean(0),
        sum((a * x for a, x in zip(shares, sizes, strict=True)), torch.zeros(())),
        sum((a * x for a, x in zip(shares, moves, strict=True)), torch.zeros(())),
    ]


def fits(scores: dict[str, Scores], seen: Seen) -> bool:
    """Whether all weight scores are those of the record."""
    return all(
        torch.allclose(values, truth.reshape(-1).float(), rtol=1e-5, atol=1e-7)
        for i, one in enumerate(scores.values())
        for name, values in one.values.items()
        for truth in [expected(seen, name)[i]]
    )


def watching(case: Case, optimizer: Optimizer) -> Any:
    return watch(case.model, optimizer, graph=case.graph, criterion=CRITERIA, granularity="weight")


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda m: Adam(m.parameters(), lr=0.01),
    "groups": lambda m: SGD([{"params": [p], "lr": 0.1 / (i + 1)}
                             for i, p in enumerate(m.parameters())]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_record_of_any_optimizer(name: str) -> None:
    case = mlp()
    optimizer = OPTIMIZERS[name](case.model)
    with watching(case, optimizer) as held:
        seen = train(case, optimizer, 5)
    assert held.steps == 5
    assert fits(held.scores(), seen)
    assert not fits(held.scores(), seen[:4])


def test_the_training_is_not_changed() -> None:
    case, other = mlp(), mlp()
    mine, theirs = (SGD(c.model.parameters(), lr=0.1) for c in (case, other))
    with watch(case.model, mine, graph=case.graph) as held:
        train(case, mine, 4)
    train(other, theirs, 4)
    for p, q in zip(case.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert isinstance(held.scores(), Scores)
    assert held.scores().values.keys() == case.graph.units.keys()


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "residual"])
def test_plain_gradient_descent_is_what_score_does(name: str) -> None:
    case = CASES[name]()
    wanted = {"name": "movement", "lr": 0.05, "epochs": 2}
    alone = score(case.model, case.batches, case.loss_fn, criterion=wanted, graph=case.graph)
    case.model.eval()
    optimizer = SGD(case.model.parameters(), lr=0.05)
    with watch(case.model, optimizer, graph=case.graph, criterion="movement") as held:
        train(case, optimizer, 6)
    for target, values in held.scores().values.items():
        torch.testing.assert_close(values, alone.values[target])


def test_scores_at_any_time_and_after() -> None:
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with watching(case, optimizer) as held:
        with pytest.raises(ConfigError, match="no optimizer step has been seen"):
            held.scores()
        seen = train(case, optimizer, 2)
        assert fits(held.scores(), seen)
        seen += train(case, optimizer, 2)
        assert fits(held.scores(), seen)
    train(case, optimizer, 3)
    assert held.steps == 4
    assert fits(held.scores(), seen)


def test_accumulated_gradients_count_once() -> None:
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with watching(case, optimizer) as held:
        seen = train(case, optimizer, 3, lambda: backward(case, case.model, 1))
    assert held.steps == 3
    assert fits(held.scores(), seen)


def test_what_the_step_uses_is_what_counts() -> None:
    """Clipped gradients, not raw ones."""
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)

    def clip() -> None:
        nn.utils.clip_grad_norm_(case.model.parameters(), 0.01)

    with watching(case, optimizer) as held:
        seen = train(case, optimizer, 3, clip)
    assert fits(held.scores(), seen)


def test_closures() -> None:
    """Gradients are made inside the step: what its first call leaves counts."""
    for name, keyword in (("sgd", False), ("sgd", True), ("lbfgs", False)):
        case = mlp()
        calls: list[int] = []
        make: Any = SGD if name == "sgd" else torch.optim.LBFGS
        optimizer = make(case.model.parameters(), lr=0.1)
        first: Seen = []

        def closure(
            case: Case = case, optimizer: Optimizer = optimizer, calls: list[int] = calls
        ) -> float:
            optimizer.zero_grad()
            x, y = case.batches[0]
            loss = case.loss_fn(case.model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            calls.append(1)
            return float(loss.detach())

        with watching(case, optimizer) as held:
            for _ in range(2):
                before = copy.deepcopy(case.model)
                backward(case, before, 0)
                first.append(
                    {n: (p.detach(), p.grad) for n, p in before.named_parameters()
                     if p.grad is not None}
                )  # fmt: skip
                if keyword:
                    optimizer.step(closure=closure)
                else:
                    optimizer.step(closure)
        assert held.steps == 2
        assert len(calls) == 2 if name == "sgd" else len(calls) > 2
        assert fits(held.scores(), first)


def test_frozen_parts_are_named() -> None:
    case = mlp()
    first, *_ = case.model.children()
    first.requires_grad_(False)
    trained = [p for p in case.model.parameters() if p.requires_grad]
    optimizer = SGD(trained, lr=0.1)
    with watch(case.model, optimizer, graph=case.graph, granularity="weight") as held:
        train(case, optimizer, 2)
    scores = held.scores()
    assert scores.not_scored == {"0.weight": "the optimizer trains none of its weights"}
    assert scores.values.keys() == {"2.weight", "4.weight"}
    both = watch(
        case.model, optimizer, graph=case.graph,
        criterion={"name": "movement", "members": "all"},
    )  # fmt: skip
    with both as held:
        train(case, optimizer, 1)
    notes = held.scores().notes
    assert notes[0] == "1 optimizer steps"
    assert "0.weight: not trained by this optimizer, counted as 0" in notes


def test_a_gradient_that_comes_late_or_never() -> None:
    """A step without a gradient counts as zero, and ages the moving average."""
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    weight = case.model.get_parameter("0.weight")
    steps: list[int] = []

    def drop() -> None:
        steps.append(1)
        if len(steps) != 2:
            weight.grad = None

    with watching(case, optimizer) as held:
        seen = train(case, optimizer, 4, drop)
    assert fits(held.scores(), seen)

    def never() -> None:
        weight.grad = None

    with watching(case, optimizer) as held:
        seen = train(case, optimizer, 2, never)
    assert fits(held.scores(), seen)
    assert (
        "0.weight: no gradient arrives in any step, counted as 0" in held.scores()["movement"].notes
    )


def test_masked_weights_score_zero_and_minus_infinity() -> None:
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[2] = False
    with (
        hold_masks(case.model, optimizer, {"0.weight": mask}),
        watch(case.model, optimizer, graph=case.graph, granularity="weight") as held,
    ):
        train(case, optimizer, 3)
    assert held.scores().values["0.weight"].view(6, 4)[2].tolist() == [0.0] * 4
    plan = Plan({}, {"0.weight": mask}, {}, {"0.weight": (6, 4)})
    values = held.scores(plan).values["0.weight"].view(6, 4)
    assert (values[2] == float("-inf")).all()
    assert torch.isfinite(values[mask.any(1)]).all()
    with watch(case.model, optimizer, graph=case.graph) as units:
        train(case, optimizer, 1)
    gone = units.scores(Plan({}, {}, {"0:neuron": torch.tensor([1])}, {})).values["0:neuron"]
    assert (gone == float("-inf")).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler(fused: bool) -> None:
    """Gradients count in true size, and a step that the scaler leaves out does not."""
    case = mlp(torch.float32)
    optimizer = SGD(case.model.parameters(), lr=0.0, fused=fused)  # the scaler and fused
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with watching(case, optimizer) as held:
        seen = train(case, optimizer, 2)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            x, y = case.batches[2]
            loss: Any = scaler.scale(case.loss_fn(case.model(x), y) * factor)
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
    optimizer = SGD(case.model.parameters(), lr=0.0)
    seen += train(replace(case, batches=[case.batches[2]] * 3), optimizer, 2)
    assert held.steps == 4
    assert fits(held.scores(), seen)


def test_half_precision_is_summed_in_single() -> None:
    case = mlp(torch.bfloat16)
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with watching(case, optimizer) as held:
        seen = train(case, optimizer, 3)
    single = [{n: (w.float(), g.float()) for n, (w, g) in now.items()} for now in seen]
    assert fits(held.scores(), single)


def test_the_hook_is_gone_also_after_an_exception() -> None:
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)

    def stopped() -> None:
        with watching(case, optimizer):
            train(case, optimizer, 1)
            assert len(optimizer._optimizer_step_pre_hooks) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_gradient_that_is_not_finite_is_named() -> None:
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)

    def spoil() -> None:
        weight = case.model.get_parameter("2.weight")
        assert weight.grad is not None
        weight.grad[0, 0] = float("nan")

    with watching(case, optimizer):
        train(case, optimizer, 1)
        with pytest.raises(ScoringError, match=r"step 1: the gradient of 2.weight is not finite"):
            train(case, optimizer, 1, spoil)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("taylor", "not made of training steps; use score for it, or watch with one of: movement"),
        ("movment", "Did you mean 'movement'"),
        ({"name": "movement", "lr": 0.5}, "lr are for the copy that score trains"),
        ({"name": "movement", "epochs": 2, "lr": 0.5}, "epochs and lr are for the copy"),
        ([], "criteria must be named, each once"),
        (["movement", "movement"], "criteria must be named, each once"),
    ],
)
def test_requests_that_are_refused(criterion: Any, message: str) -> None:
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=message):
        watch(case.model, optimizer, graph=case.graph, criterion=criterion)


def test_an_optimizer_of_another_model_is_refused() -> None:
    case = mlp()
    optimizer = SGD(mlp().model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="trains none of the weights"):
        watch(case.model, optimizer, graph=case.graph)
    graph = Graph({"other": WeightTarget("other", (2, 2))})
    with pytest.raises(ConfigError, match="the graph does not belong to this model"):
        watch(case.model, optimizer, graph=graph, granularity="weight")


def test_scores_feed_the_rest_of_the_pipeline() -> None:
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with sc.watch(case.model, optimizer, graph=case.graph) as held:
        train(case, optimizer, 3)
    scores = held.scores()
    plan = sc.select(scores, sc.allocate(scores, sc.Budget(units=0.5)))
    assert sum(len(units) for units in plan.removed.values()) in (5, 6)
    assert replace(scores, criterion="x").criterion == "x"
