"""Folds: samples in memory by their number, and how they are divided (scikit-learn).

gather(batches) -> Samples       divide(n, Folds, labels, groups) -> [Fold]
samples.batches(fold.train), samples.batches(fold.held)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from secateurs.batches import iterate
from secateurs.errors import DataError, MissingDependencyError
from secateurs.searching.config import Folds
from secateurs.searching.holdout import sample_keys
from secateurs.types import Batch, Batches, IntArray

__all__ = ["Fold", "Samples", "divide", "gather"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in memory.

    Attributes:
        leaves: tensors (n, ...) of inputs and targets; other leaves are the same for all samples.
        spec: the structure that they came in.
        n: number of samples.
        batch_size: of the first batch that was read.
    """

    leaves: tuple[Any, ...]
    spec: Any
    n: int
    batch_size: int

    def batches(self, chosen: IntArray, size: int | None = None) -> list[Batch]:
        """The chosen samples (a sample may come several times), in that order, in batches."""
        found = []
        for part in torch.split(torch.from_numpy(np.asarray(chosen)), size or self.batch_size):
            leaves = [x[part] if isinstance(x, Tensor) else x for x in self.leaves]
            inputs, targets = pytree.tree_unflatten(leaves, self.spec)
            found.append((inputs, targets))
        return found

    @property
    def labels(self) -> IntArray | None:
        """(n,) whole-numbered targets; None for targets of another form."""
        _, targets = pytree.tree_unflatten(list(self.leaves), self.spec)
        if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
            return None
        found: IntArray = targets.cpu().numpy().astype(np.int64)
        return found

    @property
    def keys(self) -> list[bytes]:
        """`sample_keys` of all samples."""
        return sample_keys(self.batches(np.arange(self.n), max(self.n, 1)))

    def joined(self, other: Samples) -> Samples:
        """These samples, then the others.

        Raises:
            DataError: they differ in structure or shape.
        """
        return _joined([self, other], ["training", "validation"])


def gather(batches: Batches, name: str) -> Samples:
    """All samples in memory, in order. A loader that shuffles is read in the order of its dataset.

    Raises:
        DataError: a batch is no pair, or batches differ in structure or shape.
    """
    parts: list[Samples] = []
    for inputs, targets in iterate(_in_order(batches), torch.device("cpu")):
        leaves, spec = pytree.tree_flatten((inputs, targets))
        sized = [x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()]
        if not sized or len(set(sized)) != 1:
            raise DataError(
                f"{name} batch {len(parts)}: its tensors have {sorted(set(sized)) or 'no'} samples "
                "along dimension 0; to divide it, all need the same number"
            )
        parts.append(Samples(tuple(leaves), spec, sized[0], sized[0]))
    return _joined(parts, [f"{name} batch {i}" for i in range(len(parts))])


def _in_order(batches: Batches) -> Batches:
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return batches
    return DataLoader(
        batches.dataset, batch_size=batches.batch_size or 64, collate_fn=batches.collate_fn
    )


def _joined(parts: Sequence[Samples], names: Sequence[str]) -> Samples:
    first = parts[0]
    for part, name in zip(parts[1:], names[1:], strict=True):
        if part.spec != first.spec:
            raise DataError(f"{name} has another structure than {names[0]}: cannot be divided")
    leaves: list[Any] = []
    for column in zip(*(p.leaves for p in parts), strict=True):
        if not isinstance(column[0], Tensor) or not column[0].dim():
            if any(not _same(x, column[0]) for x in column):
                raise DataError(f"{names[0]}: a value that is no tensor of samples differs later")
            leaves.append(column[0])
            continue
        shapes = {tuple(x.shape[1:]) for x in column}
        if len(shapes) > 1:
            raise DataError(
                f"samples have different shapes: {', '.join(map(str, sorted(shapes)[:3]))}. To "
                "divide them into folds, pad all to one length"
            )
        leaves.append(torch.cat(column))
    return Samples(tuple(leaves), first.spec, sum(p.n for p in parts), first.batch_size)


