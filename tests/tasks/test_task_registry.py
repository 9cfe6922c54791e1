"""The registry, the data of every task, and the metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, DataError, ScoringError
from secateurs.tasks import TASKS, TrainRecipe, available, get_task, task
from secateurs.tasks.base import accuracy, accuracy_and_auc, auc_and_accuracy
from secateurs.tasks.data import SKLEARN, read_digits
from secateurs.tasks.text import MINILM


@dataclass(frozen=True)
class Expected:
    """What a task must be: one sample, classes, train/validation/test sizes, parameters."""

    sample: tuple[int, ...]
    n_classes: int
    sizes: tuple[int, int, int]
    n_params: int
    granularity: str


# Of the text Transformer's layer: four projections, two feed-forward ones, two norms.
LAYER = 4 * 65 * 64 + 65 * 256 + 257 * 64 + 2 * 128
DIGITS, FASHION, VOWELS = (1078, 360, 359), (55_000, 5_000, 10_000), (216, 54, 370)
# ResNet-20 is published with 269,722: 288 go with two input channels, 2,752 are 1x1 shortcuts.
EXPECTED = {
    "digits-mlp": Expected((1, 8, 8), 10, DIGITS, 65 * 128 + 129 * 64 + 65 * 10, "neuron"),
    "digits-cnn": Expected(
        (1, 8, 8), 10, DIGITS, 9 * (32 + 32 * 32 + 32 * 64) + 2 * 128 + 1025 * 10, "channel"
    ),
    "cancer-mlp": Expected((30,), 2, (341, 115, 113), 31 * 64 + 65 * 32 + 33 * 2, "neuron"),
    "fashion-lenet300": Expected((1, 28, 28), 10, FASHION, 266_610, "neuron"),
    "fashion-lenet5": Expected((1, 28, 28), 10, FASHION, 431_080, "channel"),
    "fashion-resnet20": Expected(
        (1, 28, 28), 10, (10_000, 2_000, 10_000), 269_722 - 288 + 2_752, "channel"
    ),
    "vowels-lstm": Expected((29, 12), 9, VOWELS, 4 * 64 * (12 + 64 + 2) + 65 * 9, "hidden"),
    "vowels-gru": Expected((29, 12), 9, VOWELS, 3 * 64 * (12 + 64 + 2) + 65 * 9, "hidden"),
    "spam-transformer": Expected(
        (128,),
        2,
        (3_333, 1_111, 1_111),
        (4096 + 128) * 64 + 2 * LAYER + 128 + 65 * 2,
        "structured",
    ),
    # The published 22,713,216 without the pooling layer.
    "spam-minilm": Expected(
        (64,), 2, (1_500, 500, 1_111), 22_713_216 - 385 * 384 + 385 * 2, "structured"
    ),
}
MISSING = {name: available(get_task(name)) for name in EXPECTED}


def named(names: list[str]) -> list[object]:
    """The names as parameters; one whose data is missing skips with the install command."""
    return [
        pytest.param(
            name, marks=pytest.mark.skipif(MISSING[name] is not None, reason=MISSING[name] or "")
        )
        for name in names
    ]


def samples(name: str, n: int) -> Tensor:
    """Random inputs of a task: numbers, or ids of tokens."""
    shape = (n, *EXPECTED[name].sample)
    return torch.randint(1, 4096, shape) if get_task(name).kind == "text" else torch.randn(shape)


def test_every_task_has_a_row() -> None:
    assert set(TASKS) == set(EXPECTED)
    assert all(TASKS[name].name == name for name in TASKS)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_network_fits_its_data_and_follows_the_seed(name: str) -> None:
    expected, chosen = EXPECTED[name], get_task(name)
    if name == "spam-minilm" and not MINILM.present():
        pytest.skip(f"its network needs {MINILM.needs}")
    torch.manual_seed(0)
    model = chosen.build()
    torch.manual_seed(0)
    again = chosen.build()
    assert sum(p.numel() for p in model.parameters()) == expected.n_params
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert model(samples(name, 3)).shape == (3, expected.n_classes)
    assert chosen.default_granularity == expected.granularity
    assert "install" in chosen.needs


@pytest.mark.parametrize("name", named(list(EXPECTED)))
def test_the_data_is_as_stated(name: str) -> None:
    expected, chosen = EXPECTED[name], get_task(name)
    data = chosen.load(0)
    assert tuple(data.sizes.values()) == expected.sizes
    for part in ("train", "validation", "test"):
        batches = getattr(data, part)
        assert sum(len(y) for _, y in batches) == data.sizes[part]
        for x, y in batches:
            assert x.shape == (len(y), *expected.sample)
            assert x.dtype == (torch.int64 if chosen.kind == "text" else torch.float32)
            assert y.dtype == torch.int64
        labels = torch.cat([y for _, y in batches])
        assert torch.unique(labels).tolist() == list(range(expected.n_classes))
    assert {len(y) for _, y in data.train[:-1]} == {chosen.train_recipe.batch_size}
    assert data.example_inputs.shape == (4, *expected.sample)
    calibration = torch.cat([x for x, _ in data.calibration])
    assert len(calibration) == min(512, data.sizes["train"])
    train = torch.cat([x for x, _ in data.train])
    assert torch.equal(calibration, train[: len(calibration)])
    assert torch.equal(data.example_inputs, train[:4])


@pytest.mark.parametrize(
    "name", named(["digits-mlp", "cancer-mlp", "vowels-gru", "spam-transformer"])
)
def test_load_follows_the_seed_and_leaves_the_random_state(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (get_task(name).load(seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    for part in ("train", "validation", "test", "calibration"):
        for (x, y), (x2, y2) in zip(getattr(first, part), getattr(again, part), strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
    assert not torch.equal(first.train[0][0], other.train[0][0])


@pytest.mark.parametrize("name", named(["fashion-resnet20"]))
def test_resnet_trains_on_a_fixed_subset_or_on_everything(name: str) -> None:
    chosen = get_task(name)
    a, b = chosen.load(0), chosen.load(1)
    images = [torch.cat([x for x, _ in d.train]).flatten(1).sum(1) for d in (a, b)]
    assert not torch.equal(*images)  # another order
    assert torch.allclose(images[0].sort()[0], images[1].sort()[0], atol=0.02)  # of the same images
    assert torch.equal(a.validation[0][0], b.validation[0][0])
    assert chosen.load(0, full_data=True).sizes == {
        "train": 55_000,
        "validation": 5_000,
        "test": 10_000,
    }


def test_an_unknown_task_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'digit-cnn'. Did you mean 'digits-cnn'"):
        get_task("digit-cnn")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="'digits-mlp' is registered already"):
        task(
            "digits-mlp",
            "again",
            kind="image",
            data=(SKLEARN, read_digits),
            recipe=TrainRecipe(epochs=1),
            granularity="neuron",
        )(lambda: nn.Linear(1, 1))


# --- metrics


def logits_batches(logits: list[list[float]], labels: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Two batches for `nn.Identity`: the inputs are the logits."""
    x, y = torch.tensor(logits), torch.tensor(labels)
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def test_accuracy_counts_samples_not_batches() -> None:
    model = nn.Identity().train()
    batches = logits_batches([[1, 0], [1, 0], [0, 1], [0, 1]], [0, 0, 0, 1])
    assert accuracy(model, batches) == {"accuracy": 0.75}
    assert model.training


