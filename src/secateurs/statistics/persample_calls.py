"""What hooks keep of one call of a layer, and the copy that makes a first layer differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import ScoringError
from secateurs.statistics.persample_layers import Layer
from secateurs.statistics.persample_probe import Layout, first_input

__all__ = ["Call", "Run", "forward_hook", "join", "never_used", "plainly"]


@dataclass
class Call:
    """One call of a layer: what entered, and the gradient of what left once it has arrived.

    Attributes:
        path: of the module.
        module: the module itself.
        layer: its rules.
        layout: where the samples are in `x` and `g`.
        x: the input, detached; None once released.
        version: of `x` when the layer read it.
        left: parameters that still need this call.
        g: gradient of the mean loss.
    """

    path: str
    module: nn.Module
    layer: Layer
    layout: Layout
    x: Tensor | None
    version: int
    left: int
    g: Tensor | None = None

    def samples(self, n: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Input and output gradient of samples [low, high), sample after sample, wide enough."""
        assert self.x is not None
        assert self.g is not None
        x, g = (t.movedim(self.layout.dim, 0) for t in (self.x, self.g))
        if self.layout.shared:
            x = x.expand(n, *x.shape[1:])
        t = g.shape[0] // n
        wide = torch.float64 if torch.float64 in (g.dtype, x.dtype) else torch.float32
        x, g = x[low * t : high * t], g[low * t : high * t].to(wide)
        return (x.to(wide) if x.is_floating_point() else x), g

    def largest(self, n: int, i: int) -> float:
        """A norm that the gradients of sample `i` cannot have exceeded by much."""
        x, g = self.samples(n, i, i + 1)
        norm = float(x.norm()) if x.is_floating_point() else 0.0
        return n * float(g.norm()) * max(norm, math.sqrt(g.numel()))


@dataclass
class Run:
    """What the hooks of one forward and backward pass share.

    Attributes:
        n: samples.
        each: told about every parameter whose gradients are complete.
        anchor: the leaf that everything hooked depends on.
        calls: id of a parameter -> calls of its layers, in order.
        waiting: id of a parameter -> calls whose gradient has not arrived.
        counts: module path -> number of its last call.
        done: ids of parameters that were handed over and released.
        spoiled: modules whose input was changed in place.
        unused: parameters that no module call used in the probe; none may get a gradient.
        open: between entry and exit.
        arrived: some gradient did.
        probing: a changed input is noted in `spoiled` and is no error.
    """

    n: int
    each: Callable[[str], None] | None = None
    anchor: Tensor | None = None
    calls: dict[int, list[Call]] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    spoiled: set[str] = field(default_factory=set)
    unused: list[nn.Parameter] = field(default_factory=list)
    open: bool = False
    arrived: bool = False
    probing: bool = False

    def known(self, key: int) -> list[Call]:
        """Calls of a parameter that got a gradient."""
        return [call for call in self.calls.get(key, []) if call.g is not None]


