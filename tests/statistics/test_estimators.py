"""Estimators against cases with known values, and against scipy and scikit-learn."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression
from sklearn.metrics import mutual_info_score
from torch import Tensor

from secateurs.errors import MissingDependencyError
from secateurs.statistics import estimators as es

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)[:, None]


# -- histograms ------------------------------------------------------------------------------------


def test_bins_reach_from_the_least_to_the_largest() -> None:
    x = torch.stack([torch.tensor([0.0, 0.9, 1.0, 3.9, 4.0]), torch.full((5,), 7.0)], dim=1)
    assert es.bin_index(x, 4).T.tolist() == [[0, 0, 1, 3, 3], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("k", [2, 5, 16])
def test_uniform_over_k_bins_has_entropy_log_k(k: int) -> None:
    x = torch.arange(k, dtype=F64).repeat(3)[:, None]
    assert es.histogram_entropy(x, k).item() == pytest.approx(math.log(k))
    # Twice as many bins: every second one is empty, and empty ones do not count.
    assert es.histogram_entropy(x, 2 * k).item() == pytest.approx(math.log(k))


def test_a_constant_has_no_entropy() -> None:
    assert es.histogram_entropy(column(0.1, 0.1, 0.1), 8).tolist() == [0.0]


def test_entropy_agrees_with_numpy_and_scipy() -> None:
    x = normal(200, 5)
    counts = [np.histogram(x[:, u].numpy(), bins=12)[0] for u in range(5)]
    expected = [scipy_entropy(c) for c in counts]
    torch.testing.assert_close(es.histogram_entropy(x, 12), torch.tensor(expected))


def test_entropy_does_not_see_scale_offset_or_order() -> None:
    x = normal(100, 3)
    straight = es.histogram_entropy(x, 10)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(es.histogram_entropy(x[order], 10), straight)
    torch.testing.assert_close(es.histogram_entropy(4 * x - 2, 10), straight)
    assert not torch.allclose(es.histogram_entropy(x.exp(), 10), straight)


def test_miller_madow_adds_the_bias() -> None:
    x = column(0, 1, 2, 3)
    assert es.histogram_entropy(x, 4, correct=True).item() == pytest.approx(math.log(4) + 3 / 8)


def test_miller_madow_is_nearer_to_the_truth() -> None:
    """30 samples of a fair die with 8 sides, 400 times."""
    x = torch.randint(8, (30, 400), generator=torch.Generator().manual_seed(0)).double()
    plain = es.histogram_entropy(x, 8).mean().item()
    better = es.histogram_entropy(x, 8, correct=True).mean().item()
    assert plain < math.log(8) - 0.1
    assert abs(better - math.log(8)) < 0.03


def test_a_copy_of_the_label_tells_all_of_it() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    h = scipy_entropy([3, 2, 1])
    both = torch.stack([y.double(), -2.0 * y + 1], dim=1)
    found = es.histogram_information(both, y, bins=3)
    torch.testing.assert_close(found, torch.tensor([h, h], dtype=F64))


def test_independent_of_the_label_tells_nothing() -> None:
    x = column(0, 1, 0, 1, 0, 1)
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    assert es.histogram_information(x, y, bins=2).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("units", [3, 600])
def test_information_agrees_with_scikit_learn(units: int) -> None:
    y = torch.randint(4, (80,), generator=torch.Generator().manual_seed(0))
    x = normal(80, units) + y[:, None] * torch.linspace(0, 2, units, dtype=F64)
    place = es.bin_index(x, 6).numpy()
    expected = [mutual_info_score(y.numpy(), place[:, u]) for u in range(units)]
    torch.testing.assert_close(es.histogram_information(x, y, 6), torch.tensor(expected, dtype=F64))


def test_miller_madow_takes_the_bias_of_information_away() -> None:
    x = torch.randint(8, (200, 500), generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(200) % 5
    plain = es.histogram_information(x, y, 8).mean().item()
    better = es.histogram_information(x, y, 8, correct=True).mean().item()
    assert plain == pytest.approx(7 * 4 / 400, rel=0.1)  # (bins - 1) (classes - 1) / 2n
    assert abs(better) < 0.1 * plain


# -- nearest neighbours ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [True, False])
def test_knn_is_that_of_scikit_learn_for_each_column(classes: bool) -> None:
    x = normal(60, 3)
    y = (x[:, 0] > 0).long() if classes else x[:, 0] + normal(60, seed=1)
    estimate = mutual_info_classif if classes else mutual_info_regression
    found = es.knn_information(x, y, neighbors=3, seed=5)
    for u in range(3):
        order = x[:, u].argsort().numpy()
        alone = estimate(x[order][:, [u]].numpy(), y[order].numpy(), n_neighbors=3, random_state=5)
        assert found[u].item() == pytest.approx(alone[0])
    assert found[0] > found[1:].max()


def test_knn_does_not_see_the_order_of_the_samples() -> None:
    """Not even among ties, which scikit-learn breaks at random."""
    x = normal(80, 2).clamp(min=0.0)
    y = (x[:, 0] > 0.5).long()
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    straight = es.knn_information(x, y, neighbors=3, seed=0)
    assert torch.equal(es.knn_information(x[order], y[order], neighbors=3, seed=0), straight)
    assert not torch.equal(es.knn_information(x, y, neighbors=3, seed=1), straight)


def test_knn_of_jointly_normal_values() -> None:
    """I = -1/2 log(1 - rho^2), rho = 0.8."""
    a, e = normal(2000), normal(2000, seed=1)
    found = es.knn_information(a[:, None], 0.8 * a + 0.6 * e, neighbors=3, seed=0)
    assert found.item() == pytest.approx(-0.5 * math.log(1 - 0.64), abs=0.05)


def test_knn_needs_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"secateurs\[stats\]"):
        es.knn_information(normal(5, 1), torch.arange(5), neighbors=3, seed=0)


# -- normal variables ------------------------------------------------------------------------------


def test_gaussian_entropy_in_closed_form() -> None:
    found = es.gaussian_entropy(torch.tensor([1.0, 1 / (2 * math.pi * math.e), 4.0], dtype=F64))
    one = 0.5 * math.log(2 * math.pi * math.e)
    torch.testing.assert_close(found, torch.tensor([one, 0.0, one + math.log(2)], dtype=F64))


def test_a_constant_is_finite_and_last() -> None:
    x = torch.stack([torch.full((7,), 0.1), 1e-12 * torch.arange(7.0)], dim=1)
    var = es.variance(x)
    assert var[0] == 0
    low, high = es.gaussian_entropy(var)
    assert -math.inf < low < high


def test_variance_agrees_with_numpy() -> None:
    x = normal(50, 3) + 100
    np.testing.assert_allclose(es.variance(x).numpy(), x.numpy().var(axis=0))


def test_standardised() -> None:
    z = es.standardised(torch.stack([normal(40) * 5 + 3, torch.full((40,), 0.1)], dim=1))
    assert z[:, 0].mean().item() == pytest.approx(0, abs=1e-12)
    assert z[:, 0].square().mean().item() == pytest.approx(1)
    assert (z[:, 1] == 0).all()


@pytest.mark.parametrize(("n", "p"), [(50, 7), (20, 40), (1000, 30)])
def test_shrinkage_is_that_of_scikit_learn(n: int, p: int) -> None:
    z = es.standardised(normal(n, p) @ normal(p, p, seed=1))
    assert es.shrinkage(z) == pytest.approx(ledoit_wolf_shrinkage(z.numpy()))


def test_shrinkage_falls_with_samples() -> None:
    mix = normal(5, 5, seed=1)
    few, many = (es.shrinkage(es.standardised(normal(n, 5) @ mix)) for n in (20, 20_000))
    assert few > 50 * many > 0


def residual_slowly(z: Tensor) -> list[float]:
    """1 - r' R^-1 r by numpy, one unit at a time."""
    s = max(es.shrinkage(z), es.RIDGE)
    matrix = ((1 - s) * (z.T @ z / len(z)) + s * torch.eye(z.shape[1], dtype=F64)).numpy()
    found = []
    for u in range(len(matrix)):
        others = [v for v in range(len(matrix)) if v != u]
        r = matrix[others, u]
        found.append(1 - r @ np.linalg.inv(matrix[np.ix_(others, others)]) @ r)
    return found


