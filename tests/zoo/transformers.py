"""Encoders, decoders and mixtures: the modules of the framework and hand-written ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.types import Inputs
from tests.zoo.blocks import case, image, tokens, vectors

__all__ = ["CASES"]


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` with or without the attention weights."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.inp = nn.Linear(10, 32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.inp(x)
        y, _ = self.attn(h, h, h, need_weights=self.need_weights)
        return self.head(F.relu(h + y).mean(dim=1))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 32)
        self.pos = nn.Parameter(torch.randn(8, 32) * 0.1)
        layer = nn.TransformerEncoderLayer(
            32, 4, 48, 0.1, F.gelu, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) * math.sqrt(32) + self.pos[: ids.shape[1]]
        return self.head(self.encoder(x)[:, 0])


class Translator(nn.Module):
    """`nn.Transformer`, source and target, sequence first, sinusoids as a constant.

    Without `hint` the module looks at the values of the mask to see whether it is causal.
    """

    pe: Tensor

    def __init__(self, hint: bool = True, dim: int = 32) -> None:
        super().__init__()
        self.hint = hint or None
        self.src, self.tgt = nn.Embedding(25, dim), nn.Embedding(28, dim)
        position = torch.arange(16).unsqueeze(1)
        div = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        pe = torch.zeros(16, 1, dim)
        pe[:, 0, 0::2], pe[:, 0, 1::2] = torch.sin(position * div), torch.cos(position * div)
        self.register_buffer("pe", pe, persistent=False)
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, 4, 40), 1, nn.LayerNorm(dim), enable_nested_tensor=False
        )
        self.transformer = nn.Transformer(dim, 4, 1, 1, 40, 0.1, custom_encoder=encoder)
        self.generator = nn.Linear(dim, 28)

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        s, t = self.src(src.t()), self.tgt(tgt.t())
        s, t = s + self.pe[: s.size(0)], t + self.pe[: t.size(0)]
        mask = torch.triu(torch.full((t.size(0), t.size(0)), float("-inf")), diagonal=1)
        out = self.transformer(s, t, tgt_mask=mask, tgt_is_causal=self.hint)
        return self.generator(out).transpose(0, 1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(x: Tensor, n: int) -> Tensor:
    b, heads, length, dim = x.shape
    x = x[:, :, None, :, :].expand(b, heads, n, length, dim)
    return x.reshape(b, heads * n, length, dim)


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, gated MLP, root-mean-square norms."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.input_norm, self.post_norm = RMSNorm(dim), RMSNorm(dim)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = repeat_kv(k, self.heads // self.kv_heads), repeat_kv(v, self.heads // self.kv_heads)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        mask = torch.full((n, n), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.o_proj(out.reshape(b, n, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        x = x + self.attend(self.input_norm(x), cos, sin)
        h = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(LlamaBlock(32, 4, 2, 8, 48) for _ in range(2))
        self.norm = RMSNorm(32)
        self.lm_head = nn.Linear(32, 40, bias=False)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8), False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed_tokens(ids)
        with torch.no_grad():
            t = torch.arange(ids.shape[1], dtype=torch.float32)
            freqs = torch.outer(t, self.inv_freq)
            emb = torch.cat((freqs, freqs), dim=-1)
            cos, sin = emb.cos(), emb.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


class Alibi(nn.Module):
    """Linear position biases; the slopes of the heads are a constant made in forward."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(20, dim)
        self.ln, self.ln_f = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, 20, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        b, n, c = x.size()
        q, k, v = self.c_attn(self.ln(x)).split(c, dim=2)
        q = q.view(b, n, self.heads, c // self.heads).transpose(1, 2)
        k = k.view(b, n, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, n, self.heads, c // self.heads).transpose(1, 2)
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(self.heads)]).view(-1, 1, 1)
        positions = torch.arange(n)
        distance = positions[None, :] - positions[:, None]
        att = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1))) + slopes * distance
        att = att.masked_fill(distance > 0, float("-inf")).softmax(dim=-1)
        y = (att @ v).transpose(1, 2).contiguous().view(b, n, c)
        return self.head(self.ln_f(x + self.c_proj(y)))


class T5Attention(nn.Module):
    def __init__(self, dim: int, heads: int, d_kv: int) -> None:
        super().__init__()
        self.heads, self.d_kv = heads, d_kv
        inner = heads * d_kv
        self.q, self.k = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.v, self.o = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, bias: Tensor) -> Any:
        b, h = x.shape[0], self.norm(x)
        q = self.q(h).view(b, -1, self.heads, self.d_kv).transpose(1, 2)
        k = self.k(h).view(b, -1, self.heads, self.d_kv).transpose(1, 2)
        v = self.v(h).view(b, -1, self.heads, self.d_kv).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        y = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)
        return x + self.o(y.transpose(1, 2).contiguous().view(b, -1, self.heads * self.d_kv))


