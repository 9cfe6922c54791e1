"""Language models with tied tables, mixtures of experts, several inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.types import Inputs
from tests.zoo.blocks import case, tokens, vectors

__all__ = ["CASES"]


class TiedLM(nn.Module):
    """A small causal language model whose output layer is its embedding."""

    def __init__(self, vocabulary: int = 36, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.n_head = heads
        self.wte, self.wpe = nn.Embedding(vocabulary, dim), nn.Embedding(16, dim)
        self.ln_1, self.ln_2, self.ln_f = (nn.LayerNorm(dim) for _ in range(3))
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.mlp_proj = nn.Linear(dim, 64), nn.Linear(64, dim)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Any:
        b, t = idx.size()
        x = self.wte(idx) + self.wpe(torch.arange(0, t, dtype=torch.long, device=idx.device))
        q, k, v = self.c_attn(self.ln_1(x)).split(x.size(-1), dim=2)
        q, k, v = (y.view(b, t, self.n_head, -1).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(b, t, x.size(-1)))
        h = self.c_fc(self.ln_2(x))
        h = 0.5 * h * (1.0 + torch.tanh(0.7978845608 * (h + 0.044715 * torch.pow(h, 3.0))))
        return self.lm_head(self.ln_f(x + self.mlp_proj(h)))


class TwoTowers(nn.Module):
    """Numbers and categories in, two named outputs out."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.tables = nn.ModuleList(nn.Embedding(n, 8) for n in (5, 9, 13))
        self.fuse = nn.Linear(24 + 3 * 8, 32)
        self.bilinear = nn.Linear(24, 24, bias=False)
        self.score, self.risk = nn.Linear(33, 3), nn.Linear(32, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> dict[str, Tensor]:
        a = self.deep(numbers)
        b = torch.cat([table(categories[:, i]) for i, table in enumerate(self.tables)], dim=-1)
        match = (self.bilinear(a) * b).sum(dim=-1, keepdim=True)
        h = F.selu(self.fuse(torch.cat([a, b], dim=-1)))
        risk = F.softplus(self.risk(h)).squeeze(-1)
        return {"score": self.score(torch.cat([h, match], dim=-1)), "risk": risk}


class SoftExperts(nn.Module):
    """Every expert sees every token; sigmoid gates weigh them. Expert weights are stacked."""

    def __init__(self, dim: int = 20, experts: int = 10, hidden: int = 16) -> None:
        super().__init__()
        self.inp = nn.Linear(8, dim)
        self.router = nn.Linear(dim, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden) * 0.2)
        self.b1 = nn.Parameter(torch.randn(experts, hidden) * 0.2)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim) * 0.2)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.inp(x)
        gate = torch.sigmoid(self.router(x))
        h = F.silu(torch.einsum("btd,edh->bteh", x, self.w1) + self.b1)
        y = torch.einsum("bteh,ehd->bted", h, self.w2)
        return self.head(x + torch.einsum("bted,bte->btd", y, gate)).mean(1)


class BatchedExperts(nn.Module):
    """The same idea by batched matrix products over experts."""

    def __init__(self, dim: int = 16, experts: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.inp = nn.Linear(6, dim)
        self.gate = nn.Linear(dim, experts)
        self.up = nn.Parameter(torch.randn(experts, dim, 2 * hidden) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) * 0.2)
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.inp(x))
        b, t, d = x.shape
        flat = x.reshape(-1, d)
        weights = torch.sigmoid(self.gate(flat))
        gate, up = torch.bmm(flat.expand(len(self.up), -1, -1), self.up).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.down)
        y = (y * weights.t().unsqueeze(-1)).sum(dim=0)
        return self.head(flat + y).view(b, t, -1).mean(dim=1)