@pytest.mark.parametrize(("n", "p"), [(60, 6), (15, 20)])
def test_residual_share_one_unit_at_a_time(n: int, p: int) -> None:
    z = es.standardised(normal(n, p) @ normal(p, p, seed=1))
    np.testing.assert_allclose(es.residual_share(z).numpy(), residual_slowly(z), rtol=1e-9)


def test_residual_share_of_two_is_one_minus_rho_squared() -> None:
    a, e = normal(20_000), normal(20_000, seed=1)
    z = es.standardised(torch.stack([a, 0.8 * a + 0.6 * e], dim=1))
    assert es.residual_share(z).tolist() == pytest.approx([0.36, 0.36], abs=0.01)


def test_copies_and_constants_leave_nothing() -> None:
    a, b = normal(500), normal(500, seed=1)
    z = es.standardised(torch.stack([a, 2 * a, b, torch.ones(500, dtype=F64)], dim=1))
    share = es.residual_share(z)
    assert share[:2].max() < 2.1 * es.shrinkage(z[:, :3]) < 0.05  # of copies: 1 - (1 - s)^2
    assert share[2] > 0.95
    assert share[3] == 0
    assert es.residual_share(torch.zeros(5, 2, dtype=F64)).tolist() == [0, 0]


@pytest.mark.parametrize("p", [3, 40])
def test_explained_by_the_textbook_formula(p: int) -> None:
    """Both ways of solving: more samples than columns, and fewer."""
    z, b = es.standardised(normal(30, 4)), es.standardised(normal(30, p, seed=1))
    cross, inner = (z.T @ b / 30).numpy(), (b.T @ b / 30).numpy() + 0.1 * np.eye(p)
    expected = [r @ np.linalg.inv(inner) @ r for r in cross]
    np.testing.assert_allclose(es.explained(z, b, 0.1).numpy(), expected, rtol=1e-9)


