"""The networks of the built-in tasks: plain modules, initialised from the global torch seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from secateurs.errors import FileFormatError

__all__ = [
    "MLP",
    "DigitsCNN",
    "LeNet5",
    "MiniLM",
    "RecurrentClassifier",
    "ResNet20",
    "TextTransformer",
]


class MLP(nn.Module):
    """Fully connected layers with ReLU between them; each sample is flattened first.

    Args:
        sizes: features of the input, of each hidden layer, and of the output.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x.flatten(1))
        return out


class DigitsCNN(nn.Module):
    """Three convolutions for (n, 1, 8, 8): the second one is a residual branch of the first."""

    def __init__(self, width: int = 32, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width * 4 * 4, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(self.pool(x))))
        out: Tensor = self.head(x.flatten(1))
        return out


class LeNet5(nn.Module):
    """LeNet-5 in the 20-50-500 form of Caffe for (n, 1, 28, 28): 431,080 parameters."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        out: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return out


class _Block(nn.Module):
    """Two 3x3 convolutions plus a shortcut; a 1x1 convolution where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(branch)) + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet-20 of the CIFAR kind (16-32-64 channels, three blocks each) for (n, 1, h, w)."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        blocks, n_in = [], 16
        for n_out, stride in [(16, 1), (32, 2), (64, 2)]:
            blocks += [_Block(n_in, n_out, stride), *[_Block(n_out, n_out, 1) for _ in range(2)]]
            n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(n_in, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))  # (n, c, h, w) -> (n, 10)
        return out


class RecurrentClassifier(nn.Module):
    """An LSTM or GRU over (n, time, features); the last step goes to a linear layer."""

    def __init__(
        self, cell: type[nn.LSTM] | type[nn.GRU], n_features: int, hidden: int, n_classes: int
    ) -> None:
        super().__init__()
        self.rnn = cell(n_features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(x)[0]  # (n, time, hidden)
        out: Tensor = self.head(states[:, -1])
        return out


class _TextBlock(nn.Module):
    """One encoder layer: attention, then a feed-forward network, each behind its own layer norm."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = [nn.Linear(width, width) for _ in range(3)]
        self.out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)  # (n, time, width); mask: (n, 1, 1, time), True = may be looked at
        q, k, v = [
            layer(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (n, heads, time, d)
            for layer in (self.query, self.key, self.value)
        ]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        y = self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        out: Tensor = x + self.dropout(y)
        return out


class TextTransformer(nn.Module):
    """A Transformer encoder over token ids (n, time), 0 = padding; the mean token is classified."""

    def __init__(
        self,
        n_tokens: int,
        length: int,
        *,
        width: int = 64,
        heads: int = 4,
        hidden: int = 256,
        layers: int = 2,
        dropout: float = 0.2,
        n_classes: int = 2,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            [_TextBlock(width, heads, hidden, dropout) for _ in range(layers)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, ids: Tensor) -> Tensor:
        real = ids != 0  # (n, time)
        x = self.dropout(self.tokens(ids) + self.positions)
        for block in self.blocks:
            x = block(x, real[:, None, None, :])
        out: Tensor = self.head(_mean_of_real(self.norm(x), real))
        return out


def _mean_of_real(x: Tensor, real: Tensor) -> Tensor:
    """Mean over the tokens that are no padding: (n, time, d), (n, time) -> (n, d)."""
    weights = real.unsqueeze(2).to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


class MiniLM(nn.Module):
    """The encoder all-MiniLM-L6-v2 with its pretrained weights over ids (n, time), 0 = padding.

    The mean token is classified by a linear layer that is initialised from the global torch seed.

    Args:
        folder: holds config.json and model.safetensors.
        n_classes: outputs.

    Raises:
        FileFormatError: the file of the weights is damaged or of another network.
    """

    def __init__(self, folder: Path, n_classes: int = 2) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig.from_json_file(folder / "config.json")
        self.encoder = BertModel(config, add_pooling_layer=False)
        path = folder / "model.safetensors"
        try:
            held = load_file(path)  # also of parts that are not used here
            self.encoder.load_state_dict({name: held[name] for name in self.encoder.state_dict()})
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise FileFormatError(f"{path}: not the weights of this encoder: {error}") from error
        self.head = nn.Linear(config.hidden_size, n_classes)

    def forward(self, ids: Tensor) -> Tensor:
        real = ids != 0  # (n, time)
        states = self.encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
        out: Tensor = self.head(_mean_of_real(states, real))
        return out
