"""Image classifiers: plain, residual, dense, split, normalised and shared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.blocks import case, conv_bn, image

__all__ = ["CASES"]


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 40)
        self.fc2 = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x)), inplace=True), 2)
        x = F.leaky_relu(self.conv3(x), 0.1)
        x = x.view(-1, 32 * 4 * 4)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class BasicBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int = 1, pad: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        self.extra = n_out - n_in if pad else 0
        if (stride > 1 or n_in != n_out) and not pad:
            self.downsample = conv_bn(n_in, n_out, 1, stride, act=None)

    def forward(self, x: Tensor) -> Any:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.extra:
            half = self.extra // 2
            identity = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.extra - half))
        elif self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, n_in: int, width: int, n_out: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.reduce = conv_bn(n_in, width, 1)
        self.spatial = conv_bn(width, width, 3, stride, groups)
        self.expand = conv_bn(width, n_out, 1, act=None)
        self.shortcut = nn.Sequential()
        if stride > 1 or n_in != n_out:
            self.shortcut = conv_bn(n_in, n_out, 1, stride, act=None)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, layers: nn.Sequential, width: int, n_features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = layers
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(n_features, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layers(x))
        return self.fc(torch.flatten(x, 1))


def resnet_basic() -> nn.Module:
    blocks = [BasicBlock(16, 16), BasicBlock(16, 16), BasicBlock(16, 24, 2), BasicBlock(24, 24)]
    return ResNet(nn.Sequential(*blocks), 16, 24)


def resnet_padded() -> nn.Module:
    blocks = [BasicBlock(16, 16), BasicBlock(16, 32, 2, pad=True), BasicBlock(32, 32)]
    return ResNet(nn.Sequential(*blocks), 16, 32)


def resnet_bottleneck() -> nn.Module:
    blocks = [Bottleneck(16, 12, 32, 1), Bottleneck(32, 12, 32, 1), Bottleneck(32, 16, 48, 2)]
    return ResNet(nn.Sequential(*blocks), 16, 48)


def resnext() -> nn.Module:
    blocks = [Bottleneck(16, 32, 32, 1, 8), Bottleneck(32, 32, 32, 1, 8)]
    return ResNet(nn.Sequential(*blocks, Bottleneck(32, 48, 40, 2, 4)), 16, 40)


class DenseLayer(nn.Module):
    def __init__(self, n_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Any:
        x = torch.cat(features, 1)
        x = self.conv1(F.relu(self.norm1(x), inplace=True))
        return self.conv2(F.relu(self.norm2(x), inplace=True))


class DenseNet(nn.Module):
    def __init__(self, growth: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block1 = nn.ModuleList(DenseLayer(16 + i * growth, growth) for i in range(3))
        n = 16 + 3 * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 20, 1, bias=False), nn.AvgPool2d(2)
        )
        self.block2 = nn.ModuleList(DenseLayer(20 + i * growth, growth) for i in range(2))
        self.norm = nn.BatchNorm2d(20 + 2 * growth)
        self.classifier = nn.Linear(20 + 2 * growth, 10)

    def forward(self, x: Tensor) -> Any:
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(features))
        features = [self.transition(torch.cat(features, 1))]
        for layer in self.block2:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class InceptionBlock(nn.Module):
    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.branch1 = conv_bn(n_in, 12, 1)
        self.branch3 = nn.Sequential(conv_bn(n_in, 10, 1), conv_bn(10, 16))
        self.branch5 = nn.Sequential(conv_bn(n_in, 8, 1), conv_bn(8, 12), conv_bn(12, 12))
        self.branch_pool = conv_bn(n_in, 8, 1)

    def forward(self, x: Tensor) -> Any:
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branches = [self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(pooled)]
        return torch.cat(branches, dim=1)


def inception() -> nn.Module:
    stem = [conv_bn(3, 16, 3, 2), nn.MaxPool2d(3, 2, ceil_mode=True)]
    blocks = [InceptionBlock(16), InceptionBlock(48)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(48, 10)]
    return nn.Sequential(*stem, *blocks, *head)


class Res2Block(nn.Module):
    """The channels pass in four slices, each of which also sees the one before."""

    def __init__(self, n_in: int, width: int, scale: int = 4) -> None:
        super().__init__()
        self.width = width
        self.conv1 = conv_bn(n_in, width * scale, 1)
        self.convs = nn.ModuleList(conv_bn(width, width) for _ in range(scale - 1))
        self.conv3 = conv_bn(width * scale, n_in, 1, act=None)

    def forward(self, x: Tensor) -> Any:
        slices = torch.split(self.conv1(x), self.width, 1)
        out = [slices[0]]
        for i, conv in enumerate(self.convs):
            s = slices[i + 1] if i == 0 else out[-1] + slices[i + 1]
            out.append(conv(s))
        return F.relu(self.conv3(torch.cat(out, 1)) + x)


class C2f(nn.Module):
    """Half of the channels passes a chain of bottlenecks, and every stage is joined."""

    def __init__(self, n_in: int, n_out: int, n: int = 2) -> None:
        super().__init__()
        self.c = n_out // 2
        self.cv1 = conv_bn(n_in, 2 * self.c, 1, act=nn.SiLU)
        self.cv2 = conv_bn((2 + n) * self.c, n_out, 1, act=nn.SiLU)
        self.m = nn.ModuleList(
            nn.Sequential(conv_bn(self.c, self.c, act=nn.SiLU), conv_bn(self.c, self.c))
            for _ in range(n)
        )

    def forward(self, x: Tensor) -> Any:
        y = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class CSP(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.down = conv_bn(n, n, 3, 2, act=lambda: nn.LeakyReLU(0.1))
        self.block = conv_bn(n // 2, n // 2)
        self.merge = conv_bn(n, n, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.down(x)
        half = x.shape[1] // 2
        part1, part2 = x[:, :half], x[:, half:]
        return self.merge(torch.cat((part1, self.block(part2) + part2), dim=1))


def csp() -> nn.Module:
    blocks = [conv_bn(3, 16), C2f(16, 32), CSP(32), C2f(32, 24)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def res2net() -> nn.Module:
    blocks = [conv_bn(3, 24), Res2Block(24, 8), nn.MaxPool2d(2), Res2Block(24, 10)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(24, 10))


class StandardConv(nn.Conv2d):
    """A convolution with standardised weights and a learned gain."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 3) -> None:
        super().__init__(n_in, n_out, kernel, padding="same")
        self.gain = nn.Parameter(torch.rand(n_out, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True)
        fan_in = w[0].numel()
        scale = torch.rsqrt(torch.clamp(var * fan_in, min=1e-4)) * self.gain
        return F.conv2d(x, (w - mean) * scale, self.bias, 1, self.padding)


class NFBlock(nn.Module):
    def __init__(self, n: int, hidden: int, beta: float) -> None:
        super().__init__()
        self.conv1 = StandardConv(n, hidden)
        self.conv2 = StandardConv(hidden, n)
        self.skip_gain = nn.Parameter(torch.zeros(()))
        self.beta = beta

    def forward(self, x: Tensor) -> Any:
        out = F.gelu(x) * 1.7 * self.beta
        out = self.conv2(F.gelu(self.conv1(out)) * 1.7)
        return x + 0.2 * out * self.skip_gain


def nfnet() -> nn.Module:
    blocks = [StandardConv(3, 16), NFBlock(16, 24, 1.0), NFBlock(16, 24, 0.98), nn.GELU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class RepBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.dense = conv_bn(n_in, n_out, 3, act=None)
        self.pointwise = conv_bn(n_in, n_out, 1, act=None)
        self.identity = nn.BatchNorm2d(n_in) if n_in == n_out else None

    def forward(self, x: Tensor) -> Any:
        identity = 0 if self.identity is None else self.identity(x)
        return F.relu(self.dense(x) + self.pointwise(x) + identity)


def repvgg() -> nn.Module:
    blocks = [RepBlock(3, 16), RepBlock(16, 16), nn.MaxPool2d(2), RepBlock(16, 24)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def group_norm() -> nn.Module:
    def layer(n_in: int, n_out: int, groups: int) -> list[nn.Module]:
        conv = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        return [conv, nn.GroupNorm(groups, n_out), nn.SiLU()]

    layers = [*layer(3, 32, 8), nn.AvgPool2d(2), *layer(32, 24, 4), *layer(24, 16, 16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Reparametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.weight_norm(nn.Conv2d(3, 16, 3, padding=1))
        self.conv2 = parametrizations.spectral_norm(nn.Conv2d(16, 24, 3, stride=2, padding=1))
        self.fc1 = parametrizations.weight_norm(nn.Linear(24, 32))
        self.fc2 = parametrizations.spectral_norm(nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Any:
        x = F.leaky_relu(self.conv1(x), 0.2, inplace=True)
        x = F.leaky_relu(self.conv2(x), 0.2, inplace=True)
        return self.fc2(torch.tanh(self.fc1(x.mean([2, 3]))))


class Shared(nn.Module):
    """One block applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(conv_bn(16, 24), nn.Conv2d(24, 16, 3, padding=1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.fc(x.amax(dim=(2, 3)))


CASES = [
    case("plain-cnn", PlainCNN, image()),
    case("resnet-basic", resnet_basic, image(3, 32)),
    case("resnet-padded-shortcut", resnet_padded, image(3, 32)),
    case("resnet-bottleneck", resnet_bottleneck, image(3, 32)),
    case("resnext", resnext, image(3, 32)),
    case("densenet", DenseNet, image()),
    case("inception", inception, image(3, 32)),
    case("res2net", res2net, image()),
    case("csp", csp, image()),
    case("nfnet", nfnet, image()),
    case("repvgg", repvgg, image()),
    case("group-norm", group_norm, image()),
    case("weight-and-spectral-norm", Reparametrised, image()),
    case("shared-block", Shared, image()),
]
