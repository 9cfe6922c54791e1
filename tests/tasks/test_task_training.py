"""Dense training is deterministic and good enough; the cache is exact and survives damage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from secateurs.errors import ConfigError, ScoringError
from secateurs.finetuning import EpochRow
from secateurs.tasks import Task, TrainRecipe, dense_checkpoint, get_task, train_dense
from secateurs.tasks.data import Splits, read_cancer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def short(name: str = "cancer-mlp", **changes: object) -> Task:
    """The task with a recipe of two epochs."""
    recipe = replace(get_task(name).train_recipe, epochs=2, **changes)  # type: ignore[arg-type]
    return replace(get_task(name), train_recipe=recipe)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether all parameters and buffers are bit-identical."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- training


@pytest.mark.parametrize(
    ("name", "main", "least"), [("digits-mlp", "accuracy", 0.93), ("cancer-mlp", "auc", 0.97)]
)
def test_the_recipe_reaches_a_sensible_quality(name: str, main: str, least: float) -> None:
    task = get_task(name)
    data = task.load(0)
    torch.manual_seed(0)
    assert task.metric(task.build(), data.validation)["accuracy"] < 0.9
    model = train_dense(task, data, 0)
    quality = task.metric(model, data.validation)
    assert next(iter(quality)) == main
    assert quality[main] > least
    assert not model.training


@pytest.mark.parametrize("name", ["cancer-mlp", "digits-cnn"])
def test_training_follows_the_seed_and_leaves_the_random_state(name: str) -> None:
    task = short(name)
    data = task.load(0)
    state = torch.get_rng_state()
    first, again, other = (train_dense(task, data, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert same(first, again)
    assert not same(first, other)


def test_progress_is_called_after_each_epoch() -> None:
    task, rows = short(), list[EpochRow]()
    train_dense(task, task.load(0), 0, progress=rows.append)
    assert [row.epoch for row in rows] == [1, 2]
    assert rows[1].train_loss < rows[0].train_loss


def test_one_full_batch_step_of_sgd_is_the_textbook_update() -> None:
    recipe = TrainRecipe(1, 0.1, batch_size=341, optimizer="sgd", lr_schedule="constant")
    task = replace(get_task("cancer-mlp"), train_recipe=recipe, build=lambda: nn.Linear(30, 2))
    data = task.load(0)
    model = train_dense(task, data, 5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = nn.Linear(30, 2)
    (inputs, targets), *_ = data.train
    loss = nn.functional.cross_entropy(expected(inputs), targets)
    for got, p in zip(model.parameters(), expected.parameters(), strict=True):
        (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
        torch.testing.assert_close(got, p - 0.1 * gradient)


def test_bad_recipes_are_refused() -> None:
    bad: list[tuple[dict[str, object], str]] = [
        ({"lr": -1.0}, "lr must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"optimizer": "adamm"}, "Did you mean 'adam"),
        ({"lr_schedule": "cosin"}, "Did you mean 'cosine'"),
    ]
    for changes, message in bad:
        with pytest.raises(ConfigError, match=message):
            short("cancer-mlp", **changes)


def test_a_diverging_loss_is_an_error() -> None:
    task = short(optimizer="sgd", lr=1e20)
    with pytest.raises(ScoringError, match="epoch 1"):
        train_dense(task, task.load(0), 0)


# --- cache


def test_the_second_call_restores_identical_weights(cache: Path) -> None:
    task, rows = short("digits-cnn"), list[EpochRow]()
    model, data, from_cache = dense_checkpoint(task, 0, progress=rows.append)
    assert not from_cache
    assert len(rows) == 2
    state = torch.get_rng_state()
    again, _, from_cache = dense_checkpoint(task, 0, progress=rows.append)
    assert from_cache
    assert len(rows) == 2
    assert torch.equal(state, torch.get_rng_state())
    assert same(model, again)
    assert not again.training
    assert data.sizes["train"] == 1078
    (file,) = cache.iterdir()
    assert file.name.startswith("digits-cnn-0-")
    assert file.suffix == ".safetensors"


def _half(seed: int, n_train: int | None) -> Splits:
    whole = read_cancer(seed, n_train)
    return replace(whole, train=(whole.train[0][::2], whole.train[1][::2]))


def test_another_seed_recipe_network_or_data_is_another_file(cache: Path) -> None:
    for task, seed in [(short(), 0), (short(), 1), (short(lr=0.5), 0)]:
        assert not dense_checkpoint(task, seed)[2]
    wider = replace(short(), build=lambda: nn.Linear(30, 2))
    assert not dense_checkpoint(wider, 0)[2]
    halved = replace(short(), read=_half)
    assert not dense_checkpoint(halved, 0)[2]
    assert len(list(cache.iterdir())) == 5


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [_truncated, _flipped, _empty])
def test_a_damaged_file_is_reported_and_trained_again(cache: Path, damage: object) -> None:
    assert callable(damage)
    task = short()
    model = dense_checkpoint(task, 0)[0]
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=r"cache file .* training cancer-mlp again"):
        again, _, from_cache = dense_checkpoint(task, 0)
    assert not from_cache
    assert same(model, again)
    assert dense_checkpoint(task, 0)[2]
    assert list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_reported(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not cached"):
        model, _, from_cache = dense_checkpoint(short(), 0)
    assert not from_cache
    assert isinstance(model, nn.Module)


def test_a_failed_write_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dense_checkpoint(short(), 0)
    assert "disk full" in str(caught[0].message)
    assert list(cache.iterdir()) == []