def test_noise_means_noise() -> None:
    """Noise that is really added to the columns explains as much as the formula says."""
    a = normal(40_000, 2)
    b = es.standardised(a @ normal(2, 3, seed=1))
    z = es.standardised(a)
    blurred = b + 0.5**0.5 * normal(40_000, 3, seed=2)
    seen = es.standardised(blurred)
    direct = es.explained(z, seen, 1e-9)
    torch.testing.assert_close(es.explained(z, b, 0.5), direct, rtol=0.02, atol=0)


def test_information_of_two_normal_variables() -> None:
    """-1/2 log(1 - rho^2 / (1 + noise)), whatever the scales."""
    a, e = normal(1000), normal(1000, seed=1)
    z, b = es.standardised(a[:, None]), es.standardised((0.8 * a + 0.6 * e)[:, None])
    rho = (z * b).mean().item()
    expected = -0.5 * math.log(1 - rho**2 / 1.01)
    assert es.noisy_information(z, b, 0.01).item() == pytest.approx(expected)
    moved = es.standardised(7 * a[:, None] - 3)
    assert es.noisy_information(moved, b, 0.01).item() == pytest.approx(expected)


def test_what_is_determined_stays_finite() -> None:
    z = es.standardised(normal(200, 2))
    found = es.noisy_information(z, z, 1e-6)
    assert torch.isfinite(found).all()
    assert found.tolist() == pytest.approx([-0.5 * math.log(1e-6)] * 2, rel=0.01)
