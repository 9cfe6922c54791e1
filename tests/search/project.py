"""A user's own project: two clouds of points, a small network, and a way to train it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.finetuning import Finetune, finetune
from secateurs.types import Batches

N_TRAIN, N_VALIDATION, N_TEST = 96, 48, 40


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n points of two classes that overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    x = torch.randn(n, 6, generator=generator)
    x[:, 0] += 3.0 * labels
    return x, labels


def batched(part: tuple[Tensor, Tensor], size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Consecutive batches."""
    return list(zip(torch.split(part[0], size), torch.split(part[1], size), strict=True))


def untrained() -> nn.Module:
    """6-16-2."""
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def fit(batches: Batches) -> nn.Module:
    """A new network, trained on these batches."""
    return _trained(batches)


def _trained(batches: Batches) -> nn.Module:
    model = untrained()
    finetune(model, batches, functional.cross_entropy, Finetune(epochs=4, lr=0.02))
    return model


def model() -> nn.Module:
    """The dense network."""
    return _trained(batched(points(N_TRAIN, 0))).eval()


def data() -> dict[str, Any]:
    """Splits, with groups of four samples."""
    return {
        "train": batched(points(N_TRAIN, 0)),
        "validation": batched(points(N_VALIDATION, 1)),
        "test": batched(points(N_TEST, 2)),
        "groups": {
            "train": [f"t{i // 4}" for i in range(N_TRAIN)],
            "validation": [f"v{i // 4}" for i in range(N_VALIDATION)],
        },
    }


def leaking() -> dict[str, Any]:
    """Its validation data hold three test samples."""
    splits = data()
    x, labels = points(N_TEST, 2)
    splits["validation"] = [*splits["validation"], (x[[5, 0, 9]], 1 - labels[[5, 0, 9]])]
    return splits


def wrong_fit(batches: Batches) -> nn.Module:
    """Another architecture."""
    return nn.Linear(6, 2)