def _same(a: Any, b: Any) -> bool:
    return bool(torch.equal(a, b)) if isinstance(a, Tensor) else bool(a == b)


@dataclass(frozen=True, eq=False)
class Fold:
    """One division.

    Attributes:
        number: from 0.
        train: sample numbers to train on; with repeats under "bootstrap".
        held: sample numbers to judge on; none of them is in `train`.
    """

    number: int
    train: IntArray
    held: IntArray


def divide(
    n: int, folds: Folds, labels: IntArray | None = None, groups: Sequence[Any] | None = None
) -> list[Fold]:
    """Folds over the samples 0 to n - 1, as scikit-learn makes them.

    "stratified", "kfold" and "grouped" are StratifiedKFold, KFold (both shuffled by `folds.seed`)
    and GroupKFold (which has no seed). "bootstrap" draws n samples with replacement for each fold.

    Args:
        n: number of samples.
        folds: kind, number and seed.
        labels: (n,) classes, for "stratified".
        groups: n groups, for "grouped".

    Raises:
        DataError: too few samples, classes or groups for so many folds, or none are given.
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> [fold.held.tolist() for fold in divide(4, Folds("grouped", k=2), groups="aabb")]
        [[2, 3], [0, 1]]
    """
    if n < folds.k:
        raise DataError(f"{n} samples cannot be divided into {folds.k} folds; lower folds.k")
    if folds.kind == "bootstrap":
        return _bootstrap(n, folds)
    if find_spec("sklearn") is None:
        raise MissingDependencyError("folds need scikit-learn; pip install 'secateurs[stats]'")
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

    index = np.zeros(n)
    if folds.kind == "stratified":
        _check_labels(labels, folds.k)
        shuffled = StratifiedKFold(folds.k, shuffle=True, random_state=folds.seed)
        pairs = shuffled.split(index, labels)
    elif folds.kind == "grouped":
        pairs = GroupKFold(folds.k).split(index, groups=_numbered(groups, n, folds.k))
    else:
        pairs = KFold(folds.k, shuffle=True, random_state=folds.seed).split(index)
    return [
        Fold(i, np.asarray(train, np.int64), np.asarray(held, np.int64))
        for i, (train, held) in enumerate(pairs)
    ]


def _bootstrap(n: int, folds: Folds) -> list[Fold]:
    found = []
    for number in range(folds.k):
        train = np.random.default_rng([folds.seed, number]).integers(0, n, n)
        held = np.setdiff1d(np.arange(n), train)
        if not len(held):
            raise DataError(f"bootstrap of {n} samples left none out; take kind: kfold")
        found.append(Fold(number, train, held))
    return found


def _check_labels(labels: IntArray | None, k: int) -> None:
    if labels is None:
        raise DataError(
            "stratified folds need one whole-numbered label per sample; write folds: {kind: kfold}"
        )
    few = {int(c): m for c, m in sorted(Counter(labels.tolist()).items()) if m < k}
    if few:
        listed = ", ".join(f"class {c} has {m}" for c, m in list(few.items())[:3])
        raise DataError(
            f"each class needs at least one sample in each of {k} folds: {listed}; lower folds.k "
            "or write kind: kfold"
        )


def _numbered(groups: Sequence[Any] | None, n: int, k: int) -> IntArray:
    if groups is None:
        raise DataError(
            'grouped folds need the group of each sample: let data() return "groups", or name a '
            "function in folds: {kind: grouped, groups: module:function}"
        )
    names = [g.item() if isinstance(g, (Tensor, np.generic)) else g for g in groups]
    if len(names) != n:
        raise DataError(f"groups has {len(names)} entries for {n} samples; one each is needed")
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(order) < k:
        raise DataError(f"{len(order)} groups cannot be divided into {k} folds; lower folds.k")
    return np.array([order[name] for name in names], np.int64)
