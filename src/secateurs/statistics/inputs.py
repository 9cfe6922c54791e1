"""The norm of every input feature of a layer, laid out as its weights are (for Wanda).

    ||X_j||_2 = sqrt(mean over samples of the sum over positions of x_j^2)

A layer is one that multiplies inputs by weights: linear, convolution, embedding (a linear layer on
one-hot inputs: the norm counts how often a row is looked up), attention projections, and recurrent
layers of one level. A parameter that several modules or calls use gets the sum of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence

from secateurs.errors import ScoringError
from secateurs.statistics.collector import Collector, Request, Run, Setting, register_statistic
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters, members_of
from secateurs.types import GroupTarget, Target

__all__ = ["InputNorm"]

Found = Mapping[str, Tensor]
Reader = Callable[[Any, Mapping[str, Any], tuple[Any, ...], Any], Found]
"""(module, keyword inputs, positional inputs, output) -> own parameter -> squared norms, in a shape
that broadcasts to the parameter's."""


def _squares(x: Tensor, dim: int = -1) -> Tensor:
    """(size,) float64: sums of squares over everything but one dimension."""
    x = x.detach()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    dim %= x.dim()
    inner = [d for d in range(1, x.dim()) if d != dim]
    line: Tensor
    if inner and min(inner) > dim and x.is_contiguous():  # in one go, without a temporary square
        line = torch.linalg.vector_norm(x, dim=inner).double().square()
    else:
        line = x.square()
        line = (line.sum(inner) if inner else line).double()
    return line.sum(0) if line.dim() > 1 else line


def _first(given: Mapping[str, Any], args: tuple[Any, ...], name: str = "input") -> Any:
    return args[0] if args else given.get(name, next(iter(given.values()), None))


def _linear(m: nn.Linear, given: Mapping[str, Any], args: tuple[Any, ...], out: Any) -> Found:
    return {"weight": _squares(_first(given, args))[None]}  # (1, in)


def _transposed_linear(m: Any, given: Mapping[str, Any], args: tuple[Any, ...], out: Any) -> Found:
    return {"weight": _squares(_first(given, args, "x"))[:, None]}  # (in, 1)


