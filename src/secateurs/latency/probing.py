"""Where the time of one call goes: milliseconds of each layer.

Every operator is timed as it passes below autograd, and belongs to the innermost module whose call
is under way. The graph form has no calls of modules; its nodes remember theirs.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode

from secateurs.batches import call_model, model_device, to_device
from secateurs.latency.timing import wait
from secateurs.macs import run_once
from secateurs.surgery.graph_form import PrunedGraph, flat_inputs
from secateurs.types import Inputs

__all__ = ["Clock", "Turns", "call_time", "clock_for", "layer_times", "turns"]

Clock = Callable[[], float]
"""Seconds, from any start."""


def clock_for(device: torch.device, threads: int) -> Clock:
    """Time of the processor where one thread does all the work, else that of the wall.

    On a quiet machine they are the same; on a busy one the first leaves out the waiting, which
    falls on whichever model happens to run.
    """
    alone = device.type == "cpu" and threads == 1
    return time.thread_time if alone else time.perf_counter


def call_time(model: nn.Module, inputs: Inputs, calls: int, clock: Clock) -> tuple[float, float]:
    """Milliseconds of a call, by the clock and by the wall; call it inside `timing`."""
    device = model_device(model)
    with torch.inference_mode():
        wait(device)
        wall, start = time.perf_counter(), clock()
        for _ in range(calls):
            call_model(model, inputs)
        wait(device)
        taken = clock() - start
        return taken * 1e3 / calls, (time.perf_counter() - wall) * 1e3 / calls


@dataclass(frozen=True)
class Turns:
    """Milliseconds of a call of each model, by turn.

    Attributes:
        clock: by the clock of `clock_for`.
        wall: by the wall.
        calls: timed in each turn.
    """

    clock: Mapping[str, list[float]]
    wall: Mapping[str, list[float]]
    calls: Mapping[str, int]


def turns(models: Mapping[str, nn.Module], inputs: Inputs, repeats: int, min_ms: float) -> Turns:
    """Time models in alternating order, each turn at least `min_ms`; call it inside `timing`."""
    clock = clock_for(model_device(next(iter(models.values()))), torch.get_num_threads())
    placed = {name: to_device(inputs, model_device(m)) for name, m in models.items()}
    calls = {}
    for name, model in models.items():
        with torch.inference_mode(False), torch.no_grad():
            run_once(model, placed[name], f"{name!r}")
        taken = min(call_time(model, placed[name], 1, clock)[0] for _ in range(2))
        calls[name] = max(1, math.ceil(min_ms / max(taken, 1e-3)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    order = list(models)
    for _ in range(repeats):
        for name in order:
            times[name].append(call_time(models[name], placed[name], calls[name], clock))
        order.reverse()
    by_clock = {name: [own for own, _ in pairs] for name, pairs in times.items()}
    return Turns(by_clock, {n: [wall for _, wall in pairs] for n, pairs in times.items()}, calls)


def layer_times(model: nn.Module, inputs: Inputs, clock: Clock) -> dict[str, float]:
    """Module path -> milliseconds of its own operators in one call, not of modules inside it.

    Call it inside `timing`. The operators take a little longer than in a plain call, so only the
    shares count.
    """
    with torch.inference_mode():
        if isinstance(model, PrunedGraph):
            graph = model.secateurs_captured.graphs["eval"]
            nodes = _Nodes(model, graph, clock)
            nodes.run(*flat_inputs(graph, inputs), enable_io_processing=False)
            return dict(nodes.times)
        with _Operators(model, clock) as operators:
            call_model(model, inputs)
        return dict(operators.times)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times operators by the module whose call is under way."""

    def __init__(self, model: nn.Module, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.device, self.clock = model_device(model), clock
        self.stack = [""]
        self.times: dict[str, float] = defaultdict(float)

    def __enter__(self) -> _Operators:
        self.handles = [
            modules.register_module_forward_pre_hook(self.enter),
            modules.register_module_forward_hook(self.leave, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.stack.append(self.paths.get(id(module), self.stack[-1]))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if len(self.stack) > 1:
            self.stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        start = self.clock()
        result = func(*args, **(kwargs or {}))
        wait(self.device)
        self.times[self.stack[-1]] += (self.clock() - start) * 1e3
        return result


class _Nodes(fx.Interpreter):
    """Times the nodes of a graph by the module that they come from."""

    def __init__(self, model: nn.Module, graph: fx.Graph, clock: Clock) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self.device, self.clock = model_device(model), clock
        self.times: dict[str, float] = defaultdict(float)

    def run_node(self, n: fx.Node) -> Any:
        start = self.clock()
        result = super().run_node(n)
        if n.op == "call_function":
            wait(self.device)
            self.times[_module_of(n)] += (self.clock() - start) * 1e3
        return result


def _module_of(node: fx.Node) -> str:
    """Path of the innermost module that the exporter saw around a node."""
    entries = [v for k, v in (node.meta.get("nn_module_stack") or {}).items() if "_empty" not in k]
    return str(entries[-1][0]) if entries else ""