def test_auc_is_the_share_of_ordered_pairs_with_ties_as_half() -> None:
    margins, labels = [0.1, 0.4, 0.4, 0.8, -0.3, 0.2], [0, 0, 1, 1, 0, 1]
    pairs = product(
        [m for m, y in zip(margins, labels, strict=True) if y],
        [m for m, y in zip(margins, labels, strict=True) if not y],
    )
    expected = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs]
    got = auc_and_accuracy(nn.Identity(), logits_batches([[0, m] for m in margins], labels))
    assert got["auc"] == pytest.approx(sum(expected) / 9)
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert next(iter(got)) == "auc"


def test_auc_needs_both_classes() -> None:
    with pytest.raises(DataError, match="both classes"):
        auc_and_accuracy(nn.Identity(), logits_batches([[0, 1]] * 4, [1] * 4))


def test_the_same_two_with_accuracy_first() -> None:
    batches = logits_batches([[0, m] for m in (0.1, -0.4, 0.4, 0.8)], [0, 0, 1, 1])
    got = accuracy_and_auc(nn.Identity(), batches)
    assert list(got.items()) == [("accuracy", 0.75), ("auc", 1.0)]


@pytest.mark.parametrize("metric", [accuracy, auc_and_accuracy, accuracy_and_auc])
def test_a_diverged_model_has_no_metric(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ScoringError, match="nan or inf"):
        metric(nn.Identity(), logits_batches([[0, math.nan]] * 4, [0, 1, 0, 1]))
