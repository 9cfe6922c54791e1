"""Full-size architectures with random weights, for what needs their shapes only."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["densenet", "image", "llama", "resnet", "tokens", "transformers_model"]


def norm_conv(i: int, o: int, k: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut."""

    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__()
        o = 4 * width
        self.a, self.b = norm_conv(i, width, 1), norm_conv(width, width, 3, stride)
        self.c = norm_conv(width, o, 1)
        self.shortcut = norm_conv(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet(blocks: tuple[int, ...]) -> nn.Module:
    """ResNet-50 is (3, 4, 6, 3), ResNet-152 is (3, 8, 36, 3)."""
    parts: list[nn.Module] = [norm_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    i = 64
    for stage, n in enumerate(blocks):
        for block in range(n):
            width, stride = 64 * 2**stage, 2 if stage and not block else 1
            parts.append(Bottleneck(i, width, stride))
            i = 4 * width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 1000))


class Dense(nn.Module):
    """Norm, 1x1, norm, 3x3, and the input beside the result."""

    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(i), nn.BatchNorm2d(4 * growth)
        self.squeeze = nn.Conv2d(i, 4 * growth, 1, bias=False)
        self.grow = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(torch.relu(self.a(x)))
        return torch.cat([x, self.grow(torch.relu(self.b(y)))], 1)


def densenet(blocks: tuple[int, ...], growth: int = 32) -> nn.Module:
    """DenseNet-201 is (6, 12, 48, 32)."""
    width = 2 * growth
    parts: list[nn.Module] = [norm_conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage, n in enumerate(blocks):
        for _ in range(n):
            parts.append(Dense(width, growth))
            width += growth
        parts += [nn.BatchNorm2d(width), nn.ReLU()]
        if stage + 1 < len(blocks):
            parts += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def transformers_model(name: str, **settings: Any) -> nn.Module:
    """A class of the transformers library with random weights."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = importlib.import_module("transformers")
    config = getattr(library, name.split("For")[0] + "Config")(**settings)
    model: nn.Module = getattr(library, name)(config)
    return model


def llama(layers: int, hidden: int, **settings: Any) -> nn.Module:
    shape = {
        "vocab_size": 1000,
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    return transformers_model("LlamaForCausalLM", **{**shape, **settings})


def image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(batch * 32).view(batch, 32) % 1000}