class AdditiveSeq2Seq(nn.Module):
    """A bidirectional reader and a cell that looks back by additive attention."""

    def __init__(self) -> None:
        super().__init__()
        self.src, self.tgt = nn.Embedding(20, 16), nn.Embedding(22, 14)
        self.encoder = nn.GRU(16, 12, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(24, 20)
        self.w_query, self.w_key = nn.Linear(20, 18, bias=False), nn.Linear(24, 18, bias=False)
        self.v = nn.Linear(18, 1, bias=False)
        self.cell = nn.GRUCell(14 + 24, 20)
        self.out = nn.Linear(20 + 24, 22)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        memory, h_n = self.encoder(self.src(src))
        state = torch.tanh(self.bridge(torch.cat([h_n[0], h_n[1]], dim=1)))
        keys, words, logits = self.w_key(memory), self.tgt(tgt), []
        for t in range(tgt.size(1)):
            energy = self.v(torch.tanh(self.w_query(state).unsqueeze(1) + keys)).squeeze(-1)
            context = torch.bmm(F.softmax(energy, dim=1).unsqueeze(1), memory).squeeze(1)
            state = self.cell(torch.cat([words[:, t], context], dim=1), state)
            logits.append(self.out(torch.cat([state, context], dim=1)))
        return torch.stack(logits, dim=1)


class PointNet(nn.Module):
    """A shared network over points, maxima over the set, and the global feature given back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 32, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(32)
        self.seg1, self.seg2 = nn.Conv1d(48, 24, 1), nn.Conv1d(24, 6, 1)
        self.fc = nn.Linear(32, 9)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        x = points.transpose(2, 1)
        n = x.size(2)
        local = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(local))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 32)
        rotation = self.fc(x).view(-1, 3, 3) + torch.eye(3)
        spread = x.view(-1, 32, 1).repeat(1, 1, n)
        out = self.seg2(F.relu(self.seg1(torch.cat([spread, local], 1))))
        return out.transpose(2, 1).contiguous(), rotation


class GraphConv(nn.Module):
    """Two rounds of normalised neighbourhood sums with a dense adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(7, 20, bias=False), nn.Linear(20, 16, bias=False)
        self.b1, self.b2 = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.zeros(16))
        self.readout = nn.Linear(16, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Any:
        a = adjacency + torch.eye(adjacency.size(-1))
        d = a.sum(-1).pow(-0.5)
        a = d.unsqueeze(-1) * a * d.unsqueeze(-2)
        h = F.relu(torch.matmul(a, self.w1(x)) + self.b1)
        h = F.relu(torch.baddbmm(self.b2.expand(len(x), 6, 16), a, self.w2(h)))
        return self.readout(h.sum(1))


class Autoencoder(nn.Module):
    """Mean and log-variance in halves; the mean is decoded. Reconstruction and latent out."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(20, 32), nn.ELU(), nn.Linear(32, 24), nn.ELU())
        self.stats = nn.Linear(24, 16)
        self.dec = nn.Sequential(nn.Linear(8, 24), nn.Softsign(), nn.Linear(24, 20))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mu, logvar = self.stats(self.enc(x)).chunk(2, dim=1)
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=1)
        return {"reconstruction": self.dec(mu), "kl": kl}


def towers() -> Inputs:
    return {"numbers": torch.randn(2, 12), "categories": torch.randint(5, (2, 3))}


def sentence_pair() -> Inputs:
    return torch.randint(20, (2, 6)), torch.randint(22, (2, 4))


def graph() -> Inputs:
    links = (torch.rand(2, 6, 6) > 0.5).float()
    return torch.randn(2, 6, 7), torch.maximum(links, links.transpose(1, 2))


CASES = [
    case("tied-lm", TiedLM, tokens(7, 36)),
    case("two-inputs-dict", TwoTowers, towers),
    case("soft-experts", SoftExperts, vectors(5, 8)),
    case("batched-experts", BatchedExperts, vectors(5, 6)),
    case("additive-seq2seq", AdditiveSeq2Seq, sentence_pair),
    case("point-net", PointNet, vectors(12, 3)),
    case("graph-convolution", GraphConv, graph),
    case("autoencoder", Autoencoder, vectors(20)),
    case("autoencoder-one-output", Autoencoder, vectors(20), outputs=("reconstruction",)),
]
