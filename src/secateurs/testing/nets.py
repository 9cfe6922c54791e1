"""Small networks with data: together they have units of every kind.

Weights, biases and norms are random (zeros and ones hide mistakes), and so is the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.errors import choose
from secateurs.graph import trace
from secateurs.types import Batch, Graph, LossFn

__all__ = ["NETS", "Case", "case"]

CLASSES, SIZES = 3, (4, 4, 2)


@dataclass(frozen=True, eq=False)
class Case:
    """A network, its graph, and data that fits: three batches, the last one smaller."""

    model: nn.Module
    graph: Graph
    batches: list[Batch]
    loss_fn: LossFn


class Mlp(nn.Module):
    """6 -> tanh 8 -> relu 7 -> 3: neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 6) -> (n, 3)."""
        out: Tensor = self.c(torch.relu(self.b(torch.tanh(self.a(x)))))
        return out


class Cnn(nn.Module):
    """A residual block with batch norms between convolutions: channels, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.outer, self.outer_norm = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 2, 5, 5) -> (n, 3)."""
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.inner_norm(self.inner(x)))
        x = torch.relu(x + self.outer_norm(self.outer(y)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Recurrent(nn.Module):
    """An LSTM and a GRU: hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.gru = nn.GRU(5, 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, 3) -> (n, 3)."""
        out: Tensor = self.head(self.gru(self.lstm(x)[0])[0][:, -1])
        return out


class Transformer(nn.Module):
    """Tokens, two sizes of heads (queries share keys), a gated branch: heads, layers, embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.kv, self.o = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.up, self.gate, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """(n, 5) int64 -> (n, 3)."""
        x = self.table(ids)
        n, t, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(n, t, 4, 4).transpose(1, 2)
        k, v = self.kv(y).view(n, t, 2, 2, 4).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, 16))
        y = self.norm2(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        out: Tensor = self.head(x.mean(1))
        return out


class Heads(nn.Module):
    """Plain attention: heads with keys and values of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, 6) -> (n, 3)."""
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 3, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 6)
        out: Tensor = self.head((x + self.o(y)).mean(1))
        return out


class Experts(nn.Module):
    """A mixture in which every expert sees every sample: experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.up = nn.Parameter(torch.empty(4, 6, 5))
        self.down = nn.Parameter(torch.empty(4, 5, 6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 6) -> (n, 3)."""
        h = torch.relu(torch.einsum("ni,kij->nkj", x, self.up))
        y = torch.einsum("nkj,kjo->nko", h, self.down)
        mixed = (y * torch.sigmoid(self.router(x)).unsqueeze(-1)).sum(1)
        out: Tensor = self.head(x + mixed)
        return out


@dataclass(frozen=True)
class Net:
    """How to build a network and what it takes: the shape of a sample; `tokens` for ids."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0
    head_dim: bool = False


NETS: Mapping[str, Net] = {
    "mlp": Net(Mlp, (6,)),
    "cnn": Net(Cnn, (2, 5, 5)),
    "recurrent": Net(Recurrent, (4, 3)),
    "transformer": Net(Transformer, (5,), tokens=11),
    "heads": Net(Heads, (4, 6)),
    "head_dims": Net(Heads, (4, 6), head_dim=True),
    "experts": Net(Experts, (6,)),
}
"""Network -> how it is built."""


def case(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """One of `NETS` with random weights and data.

    Args:
        name: a key of `NETS`.
        dtype: of weights and data.
        seed: of both.

    Example:
        >>> sorted({t.kind for t in case("transformer").graph.targets.values()})
        ['embedding', 'kv_group', 'layer', 'neuron', 'weight']
    """
    net = NETS[choose(name, NETS, "network")]
    draw = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    with torch.random.fork_rng():
        model = net.build()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(tuple(p.shape)) * 0.6)
        for buffer_name, b in model.named_buffers():
            if b.is_floating_point():
                noise = normal(tuple(b.shape))
                b.copy_(noise.abs() + 0.5 if buffer_name.endswith("var") else noise * 0.5)
    model = model.to(dtype).eval()
    n = sum(SIZES)
    x = normal((n, *net.shape)).to(dtype)
    if net.tokens:
        x = torch.randint(net.tokens, (n, *net.shape), generator=draw)
    y = torch.randint(CLASSES, (n,), generator=draw)
    pairs = zip(torch.split(x, list(SIZES)), torch.split(y, list(SIZES)), strict=True)
    graph = trace(model, x[:2], heads="head_dim" if net.head_dim else "head")
    return Case(model, graph, list(pairs), functional.cross_entropy)
