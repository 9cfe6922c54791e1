"""Runs that look at the inputs of layers, and sums over them that never hold all samples.

`passes` orders the layers as they are executed, those that read the same tensors together;
`watch_calls` shows the calls of some modules in a run that ends behind the last of them; `Moments`
are the sums of x x' and e x' from which least squares and second-order pruning follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.batches import call_model, in_mode, iterate, model_device, preserve, tensors
from secateurs.errors import CaptureError, PruningError
from secateurs.graph.tape import plain_kernels
from secateurs.masks import named_tensors
from secateurs.posttraining.layers import Call, Layer, flat, product
from secateurs.types import Batches

__all__ = ["Moments", "Passes", "inputs_of", "passes", "quiet", "watch_calls"]

Look = Callable[[str, Call], None]


class _Enough(BaseException):
    """Ends a run whose rest nobody needs; no `except Exception` of a model may stop it."""


@contextmanager
def quiet(*models: nn.Module) -> Iterator[None]:
    """Runs inside leave gradients, buffers, modes and random state as they were; eval mode."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(preserve(model))
            stack.enter_context(in_mode(model, training=False))
            stack.enter_context(plain_kernels(model))
        stack.enter_context(torch.no_grad())
        yield


def inputs_of(batches: Batches, model: nn.Module, max_batches: int | None) -> Iterator[Any]:
    """What the model is called with, batch by batch, on its device."""
    for inputs, _ in iterate(batches, model_device(model), max_batches):
        yield inputs


