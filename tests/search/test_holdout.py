"""The test split is read once, at the end, and its samples are nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateurs.errors import DataError
from secateurs.searching.holdout import LockedSplit, check_copies, sample_keys
from secateurs.tasks.base import accuracy

BATCHES = [(torch.eye(2), torch.tensor([0, 1])), (torch.ones(1, 2), torch.tensor([0]))]


def peeking(batches: Any) -> list[Any]:
    return list(batches)


def test_reading_before_the_end_raises_and_names_the_reader() -> None:
    locked = LockedSplit(BATCHES)
    with pytest.raises(DataError, match=r"test split was touched before .* by peeking \(test_hold"):
        peeking(locked)
    with pytest.raises(DataError, match=r"by _outputs \(base.py"):
        accuracy(nn.Linear(2, 2), locked)
    assert len(locked.tried) == 2


def test_it_is_read_inside_its_single_use_and_never_again() -> None:
    locked = LockedSplit(BATCHES)
    use = locked.unlock("final figures")
    with pytest.raises(DataError, match="outside its single use by 'final figures'"):
        peeking(locked)
    for _ in range(2):  # the dense and the smaller network
        with use:
            assert len(peeking(locked)) == 2
    use.close()
    with pytest.raises(DataError, match="outside its single use"):
        peeking(locked)
    with pytest.raises(DataError, match="'final figures' is over"):
        use.__enter__()
    with pytest.raises(DataError, match="'final figures' did: 'again' cannot"):
        locked.unlock("again")


def test_there_is_no_other_way_to_its_samples() -> None:
    locked: Any = LockedSplit(BATCHES)
    assert not hasattr(locked, "dataset")
    with pytest.raises(TypeError):
        locked[0]
    with pytest.raises(DataError):
        dict(locked)


def test_keys_are_equal_where_inputs_are_equal() -> None:
    one, two, three = sample_keys(BATCHES)
    assert len({one, two, three}) == 3
    again = [(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([7, 7]))]
    assert sample_keys(again) == [three, one]
    assert sample_keys([(torch.ones(1, 2).double(), torch.zeros(1))]) != [three]
    assert sample_keys([(torch.ones(1, 1, 2), torch.zeros(1))]) != [three]


def test_one_number_out_of_a_row_has_the_key_of_a_copy() -> None:
    one = torch.tensor([[1.0, 2.0]])[:, ::2]  # of stride 2
    assert sample_keys([(one, torch.zeros(1))]) == sample_keys([(one.clone(), torch.zeros(1))])


def test_keys_cover_all_inputs_of_a_sample() -> None:
    def keys(mask: float) -> list[bytes]:
        inputs = {"ids": torch.tensor([[1, 2]]), "mask": torch.tensor([[mask, 1.0]])}
        return sample_keys([(inputs, torch.zeros(1))])

    assert keys(0.0) == keys(0.0)
    assert keys(0.0) != keys(1.0)


def test_copies_are_refused_with_their_numbers() -> None:
    with pytest.raises(
        DataError,
        match=r"2 of 3 samples of the test split \(numbers 0, 2\) occur in the training data too "
        r"\(there 1, 3\)",
    ):
        check_copies([b"a", b"b", b"c"], {"training": [b"x", b"c", b"y", b"a"], "other": [b"z"]})


def test_copies_may_be_told_only() -> None:
    assert check_copies([b"a"], {"training": [b"b"]}) == ()
    (note,) = check_copies([b"a"], {"training": [b"a"]}, allowed=True)
    assert "1 of 1 samples" in note
