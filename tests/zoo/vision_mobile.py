"""Small and modern image classifiers: depthwise, shuffled, gated, patch-wise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.blocks import SqueezeExcite, case, conv_bn, image

__all__ = ["CASES"]


def head(channels: int, classes: int = 10) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def mobilenet_v1() -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 16, 3, 2)]
    for n_in, n_out, stride in [(16, 24, 1), (24, 32, 2), (32, 32, 1)]:
        layers += [conv_bn(n_in, n_in, 3, stride, groups=n_in), conv_bn(n_in, n_out, 1)]
    return nn.Sequential(*layers, *head(32))


class InvertedResidual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = n_in * expand
        self.use_res = stride == 1 and n_in == n_out
        layers = [] if expand == 1 else [conv_bn(n_in, hidden, 1, act=nn.ReLU6)]
        layers.append(conv_bn(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6))
        self.conv = nn.Sequential(*layers, conv_bn(hidden, n_out, 1, act=None))

    def forward(self, x: Tensor) -> Any:
        if self.use_res:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        plan = [(16, 12, 1, 1), (12, 12, 1, 3), (12, 20, 2, 3), (20, 20, 1, 2)]
        blocks = [InvertedResidual(*row) for row in plan]
        stem, last = conv_bn(3, 16, 3, 2, act=nn.ReLU6), conv_bn(20, 40, 1, act=nn.ReLU6)
        self.features = nn.Sequential(stem, *blocks, last)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x).mean([2, 3]))


class MobileBlock(nn.Module):
    """Expansion, depthwise, squeeze and excitation, projection: v3 and EfficientNet."""

    def __init__(self, n_in: int, hidden: int, n_out: int, stride: int, swish: bool) -> None:
        super().__init__()
        act = nn.SiLU if swish else nn.Hardswish
        self.expand = conv_bn(n_in, hidden, 1, act=act)
        self.depthwise = conv_bn(hidden, hidden, 5, stride, groups=hidden, act=act)
        self.se = SqueezeExcite(hidden, 8, nn.Sigmoid if swish else nn.Hardsigmoid)
        self.project = conv_bn(hidden, n_out, 1, act=None)
        self.skip = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Any:
        out = self.project(self.se(self.depthwise(self.expand(x))))
        if self.skip:
            out = out + x
        return out


def mobilenet_v3() -> nn.Module:
    blocks = [MobileBlock(16, 24, 16, 1, False), MobileBlock(16, 32, 24, 2, False)]
    last = conv_bn(24, 40, 1, act=nn.Hardswish)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    mlp = [nn.Linear(40, 48), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(48, 10)]
    return nn.Sequential(conv_bn(3, 16, 3, 2, act=nn.Hardswish), *blocks, last, *pool, *mlp)


def efficientnet() -> nn.Module:
    blocks = [MobileBlock(12, 24, 12, 1, True), MobileBlock(12, 36, 20, 2, True)]
    stem, last = conv_bn(3, 12, 3, 2, act=nn.SiLU), conv_bn(20, 40, 1, act=nn.SiLU)
    return nn.Sequential(stem, *blocks, MobileBlock(20, 40, 20, 1, True), last, *head(40))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, -1, height, width)


class ShuffleV1(nn.Module):
    def __init__(self, n: int, stride: int, groups: int = 4) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.compress = conv_bn(n, n, 1, groups=groups)
        self.depthwise = conv_bn(n, n, 3, stride, groups=n, act=None)
        self.expand = conv_bn(n, n, 1, groups=groups, act=None)

    def forward(self, x: Tensor) -> Any:
        out = channel_shuffle(self.compress(x), self.groups)
        out = self.expand(self.depthwise(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu(out + x)


def shufflenet_v1() -> nn.Module:
    blocks = [ShuffleV1(32, 1), ShuffleV1(32, 2), ShuffleV1(64, 1)]
    return nn.Sequential(conv_bn(3, 32), *blocks, *head(64))


class ShuffleV2(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        half = n_out // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                conv_bn(n_in, n_in, 3, stride, groups=n_in, act=None), conv_bn(n_in, half, 1)
            )
        inner = n_in if stride > 1 else half
        self.branch2 = nn.Sequential(
            conv_bn(inner, half, 1),
            conv_bn(half, half, 3, stride, groups=half, act=None),
            conv_bn(half, half, 1),
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


def shufflenet_v2() -> nn.Module:
    blocks = [ShuffleV2(24, 32, 2), ShuffleV2(32, 32, 1), ShuffleV2(32, 32, 1)]
    return nn.Sequential(conv_bn(3, 24), *blocks, conv_bn(32, 48, 1), *head(48))


class Ghost(nn.Module):
    """Half of the outputs are cheap depthwise functions of the other half."""

    def __init__(self, n_in: int, n_out: int, relu: bool = True) -> None:
        super().__init__()
        self.n_out = n_out
        self.primary = conv_bn(n_in, (n_out + 1) // 2, 1)
        made = (n_out + 1) // 2
        self.cheap = conv_bn(made, made, 3, groups=made)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        out = torch.cat([x1, self.cheap(x1)], dim=1)
        out = out[:, : self.n_out, :, :]
        return F.relu(out) if self.relu else out


class GhostBottleneck(nn.Module):
    def __init__(self, n: int, hidden: int) -> None:
        super().__init__()
        self.ghost1 = Ghost(n, hidden)
        self.se = SqueezeExcite(hidden, 8, nn.Hardsigmoid)
        self.ghost2 = Ghost(hidden, n, relu=False)

    def forward(self, x: Tensor) -> Any:
        return self.ghost2(self.se(self.ghost1(x))) + x


def ghostnet() -> nn.Module:
    blocks = [GhostBottleneck(20, 32), nn.AvgPool2d(2), GhostBottleneck(20, 31)]
    return nn.Sequential(conv_bn(3, 20, 3, 2), *blocks, *head(20))


def depth_multiplier() -> nn.Module:
    """Depthwise convolutions that make two or three channels of each."""
    layers = [conv_bn(3, 12), conv_bn(12, 24, 3, groups=12), conv_bn(24, 16, 1)]
    return nn.Sequential(*layers, nn.Conv2d(16, 48, 3, groups=16), nn.ReLU(), *head(48))


class MixerBlock(nn.Module):
    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(patches, 24), nn.GELU(), nn.Linear(24, patches))
        self.channels = nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim))

    def forward(self, x: Tensor) -> Any:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 20, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(16, 20), MixerBlock(16, 20))
        self.norm = nn.LayerNorm(20)
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.blocks(x)).mean(dim=1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 3 * dim)
        self.pwconv2 = nn.Linear(3 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Any:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
        return shortcut + x.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 2, stride=2), LayerNorm2d(16, eps=1e-6)]
    down = [LayerNorm2d(16, eps=1e-6), nn.Conv2d(16, 24, 2, stride=2)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.LayerNorm(24), nn.Linear(24, 10)]
    return nn.Sequential(*stem, ConvNeXtBlock(16), *down, ConvNeXtBlock(24), *pool)


CASES = [
    case("mobilenet-v1", mobilenet_v1, image()),
    case("mobilenet-v2", MobileNetV2, image()),
    case("mobilenet-v3", mobilenet_v3, image()),
    case("efficientnet", efficientnet, image()),
    case("shufflenet-v1", shufflenet_v1, image()),
    case("shufflenet-v2", shufflenet_v2, image()),
    case("ghostnet", ghostnet, image()),
    case("depth-multiplier", depth_multiplier, image()),
    case("mlp-mixer", Mixer, image()),
    case("convnext", convnext, image()),
]
