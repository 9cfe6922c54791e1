"""Random networks: a seeded program of operators over images, sequences and vectors.

`random_net(seed)` returns a model and example inputs. Values of the same shape are added,
multiplied and joined wherever they come from, so residual streams, joins and splits mix freely.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RandomNet", "random_net"]

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu, torch.sigmoid, torch.tanh, F.gelu, F.hardswish, F.softplus, F.elu,
    lambda x: x + 1, lambda x: x * 0.5, lambda x: x.clone().relu_(), lambda x: x.clamp(-1, 1),
    lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x.masked_fill(x > 1, 0.3),
    lambda x: x.abs().sqrt(), lambda x: x / (1 + x.abs()), torch.square, torch.exp,
]  # fmt: skip


@dataclass
class Step:
    """One operator of the program: which values it reads, and a module or none."""

    run: Callable[..., Tensor]
    reads: tuple[int, ...]
    module: str | None = None


class RandomNet(nn.Module):
    """Runs a program that `random_net` has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            inputs: list[Any] = [values[i] for i in step.reads]
            if step.module is not None:
                inputs.insert(0, self.get_submodule(step.module))
            values.append(step.run(*inputs))
        return values[-1]


class Drawer:
    """Appends random steps; runs them at once to know the shapes."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.net = RandomNet()
        kind = self.rng.choice(["image", "image", "image", "sequence", "vector"])
        generator = torch.Generator().manual_seed(seed)
        shape = {"image": (2, 3, 6, 6), "sequence": (2, 4, 5), "vector": (2, 6)}[kind]
        self.values = [torch.randn(shape, generator=generator)]

    def add(
        self, run: Callable[..., Tensor], reads: tuple[int, ...], part: nn.Module | None = None
    ) -> int:
        name = None if part is None else f"m{len(self.net.steps)}"
        inputs: list[Any] = [self.values[i] for i in reads]
        if part is not None and name is not None:
            self.net.add_module(name, part.eval())
            inputs.insert(0, part)
        with torch.no_grad():
            self.values.append(run(*inputs))
        self.net.steps.append(Step(run, reads, name))
        return len(self.values) - 1

    def call(self, part: nn.Module, at: int) -> int:
        return self.add(lambda m, x: m(x), (at,), part)

    def recent(self, rank: int) -> int | None:
        """A value of that rank, late ones more often."""
        found = [i for i, v in enumerate(self.values) if v.dim() == rank]
        return found[-min(len(found), 1 + int(self.rng.expovariate(1.2)))] if found else None

    def partner(self, at: int, *, whole: bool = True) -> int:
        """Another value of the same shape, or with the same shape but for dim 1."""
        shape = self.values[at].shape

        def fits(v: Tensor) -> bool:
            same = v.dim() == len(shape) and v.shape[2:] == shape[2:]
            return same and (v.shape[1] == shape[1] or not whole)

        return self.rng.choice([i for i, v in enumerate(self.values) if fits(v)])

    # -- one step per kind of value --------------------------------------------------------

    def step(self) -> None:
        rank = self.rng.choice([v.dim() for v in self.values[-3:]])
        at = self.recent(rank)
        assert at is not None
        if rank > 2 and self.rng.random() < 0.05:
            self.add(lambda x: x.cumsum(1), (at,))  # has no rule
        elif self.rng.random() < 0.35:
            self.elementwise(at)
        else:
            {4: self.image, 3: self.sequence, 2: self.vector}[rank](at)

    def elementwise(self, at: int) -> None:
        choice = self.rng.randrange(5)
        if choice < 2:
            self.add(self.rng.choice(ACTIVATIONS), (at,))
        elif choice == 2:
            self.add(torch.add, (at, self.partner(at)))
        elif choice == 3:
            self.add(lambda x, y: x * torch.sigmoid(y), (at, self.partner(at)))
        else:
            axis = 2 if self.values[at].dim() == 3 else 1
            if self.values[at].shape[axis] <= 16 and axis == 1:
                other = self.partner(at, whole=False)
                self.add(lambda x, y: torch.cat([x, y], 1), (at, other))
            else:
                self.split(at, axis)

    def split(self, at: int, dim: int) -> None:
        n = self.values[at].shape[dim]
        if n < 4:
            return
        cut = self.rng.randrange(1, n)
        ways: list[Callable[[Tensor], Tensor]] = [
            lambda x: torch.cat(x.chunk(2, dim)[::-1], dim),
            lambda x: torch.cat([x.narrow(dim, cut, n - cut), x.narrow(dim, 0, cut)], dim),
            lambda x: torch.cat(torch.split(x, [1, n - 2, 1], dim), dim),
        ]
        if n % 2 == 0:
            ways += [
                lambda x: (
                    torch.unflatten(x, dim, (2, n // 2))
                    .transpose(dim, dim + 1)
                    .flatten(dim, dim + 1)
                ),
                lambda x: x.chunk(2, dim)[0] * torch.tanh(x.chunk(2, dim)[1]),
            ]
        self.add(self.rng.choice(ways), (at,))

    def image(self, at: int) -> None:
        _, c, h, _ = self.values[at].shape
        choice = self.rng.randrange(12)
        wide = self.rng.choice([4, 6, 8])
        if choice <= 2:
            self.call(nn.Conv2d(c, wide, 3, padding=1, bias=self.rng.random() < 0.6), at)
        elif choice == 3:
            groups = [g for g in range(2, c + 1) if c % g == 0]
            if groups:
                g = self.rng.choice(groups)
                out = g * self.rng.choice([1, 2])
                self.call(nn.Conv2d(c, out, 3, padding=1, groups=g), at)
        elif choice in (4, 5):
            affine = self.rng.random() < 0.8
            self.call(nn.BatchNorm2d(c, affine=affine), at)
        elif choice == 6 and h >= 4:
            pool = self.rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2)])
            self.call(pool, at)
        elif choice == 7:
            self.split(at, 1)
        elif choice == 8:
            self.call(nn.PReLU(self.rng.choice([1, c])), at)
        elif choice == 9:
            value = self.rng.choice([0.0, 1.0])
            small = self.add(lambda x: F.pad(x, (1, 0, 0, 1), value=value), (at,))
            self.call(nn.Conv2d(c, wide, 2), small)
        elif choice == 10 and h <= 4:
            self.call(nn.ConvTranspose2d(c, wide, 2, stride=2), at)
        elif self.rng.random() < 0.5:  # the exporter unrolls recurrent layers: few steps
            self.add(lambda x: x.mean(3).transpose(1, 2), (at,))
        else:
            self.add(lambda x: x.mean((2, 3)), (at,))

    def sequence(self, at: int) -> None:
        _, _, f = self.values[at].shape
        wide = self.rng.choice([4, 6])
        choice = self.rng.randrange(9)
        if choice <= 2:
            kind = self.rng.choice([nn.LSTM, nn.GRU, nn.RNN])
            layer = kind(
                f, wide, self.rng.choice([1, 1, 2]), batch_first=True,
                bias=self.rng.random() < 0.8, bidirectional=self.rng.random() < 0.4,
            )  # fmt: skip
            self.add(lambda m, x: m(x)[0], (at,), layer)
        elif choice <= 4:
            self.call(nn.Linear(f, wide), at)
        elif choice == 5:
            self.split(at, 2)
        elif choice == 6:
            self.add(lambda x: x[:, -1], (at,))
        elif choice == 7:
            self.add(
                lambda m, x: m(x.transpose(1, 2)).transpose(1, 2), (at,), nn.Conv1d(f, wide, 1)
            )
        else:
            self.add(lambda x: x.mean(1), (at,))

    def vector(self, at: int) -> None:
        f = self.values[at].shape[1]
        choice = self.rng.randrange(5)
        if choice <= 2:
            self.call(nn.Linear(f, self.rng.choice([4, 6, 8]), bias=self.rng.random() < 0.7), at)
        elif choice == 3:
            self.split(at, 1)
        elif f % 2 == 0:
            self.add(lambda x: (x.view(-1, 2, f // 2) * 2).reshape(-1, f), (at,))

    def finish(self) -> None:
        """To a vector of three, from the last value of the program."""
        at = len(self.values) - 1
        if self.values[at].dim() == 4:
            at = self.add(lambda x: x.flatten(1), (at,))
        elif self.values[at].dim() == 3:
            at = self.add(lambda x: x.mean(1), (at,))
        at = self.call(nn.Linear(self.values[at].shape[1], 6), at)
        at = self.add(torch.tanh, (at,))
        self.call(nn.Linear(6, 3), at)


def random_net(seed: int) -> tuple[RandomNet, Tensor]:
    """A model and example inputs; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawer = Drawer(seed)
        for _ in range(drawer.rng.randrange(4, 14)):
            drawer.step()
        drawer.finish()
    return drawer.net, drawer.values[0]
