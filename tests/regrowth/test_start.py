"""Random masks: counts, shares and the draw."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.errors import BudgetError, ConfigError
from secateurs.regrowth import random_masks

SHAPES = {"conv": (8, 4, 3, 3), "wide": (64, 72), "out": (10, 64)}


def counts(density: float, allocation: str) -> dict[str, int]:
    masks = random_masks(SHAPES, density, allocation=allocation)
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_the_density_is_exact() -> None:
    for allocation in ("erk", "uniform"):
        assert sum(counts(0.1, allocation).values()) == (288 + 4608 + 640) // 10
    assert counts(0.125, "uniform") == {"conv": 36, "wide": 576, "out": 80}


def test_erk_follows_the_shapes() -> None:
    eps = 553 / (18 + 136 + 74)  # sums of dims: no layer would exceed 1
    assert eps * 18 < 288
    found = counts(0.1, "erk")
    for name, total in (("conv", 18), ("wide", 136), ("out", 74)):
        assert abs(found[name] - eps * total) < 1


def test_the_draw_is_even_and_repeats() -> None:
    drawn = torch.zeros(8)
    for seed in range(100):
        mask = random_masks({"w": (2, 4)}, 0.5, seed=seed)["w"]
        assert torch.equal(mask, random_masks({"w": (2, 4)}, 0.5, seed=seed)["w"])
        drawn += mask.reshape(-1)
    assert drawn.sum() == 400
    assert bool(((drawn > 30) & (drawn < 70)).all())  # 50 expected, standard deviation 5


def test_of_a_model_matrices_that_train_get_masks() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 2))
    model.get_parameter("3.weight").requires_grad_(False)
    model.append(model[2])  # tied: once
    masks = random_masks(model, 0.5)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "0.weight": (6, 4),
        "2.weight": (6, 6),
    }
    assert sum(int(mask.sum()) for mask in masks.values()) == 30


def test_density_one_keeps_everything() -> None:
    assert all(mask.all() for mask in random_masks(SHAPES, 1).values())


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ConfigError, match=r"density must be in \(0, 1\], got 90"):
        random_masks(SHAPES, 90)
    with pytest.raises(ConfigError, match="unknown allocation 'erdos'"):
        random_masks(SHAPES, 0.1, allocation="erdos")
    with pytest.raises(ConfigError, match="no trained parameter with two dimensions"):
        random_masks(nn.BatchNorm1d(3), 0.5)
    with pytest.raises(BudgetError):
        random_masks(SHAPES, 1e-4)
