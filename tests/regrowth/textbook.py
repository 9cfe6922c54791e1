"""Slow training with moving masks, from the papers: plain arithmetic on float64, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MASKED = ("0.weight", "2.weight")
Tensors = dict[str, Tensor]


def net() -> nn.Sequential:
    """4 -> tanh 6 -> 3, float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(n: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Batches of 4 samples."""
    torch.manual_seed(1)
    return [(torch.randn(4, 4).double(), torch.randn(4, 3).double()) for _ in range(n)]


def some_masks() -> Tensors:
    """10 of 24 and 7 of 18 entries kept."""
    torch.manual_seed(2)
    masks = {}
    for name, shape, kept in (("0.weight", (6, 4), 10), ("2.weight", (3, 6), 7)):
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask[torch.randperm(len(mask))[:kept]] = True
        masks[name] = mask.reshape(shape)
    return masks


@dataclass
class Sgd:
    """Momentum 0.9, weight decay 0.01 in the gradient, learning rate 0.1."""

    buffer: Tensor | None = None

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        g = g + 0.01 * w
        self.buffer = g if self.buffer is None else 0.9 * self.buffer + g
        return w - 0.1 * self.buffer

    def keep(self, mask: Tensor) -> None:
        if self.buffer is not None:
            self.buffer = self.buffer * mask


@dataclass
class Adam:
    """Betas 0.9 and 0.999, eps 1e-8, learning rate 0.03."""

    first: Tensor | None = None
    second: Tensor | None = None
    t: int = 0

    def step(self, w: Tensor, g: Tensor) -> Tensor:
        zero = torch.zeros_like(g)
        self.first = 0.9 * (zero if self.first is None else self.first) + 0.1 * g
        self.second = 0.999 * (zero if self.second is None else self.second) + 0.001 * g * g
        self.t += 1
        up, down = self.first / (1 - 0.9**self.t), self.second / (1 - 0.999**self.t)
        return w - 0.03 * up / (down.sqrt() + 1e-8)

    def keep(self, mask: Tensor) -> None:
        if self.first is not None and self.second is not None:
            self.first, self.second = self.first * mask, self.second * mask


OPTIMIZERS: dict[str, tuple[type[Sgd] | type[Adam], Callable[[nn.Module], torch.optim.Optimizer]]]
OPTIMIZERS = {
    "sgd": (
        Sgd,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "adam": (Adam, lambda m: torch.optim.Adam(m.parameters(), lr=0.03)),
}


def gradients(weights: Tensors, masks: Tensors, batches: list[tuple[Tensor, Tensor]]) -> Tensors:
    """Of the mean squared error over all samples at the masked weights, for removed ones too."""
    at = {n: (w * masks.get(n, 1)).requires_grad_() for n, w in weights.items()}
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    hidden = torch.tanh(x @ at["0.weight"].T + at["0.bias"])
    out = hidden @ at["2.weight"].T + at["2.bias"]
    found = torch.autograd.grad(((out - y) ** 2).mean(), list(at.values()))
    return dict(zip(at, found, strict=True))


def largest(scores: list[float], among: list[int], k: int) -> list[int]:
    """The k indices with the largest scores; the first of equal ones."""
    return sorted(among, key=lambda i: (-scores[i], i))[:k]


def drop_and_grow(w: Tensor, mask: Tensor, wanted: Tensor, share: float) -> Tensor:
    """Drop the smallest kept weights; connect as many of all that are unconnected then."""
    size, want = w.abs().reshape(-1).tolist(), wanted.reshape(-1).tolist()
    kept = [i for i, m in enumerate(mask.reshape(-1).tolist()) if m]
    k = math.floor(share * len(kept))
    stay = largest(size, kept, len(kept) - k)
    free = [i for i in range(len(size)) if i not in stay]
    return _mask([*stay, *largest(want, free, k)], mask)


def keep_largest(w: Tensor, mask: Tensor) -> Tensor:
    size = w.abs().reshape(-1).tolist()
    return _mask(largest(size, list(range(len(size))), int(mask.sum())), mask)


def two_thresholds(w: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    new = mask.clone()
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            size = abs(float(w[i, j]))
            if size < low:
                new[i, j] = False
            elif size >= high:
                new[i, j] = True
    return new


def exact_thresholds(w: Tensor, mask: Tensor, margin: float) -> Tensor:
    """Two thresholds around the centre, among all that change something, that keeps as many."""
    size = w.abs().reshape(-1)
    centres = torch.cat([size / (1 - margin), size / (1 + margin)]).sort().values
    for c in centres.tolist():
        new = two_thresholds(w, mask, c * (1 - margin) * (1 - 1e-12), c * (1 + margin))
        if int(new.sum()) == int(mask.sum()):
            return new
    raise AssertionError("no centre keeps as many")


def _mask(indices: list[int], like: Tensor) -> Tensor:
    flat = torch.zeros(like.numel(), dtype=torch.bool)
    flat[indices] = True
    return flat.reshape(like.shape)


def train(
    rule: str,
    optimizer: str,
    masks: Tensors,
    *,
    n_steps: int,
    every: int,
    end: float,
    fraction: float = 0.5,
    margin: float = 0.1,
    seed: int = 0,
    accumulate: int = 1,
) -> tuple[Tensors, Tensors]:
    """Weights and masks at the end: one training with moving masks."""
    weights = {n: p.detach().clone() for n, p in net().named_parameters()}
    memory = {name: OPTIMIZERS[optimizer][0]() for name in weights}
    generator = torch.Generator().manual_seed(seed)
    batches, masks = data(), dict(masks)
    for t in range(n_steps):
        lives = rule in ("dns", "dpf") and t < end  # removed weights learn
        moves = 0 < t < end and t % every == 0
        share = fraction * (1 + math.cos(math.pi * t / end)) / 2
        if moves and rule != "rigl":
            for name in MASKED:
                w, mask = weights[name], masks[name]
                if rule == "set":
                    draw = torch.rand(mask.shape, generator=generator)
                    masks[name] = drop_and_grow(w, mask, draw, share)
                elif rule == "dpf":
                    masks[name] = keep_largest(w, mask)
                else:
                    masks[name] = exact_thresholds(w, mask, margin)
        if not lives:
            _cut(weights, masks, memory)
        used = [batches[(t * accumulate + i) % len(batches)] for i in range(accumulate)]
        g = gradients(weights, masks, used)
        if moves and rule == "rigl":  # in place of the step
            for name in MASKED:
                masks[name] = drop_and_grow(weights[name], masks[name], g[name].abs(), share)
            _cut(weights, masks, memory)
            continue
        for name in weights:
            if not lives and name in MASKED:
                g[name] = g[name] * masks[name]
            weights[name] = memory[name].step(weights[name], g[name])
    _cut(weights, masks, memory)
    return weights, masks


def _cut(weights: Tensors, masks: Tensors, memory: dict[str, Sgd | Adam]) -> None:
    for name in MASKED:
        weights[name] = weights[name] * masks[name]
        memory[name].keep(masks[name])
