"""Estimators of entropy and mutual information from samples: pure functions on tensors.

    x (n, units)  ->  (units,) float64, in nats

`x` holds one sample in each row and one unit in each column; every column is judged by itself,
except where a function says "given". Nothing here knows of models.
"""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import MissingDependencyError

__all__ = [
    "bin_index",
    "check_sklearn",
    "explained",
    "gaussian_entropy",
    "histogram_entropy",
    "histogram_information",
    "knn_information",
    "noisy_information",
    "residual_share",
    "shrinkage",
    "standardised",
    "variance",
]

SMALLEST = float(torch.finfo(torch.float32).tiny)
"""The variance that stands for none: a constant is then below every unit that varies."""
RIDGE = 1e-9
"""The least shrinkage: exact copies leave a residual of about this share, not an error."""
COLUMNS = 256
"""Columns that are counted at once, so that a thousand classes fit into memory."""


def bin_index(x: Tensor, bins: int) -> Tensor:
    """(n, units) int64: the bin of each sample, of equal widths from the column's min to its max.

    The right edge of the last bin belongs to it; a constant column is all in bin 0. Adding a
    constant or multiplying by a positive one moves nothing.

    Example:
        >>> bin_index(torch.tensor([[0.0], [1.0], [2.0], [4.0]]), bins=4).flatten().tolist()
        [0, 1, 2, 3]
    """
    x = x.double()
    low, high = x.amin(0), x.amax(0)
    width = torch.where(high > low, high - low, 1.0)
    return ((x - low) / width * bins).long().clamp(max=bins - 1)


def histogram_entropy(x: Tensor, bins: int, *, correct: bool = False) -> Tensor:
    """-sum p log p over the bins that are not empty; between 0 and log(bins).

    Args:
        x: (n, units).
        bins: of equal width between the minimum and the maximum of each unit.
        correct: add the Miller-Madow correction (occupied bins - 1) / (2 n): the plain estimate is
            too low by about that.

    Example:
        >>> histogram_entropy(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), bins=4).exp().round()
        tensor([4.], dtype=torch.float64)
    """
    return _entropy(bin_index(x, bins), bins, correct)


def histogram_information(
    x: Tensor, classes: Tensor, bins: int, *, correct: bool = False
) -> Tensor:
    """I(bin(x); class) = H(bin) + H(class) - H(bin, class); 0 for a constant column.

    Args:
        x: (n, units).
        classes: (n,) int64, from 0.
        bins: as in `histogram_entropy`.
        correct: Miller-Madow for each of the three entropies; the result may then be negative.
            The plain estimate is too high by about (bins - 1) (classes - 1) / (2 n).

    Example:
        >>> x = torch.tensor([[0.0, 5.0], [0.0, 5.0], [1.0, 5.0], [1.0, 5.0]])
        >>> histogram_information(x, torch.tensor([0, 0, 1, 1]), bins=2).exp().round()
        tensor([2., 1.], dtype=torch.float64)
    """
    n_classes = int(classes.max()) + 1
    place = bin_index(x, bins)
    own = _entropy(place, bins, correct) + _entropy(classes[:, None], n_classes, correct)
    found = own - _entropy(place * n_classes + classes[:, None], bins * n_classes, correct)
    return found if correct else found.clamp(min=0.0)


def _entropy(symbols: Tensor, n_symbols: int, correct: bool) -> Tensor:
    """Entropy of the symbols in each column."""
    n = len(symbols)
    found = []
    for start in range(0, symbols.shape[1], COLUMNS):
        part = symbols[:, start : start + COLUMNS]
        units = part.shape[1]
        own = part + torch.arange(units) * n_symbols
        counts = torch.bincount(own.reshape(-1), minlength=units * n_symbols).view(units, -1)
        nats = torch.special.entr(counts.double() / n).sum(1)  # (units, symbols) -> (units,)
        found.append(nats + ((counts > 0).sum(1) - 1) / (2 * n) if correct else nats)
    return torch.cat(found)


def knn_information(x: Tensor, labels: Tensor, *, neighbors: int, seed: int) -> Tensor:
    """I(x; label) from distances to the k nearest neighbours, by scikit-learn; at least 0.

    Integer labels are classes (Ross 2014), floating-point ones are values (Kraskov et al. 2004).
    scikit-learn breaks ties by a little noise, sample by sample: here the samples come in sorted
    order, with the same noise for each column, so that their order does not matter.

    Args:
        x: (n, units).
        labels: (n,) int64 or floating point.
        neighbors: k.
        seed: of the noise.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    check_sklearn()
    from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

    estimate = mutual_info_regression if labels.is_floating_point() else mutual_info_classif
    columns, y = x.double().numpy(), labels.numpy()
    found = []
    for column in columns.T:
        order = np.lexsort((y, column))
        one = estimate(column[order, None], y[order], n_neighbors=neighbors, random_state=seed)
        found.append(float(one[0]))
    return torch.from_numpy(np.array(found, dtype=np.float64))


def check_sklearn() -> None:
    """Look for scikit-learn before a long pass.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise MissingDependencyError(
            "estimator='knn' needs scikit-learn; install: pip install 'secateurs[stats]', or use "
            "estimator='histogram'"
        )


