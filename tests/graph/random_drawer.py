"""Programs of random networks, and how they are drawn: lines of Python and the parts they use.

`Program.build()` makes the module, `Program.text()` is its source, for people. A `Drawer` appends
lines. A family is one kind of step, `family(drawer) -> None`, in `FAMILIES`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from secateurs.types import Inputs

__all__ = ["FAMILIES", "Drawer", "Entry", "Part", "Program", "RandomNet", "Refused", "family"]

SCOPE: dict[str, Any] = {
    "torch": torch, "nn": nn, "F": F, "math": math, "checkpoint": checkpoint,
    "weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm,
}  # fmt: skip
LARGEST = 2000
"""Most elements that a value may have."""


@dataclass(frozen=True)
class Part:
    """A module, or a parameter or buffer of a shape: `self.name = text`."""

    name: str
    text: str
    seed: int

    def make(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = eval(self.text, dict(SCOPE))
            return randomized(made.double()) if isinstance(made, nn.Module) else made


class RandomNet(nn.Module):
    """Base of the generated modules."""


@dataclass(frozen=True)
class Program:
    """A network as text: inputs by name, parts, lines, and the expression that it returns."""

    inputs: tuple[tuple[str, Tensor], ...]
    parts: tuple[Part, ...]
    lines: tuple[str, ...]
    result: str
    as_dict: bool = False

    def example(self, seed: int | None = None, *, longer: bool = False) -> Inputs:
        """Inputs as drawn, or fresh ones; whole numbers stay as they are.

        Args:
            seed: of fresh inputs.
            longer: with twice the samples.
        """
        found = dict(self.inputs)
        generator = torch.Generator().manual_seed(seed or 0)
        for name, x in self.inputs:
            if longer:
                found[name] = torch.cat([x, x])
            if seed is not None and x.is_floating_point():
                shape = found[name].shape
                found[name] = torch.randn(shape, generator=generator, dtype=x.dtype)
        return {**found} if self.as_dict else tuple(found.values())

    def forward_text(self) -> str:
        names = ", ".join(name for name, _ in self.inputs)
        body = "".join(f"        {line}\n" for line in self.lines)
        return f"    def forward(self, {names}):\n{body}        return {self.result}\n"

    def text(self) -> str:
        """The source of the module."""
        used = [p for p in self.parts if f"self.{p.name}" in self.forward_text()]
        parts = "".join(f"        self.{p.name} = {p.text}\n" for p in used)
        shapes = ", ".join(f"{n}: {tuple(x.shape)}" for n, x in self.inputs)
        init = f"    def __init__(self):  # {shapes}\n        super().__init__()\n{parts}"
        return f"class Net(nn.Module):\n{init}{self.forward_text()}"

    def build(self) -> RandomNet:
        scope = {**SCOPE, "RandomNet": RandomNet}
        exec(f"class Net(RandomNet):\n{self.forward_text()}", scope)
        net: RandomNet = scope["Net"]()
        for part in self.parts:
            if f"self.{part.name}" in self.forward_text():
                made = part.make()
                if isinstance(made, (nn.Module, nn.Parameter)):
                    setattr(net, part.name, made)
                else:
                    net.register_buffer(part.name, made)
        return net.eval()


def randomized(module: nn.Module) -> nn.Module:
    """Random weights, biases, scales and statistics: zeros and ones would hide mistakes."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith(("._u", "._v")):
                continue
            draw = torch.randn_like(tensor)
            if "running_var" in name:
                draw = draw.abs() + 0.5
            elif tensor.dim() > 1:
                draw = 1.2 * draw / tensor[0].numel() ** 0.5
            else:
                draw = 0.5 * draw + 0.1
            tensor.copy_(draw)
    return module


class Refused(Exception):
    """This step does not fit here; the drawer goes on without it."""


