"""How much each residual branch turns the stream that it is added to: 1 - mean cos(h_in, h_out).

The sums of a model are seldom modules, so that no hook sees them. `trace` has counted them: a sum
is the n-th of two tensors of one shape in a certain call of a certain module. The same is counted
here while the model runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.errors import ScoringError
from secateurs.statistics.collector import Collector, Request, Run, Setting, register_statistic
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters
from secateurs.types import BranchSum, GroupTarget, Target

__all__ = ["Influence", "cosine"]

HERE = str(Path(__file__).parent)
ADDS = frozenset("add add_ __add__ __iadd__ __radd__ sub sub_ subtract __sub__ __isub__".split())
Place = tuple[str, int]
"""(module, call)."""


def cosine(before: Tensor, after: Tensor, dim: int) -> Tensor:
    """Cosines between two streams along the features; 1 where both are zero, 0 where one is.

    Example:
        >>> h = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
        >>> cosine(h, torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1)
        tensor([0.6000, 1.0000])
    """
    product = (before * after).sum(dim)
    a, b = (torch.linalg.vector_norm(x, dim=dim) for x in (before, after))
    neither = (a == 0) & (b == 0)
    found = product / torch.where((a == 0) | (b == 0), torch.ones_like(a), a * b)
    return torch.where(neither, torch.ones_like(found), found.clamp(-1, 1))


class _Watch(TorchFunctionMode):
    """Counts sums in every call of the modules that hold one, and shows those that are wanted."""

    def __init__(self, collector: Influence, run: Run, modules: dict[int, str]) -> None:
        super().__init__()
        self.collector, self.run, self.modules = collector, run, modules
        self.stack: list[Place] = []
        self.calls: dict[str, int] = {}
        self.counts: dict[Place, int] = {}
        self.over = False

    def enter(self, module: nn.Module, inputs: Any) -> None:
        if self.over:
            return  # a checkpointed part runs again in the backward pass
        path = self.modules[id(module)]
        place = path, self.calls.get(path, 0)
        self.calls[path] = place[1] + 1
        self.counts[place] = 0
        self.stack.append(place)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.stack:
            self.stack.pop()
            self.over = not self.stack

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        pair = self._pair(func, args, kwargs)
        if pair is None:
            return func(*args, **kwargs)
        place = self.stack[-1]
        order = self.counts[place]
        self.counts[place] += 1
        wanted = self.collector.wanted.get((*place, order), [])
        kept = [(s, pair[s[1].skip].detach().clone()) for s in wanted]  # the sum may be in place
        result = func(*args, **kwargs)
        for one, before in kept:
            self.collector.take(self.run, one, before, result.detach())
        return result

    def _pair(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """The two summands of a sum that counts."""
        if not self.stack or getattr(func, "__name__", "") not in ADDS:
            return None
        given = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)][:2]
        if len(given) < 2 or not all(isinstance(x, Tensor) for x in given):
            return None
        a, b = given
        same = a is not b and a.shape == b.shape and a.dtype == b.dtype and a.is_floating_point()
        if not same or sys._getframe(2).f_code.co_filename.startswith(HERE):
            return None  # what other collectors add up is no part of the model
        return a, b


class Influence(Collector):
    """1 - mean cos(h_in, h_out) for each residual branch."""

    shares = "forward"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self.wanted: dict[tuple[str, int, int], list[tuple[str, BranchSum]]] = {}
        self._of: dict[Place, int] = {}
        for target in request.groups:
            for one in target.sums:
                key = one.module, one.call, one.order
                self.wanted.setdefault(key, []).append((target.name, one))
                self._of[one.module, one.call] = one.of

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When the sums are not known."""
        units = {s.unit for s in target.sums} if isinstance(target, GroupTarget) else set()
        missing = target.n_units - len(units)
        return f"the sums of {missing} units are not known: trace the model" if missing else ""

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        """Follow one forward pass."""
        model = self.setting.model
        watch = _Watch(self, run, {id(m): path for path, m in model.named_modules()})
        with ExitStack() as stack:
            for module in dict.fromkeys(model.modules()):
                # First in, last out, so that the hooks of others run inside or do not matter.
                first = module.register_forward_pre_hook(watch.enter, prepend=True)
                last = module.register_forward_hook(watch.leave, always_call=True)
                stack.callback(first.remove)
                stack.callback(last.remove)
            stack.enter_context(watch)
            yield
        for place, expected in self._of.items():
            got = watch.counts.get(place)
            if got != expected:
                raise ScoringError(
                    f"batch {run.number}: call {place[1]} of {place[0] or 'the model'} made "
                    f"{got or 'no'} sums of two tensors, and {expected} when the model was traced; "
                    "trace the model as it is, with inputs like those of the batches"
                )

    def take(self, run: Run, found: tuple[str, BranchSum], before: Tensor, after: Tensor) -> None:
        """Add up the cosines of one sum."""
        name, one = found
        with torch.no_grad():
            if before.dtype in (torch.float16, torch.bfloat16):
                before, after = before.float(), after.float()
            cosines = cosine(before, after, one.dim)
            total = cosines.double().sum().cpu()
            if not torch.isfinite(total):
                raise ScoringError(
                    f"batch {run.number}: the stream in {one.module or 'the model'} holds values "
                    "that are not finite"
                )
            # Positions of a sample are averaged first, so that every sample counts the same.
            share = torch.zeros(self._units(name), dtype=torch.float64)
            share[one.unit] = total * run.n / cosines.numel()
            self.sums.add(name, share)

    def _units(self, name: str) -> int:
        return next(t.n_units for t in self.request.groups if t.name == name)

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64 in [0, 2]."""
        assert isinstance(target, GroupTarget)
        sums = torch.zeros(target.n_units, dtype=torch.float64)
        for one in target.sums:
            sums[one.unit] += 1
        return (1 - self.sums[target.name] / (self.n_samples * sums)).clamp(min=0)


register_statistic("influence", Influence)
