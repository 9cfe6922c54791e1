"""Real data that installs with a package manager: where it is, reading it, splitting it.

Every reader is `read(seed, n_train) -> Splits`: the seed drives the split, `n_train` asks for a
fixed subset of the training data (None: all of it). Nothing is downloaded: a `Source` knows the
command that installs its data, and a missing one is an error that names it.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import ConfigError, FileFormatError, MissingDependencyError

__all__ = [
    "FASHION",
    "SKLEARN",
    "VOWELS",
    "Read",
    "Source",
    "Splits",
    "read_cancer",
    "read_digits",
    "read_fashion",
    "read_idx",
    "read_ts",
    "read_vowels",
    "stratified_split",
]

_IDX_KINDS = ("images-idx3", "labels-idx1")
Part = tuple[Tensor, Tensor]
Read = Callable[[int, int | None], "Splits"]
SUBSET_SEED, N_VALIDATION = 0, 2000  # of the training subset of Fashion-MNIST


@dataclass(frozen=True, eq=False)
class Splits:
    """Inputs (n, ...) and labels (n,) int64 of each part; no sample is in two parts.

    Inputs are float32, or int64 ids of tokens.
    """

    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Source:
    """Where data comes from.

    Attributes:
        what: what must be installed.
        install: the command that installs it.
        present: a cheap check that reads no data.
    """

    what: str
    install: str
    present: Callable[[], bool]

    @property
    def needs(self) -> str:
        """One line for people: what must be installed, and how."""
        return f"{self.what} ({self.install})"

    def require(self) -> None:
        """Raise MissingDependencyError with the install command if the data is missing."""
        if not self.present():
            raise MissingDependencyError(f"this task needs {self.what}; install: {self.install}")


def _fashion_dir() -> Path:
    """Folder of the four idx files: $SECATEURS_FASHION_MNIST, else that of the Debian package."""
    default = "/usr/share/datasets/fashion-mnist"
    return Path(os.environ.get("SECATEURS_FASHION_MNIST") or default).expanduser()


def _fashion_files() -> list[Path]:
    """Images and labels of train, then of test."""
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in _IDX_KINDS]
    return [_fashion_dir() / name for name in names]


def _vowels_dir() -> Path | None:
    """Folder of the series inside aeon or sktime, found without importing either."""
    for package in ("aeon", "sktime"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            folder = Path(root) / "datasets" / "data" / "JapaneseVowels"
            if (folder / "JapaneseVowels_TRAIN.ts").is_file():
                return folder
    return None


SKLEARN = Source(
    "scikit-learn",
    "pip install 'secateurs[stats]'",
    lambda: importlib.util.find_spec("sklearn") is not None,
)
FASHION = Source(
    "Fashion-MNIST (or its four .gz files in the folder $SECATEURS_FASHION_MNIST)",
    "apt-get install dataset-fashion-mnist",
    lambda: all(path.is_file() for path in _fashion_files()),
)
VOWELS = Source(
    "the JapaneseVowels series inside aeon or sktime",
    "pip install 'secateurs[tasks]' or pip install aeon",
    lambda: _vowels_dir() is not None,
)


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Disjoint index sets with the class proportions of the whole, in random order.

    Args:
        labels: (n,) int64.
        fractions: share of each part; they sum to 1.
        seed: the same seed gives the same parts.

    Returns:
        One (m,) int64 index tensor per fraction; together they hold every sample once.

    Raises:
        ConfigError: a fraction is negative, or they do not sum to 1.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> [sorted(labels[part].tolist()) for part in stratified_split(labels, [0.5, 0.5], 0)]
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ConfigError(f"fractions must be at least 0 and sum to 1, got {list(fractions)}")
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for label in torch.unique(labels):
        own = (labels == label).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        cuts = [round(float(c) * len(own)) for c in np.cumsum(fractions)[:-1]]
        for part, piece in zip(parts, own.tensor_split(cuts), strict=True):
            part.append(piece)
    joined = [torch.cat(part) for part in parts]
    return [part[torch.randperm(len(part), generator=generator)] for part in joined]


def _three_way(inputs: Tensor, labels: Tensor, seed: int) -> Splits:
    """A stratified 60/20/20 split."""
    train, validation, test = stratified_split(labels, (0.6, 0.2, 0.2), seed)
    return Splits(
        (inputs[train], labels[train]),
        (inputs[validation], labels[validation]),
        (inputs[test], labels[test]),
    )


def _whole(n_train: int | None, name: str) -> None:
    """Refuse a subset where none is defined."""
    if n_train is not None:
        raise ConfigError(f"{name} defines no training subset, got n_train={n_train}; use None")


def read_digits(seed: int, n_train: int | None = None) -> Splits:
    """Scikit-learn digits, 1797 images: inputs (n, 1, 8, 8) in [0, 1], 10 classes, 60/20/20.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    _whole(n_train, "digits")
    SKLEARN.require()
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    return _three_way(images, torch.from_numpy(raw.target).long(), seed)


