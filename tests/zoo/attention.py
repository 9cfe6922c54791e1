"""Attention for images, sets and generic sequences, written the ways that people write it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.blocks import case, conv_bn, image, vectors

__all__ = ["CASES"]


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(F.gelu(self.fc1(x)))


class VitAttention(nn.Module):
    """Fused qkv, normalised queries and keys, fused kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Any:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class VitBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = VitAttention(dim, heads), Mlp(dim, 2 * dim)
        self.ls1 = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Any:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.Sequential(VitBlock(dim, heads), VitBlock(dim, heads))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0])


def windows(x: Tensor, w: int) -> Tensor:
    B, H, W, C = x.shape
    x = x.view(B, H // w, w, W // w, w, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, C)


def unwindow(x: Tensor, w: int, H: int, W: int) -> Tensor:
    B = int(x.shape[0] / (H * W / w / w))
    x = x.view(B, H // w, W // w, w, w, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    """Explicit softmax in windows, with a table of relative positions."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, w: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.table = nn.Parameter(torch.randn((2 * w - 1) ** 2, heads) * 0.1)
        axis = torch.arange(w)
        coords = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + w - 1
        index = relative[:, :, 0] * (2 * w - 1) + relative[:, :, 1]
        self.register_buffer("relative_position_index", index)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            nw = mask.shape[0]
            attn = attn.view(B_ // nw, nw, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class CosineWindowAttention(nn.Module):
    """Cosine similarity with a learned, clamped scale per head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.logit_scale = nn.Parameter(torch.log(10 * torch.rand(heads, 1, 1) + 5))
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        B_, N, C = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(B_, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        if mask is not None:
            attn = attn.view(-1, len(mask), self.num_heads, N, N) + mask[None, :, None]
            attn = attn.view(B_, self.num_heads, N, N)
        x = (F.softmax(attn, dim=-1) @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


def shift_mask(size: int, w: int, shift: int) -> Tensor:
    areas = torch.zeros(1, size, size, 1)
    slices = (slice(0, -w), slice(-w, -shift), slice(-shift, None))
    for i, rows in enumerate(slices):
        for j, cols in enumerate(slices):
            areas[:, rows, cols] = 3 * i + j
    area = windows(areas, w).view(-1, w * w)
    return (area.unsqueeze(1) != area.unsqueeze(2)).float() * -100.0


class SwinBlock(nn.Module):
    attn_mask: Tensor | None

    def __init__(self, dim: int, heads: int, size: int, shift: int, cosine: bool) -> None:
        super().__init__()
        self.size, self.shift, self.w, self.cosine = size, shift, 4, cosine
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        make = CosineWindowAttention(dim, heads) if cosine else WindowAttention(dim, heads, 4)
        self.attn, self.mlp = make, Mlp(dim, 2 * dim)
        self.register_buffer("attn_mask", shift_mask(size, 4, shift) if shift else None)

    def forward(self, x: Tensor) -> Any:
        H = W = self.size
        B, _, C = x.shape
        y = x if self.cosine else self.norm1(x)
        y = y.view(B, H, W, C)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = self.attn(windows(y, self.w), self.attn_mask).view(-1, self.w, self.w, C)
        y = unwindow(y, self.w, H, W)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        y = y.view(B, H * W, C)
        if self.cosine:  # norms after the branch
            x = x + self.norm1(y)
            return x + self.norm2(self.mlp(x))
        x = x + y
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    def __init__(self, cosine: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 2, stride=2)
        self.stage1 = nn.Sequential(*(SwinBlock(24, 3, 8, s, cosine) for s in (0, 2)))
        self.merge_norm = nn.LayerNorm(96)
        self.reduction = nn.Linear(96, 32, bias=False)
        self.stage2 = SwinBlock(32, 4, 4, 0, cosine)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stage1(self.embed(x).flatten(2).transpose(1, 2))
        B = x.shape[0]
        x = x.view(B, 8, 8, 24)
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        x = torch.cat(parts, -1).view(B, -1, 4 * 24)
        x = self.norm(self.stage2(self.reduction(self.merge_norm(x))))
        return self.head(F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1))


class ExplicitAttention(nn.Module):
    """Head sizes written as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 48)
        self.out, self.head = nn.Linear(48, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.inp(x))
        q = self.q(h).view(-1, 6, 4, 8).transpose(1, 2)
        k = self.k(h).view(-1, 6, 4, 8).permute(0, 2, 3, 1)
        v = self.v(h).view(-1, 6, 4, 12).transpose(1, 2)
        weights = torch.softmax(torch.matmul(q, k) / math.sqrt(8), dim=-1)
        context = torch.matmul(weights, v).transpose(1, 2).contiguous().view(-1, 6, 48)
        h = h + self.out(context)
        return self.head(h.max(dim=1).values)


class LinearAttention(nn.Module):
    """Kernelised attention by einsum, then a gated linear unit."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.h = heads
        self.embed = nn.Linear(10, dim)
        self.to_qkv = nn.Linear(dim, dim * 3, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.glu_in, self.glu_out = nn.Linear(dim, 80), nn.Linear(40, dim)
        self.head = nn.Linear(dim, 6)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        b, n, d = x.shape
        q, k, v = (
            t.view(b, n, self.h, d // self.h).transpose(1, 2)
            for t in self.to_qkv(x).chunk(3, dim=-1)
        )
        q, k = F.elu(q) + 1, k.softmax(dim=-2)
        context = torch.einsum("bhnd,bhne->bhde", k, v)
        out = torch.einsum("bhnd,bhde->bhne", q, context)
        x = x + self.to_out(out.transpose(1, 2).reshape(b, n, d))
        x = x + self.glu_out(F.glu(self.glu_in(x), dim=-1))
        return self.head(x.mean(1))


class SpatialGating(nn.Module):
    def __init__(self, hidden: int, length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.spatial = nn.Conv1d(length, length, kernel_size=1)

    def forward(self, x: Tensor) -> Any:
        u, v = x.chunk(2, dim=-1)
        return u * self.spatial(self.norm(v))


class GMLP(nn.Module):
    def __init__(self, dim: int = 20, hidden: int = 32, length: int = 9) -> None:
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(dim, 2 * hidden) for _ in range(2))
        self.gate = nn.ModuleList(SpatialGating(hidden, length) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(2))
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        for norm, up, gate, down in zip(self.norms, self.up, self.gate, self.down, strict=True):
            x = x + down(gate(F.gelu(up(norm(x)))))
        return self.head(x).mean(dim=1)


class CBAM(nn.Module):
    """Channel gates from mean and maximum, then a spatial gate from mean and maximum."""

    def __init__(self, n: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(n, hidden), nn.ReLU(), nn.Linear(hidden, n))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        avg = self.mlp(F.adaptive_avg_pool2d(x, 1).view(b, c))
        top = self.mlp(F.adaptive_max_pool2d(x, 1).view(b, c))
        x = x * torch.sigmoid(avg + top).view(b, c, 1, 1)
        mean, peak = torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]
        return x * torch.sigmoid(self.spatial(torch.cat([mean, peak], dim=1)))


def cbam() -> nn.Module:
    layers = [conv_bn(3, 16), conv_bn(16, 24), CBAM(24, 12), conv_bn(24, 32, 3, 2), CBAM(32, 10)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class NonLocal(nn.Module):
    """Attention over positions between convolutions, as in generative models."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv_bn(3, 24, 3, 2), nn.GroupNorm(4, 24)
        self.theta, self.phi = nn.Conv2d(24, 12, 1), nn.Conv2d(24, 12, 1)
        self.g, self.o = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 24, 1)
        self.gamma = nn.Parameter(torch.tensor(0.5))
        self.last = nn.Conv2d(24, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        h = self.norm(x)
        theta = self.theta(h).view(-1, 12, 64)
        phi = F.max_pool2d(self.phi(h), 2).view(-1, 12, 16)
        g = F.max_pool2d(self.g(h), 2).view(-1, 16, 16)
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        o = self.o(torch.bmm(g, beta.transpose(1, 2)).view(-1, 16, 8, 8))
        return self.last(x + self.gamma * o)


CASES = [
    case("vit", ViT, image()),
    case("swin", Swin, image()),
    case("swin-cosine", lambda: Swin(cosine=True), image()),
    case("explicit-attention", ExplicitAttention, vectors(6, 12)),
    case("linear-attention-glu", LinearAttention, vectors(7, 10)),
    case("gmlp", GMLP, vectors(9, 6)),
    case("cbam", cbam, image()),
    case("non-local", NonLocal, image()),
]