class T5(nn.Module):
    """One table of relative positions for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.bias = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(T5Attention(24, 4, 8) for _ in range(2))
        self.wi, self.wo = nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 6)

    def forward(self, ids: Tensor) -> Any:
        n = ids.shape[1]
        relative = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        bucket = torch.where(relative > 0, 4, 0) + torch.clamp(relative.abs(), max=3)
        bias = self.bias(bucket).permute([2, 0, 1]).unsqueeze(0)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, bias)
        x = x + self.wo(F.relu(self.wi(x)))
        return self.head(x).sum(dim=1)


class Perceiver(nn.Module):
    """Learned latents read a long input, then each other."""

    def __init__(self, n: int = 10, dim: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(n, dim))
        self.norm_in, self.norm_latent = nn.LayerNorm(12), nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, 24, bias=False), nn.Linear(12, 48, bias=False)
        self.to_out = nn.Linear(24, dim)
        self.ff = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 40), nn.GELU(), nn.Linear(40, dim)
        )
        self.head = nn.Linear(dim, 7)

    def forward(self, data: Tensor) -> Any:
        x = self.latents.unsqueeze(0).repeat(data.shape[0], 1, 1)
        q = self.to_q(self.norm_latent(x))
        k, v = self.to_kv(self.norm_in(data)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 8**-0.5
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)
        x = x + self.to_out(out.transpose(1, 2).flatten(2))
        x = x + self.ff(x)
        return self.head(x.mean(dim=-2))


class DETR(nn.Module):
    """A CNN, an encoder, object queries that attend to it, two heads; a dict of outputs."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1)
        )
        self.conv = nn.Conv2d(24, dim, 1)
        self.row_embed = nn.Parameter(torch.rand(10, dim // 2))
        self.col_embed = nn.Parameter(torch.rand(10, dim // 2))
        self.query_pos = nn.Parameter(torch.rand(6, dim))
        self.transformer = nn.Transformer(dim, 4, 1, 1, 48, batch_first=True)
        self.linear_class, self.linear_bbox = nn.Linear(dim, 5), nn.Linear(dim, 4)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        h = self.conv(self.backbone(inputs))
        H, W = h.shape[-2:]
        columns = self.col_embed[:W].unsqueeze(0).repeat(H, 1, 1)
        rows = self.row_embed[:H].unsqueeze(1).repeat(1, W, 1)
        pos = torch.cat([columns, rows], dim=-1).flatten(0, 1).unsqueeze(0)
        queries = self.query_pos.unsqueeze(0).expand(inputs.size(0), -1, -1)
        out = self.transformer(pos + 0.1 * h.flatten(2).transpose(1, 2), queries)
        return {
            "pred_logits": self.linear_class(out),
            "pred_boxes": self.linear_bbox(out).sigmoid(),
        }


class Conformer(nn.Module):
    """Half-step feed-forward, attention, gated depthwise convolution, half-step feed-forward."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.inp = nn.Linear(13, dim)
        self.ff1, self.ff2 = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 48), nn.SiLU(), nn.Linear(48, dim))
            for _ in range(2)
        )
        self.attn_norm, self.conv_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, 3, batch_first=True)
        self.pointwise1 = nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv1d(dim, dim, 5, padding=2, groups=dim)
        self.bn = nn.BatchNorm1d(dim)
        self.pointwise2 = nn.Conv1d(dim, dim, 1)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 11)

    def forward(self, x: Tensor) -> Any:
        x = self.inp(x)
        x = x + 0.5 * self.ff1(x)
        h = self.attn_norm(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        y = F.glu(self.pointwise1(self.conv_norm(x).transpose(1, 2)), dim=1)
        y = self.pointwise2(F.silu(self.bn(self.depthwise(y))))
        x = x + y.transpose(1, 2)
        x = self.norm(x + 0.5 * self.ff2(x))
        return self.head(x).log_softmax(dim=-1)


def pair(a: tuple[int, int], b: tuple[int, int]) -> Inputs:
    """Two token sequences: (length, vocabulary) each."""
    return torch.randint(a[1], (2, a[0])), torch.randint(b[1], (2, b[0]))


CASES = [
    case("mha", lambda: SelfAttention(False), vectors(6, 10)),
    case("mha-weights", lambda: SelfAttention(True), vectors(6, 10)),
    case("encoder-pre-norm", lambda: Encoder(True), tokens(6, 30)),
    case("encoder-post-norm", lambda: Encoder(False), tokens(6, 30)),
    case("transformer", Translator, lambda: pair((7, 25), (5, 28))),
    case("transformer-unhinted", lambda: Translator(False), lambda: pair((7, 25), (5, 28))),
    case("llama", Llama, tokens(7, 40)),
    case("alibi", Alibi, tokens(6, 20)),
    case("t5", T5, tokens(6, 30)),
    case("perceiver", Perceiver, vectors(14, 12)),
    case("detr", DETR, image()),
    case("conformer", Conformer, vectors(9, 13)),
]
