"""Time in optimizer steps: accumulation, cycles of the learning rate, cuts in the middle."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.errors import ConfigError
from secateurs.finetuning import Clock, EpochRow, Finetune, clock_of, finetune
from secateurs.masks import check_masks
from secateurs.schedules import Schedule

Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def blobs(sizes: tuple[int, ...] = (8, 8, 8, 8, 4)) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for size in sizes:
        y = torch.randint(0, 3, (size,), generator=generator)
        pairs.append((torch.randn(size, 4, generator=generator) + 2 * F.one_hot(y, 4), y))
    return pairs


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[k], other[k]) for k in mine)


class Unsized:
    def __iter__(self) -> Any:
        return iter(blobs())


# --- accumulation --------------------------------------------------------------------------------


def test_accumulation_is_the_textbook_loop_bit_for_bit() -> None:
    """Groups of two of five batches: the last group of an epoch is one batch of four samples."""
    model, pairs = classifier(), blobs()
    twin = copy.deepcopy(model)
    config = Finetune(epochs=2, optimizer="sgd", lr=0.1, momentum=0.9, accumulate=2)
    result = finetune(model, pairs, F.cross_entropy, config)

    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for group in (pairs[:2], pairs[2:4], pairs[4:]):
            sgd.zero_grad()
            for x, y in group:
                torch.autograd.backward(F.cross_entropy(twin(x), y) * len(y))
            for p in twin.parameters():
                assert p.grad is not None
                p.grad /= sum(len(y) for _, y in group)
            sgd.step()
    assert same(model, twin)
    assert result.steps == 6
    assert len(result.history) == 2


def test_accumulating_equals_larger_batches() -> None:
    """Also where the batches of a group differ in size: the mean is over samples."""
    model, pairs = classifier().double(), blobs((8, 3, 5, 2, 4))
    pairs = [(x.double(), y) for x, y in pairs]
    twin = copy.deepcopy(model)
    large = [
        (torch.cat([x for x, _ in g]), torch.cat([y for _, y in g]))
        for g in (pairs[:2], pairs[2:4], pairs[4:])
    ]
    config = Finetune(epochs=3, optimizer="sgd", lr=0.1, clip_norm=0.3, lr_schedule="linear")
    finetune(twin, large, F.cross_entropy, config)
    finetune(model, pairs, F.cross_entropy, Finetune(**{**vars(config), "accumulate": 2}))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)


def test_accumulating_more_than_an_epoch_is_full_batch() -> None:
    model, pairs = classifier(), blobs()
    twin = copy.deepcopy(model)
    finetune(model, pairs, F.cross_entropy, Finetune(epochs=3, accumulate=99))
    finetune(twin, pairs, F.cross_entropy, Finetune(epochs=3, full_batch=True))
    assert same(model, twin)


@pytest.mark.parametrize(("accumulate", "n_epochs"), [(1, 2), (2, 3), (5, 7)])
def test_steps_count_optimizer_steps(accumulate: int, n_epochs: int) -> None:
    config = Finetune(steps=7, accumulate=accumulate)
    result = finetune(classifier(), blobs(), F.cross_entropy, config)
    assert result.steps == 7
    assert len(result.history) == n_epochs


# --- the clock -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "n_steps", "per_epoch"),
    [
        ({"epochs": 3}, 15, 5),
        ({}, 5, 5),
        ({"steps": 7}, 7, 5),
        ({"epochs": 3, "accumulate": 2}, 9, 3),
        ({"epochs": 3, "accumulate": 5}, 3, 1),
        ({"epochs": 3, "full_batch": True}, 3, 1),
        ({"epochs": 0}, 0, 5),
    ],
)
def test_the_clock_of_five_batches(options: dict[str, Any], n_steps: int, per_epoch: int) -> None:
    config = Finetune(**options)
    clock = clock_of(config, blobs())
    assert (clock.n_steps, clock.per_epoch) == (n_steps, per_epoch)
    assert finetune(classifier(), blobs(), F.cross_entropy, config).steps == n_steps


def test_the_clock_of_batches_without_a_length() -> None:
    assert clock_of(Finetune(epochs=2), Unsized()) == Clock(None, None)
    assert clock_of(Finetune(steps=4), Unsized()) == Clock(4, None)
    assert clock_of(Finetune(epochs=4, full_batch=True), Unsized()) == Clock(4, 1)
    with pytest.raises(ConfigError, match=r"every=.* needs the number of steps.*give steps="):
        clock_of(Finetune(epochs=2), Unsized(), needs="every=")


def lrs(config: Finetune, pairs: Any) -> list[float]:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, a, k: seen.append(opt.param_groups[0]["lr"]))
    finetune(model, pairs, F.cross_entropy, config, optimizer=optimizer)
    return seen


def test_a_cycle_starts_the_learning_rate_again() -> None:
    pairs = blobs((4, 4, 4, 4))
    half = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert lrs(Finetune(epochs=2, lr_schedule="cosine", cycles=2), pairs) == pytest.approx(half * 2)
    assert lrs(Finetune(epochs=2, lr_schedule="linear", cycles=4), pairs) == [1, 0.5] * 4
    plain = Finetune(steps=8, lr_schedule="cosine", cycles=1)
    assert lrs(plain, pairs) == lrs(Finetune(steps=8, lr_schedule="cosine"), pairs)


def test_cuts_at_restarts_meet_a_high_learning_rate() -> None:
    """Seven steps in three cycles do not divide: cuts fall on the first step of each cycle."""
    config = Finetune(steps=7, lr_schedule="linear", cycles=3)
    clock = clock_of(config, blobs())
    assert clock.n_steps is not None
    seen = lrs(config, blobs())
    cuts = Schedule("linear", 3, every="restart").cuts(clock.n_steps, cycles=clock.cycles)
    assert cuts == (0, 3, 5)
    assert [i for i in range(7) if i == 0 or seen[i] > seen[i - 1]] == list(cuts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be a whole number, at least 1, got 0"),
        ({"accumulate": 2.5}, "accumulate must be a whole number"),
        ({"accumulate": 2, "full_batch": True}, "leave accumulate away"),
        ({"cycles": 0}, "cycles must be a whole number"),
        ({"cycles": 3}, "cycles has no effect on lr_schedule='constant'"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Finetune(**options)


def test_more_cycles_than_steps() -> None:
    config = Finetune(steps=3, cycles=4, lr_schedule="cosine")
    with pytest.raises(ConfigError, match="has 3 optimizer steps, fewer than cycles"):
        finetune(classifier(), blobs(), F.cross_entropy, config)


# --- cuts in the middle --------------------------------------------------------------------------


def mask(n: int) -> dict[str, Tensor]:
    """The first n of the 24 weights of the first layer are gone."""
    return {"0.weight": (torch.arange(24) >= n).reshape(6, 4)}


def test_recut_is_asked_before_every_optimizer_step() -> None:
    asked: list[int] = []

    def recut(done: int) -> Mapping[str, Tensor] | None:
        asked.append(done)
        return mask(8 * (done // 3)) if done % 3 == 0 else None

    model = classifier()
    config = Finetune(epochs=3, accumulate=2)
    rows: list[EpochRow] = []
    zeros: list[int] = []
    weight = model[0].get_parameter("weight")

    def progress(row: EpochRow) -> None:
        rows.append(row)
        zeros.append(int((weight == 0).sum()))

    finetune(model, blobs(), F.cross_entropy, config, recut=recut, progress=progress)
    assert asked == list(range(9))
    assert zeros == [0, 8, 16]
    check_masks(model, mask(16))


def test_the_best_epoch_is_one_after_the_last_cut() -> None:
    """A better but larger network of an earlier epoch is not what was asked for."""
    metrics = iter([0.9, 0.5, 0.7, 0.6])
    model = classifier()

    def recut(done: int) -> Mapping[str, Tensor] | None:
        return mask(8) if done == 5 else None  # at the start of the second epoch

    config = Finetune(epochs=4, restore_best=True)
    result = finetune(
        model, blobs(), F.cross_entropy, config, evaluate=lambda _: next(metrics), recut=recut
    )
    assert (result.best_metric, result.best_epoch) == (0.7, 3)
    check_masks(model, mask(8))


def test_patience_and_recut() -> None:
    config = Finetune(epochs=4, patience=1)
    with pytest.raises(ConfigError, match="patience could stop before the last recut"):
        finetune(
            classifier(), blobs(), F.cross_entropy, config, evaluate=lambda _: 0.5,
            recut=lambda _: None,
        )  # fmt: skip