def watch_calls(model: nn.Module, inputs: Any, expected: Mapping[str, int], look: Look) -> None:
    """Show `look` every call of these modules in one run.

    The run ends behind the last expected call. Tensors must be read at once: the next module may
    work in place.

    Args:
        model: in the state that `quiet` makes.
        inputs: what to call it with.
        expected: module path -> calls in one run; -1 for unknown, then the run goes to its end.
        look: called with path and call, right after the module.
    """
    left = dict(expected)
    busy: list[str] = []

    def hook(path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if busy:  # to look at a call may call the module again
                return
            busy.append(path)
            try:
                look(path, Call(module, args, kwargs, output))
            finally:
                busy.pop()
            left[path] -= 1
            if all(n == 0 for n in left.values()):
                raise _Enough

        return after

    with ExitStack() as hooks:
        for path in expected:
            handle = model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
            hooks.callback(handle.remove)
        try:
            call_model(model, inputs)
        except _Enough:
            return
        except PruningError:
            raise
        except Exception as error:
            raise CaptureError(f"the model refuses the inputs of a batch: {error}") from error


@dataclass(frozen=True, eq=False)
class Passes:
    """How to look at layers, one group after the other.

    Attributes:
        groups: layers in the order of their execution. Those stand together of which none can
            change what another reads, since all their calls read the same tensors.
        calls: module path -> calls in one run; -1 where batches differ.
        left: name of a layer that is in no group -> why.
    """

    groups: list[list[Layer]]
    calls: dict[str, int]
    left: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """The layers that are left, and why."""
        return [f"{name}: {why}, left" for name, why in self.left.items()]


def passes(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Batches,
    max_batches: int | None = None,
    *,
    every: bool = True,
) -> Passes:
    """Order layers by a run of the first batch, and check that they are products indeed.

    Args:
        every: count the calls of all batches; False where nobody asks for calls.
    """
    keys: dict[str, list[Any]] = {}
    held: list[Any] = []  # or an address could be used again
    odd: set[str] = set()
    weights = named_tensors(model)

    def look(path: str, call: Call) -> None:
        read = tensors((call.args, call.kwargs))
        held.append(read)
        keys.setdefault(path, []).append(tuple(_key(t) for t in read))
        odd.update(x.name for x in layers if x.path == path and not _agrees(x, call, weights))

    with quiet(model):
        stream = inputs_of(batches, model, max_batches if every else 1)
        watch_calls(model, next(stream), dict.fromkeys((x.path for x in layers), -1), look)
        calls = {path: len(key) for path, key in keys.items()}
        for inputs in stream:
            seen: list[str] = []
            watch_calls(model, inputs, dict.fromkeys(calls, -1), _noting(seen))
            calls = {path: n if n == seen.count(path) else -1 for path, n in calls.items()}
    groups: dict[Any, list[Layer]] = {}
    for path, key in keys.items():
        mine = [x for x in layers if x.path == path and x.name not in odd]
        for layer in sorted(mine, key=lambda x: x.stage):
            name = (layer.stage, path if layer.stage else "", tuple(key))
            groups.setdefault(name, []).append(layer)
    never = "its module is not called in the first batch"
    left = {x.name: never for x in layers if x.path not in keys}
    left |= dict.fromkeys(sorted(odd), "its module does more than multiply and add")
    return Passes(list(groups.values()), calls, left)


def _noting(paths: list[str]) -> Look:
    """Looks at nothing but who is called."""
    return lambda path, _: paths.append(path)


def _agrees(layer: Layer, call: Call, weights: Mapping[str, Tensor]) -> bool:
    """Whether a module makes what its product makes: a subclass or a hook may do something else."""
    if layer.made is None:
        return True
    bias = None if layer.bias is None else layer.line(weights[layer.bias])
    x = next(layer.rows(call), None)
    if x is None:
        return True
    mine = flat(product(x, layer.matrix(weights[layer.weight]), bias))
    theirs = layer.made(call)[: len(mine)]
    if theirs.shape != mine.shape:
        return False
    gap = 1e-3 if theirs.dtype in (torch.float32, torch.float64) else 0.05
    size = theirs.abs().max().nan_to_num()  # what is not finite is told of later
    return not bool((mine - theirs.to(mine)).abs().max() > gap * (size + 1e-30))


def _key(t: Tensor) -> tuple[Any, ...]:
    """What tells one tensor from another, and from itself after a change in place."""
    version = 0 if t.is_inference() else t._version
    return t.data_ptr(), t.shape, t.stride(), version


class Moments:
    """Sums over rows: of x x', of e x' with a residual e, of squares of e and of a target.

    With a bias, x has a last entry that is always 1. Products are made in the type of the
    activations, float32 at least, and added in float64.

    Attributes:
        gram: (groups, in [+ 1], in [+ 1]) float64 sums of x x'.
        cross: (groups, out, in [+ 1]) float64 sums of e x'.
        error, size: sums of squares of the residuals and of the targets.
        n: rows.
    """

    def __init__(self, groups: int, n_in: int, n_out: int, *, bias: bool) -> None:
        k = n_in + bias
        self.gram = torch.zeros(groups, k, k, dtype=torch.float64)
        self.cross = torch.zeros(groups, n_out, k, dtype=torch.float64)
        self.error = self.size = 0.0
        self.n = 0
        self._bias = bias

    def add(self, x: Tensor) -> None:
        """Take (groups, rows, in) inputs."""
        k = x.shape[-1]
        self.gram[:, :k, :k] += (x.mT @ x).double().cpu()
        if self._bias:
            line = x.sum(1, dtype=torch.float64).cpu()
            self.gram[:, :k, k] += line
            self.gram[:, k, :k] += line
            self.gram[:, k, k] += x.shape[1]
        self.n += x.shape[1]

    def compare(self, x: Tensor, e: Tensor, target: Tensor) -> None:
        """Take (groups, rows, out) residuals and targets that belong to inputs."""
        k = x.shape[-1]
        self.cross[:, :, :k] += (e.mT @ x).double().cpu()
        if self._bias:
            self.cross[:, :, k] += e.sum(1, dtype=torch.float64).cpu()
        self.error += float(e.double().square().sum())
        self.size += float(target.double().square().sum())
