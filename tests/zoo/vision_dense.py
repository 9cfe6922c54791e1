"""Images to images or boxes: segmentation, super-resolution, style, detection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.blocks import case, conv_bn, image

__all__ = ["CASES"]


def double_conv(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(conv_bn(n_in, n_out), conv_bn(n_out, n_out))


class UNet(nn.Module):
    """Upsampling by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = double_conv(3, 12)
        self.down1, self.down2 = double_conv(12, 16), double_conv(16, 24)
        self.up1 = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.conv1 = double_conv(32, 16)
        self.up2 = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.conv2 = double_conv(24, 12)
        self.outc = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        x = self.conv1(torch.cat([x2, self.up1(x3)], dim=1))
        return self.outc(self.conv2(torch.cat([x1, self.up2(x)], dim=1)))


class BilinearUNet(nn.Module):
    """Upsampling by interpolation, with the padding of uneven sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = double_conv(3, 12)
        self.down1, self.down2 = double_conv(12, 16), double_conv(16, 20)
        self.conv1, self.conv2 = double_conv(36, 16), double_conv(28, 12)
        self.outc = nn.Conv2d(12, 1, 1)

    def up(self, low: Tensor, skip: Tensor) -> Tensor:
        low = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=True)
        dy, dx = skip.size(2) - low.size(2), skip.size(3) - low.size(3)
        low = F.pad(low, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([skip, low], dim=1)

    def forward(self, x: Tensor) -> Any:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        x = self.conv2(self.up(self.conv1(self.up(x3, x2)), x1))
        return torch.sigmoid(self.outc(x))


class FPN(nn.Module):
    """Three feature maps out, as a tuple: the pyramid itself is fixed, the backbone is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.stages = nn.ModuleList([conv_bn(16, 16), conv_bn(16, 24, 3, 2), conv_bn(24, 32, 3, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(n, 20, 1) for n in (16, 24, 32))
        self.smooth = nn.ModuleList(nn.Conv2d(20, 12, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        maps = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            size = maps[i - 1].shape[-2:]
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=size, mode="nearest")
        return tuple(s(m) for s, m in zip(self.smooth, maps, strict=True))


class SuperResolution(nn.Module):
    """Residual blocks, then pixel shuffles; a long skip from the enlarged input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.act = nn.PReLU(16)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 24, 3, padding=1), nn.PReLU(), nn.Conv2d(24, 16, 3, padding=1)
            )
            for _ in range(2)
        )
        self.up1 = nn.Conv2d(16, 16 * 4, 3, padding=1)
        self.up2 = nn.Conv2d(16, 16 * 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        first = out = self.act(self.first(x))
        for block in self.body:
            out = out + block(out).mul(0.2)
        out = out + first
        out = self.shuffle(F.relu(self.up1(out)))
        out = F.relu(F.pixel_shuffle(self.up2(out), 2))
        return self.last(out) + F.interpolate(x, scale_factor=4, mode="bicubic")


class StyleBlock(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv1, self.conv2 = nn.Conv2d(n, 24, 3), nn.Conv2d(24, n, 3)
        self.in1 = nn.InstanceNorm2d(24, affine=True)
        self.in2 = nn.InstanceNorm2d(n, affine=True)

    def forward(self, x: Tensor) -> Any:
        out = F.relu(self.in1(self.conv1(self.pad(x))))
        return self.in2(self.conv2(self.pad(out))) + x


class StyleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(
            nn.ReflectionPad2d(4), nn.Conv2d(3, 12, 9), nn.InstanceNorm2d(12), nn.ReLU()
        )
        self.down = nn.Conv2d(12, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm = nn.InstanceNorm2d(16, affine=True)
        self.blocks = nn.Sequential(StyleBlock(16), StyleBlock(16))
        self.dec = nn.Conv2d(16, 12, 3, padding=1)
        self.out = nn.Conv2d(12, 3, 9, padding=4)

    def forward(self, x: Tensor) -> Any:
        y = self.blocks(F.relu_(self.norm(self.down(self.enc(x)))))
        y = F.relu(self.dec(F.interpolate(y, scale_factor=2)))
        return torch.tanh(self.out(y))


class Detector(nn.Module):
    """Class and box maps at two scales from one head, as a dict of lists."""

    def __init__(self, anchors: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.stem = conv_bn(3, 16, 3, 2)
        self.down = conv_bn(16, 24, 3, 2)
        self.align = nn.Conv2d(16, 24, 1)
        self.tower = nn.Sequential(nn.Conv2d(24, 20, 3, padding=1), nn.GroupNorm(5, 20), nn.ReLU())
        self.cls = nn.Conv2d(20, anchors * classes, 3, padding=1)
        self.box = nn.Conv2d(20, anchors * 4, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        c1 = self.stem(x)
        c2 = self.down(c1)
        out: dict[str, list[Tensor]] = {"logits": [], "boxes": []}
        for i, feature in enumerate((self.align(c1), c2)):
            t = self.tower(feature)
            logits = self.cls(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, self.classes)
            boxes = self.box(t).permute(0, 2, 3, 1).reshape(t.shape[0], -1, 4)
            out["logits"].append(logits.sigmoid())
            out["boxes"].append(torch.exp(boxes * self.scales[i]))
        return out


class ASPP(nn.Module):
    """Dilated branches and an image-level one, joined; upsampled to the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 24, 3, 2))
        self.b0 = conv_bn(24, 12, 1)
        self.dilated = nn.ModuleList(
            nn.Conv2d(24, 12, 3, padding=r, dilation=r, bias=False) for r in (1, 2)
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 12, 1), nn.ReLU())
        self.project = conv_bn(48, 20, 1)
        self.low = conv_bn(16, 8, 1)
        self.classifier = nn.Conv2d(28, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        low = self.backbone[0](x)
        y = self.backbone[1](low)
        pooled = F.interpolate(self.pool(y), size=y.shape[-2:], mode="bilinear")
        branches = [self.b0(y), *(F.relu(conv(y)) for conv in self.dilated), pooled]
        y = self.project(torch.cat(branches, dim=1))
        y = F.interpolate(y, size=low.shape[-2:], mode="bilinear", align_corners=False)
        y = self.classifier(torch.cat([y, self.low(low)], dim=1))
        return F.interpolate(y, size=size, mode="bilinear", align_corners=False)


class HRNet(nn.Module):
    """Two resolutions side by side that exchange what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.split = conv_bn(16, 24, 3, 2)
        self.high = nn.ModuleList(conv_bn(16, 16) for _ in range(2))
        self.low = nn.ModuleList(conv_bn(24, 24) for _ in range(2))
        self.up = nn.ModuleList(conv_bn(24, 16, 1, act=None) for _ in range(2))
        self.down = nn.ModuleList(conv_bn(16, 24, 3, 2, act=None) for _ in range(2))
        self.last = nn.Conv2d(40, 6, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.stem(x)
        b = self.split(a)
        for i in range(2):
            a, b = self.high[i](a), self.low[i](b)
            up = F.interpolate(self.up[i](b), scale_factor=2, mode="nearest")
            a, b = F.relu(a + up), F.relu(b + self.down[i](a))
        b = F.interpolate(b, size=(a.size(2), a.size(3)), mode="bilinear")
        return self.last(torch.cat([a, b], 1))


CASES = [
    case("unet-transposed", UNet, image()),
    case("unet-interpolate", BilinearUNet, image(3, 18)),
    case("fpn", FPN, image(3, 32)),
    case("pixel-shuffle", SuperResolution, image(3, 8)),
    case("instance-norm-style", StyleNet, image()),
    case("detector", Detector, image()),
    case("aspp", ASPP, image(3, 32)),
    case("hrnet", HRNet, image()),
]