class Drawer:
    """Appends lines to a program and runs each at once."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.inputs: list[tuple[str, Tensor]] = []
        self.parts: list[Part] = []
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {}
        self.count = 0
        self.host = nn.Module()
        self.picky = False  # whether values that are too large are refused

    # -- what a family may use --------------------------------------------------------------

    def value(self, name: str) -> Tensor:
        found = self.scope[name]
        assert isinstance(found, Tensor)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.value(name).shape)

    def pick(self, *ranks: int, test: Callable[[Tensor], bool] | None = None) -> str:
        """A value of one of these ranks (of any, when none is given), late ones more often."""
        found = [
            n
            for n, v in self.scope.items()
            if isinstance(v, Tensor)
            and v.is_floating_point()
            and (not ranks or v.dim() in ranks)
            and (test is None or test(v))
        ]
        if not found:
            raise Refused
        return found[-min(len(found), 1 + int(self.rng.expovariate(0.9)))]

    def late(self, n: int = 1) -> list[Tensor]:
        """The last values."""
        found = [v for v in self.scope.values() if isinstance(v, Tensor) and v.is_floating_point()]
        return found[-n:]

    def like(self, name: str, *, but: int | None = None) -> str:
        """A value of the same shape, possibly the same one; dimension `but` may differ."""
        want = list(self.shape(name))

        def fits(v: Tensor) -> bool:
            got = list(v.shape)
            if but is not None and len(got) == len(want):
                got[but] = want[but]
            return got == want

        return self.pick(len(want), test=fits)

    def one_of(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def wide(self) -> int:
        """A width that leaves room for removal."""
        return int(self.rng.choice([4, 6, 6, 8, 8, 12]))

    def divisor(self, n: int, least: int = 2) -> int:
        """A divisor of n, at least `least`, other than n where there is one."""
        found = [k for k in range(least, n + 1) if n % k == 0]
        if not found:
            raise Refused
        return self.rng.choice([k for k in found if k < n] or found)

    def part(self, text: str) -> str:
        """A module, or a parameter or buffer, that the next lines may use."""
        name = f"p{len(self.parts)}"
        part = Part(name, text, self.seed * 1000 + len(self.parts))
        made = part.make()
        if isinstance(made, (nn.Module, nn.Parameter)):
            setattr(self.host, name, made.eval() if isinstance(made, nn.Module) else made)
        else:
            self.host.register_buffer(name, made)
        self.parts.append(part)
        return f"self.{name}"

    def parameter(self, *shape: int, scale: float = 0.7) -> str:
        dtype = "dtype=torch.float64"
        return self.part(f"nn.Parameter({scale} * torch.randn({shape}, {dtype}))")

    def buffer(self, *shape: int) -> str:
        return self.part(f"torch.randn({shape}, dtype=torch.float64)")

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def let(self, text: str) -> str:
        """`v7 = text`; returns "v7"."""
        name = self.fresh()
        self.do(f"{name} = {text}")
        return name

    def do(self, line: str) -> None:
        """Any statement, run at once. In-place ones must not touch inputs or parameters."""
        held = {**SCOPE, "self": self.host, **self.scope}
        before = {**held, "__builtins__": None}
        exec(line, held)  # one dict, so that comprehensions see the values
        self.scope.update({k: v for k, v in held.items() if before.get(k, line) is not v})
        self.scope.pop("__builtins__", None)
        self.lines.append(line)
        for name, value in self.scope.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            small = 0 < value.numel() <= LARGEST and value.dim() <= 6
            small &= value.dtype == torch.float64
            if self.picky and (not small or not bool((value.abs() <= 60).all())):
                raise Refused(f"{name} is too large")

    def own(self, name: str) -> bool:
        """Whether writing into a value touches no input and no stored tensor."""
        store = self.value(name).untyped_storage().data_ptr()
        held = [x for _, x in self.inputs] + [*self.host.parameters(), *self.host.buffers()]
        return all(store != x.untyped_storage().data_ptr() for x in held)

    # -- one step ------------------------------------------------------------------------------

    def attempt(self, step: Callable[[Drawer], None]) -> bool:
        """Draw one step; everything is as before when it does not fit."""
        n_lines, n_parts, names = len(self.lines), len(self.parts), set(self.scope)
        try:
            self.picky = True
            step(self)
        except (Refused, RuntimeError, ValueError, IndexError, ZeroDivisionError):
            for part in self.parts[n_parts:]:
                delattr(self.host, part.name)
            del self.parts[n_parts:]
            lines = self.lines[:n_lines]
            self.lines = []
            self.scope = {k: v for k, v in self.scope.items() if k in {n for n, _ in self.inputs}}
            for line in lines:  # a step that was refused may have written into older values
                self.do(line)
            assert set(self.scope) == names
            return False
        finally:
            self.picky = False
        return True

    def program(self, result: str) -> Program:
        as_dict = self.chance(0.2)
        return Program(tuple(self.inputs), tuple(self.parts), tuple(self.lines), result, as_dict)


Family = Callable[[Drawer], None]


@dataclass(frozen=True)
class Entry:
    """A family, how often it is drawn, and the ranks of values that it can start from."""

    step: Family
    weight: float
    ranks: tuple[int, ...]


FAMILIES: dict[str, Entry] = {}


def family(
    name: str, weight: float = 1.0, ranks: tuple[int, ...] = (2, 3, 4)
) -> Callable[[Family], Family]:
    """Register one kind of step."""

    def register(fn: Family) -> Family:
        FAMILIES[name] = Entry(fn, weight, ranks)
        return fn

    return register