def _conv(m: _ConvNd, given: Mapping[str, Any], args: tuple[Any, ...], out: Any) -> Found:
    x = _first(given, args)
    space = len(m.kernel_size)
    line = _squares(x if x.dim() == space + 2 else x[None], 1)  # (in,)
    ones = [1] * space
    if isinstance(m, _ConvTransposeNd):
        return {"weight": line.reshape(-1, 1, *ones)}
    of_group = line.reshape(m.groups, 1, -1).expand(-1, m.out_channels // m.groups, -1)
    return {"weight": of_group.reshape(m.out_channels, -1, *ones)}


def _embedding(m: nn.Embedding, given: Mapping[str, Any], args: tuple[Any, ...], out: Any) -> Found:
    rows = torch.bincount(_first(given, args).reshape(-1), minlength=m.num_embeddings)
    return {"weight": rows.double()[:, None]}  # (n, 1)


def _attention(
    m: nn.MultiheadAttention, given: Mapping[str, Any], args: tuple[Any, ...], out: Any
) -> Found:
    named = {**dict(zip(("query", "key", "value"), args, strict=False)), **given}
    q, k, v = (_squares(named[name])[None] for name in ("query", "key", "value"))
    if not m._qkv_same_embed_dim:
        return {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
    return {"in_proj_weight": torch.cat([line.expand(m.embed_dim, -1) for line in (q, k, v)])}


def _recurrent(m: nn.RNNBase, given: Mapping[str, Any], args: tuple[Any, ...], out: Any) -> Found:
    x, y = _first(given, args), out[0]
    initial = args[1] if len(args) > 1 else given.get("hx")
    last: Any
    start: Any
    last, start = (h[0] if isinstance(h, tuple) else h for h in (out[1], initial))  # LSTM: (h, c)
    x, y = (t.data if isinstance(t, PackedSequence) else t for t in (x, y))
    seen = _squares(y)  # every state is read by the next step, but the last; the first one is given
    found: dict[str, Tensor] = {}
    for i, suffix in enumerate(["", "_reverse"][: 2 if m.bidirectional else 1]):
        states = seen[i * m.hidden_size : (i + 1) * m.hidden_size] - _squares(last[i])
        if start is not None:
            states = states + _squares(start[i])
        found[f"weight_ih_l0{suffix}"] = _squares(x)[None]
        found[f"weight_hh_l0{suffix}"] = states.clamp(min=0)[None]
    return found


READERS: tuple[tuple[type[nn.Module], Reader], ...] = (
    (nn.Linear, _linear),
    (_ConvNd, _conv),
    (nn.Embedding, _embedding),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
)


def _reader(module: nn.Module) -> Reader | None:
    """What knows the inputs of a module's weights, if anything does."""
    if isinstance(module, nn.RNNBase) and (module.num_layers > 1 or module.proj_size):
        return None  # states between the levels stay inside the kernel
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # of nn.MultiheadAttention: used, but never called
    if type(module).__name__ == "Conv1D" and not isinstance(module, _ConvNd):
        return _transposed_linear  # of transformers: a linear layer with weight (in, out)
    return next((read for kind, read in READERS if isinstance(module, kind)), None)


def _weights(module: nn.Module) -> list[str]:
    """Own parameters of a module that multiply inputs."""
    return [n for n, p in module.named_parameters(recurse=False) if p.dim() > 1 and "weight" in n]


class InputNorm(Collector):
    """||X_j||_2 of every input feature j of the layers in which the targets live."""

    shares = "forward"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        wanted = {id(setting.params[name]) for name in self.parameters()}
        self._modules = [
            (path, module, read)
            for path, module in setting.model.named_modules()
            if (read := _reader(module)) is not None
            and any(id(module.get_parameter(n)) in wanted for n in _weights(module))
        ]
        self._names: dict[int, str] = {}  # of tied parameters the first
        for name, p in setting.params.items():
            self._names.setdefault(id(p), name)

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When the inputs of its weights cannot be seen."""
        known = {
            id(module.get_parameter(name))
            for module in model.modules()
            if _reader(module) is not None
            for name in _weights(module)
        }
        if not isinstance(target, GroupTarget):
            return "" if id(params[target.name]) in known else _hidden(target.name)
        every = [m for m in members_of(target, members, params) if params[m.tensor].dim() > 1]
        for member in every:
            if id(params[member.tensor]) not in known:
                return _hidden(member.tensor)
        owned = {int(u) for m in every for u in m.unit}
        missing = target.n_units - len(owned)
        return f"{missing} units have no {members} weights that multiply inputs" if missing else ""

    def watch(self, run: Run) -> AbstractContextManager[Any]:
        """Hook the layers for one forward pass."""
        stack = ExitStack()
        for path, module, read in self._modules:
            hook = module.register_forward_hook(self._hook(run, path, read), with_kwargs=True)
            stack.callback(hook.remove)
        return stack

    def _hook(self, run: Run, path: str, read: Reader) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> None:
            with torch.no_grad():
                for own, squares in read(module, given, args, out).items():
                    if not torch.isfinite(squares).all():
                        raise ScoringError(
                            f"batch {run.number}: the input of {path} holds values that are not "
                            "finite"
                        )
                    # Tied parameters add up; their shapes may differ in how they broadcast.
                    key = f"{self._names[id(module.get_parameter(own))]} {list(squares.shape)}"
                    self.sums.add(key, squares.cpu())

        return hook

    def _sums_of(self, name: str) -> Iterator[Tensor]:
        shape = self.setting.params[name].shape
        first = self._names[id(self.setting.params[name])]
        for choice in _layouts(shape):
            key = f"{first} {choice}"
            if key in self.sums:
                yield self.sums[key]

    def element(self, name: str) -> Tensor:
        """||X_j||_2 for each weight; 0 for biases and norms, which multiply no input.

        Raises:
            ScoringError: the layer was never called.
        """
        weight = self.setting.params[name]
        if weight.dim() < 2:
            return torch.zeros((), dtype=weight.dtype, device=weight.device)
        found = list(self._sums_of(name))
        if not found:
            raise ScoringError(
                f"{name}: its layer was never called as a module; trace the model with inputs like "
                "those of the batches"
            )
        total = found[0]
        for other in found[1:]:
            total = total + other
        norm = (total / self.n_samples).sqrt().to(weight.device)
        return norm if weight.dtype == torch.float64 else norm.float()


def _layouts(shape: torch.Size) -> list[list[int]]:
    """Shapes in which the norms of a weight of this shape may have been summed."""
    ones = [1] * (len(shape) - 2)
    tries = [[1, shape[1]], [shape[0], 1], [*shape[:2]]]
    return [[*t, *ones] for t in dict.fromkeys(map(tuple, tries))]


def _hidden(name: str) -> str:
    return f"the input that {name} multiplies cannot be seen from outside"


register_statistic("input_norm", InputNorm)
