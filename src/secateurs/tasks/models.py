"""The networks of the built-in tasks: plain modules, initialised from the global torch seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "DigitsCNN", "LeNet5", "RecurrentClassifier", "ResNet20"]


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