def variance(x: Tensor) -> Tensor:
    """(units,) float64 mean squared distance from the mean; exactly 0 for a constant column."""
    moved = x.double() - x[0].double()
    return (moved - moved.mean(0)).square().mean(0)


def gaussian_entropy(var: Tensor) -> Tensor:
    """1/2 log(2 pi e var), the entropy of a normal variable; may be negative.

    A variance of 0 would give minus infinity: it counts as the smallest normal float32, 1.2e-38
    (-42.2 nats), so that a constant is finite and last.

    Example:
        >>> gaussian_entropy(torch.tensor([1.0, 0.0]))
        tensor([  1.4189, -42.2493], dtype=torch.float64)
    """
    return 0.5 * (2 * math.pi * math.e * var.double().clamp(min=SMALLEST)).log()


def standardised(x: Tensor) -> Tensor:
    """(n, units) float64 with mean 0 and variance 1 in each column; a constant one is all 0."""
    moved = x.double() - x[0].double()
    moved = moved - moved.mean(0)
    std = moved.square().mean(0).sqrt()
    return moved / torch.where(std > 0, std, 1.0)


def shrinkage(z: Tensor) -> float:
    """How far the correlations of few samples should be drawn towards 0: in [0, 1].

    The estimate of Ledoit and Wolf (2004): the share that minimises the expected squared error of
    (1 - s) R + s I. It falls to 0 as the samples grow.

    Args:
        z: (n, units), standardised and without constant columns.
    """
    n, p = z.shape
    gram = z @ z.T if n < p else z.T @ z
    mean = gram.square().sum() / n**2  # ||R||^2, of the smaller of the two products
    spread = (z.square().sum(1).square().sum() / n - mean) / n
    away = mean - p
    return float((spread / away).clamp(0.0, 1.0)) if away > 0 else 1.0


def residual_share(z: Tensor) -> Tensor:
    """1 - R^2 of each column predicted linearly from all others: in [0, 1].

    It is 1 / diag(C^-1) with C = (1 - s) R + s I, R the correlation matrix and s the `shrinkage`:
    without it, fewer samples than columns would predict everything. A constant column has 0.

    Args:
        z: (n, units), standardised.
    """
    found = torch.zeros(z.shape[1], dtype=torch.float64)
    varies = z.square().sum(0) > 0
    z = z[:, varies]
    if z.shape[1]:
        s = max(shrinkage(z), RIDGE)
        matrix = (1 - s) * (z.T @ z / len(z))
        matrix.diagonal().add_(s)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        found[varies] = (1 / inverse.diagonal()).clamp(0.0, 1.0)
    return found


def explained(z: Tensor, given: Tensor, noise: float) -> Tensor:
    """R^2 of each column of `z` predicted linearly from the columns of `given` plus noise.

    Args:
        z: (n, units), standardised.
        given: (n, others), standardised.
        noise: variance of the noise that every column of `given` is seen through, for a variance
            of 1; in (0, 1]. This is a ridge regression with that penalty.
    """
    n, p = given.shape
    few = n < p  # then by the smaller matrix: B (B'B + c I)^-1 B' = (BB' + c I)^-1 BB'
    gram = (given @ given.T if few else given.T @ given) / n
    ridge = gram + noise * torch.eye(len(gram), dtype=torch.float64)
    if few:
        square: Tensor = ((gram @ torch.linalg.solve(ridge, z)) * z).sum(0) / n
    else:
        both = given.T @ z / n  # (others, units)
        square = (torch.linalg.solve(ridge, both) * both).sum(0)
    return square.clamp(0.0, 1.0)


def noisy_information(z: Tensor, given: Tensor, noise: float) -> Tensor:
    """-1/2 log(1 - R^2) of each column with all of `given`, as if all were jointly normal.

    Args:
        z: (n, units), standardised.
        given: (n, others), standardised.
        noise: as in `explained`; it keeps the result finite where `given` determines the column.
    """
    left = (1 - explained(z, given, noise)).clamp(min=torch.finfo(torch.float64).eps)
    return -0.5 * left.log()
