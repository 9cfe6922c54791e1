"""Folds are those of scikit-learn; samples come back whole, by their number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from secateurs.errors import DataError
from secateurs.searching.config import Folds
from secateurs.searching.splits import Fold, divide, gather

LABELS = np.array([0, 1] * 6 + [0] * 3)


def rows(folds: list[Fold]) -> list[tuple[list[int], list[int]]]:
    return [(f.train.tolist(), f.held.tolist()) for f in folds]


def expected(splitter: Any, *args: Any, **more: Any) -> list[tuple[list[int], list[int]]]:
    pairs = splitter.split(np.zeros(15), *args, **more)
    return [(train.tolist(), held.tolist()) for train, held in pairs]


def test_stratified_folds_are_those_of_scikit_learn() -> None:
    found = rows(divide(15, Folds("stratified", 3, seed=5), LABELS))
    assert found == expected(StratifiedKFold(3, shuffle=True, random_state=5), LABELS)
    assert found != rows(divide(15, Folds("stratified", 3, seed=6), LABELS))


def test_plain_folds_are_those_of_scikit_learn() -> None:
    found = rows(divide(15, Folds("kfold", 4, seed=5)))
    assert found == expected(KFold(4, shuffle=True, random_state=5))


def test_grouped_folds_are_those_of_scikit_learn_and_never_part_a_group() -> None:
    groups = [f"patient {i // 2}" for i in range(15)]
    folds = divide(15, Folds("grouped", 3), groups=groups)
    assert rows(folds) == expected(GroupKFold(3), groups=[i // 2 for i in range(15)])
    for fold in folds:
        assert not {groups[i] for i in fold.train} & {groups[i] for i in fold.held}


def test_a_bootstrap_draws_with_replacement_and_judges_on_what_was_not_drawn() -> None:
    folds = divide(50, Folds("bootstrap", 6, seed=2))
    assert len({tuple(f.train) for f in folds}) == 6
    for fold in folds:
        assert len(fold.train) == 50
        assert len(set(fold.train.tolist())) < 50
        assert sorted({*fold.train.tolist()} ^ {*range(50)}) == fold.held.tolist()
    assert rows(folds) == rows(divide(50, Folds("bootstrap", 6, seed=2)))
    assert rows(folds)[:3] == rows(divide(50, Folds("bootstrap", 3, seed=2)))


@pytest.mark.parametrize(
    ("n", "folds", "labels", "groups", "message"),
    [
        (3, Folds("kfold", 5), None, None, "3 samples cannot be divided into 5 folds"),
        (4, Folds("stratified", 2), None, None, "need one whole-numbered label"),
        (4, Folds("stratified", 2), np.array([0, 0, 0, 7]), None, "class 7 has 1"),
        (4, Folds("grouped", 2), None, None, "need the group of each sample"),
        (4, Folds("grouped", 2), None, "abc", "groups has 3 entries for 4 samples"),
        (4, Folds("grouped", 2), None, "aaaa", "1 groups cannot be divided into 2 folds"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_words(
    n: int, folds: Folds, labels: Any, groups: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        divide(n, folds, labels, groups)


def numbered(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n * 2.0).reshape(n, 2), torch.arange(n)


def test_samples_come_back_by_their_number() -> None:
    x, y = numbered(5)
    samples = gather([(x[:3], y[:3]), (x[3:], y[3:])], "training")
    assert (samples.n, samples.batch_size) == (5, 3)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]
    (first, second) = samples.batches(np.array([4, 0, 4, 1]))
    assert torch.equal(first[0], x[[4, 0, 4]])
    assert first[1].tolist() == [4, 0, 4]
    assert second[1].tolist() == [1]
    assert [len(b[1]) for b in samples.batches(np.arange(5), 2)] == [2, 2, 1]


def test_inputs_of_several_tensors_and_a_constant_are_kept_together() -> None:
    ids, targets = torch.arange(4).reshape(4, 1), torch.arange(4.0)
    batches = [({"ids": ids[i : i + 2], "scale": 2.0}, targets[i : i + 2]) for i in (0, 2)]
    samples = gather(batches, "training")
    assert samples.labels is None  # targets are no classes
    ((inputs, found),) = samples.batches(np.array([3, 1]), 8)
    assert (inputs["ids"].flatten().tolist(), inputs["scale"]) == ([3, 1], 2.0)
    assert found.tolist() == [3.0, 1.0]


def test_a_loader_that_shuffles_is_read_in_the_order_of_its_data() -> None:
    x, y = numbered(9)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    samples = gather(loader, "training")
    assert samples.labels is not None
    assert samples.labels.tolist() == list(range(9))
    assert samples.batch_size == 4


def test_joined_samples_are_numbered_on() -> None:
    x, y = numbered(6)
    both = gather([(x[:4], y[:4])], "training").joined(gather([(x[4:], y[4:])], "validation"))
    assert both.batches(np.array([4]))[0][1].tolist() == [4]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 5), torch.zeros(2))], "pad all to"),
        ([(torch.zeros(2, 3), torch.zeros(3))], "have .2, 3. samples"),
        (
            [
                (torch.zeros(2, 3), torch.zeros(2)),
                ({"x": torch.zeros(2, 3)}, torch.zeros(2)),
            ],
            "training batch 1 has another structure",
        ),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        gather(batches, "training")