class _Anchor(torch.autograd.Function):
    """A copy, so that in-place operations may follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.device = anchor.device
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        passed = grads[0] if ctx.needs_input_grad[0] else None
        return passed, torch.zeros((), device=ctx.device)


def anchored(x: Tensor, anchor: Tensor) -> Tensor:
    """A copy that belongs to the graph although nothing before it wants a gradient."""
    out: Tensor = _Anchor.apply(x, anchor)  # type: ignore[no-untyped-call]
    return out


def forward_hook(
    run: Run,
    path: str,
    layer: Layer,
    layouts: Sequence[Layout],
    keys: Sequence[int],
    deliver: Callable[[Run, int], None],
) -> Any:
    """A hook that keeps the inputs of a module and waits for the gradients of its outputs.

    Args:
        run: the run that it belongs to.
        path: of the module.
        layer: its rules.
        layouts: of each of its calls.
        keys: ids of the parameters that are wanted.
        deliver: told the id of a parameter when its last gradient has arrived.
    """

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        again = torch._C._current_graph_task_id() != -1  # recomputed by a checkpoint
        if not again:
            run.counts[path] = run.counts.get(path, -1) + 1
        if not run.open or not torch.is_grad_enabled():
            return None  # no gradient arrives here without us either
        changed = output
        if not output.requires_grad and run.anchor is not None:
            changed = anchored(output, run.anchor)
        if layouts and layouts[0].shared:
            changed = changed.expand(run.n, *output.shape[1:])
        if not again:
            number = run.counts[path]
            if number >= len(layouts) or not layouts[number].fits(output.shape, run.n):
                raise ScoringError(
                    f"{path}: call {number} gives shape {tuple(output.shape)} for {run.n} samples, "
                    "which does not fit what the probe saw. Give batches of one layout, or probe "
                    "again"
                )
            x = first_input(args, kwargs).detach()
            call = Call(path, module, layer, layouts[number], x, version(x), len(keys))
            for key in keys:
                run.calls.setdefault(key, []).append(call)
                run.waiting[key] = run.waiting.get(key, 0) + 1
            arrival = _arrival(run, call, keys, deliver)
            changed.register_hook(arrival)  # type: ignore[no-untyped-call]
        return None if changed is output else changed

    return hook


def _arrival(
    run: Run, call: Call, keys: Sequence[int], deliver: Callable[[Run, int], None]
) -> Callable[[Tensor], None]:
    """What happens when the output gradient of a call is there."""

    def arrived(grad: Tensor) -> None:
        if not run.open:
            return
        if call.g is not None or call.x is None:
            raise ScoringError(f"{call.path}: two backward passes in one run; open a run for each")
        if version(call.x) != call.version:
            if not run.probing:
                raise ScoringError(
                    f"{call.path}: its input was changed in place after the layer had read it, "
                    "which the probe did not see. Probe again with a batch like this one"
                )
            run.spoiled.add(call.path)
        run.arrived = True
        call.g = grad.detach()
        for key in keys:
            run.waiting[key] -= 1
            if not run.waiting[key]:
                deliver(run, key)

    return arrived


def join(calls: Sequence[Call], n: int) -> tuple[Tensor, Tensor] | None:
    """Several calls of one layer as one call with more positions, where its rules allow it."""
    if not calls:
        return None
    rows = calls[0].layer.rows and all(call.path == calls[0].path for call in calls)
    if len(calls) > 1 and not rows:
        return None
    parts = [call.samples(n, 0, n) for call in calls]
    if len(parts) == 1:
        return parts[0]

    def cat(tensors: Sequence[Tensor], keep: int) -> Tensor:
        ends = [t.shape[t.dim() - keep :] for t in tensors]
        return torch.cat([t.reshape(n, -1, *e) for t, e in zip(tensors, ends, strict=True)], 1)

    xs, gs = [x for x, _ in parts], [g for _, g in parts]
    return cat(xs, 1 if xs[0].is_floating_point() else 0), cat(gs, 1)


def version(x: Tensor) -> int:
    """How often a tensor was changed in place; 0 where torch does not count."""
    return 0 if x.is_inference() else x._version


@contextmanager
def never_used(run: Run, name: str, parameter: nn.Parameter) -> Iterator[None]:
    """An error inside, when a gradient arrives at a parameter that no layer uses."""

    def arrived(_: Tensor) -> None:
        raise ScoringError(
            f"{name}: used outside the forward of its module, though not in the probe. Probe "
            "again with a batch like this one"
        )

    before = parameter.requires_grad
    parameter.requires_grad_(True)
    handle = parameter.register_hook(arrived)  # type: ignore[no-untyped-call]
    run.unused.append(parameter)
    try:
        yield
    finally:
        handle.remove()
        parameter.requires_grad_(before)


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Nothing recorded and nothing cast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
