"""Readers and splits: literal files, splits that hold each sample once, errors that help."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import pytest
import torch

from secateurs.errors import ConfigError, FileFormatError, MissingDependencyError
from secateurs.tasks import available, data, get_task
from secateurs.tasks.data import (
    Splits,
    read_cancer,
    read_digits,
    read_fashion,
    read_idx,
    read_ts,
    read_vowels,
    stratified_split,
)


def idx(tensor: torch.Tensor) -> bytes:
    """A gzipped idx file of a uint8 tensor."""
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return gzip.compress(bytes([0, 0, 8, tensor.dim()]) + sizes + bytes(tensor.flatten().tolist()))


# --- splits


def test_stratified_split_holds_each_sample_once_with_equal_class_shares() -> None:
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
    parts = stratified_split(labels, (0.6, 0.2, 0.2), seed=3)
    assert sorted(torch.cat(parts).tolist()) == list(range(60))
    assert [torch.bincount(labels[p]).tolist() for p in parts] == [
        [6, 12, 18],
        [2, 4, 6],
        [2, 4, 6],
    ]


def test_stratified_split_follows_the_seed() -> None:
    labels = torch.arange(40) % 2
    first, again, other = (stratified_split(labels, (0.5, 0.5), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("fractions", [(0.6, 0.6), (1.2, -0.2), (0.5,)])
def test_stratified_split_refuses_fractions_that_are_no_split(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        stratified_split(torch.zeros(4).long(), fractions, 0)


# --- file formats


def test_read_idx_reads_a_literal_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x02" + b"\0\0\0\x02\0\0\0\x03" + b"\1\2\3\4\5\xff"))
    assert read_idx(path).tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain", "gzip"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x02\1\2")[:-12], "gzip"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\x01\1\1\1\1"), "not an idx file of bytes"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x03\1\2"), r"says shape \[3\] but holds 2 bytes"),
        (gzip.compress(b""), "not an idx file"),
    ],
    ids=["plain", "cut-short", "floats", "too-few-bytes", "empty"],
)
def test_read_idx_names_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        read_idx(path)


def test_read_ts_reads_a_literal_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ts"
    path.write_text("#note\n@dimensions 2\n@data\n1,2,3:4,5,6:b\n7:8:a\n")
    series, labels = read_ts(path)
    assert [s.tolist() for s in series] == [[[1, 2, 3], [4, 5, 6]], [[7], [8]]]
    assert labels == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@dimensions 2\n", "no series"),
        ("@data\n1,2:3,x:a\n", "series 0: could not convert"),
        ("@data\n1:2:a\n1,2:3:a\n", "series 1: expected sequence of length 2"),
    ],
)
def test_read_ts_names_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.ts"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_ts(path)


# --- digits and breast cancer


def test_digits_parts_together_are_the_data_set() -> None:
    from sklearn.datasets import load_digits

    splits = read_digits(0)
    parts = (splits.train, splits.validation, splits.test)
    rows = torch.cat([torch.cat([x.flatten(1) * 16, y[:, None]], 1) for x, y in parts])
    raw = load_digits()
    expected = [[*pixels, label] for pixels, label in zip(raw.data, raw.target, strict=True)]
    assert sorted(rows.tolist()) == sorted(expected)


def test_cancer_is_standardised_by_the_training_part_alone() -> None:
    splits = read_cancer(0)
    inputs = splits.train[0]
    torch.testing.assert_close(inputs.mean(0), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(0), torch.ones(30), atol=1e-5, rtol=0)
    assert splits.test[0].mean(0).abs().max() > 1e-3
    labels = torch.cat([splits.train[1], splits.validation[1], splits.test[1]])
    assert torch.bincount(labels).tolist() == [212, 357]


@pytest.mark.parametrize("read", [read_digits, read_cancer, read_vowels])
def test_a_subset_is_refused_where_none_is_defined(read: data.Read) -> None:
    with pytest.raises(ConfigError, match="no training subset"):
        read(0, 10)


# --- Fashion-MNIST, on a small stand-in whose first two pixels are the image number


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEURS_FASHION_MNIST", str(tmp_path))
    for part, n, base in [("train", 2400, 0), ("t10k", 20, 60_000)]:
        number = torch.arange(n) + base
        images = torch.stack([number // 256, number % 256, number * 0, number * 0 + 255], 1)
        images = images.to(torch.uint8).reshape(n, 2, 2)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx((number % 10).byte()))
    return tmp_path


def numbers(part: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    """Image numbers: the last two pixels, always 0 and 255, undo the standardisation."""
    x = part[0].flatten(1).double()  # (n, 4)
    pixels = (x - x[:, 2:3]) / (x[:, 3:4] - x[:, 2:3]) * 255
    return [round(v) for v in (pixels[:, 0].round() * 256 + pixels[:, 1].round()).tolist()]


def check_fashion(splits: Splits, n_train: int, n_validation: int) -> None:
    """No image is in two parts, and each has its own label."""
    train, validation = numbers(splits.train), numbers(splits.validation)
    assert (len(train), len(validation)) == (n_train, n_validation)
    assert len(set(train + validation)) == n_train + n_validation
    assert max(train + validation) < 2400
    assert numbers(splits.test) == list(range(60_000, 60_020))
    for part in (splits.train, splits.validation, splits.test):
        assert [n % 10 for n in numbers(part)] == part[1].tolist()


def test_fashion_splits_the_given_training_images(fashion: Path) -> None:
    splits = read_fashion(0)
    check_fashion(splits, 2200, 200)
    assert torch.bincount(splits.validation[1]).tolist() == [20] * 10
    assert numbers(splits.validation) != numbers(read_fashion(1).validation)
    assert abs(splits.train[0].mean().item()) < 1e-5


def test_the_fashion_check_notices_a_shared_image(fashion: Path) -> None:
    splits = read_fashion(0, 300)
    leaky = Splits(splits.train, splits.train, splits.test)
    with pytest.raises(AssertionError):
        check_fashion(leaky, 300, 300)


def test_fashion_subset_is_the_same_for_every_seed(fashion: Path) -> None:
    splits = read_fashion(0, 300)
    check_fashion(splits, 300, 2000)
    assert numbers(splits.train) == numbers(read_fashion(1, 300).train)


@pytest.mark.parametrize("n_train", [0, 401])
def test_fashion_subset_leaves_validation_images(fashion: Path, n_train: int) -> None:
    with pytest.raises(ConfigError, match=r"n_train must be in \[1, 400\]"):
        read_fashion(0, n_train)


def test_fashion_names_the_damaged_file(fashion: Path) -> None:
    (fashion / "train-images-idx3-ubyte.gz").write_bytes(b"html page")
    with pytest.raises(FileFormatError, match="train-images-idx3-ubyte"):
        read_fashion(0)


# --- JapaneseVowels


def test_vowels_are_standardised_then_padded_at_the_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = "1,2,3:10,20,30:s\n" * 5 + "1,2,3:10,20,30:t\n" * 5
    (tmp_path / "JapaneseVowels_TRAIN.ts").write_text("@data\n" + train)
    (tmp_path / "JapaneseVowels_TEST.ts").write_text("@data\n1,2,3,4:10,20,30,40:t\n3:20:s\n")
    monkeypatch.setattr(data, "_vowels_dir", lambda: tmp_path)
    splits = read_vowels(0)
    assert [len(p[1]) for p in (splits.train, splits.validation, splits.test)] == [8, 2, 2]
    deviation = (2 * 8 / (3 * 8 - 1)) ** 0.5  # steps 1, 2, 3 of eight series: variance 16 / 23
    unit = 1 / deviation
    expected = [
        [[-unit, -unit], [0, 0], [unit, unit], [2 * unit, 2 * unit]],
        [[0, 0], [0, 0], [0, 0], [unit, 0]],
    ]
    torch.testing.assert_close(splits.test[0], torch.tensor(expected))
    assert splits.test[1].tolist() == [1, 0]


@pytest.mark.skipif(
    available(get_task("vowels-lstm")) is not None,
    reason=available(get_task("vowels-lstm")) or "",
)
def test_every_vowel_series_ends_with_a_real_step() -> None:
    for inputs, _ in (read_vowels(0).train, read_vowels(0).test):
        real = inputs.abs().sum(2) > 0  # (n, 29)
        assert real[:, -1].all()
        lengths = real.sum(1)
        assert lengths.min() >= 7
        assert all(row[29 - n :].all() for row, n in zip(real, lengths.tolist(), strict=True))


# --- missing data


def test_missing_fashion_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEURS_FASHION_MNIST", str(tmp_path))
    for name in ("fashion-lenet300", "fashion-lenet5", "fashion-resnet20"):
        with pytest.raises(MissingDependencyError, match="apt-get install dataset-fashion-mnist"):
            get_task(name).load(0)
        assert "apt-get install dataset-fashion-mnist" in (available(get_task(name)) or "")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("digits-mlp", "pip install 'secateurs[stats]'"),
        ("cancer-mlp", "pip install 'secateurs[stats]'"),
        ("vowels-lstm", "pip install 'secateurs[tasks]' or pip install aeon"),
    ],
)
def test_missing_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MissingDependencyError) as caught:
        get_task(name).load(0)
    assert command in str(caught.value)
    assert command in (available(get_task(name)) or "")