def read_cancer(seed: int, n_train: int | None = None) -> Splits:
    """Wisconsin breast cancer, 569 patients: inputs (n, 30), 2 classes (1 = benign), 60/20/20.

    Features are standardised with the mean and deviation of the training part.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    _whole(n_train, "breast cancer")
    SKLEARN.require()
    from sklearn.datasets import load_breast_cancer

    raw = load_breast_cancer()
    inputs, labels = torch.from_numpy(raw.data).float(), torch.from_numpy(raw.target).long()
    return _standardised(_three_way(inputs, labels, seed), dims=(0,))


def _standardised(splits: Splits, dims: tuple[int, ...]) -> Splits:
    """Subtract the mean and divide by the deviation of the training inputs over `dims`."""
    mean = splits.train[0].mean(dims, keepdim=True)
    std = splits.train[0].std(dims, keepdim=True).clamp_min(1e-8)
    parts = (splits.train, splits.validation, splits.test)
    return Splits(*[((inputs - mean) / std, labels) for inputs, labels in parts])


def read_idx(path: Path) -> Tensor:
    """The uint8 array of a gzipped idx file.

    The file is two zero bytes, the type (8: uint8), the number of dimensions, that many big-endian
    uint32 sizes, then the data.

    Raises:
        FileFormatError: not a gzip file, not idx, or of another length than it says.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise FileFormatError(f"{path}: cannot be read as gzip: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise FileFormatError(f"{path}: not an idx file of bytes, starts with {raw[:4]!r}")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4)]
    if len(raw) - start != int(np.prod(shape)):
        raise FileFormatError(f"{path}: says shape {shape} but holds {len(raw) - start} bytes")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).reshape(shape)


def read_fashion(seed: int, n_train: int | None = None) -> Splits:
    """Fashion-MNIST: inputs (n, 1, 28, 28), 10 classes, the given 10,000 test images.

    All data: 5,000 validation images (500 of each class, chosen by the seed), 55,000 to train.
    A subset: the first `n_train` images of one fixed permutation train, the next 2,000 validate,
    whatever the seed. Pixels are standardised with the mean and deviation of the training part.

    Raises:
        MissingDependencyError: the data set is not installed.
        FileFormatError: a file is damaged.
        ConfigError: `n_train` leaves no validation images.
    """
    FASHION.require()
    images, labels, test_images, test_labels = [read_idx(path) for path in _fashion_files()]
    if n_train is not None and not 0 < n_train <= len(labels) - N_VALIDATION:
        raise ConfigError(
            f"n_train must be in [1, {len(labels) - N_VALIDATION}], got {n_train}; None is all"
        )
    if n_train is None:
        train, validation = stratified_split(labels, (11 / 12, 1 / 12), seed)
    else:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SUBSET_SEED))
        train, validation = order[:n_train], order[n_train : n_train + N_VALIDATION]
    pixels = images[train].float()
    mean, std = pixels.mean(), pixels.std()

    def part(x: Tensor, y: Tensor) -> Part:
        return ((x.float() - mean) / std).unsqueeze(1), y.long()

    return Splits(
        part(images[train], labels[train]),
        part(images[validation], labels[validation]),
        part(test_images, test_labels),
    )


def read_ts(path: Path) -> tuple[list[Tensor], list[str]]:
    """The series (channels, time) and the labels of a `.ts` file.

    After `@data` each line is one series: channels parted by colons, values by commas, label last.

    Raises:
        FileFormatError: no data, a value that is no number, or channels of unequal length.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.partition("@data")[2].split()
    if not lines:
        raise FileFormatError(f"{path}: no series after @data")
    series, labels = [], []
    for number, line in enumerate(lines):
        *channels, label = line.split(":")
        try:
            rows = [[float(value) for value in channel.split(",")] for channel in channels]
            series.append(torch.tensor(rows))  # (channels, time)
        except ValueError as error:
            raise FileFormatError(f"{path}: series {number}: {error}") from error
        labels.append(label)
    return series, labels


def read_vowels(seed: int, n_train: int | None = None) -> Splits:
    """JapaneseVowels: inputs (n, 29, 12), 9 speakers, the given 270 series split 80/20, test 370.

    A series has 7 to 29 steps. It is standardised per channel with the real steps of the training
    part, then padded with zeros at the front, so that the last step is always a real one.

    Raises:
        MissingDependencyError: neither aeon nor sktime is installed.
        FileFormatError: a file is damaged.
    """
    _whole(n_train, "JapaneseVowels")
    VOWELS.require()
    folder = _vowels_dir()
    assert folder is not None
    series, names = read_ts(folder / "JapaneseVowels_TRAIN.ts")
    test_series, test_names = read_ts(folder / "JapaneseVowels_TEST.ts")
    speakers = {name: i for i, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([speakers[name] for name in names])
    train, validation = stratified_split(labels, (0.8, 0.2), seed)
    steps = torch.cat([series[i] for i in train.tolist()], dim=1)  # (channels, all real steps)
    mean, std = steps.mean(1, keepdim=True), steps.std(1, keepdim=True)
    length = max(s.shape[1] for s in series + test_series)

    def padded(chosen: Sequence[Tensor]) -> Tensor:
        out = torch.zeros(len(chosen), length, len(mean))
        for row, s in zip(out, chosen, strict=True):
            row[length - s.shape[1] :] = ((s - mean) / std).T
        return out

    return Splits(
        (padded([series[i] for i in train.tolist()]), labels[train]),
        (padded([series[i] for i in validation.tolist()]), labels[validation]),
        (padded(test_series), torch.tensor([speakers[name] for name in test_names])),
    )
