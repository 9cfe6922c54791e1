"""Cuts inside a loop of the user's own: the same as those of the pipeline, and nothing silent."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from secateurs import prune, shrink
from secateurs.checkpoints import generator_states, random_state, set_random_state
from secateurs.during import Cuts, prune_during
from secateurs.errors import BudgetError, ConfigError
from secateurs.finetuning import Finetune
from secateurs.schedules import Schedule
from secateurs.types import Budget, Threshold

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 4, generator=GENERATOR)
BATCHES = [(x, (x.sum(1) > 0).long()) for x in torch.split(X, 8)]
GRADUAL = Schedule("cubic", steps=3, every="3 steps", begin="2 steps")


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12) -> None:
    model.train()
    for i in range(steps):
        inputs, targets = BATCHES[i % 4]
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("granularity", "criterion", "rescore"),
    [("structured", "taylor", True), ("weight", "magnitude", True), ("weight", "taylor", False)],
)
def test_the_cuts_are_those_of_the_pipeline(
    granularity: str, criterion: str, rescore: bool
) -> None:
    schedule = Schedule("cubic", steps=3, every="3 steps", begin="2 steps", rescore=rescore)
    budget = Budget(params=0.4)
    wanted = prune(
        mlp(), BATCHES, F.cross_entropy, example_inputs=X, budget=budget, criterion=criterion,
        granularity=granularity, schedule=schedule,
        finetune=Finetune(steps=12, optimizer="sgd", lr=0.1, momentum=0.9),
    )  # fmt: skip
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen: list[int] = []
    with prune_during(
        model, sgd, n_steps=12, budget=budget, criterion=criterion, granularity=granularity,
        schedule=schedule, batches=BATCHES, loss_fn=F.cross_entropy,
        told=lambda cuts: seen.append(cuts.steps),
    ) as cuts:  # fmt: skip
        train(model, sgd)
    assert seen == [2, 5, 8]
    assert cuts.plan is not None
    assert {n: m.tolist() for n, m in cuts.plan.masks.items()} == {
        n: m.tolist() for n, m in wanted.plan.masks.items()
    }
    for name, value in wanted.masked.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    small = shrink(model.eval(), cuts.plan, X)
    torch.testing.assert_close(small(X), model(X))


def test_an_interrupted_loop_goes_on_bit_for_bit() -> None:
    @contextmanager
    def pruning(model: nn.Module, adam: torch.optim.Optimizer) -> Iterator[Cuts]:
        with prune_during(
            model, adam, n_steps=12, budget=Budget(units=0.5), criterion="taylor",
            schedule=GRADUAL, batches=BATCHES, loss_fn=F.cross_entropy,
        ) as cuts:  # fmt: skip
            yield cuts

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    whole, adam = fresh()
    with pruning(whole, adam):
        train(whole, adam)

    first, adam = fresh()
    file = io.BytesIO()

    def interrupted() -> None:
        with pruning(first, adam) as cuts:
            train(first, adam, 4)
            assert cuts.due == [5, 8]
            state = {"model": first.state_dict(), "adam": adam.state_dict()}
            torch.save({**state, "cuts": cuts.state_dict()}, file)

    with pytest.warns(UserWarning, match="before 2 of 3 cuts"):
        interrupted()
    file.seek(0)
    held = torch.load(file, weights_only=True)
    second, adam = fresh()
    with pruning(second, adam) as cuts:
        second.load_state_dict(held["model"])
        adam.load_state_dict(held["adam"])
        cuts.load_state_dict(held["cuts"])
        train(second, adam, 8)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_loop_without_a_torch_optimizer_tells_of_its_steps() -> None:
    model = mlp()
    with prune_during(
        model, None, n_steps=4, budget=Budget(units=0.5), criterion="l2_norm", example_inputs=X,
        schedule=Schedule("linear", steps=2, every="2 steps"),
    ) as cuts:  # fmt: skip
        assert cuts.plan is not None
        removed = [cuts.plan.n_removed]
        for _ in range(4):
            cuts.step()
            removed.append(cuts.plan.n_removed)
    assert removed == [6, 6, 12, 12, 12]


def test_a_loop_that_is_too_short_is_told() -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"after 4 optimizer steps, before 2 of 3 cuts"), (
        prune_during(
            model, sgd, n_steps=12, budget=Budget(units=0.5), criterion="l2_norm",
            example_inputs=X, schedule=GRADUAL,
        )
    ):  # fmt: skip
        train(model, sgd, 4)


def test_accumulation_and_skipped_steps_do_not_count() -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with prune_during(
        model, sgd, n_steps=2, budget=Budget(units=0.5), criterion="l2_norm", example_inputs=X,
        schedule=Schedule("one_shot", 1, every="1 step", begin="1 step"),
    ) as cuts:  # fmt: skip
        seen = []
        for wrong in (float("inf"), 1.0, 1.0):
            for inputs, targets in BATCHES[:2]:
                loss = F.cross_entropy(model(inputs), targets) * wrong
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(sgd)
            scaler.update()
            sgd.zero_grad()
            seen.append((cuts.steps, cuts.plan is not None))
    assert seen == [(0, False), (1, True), (2, True)]


def test_a_threshold_that_would_remove_all_that_is_left_stops() -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-9)

    def shrinking() -> None:
        with prune_during(
            model, sgd, n_steps=3, threshold=Threshold("value", value=0.05), criterion="magnitude",
            granularity="weight", schedule=Schedule("linear", steps=2, every="1 step"),
            example_inputs=X,
        ) as cuts:  # fmt: skip
            assert cuts.plan is not None
            first = cuts.plan.n_removed
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.01)
            train(model, sgd, 2)
            assert cuts.plan.n_removed == first

    with pytest.warns(UserWarning, match="cut 2 and those after it are left out"):
        shrinking()
    with pytest.raises(BudgetError, match="removes nothing"), prune_during(
        mlp(), None, n_steps=3, threshold=Threshold("value", value=1e-9), criterion="magnitude",
        granularity="weight", schedule=Schedule("linear", 1, every="1 step"), example_inputs=X,
    ):  # fmt: skip
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps must be"),
        ({"schedule": Schedule("cubic", steps=3)}, 'every="100 steps"'),
        ({"schedule": Schedule("cubic", steps=3, every="9 steps")}, "nothing is left to heal"),
        ({"budget": Budget(metric_drop=0.1)}, "use prune"),
        ({"budget": "auto"}, "use prune"),
        ({"allocation": "sensitivity"}, "use prune"),
        ({"criterion": "taylr"}, "Did you mean"),
        ({"example_inputs": None}, "give example_inputs"),
        ({"criterion": "taylor"}, "needs batches and loss_fn"),
        ({"budget": None}, "exactly one of budget and threshold"),
    ],
)
def test_what_cannot_work_is_said_before_the_training(
    options: dict[str, object], message: str
) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    given: dict[str, object] = {
        "n_steps": 12, "budget": Budget(units=0.5), "criterion": "l2_norm", "example_inputs": X,
        **options,
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=message), prune_during(model, optimizer, **given):  # type: ignore[arg-type]
        pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(BudgetError), prune_during(
        model, optimizer, n_steps=12, budget=Budget(params=3), criterion="l2_norm",
        example_inputs=X,
    ):  # fmt: skip
        pass


def test_the_random_state_of_the_training_is_its_own() -> None:
    def drawn(pruned: bool) -> Tensor:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        if pruned:
            with prune_during(
                model, sgd, n_steps=3, budget=Budget(units=0.5), criterion="random",
                example_inputs=X, schedule=Schedule("linear", 1, every="1 step"),
            ):  # fmt: skip
                train(model, sgd, 3)
        return torch.rand(1)

    assert torch.equal(drawn(True), drawn(False))


def test_a_ranking_that_is_not_renewed_goes_on_after_an_interruption() -> None:
    once = Schedule("linear", steps=4, every="3 steps", rescore=False)

    @contextmanager
    def cutting(
        model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, object] | None = None
    ) -> Iterator[Cuts]:
        with prune_during(
            model,
            optimizer,
            n_steps=16,
            budget=Budget(units=0.25),
            criterion="l2_norm",
            schedule=once,
            example_inputs=X,
            state=state,
        ) as cuts:
            yield cuts

    whole, part = mlp(), mlp()
    adam = torch.optim.Adam(whole.parameters(), lr=0.05)
    with cutting(whole, adam) as cuts:
        train(whole, adam, 16)
    adam = torch.optim.Adam(part.parameters(), lr=0.05)
    saved = io.BytesIO()
    with pytest.raises(KeyboardInterrupt), cutting(part, adam) as begun:  # noqa: PT012
        train(part, adam, 8)
        torch.save(begun.state_dict(), saved)
        raise KeyboardInterrupt
    saved.seek(0)
    with cutting(part, adam, torch.load(saved, weights_only=True)) as resumed:
        train(part, adam, 8)
    assert cuts.plan is not None
    assert resumed.plan is not None
    for name, gone in cuts.plan.removed.items():
        assert torch.equal(gone, resumed.plan.removed[name]), name


def test_no_random_state_moves_where_shuffled_batches_are_read() -> None:
    loader = DataLoader(TensorDataset(X, (X.sum(1) > 0).long()), batch_size=8, shuffle=True)
    own = DataLoader(loader.dataset, batch_size=8, shuffle=True, generator=torch.Generator())
    for batches in (loader, own):
        before = random_state(batches)
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        set_random_state(before, batches)
        with prune_during(
            model, sgd, n_steps=4, budget=Budget(units=0.5), batches=batches,
            loss_fn=F.cross_entropy, schedule=Schedule("linear", steps=2, every="2 steps"),
        ):  # fmt: skip
            train(model, sgd, 4)
        assert torch.equal(torch.get_rng_state(), before["torch"])
        for now, held in zip(generator_states(batches), before["generators"], strict=True):
            assert (now is None) == (held is None)
            assert now is None or held is None or torch.equal(now, held)


def test_a_void_step_of_a_fused_optimizer_does_not_count() -> None:
    model = mlp()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with prune_during(
        model, adam, n_steps=4, budget=Budget(units=0.5), criterion="l2_norm", example_inputs=X,
        schedule=Schedule("linear", steps=1, every="1 steps"),
    ) as cuts:  # fmt: skip
        for i in range(5):
            adam.zero_grad()
            loss = model(X).square().mean() * (math.inf if i == 2 else 1.0)
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(adam)
            scaler.update()
        assert cuts.steps == 4


def test_a_wrapped_model_is_traced_by_its_plain_names() -> None:
    model = mlp()
    wrapped = nn.DataParallel(model)  # names as under DistributedDataParallel
    sgd = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with prune_during(
        wrapped, sgd, n_steps=4, budget=Budget(units=0.5), criterion="l2_norm", example_inputs=X,
        schedule=Schedule("linear", steps=1, every="2 steps"),
    ) as cuts:  # fmt: skip
        train(wrapped, sgd, 4)
    assert cuts.plan is not None
    assert {name: len(gone) for name, gone in cuts.plan.removed.items()} == {
        "0:neuron": 8,
        "2:neuron": 4,
    }
    assert shrink(model, cuts.plan, X)(X).shape == (32, 2)


def test_a_state_that_does_not_fit_is_refused() -> None:
    def begin(cuts: int, state: dict[str, object] | None = None) -> Cuts:
        schedule = Schedule("linear", steps=cuts, every="2 steps")
        with pytest.raises(KeyboardInterrupt), prune_during(
            mlp(), None, n_steps=12, budget=Budget(units=0.5), criterion="l2_norm",
            schedule=schedule, example_inputs=X, state=state,
        ) as begun:  # fmt: skip
            raise KeyboardInterrupt
        return begun

    with pytest.raises(ConfigError, match="of a schedule with 2 cuts, this one has 3"):
        begin(3, begin(2).state_dict())
    with pytest.raises(ConfigError, match="due, plan are not in it"):
        begin(2, {"steps": 3})
