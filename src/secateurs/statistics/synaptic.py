"""The flow through every weight of a network of absolute weights: no data, and no loss.

    R = 1' f(|theta|; 1),     flow = |theta| dR/d|theta| / |R|

The input is all ones, in the shapes that the model was traced with. For integer inputs every
embedding reads all its rows in equal parts. Batch norms run with their variances and without their
means. In float64, because R is a product over all layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from secateurs.batches import in_mode, model_device, named_outputs, tensors
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics.collector import (
    Collector,
    Request,
    Setting,
    call_with,
    register_statistic,
)
from secateurs.statistics.sums import View
from secateurs.statistics.units import into_units, members_of
from secateurs.types import Inputs, Target, WeightTarget

__all__ = ["Flow", "Paths", "flows"]

NOTHING = 1e-13
"""No more than rounding leaves of a flow."""
LEFT = 0.01
"""What is left when the last iteration has removed its share."""


class NoFlowError(ScoringError):
    """R is zero, not finite, or does not depend on the weights."""


def flows(
    setting: Setting, power: int, keep: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """|theta| dR/d|theta| of every parameter by name, divided by |R|, and R.

    Args:
        setting: the model and its graph.
        power: 1 for |theta|, 2 for theta^2 in place of every parameter.
        keep: parameter -> factors in {0, 1}, zero for what an earlier iteration has removed.

    Raises:
        ConfigError: the graph does not say what the model is called with.
        ScoringError: the model cannot be run so.
        NoFlowError: R is zero, not finite, or does not depend on the weights.
    """
    model, first = setting.model, _first_names(setting)
    with torch.no_grad():
        point = {
            name: p.detach().double().abs().pow(power) * keep.get(name, 1.0)
            for name, p in setting.params.items()
            if first[id(p)] == name and p.is_floating_point()
        }
    leaves = {name: x.requires_grad_(True) for name, x in point.items()}
    used, inputs = {**_buffers(model, power), **leaves}, _ones(setting)
    with _prepared(model), torch.enable_grad():
        try:
            outputs = call_with(model, used, inputs)
        except Exception as error:
            raise ScoringError(
                f"the model cannot be run in float64 on inputs of ones: {error}. Data-free "
                "criteria need a model that does not fix the type or the values of its inputs"
            ) from error
        found = [t for t in tensors(named_outputs(outputs, setting.graph.outputs))
                 if t.is_floating_point()]  # fmt: skip
        total = torch.stack([t.double().sum() for t in found]).sum() if found else torch.zeros(())
        value = float(total.detach())
        if not total.requires_grad or value == 0 or not math.isfinite(value):
            raise NoFlowError(
                f"the sum of the outputs for inputs of ones and absolute weights is {value}, so "
                "that nothing flows through the weights that could be compared; use a criterion "
                "with data"
            )
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    with torch.no_grad():
        flow = {
            name: torch.zeros_like(x) if g is None else x * g / abs(value)
            for (name, x), g in zip(leaves.items(), grads, strict=True)
        }
    if max(float(f.abs().max()) for f in flow.values() if f.numel()) < NOTHING:
        raise NoFlowError(
            "the sum of the outputs does not depend on the weights (does the model end in a "
            "softmax?), so that nothing flows through them; use a criterion with data"
        )
    return flow, value


def _first_names(setting: Setting) -> dict[int, str]:
    """Id of a parameter -> its first name: tied parameters are substituted once."""
    names: dict[int, str] = {}
    for name, p in setting.params.items():
        names.setdefault(id(p), name)
    return names


def _buffers(model: nn.Module, power: int) -> dict[str, Tensor]:
    """Buffers in float64; batch norms without means, their factor raised to the power."""
    found = {
        name: b.detach().double() for name, b in model.named_buffers() if b.is_floating_point()
    }
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            dot = f"{path}." if path else ""
            found[f"{dot}running_mean"] = torch.zeros_like(found[f"{dot}running_mean"])
            variance = found[f"{dot}running_var"] + module.eps
            found[f"{dot}running_var"] = variance.pow(power) - module.eps
    return found


def _ones(setting: Setting) -> Inputs:
    """Inputs of ones, in the shapes that the model was traced with."""
    if setting.graph.inputs is None:
        raise ConfigError(
            "the graph does not say what the model is called with: use the graph of trace(...)"
        )
    device = model_device(setting.model)

    def ones(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        kind = torch.float64 if x.is_floating_point() else x.dtype
        return torch.ones(x.shape, dtype=kind, device=device)

    inputs: Inputs = pytree.tree_map(ones, setting.graph.inputs)
    return inputs


@contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode, float64 for what the model creates, embeddings that read all rows alike."""

    def any_row(module: nn.Embedding, args: tuple[Any, ...]) -> Any:
        return (torch.zeros_like(args[0]), *args[1:])

    def all_rows(module: nn.Embedding, args: Any, out: Tensor) -> Tensor:
        return module.weight.mean(0).expand(out.shape)

    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, training=False))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(any_row).remove)
                stack.callback(module.register_forward_hook(all_rows).remove)
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, before)
        yield


class Flow(Collector):
    """The flow through each unit; with iterations, the order in which the smallest are removed."""

    power: ClassVar[int] = 1

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._iterations = int(request.options.get("iterations", 1))
        self._found: dict[str, Tensor] = {}
        bent = _bent(setting)
        if bent:
            self.notes.append(
                f"the network is not positively homogeneous ({', '.join(bent)}): R is no sum over "
                "paths, and the score only says how R reacts to a weight"
            )

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64: the flow, or with iterations the share removed before."""
        if target.name not in self._found:
            weights = [t for t in self.request.targets if isinstance(t, WeightTarget)]
            groups = [t for t in self.request.targets if not isinstance(t, WeightTarget)]
            for pool in (weights, groups):
                if pool:
                    self._found |= self._eliminated(pool)
        return self._found[target.name]

    def _eliminated(self, pool: Sequence[Target]) -> dict[str, Tensor]:
        """The scores of all targets of a pool, which are compared with each other."""
        alive = [_flags(t, self.setting.alive[t.name]) for t in pool]
        sizes = [t.n_units for t in pool]
        left = torch.cat(alive)
        if self._iterations == 1:
            return {t.name: x for t, x in zip(pool, self._flows(pool, alive), strict=True)}
        total, done, values = int(left.sum()), 0, torch.zeros(len(left))
        ranks = torch.zeros(len(left), dtype=torch.float64)
        for k in range(1, self._iterations + 1):
            started = time.perf_counter()
            last = k == self._iterations
            try:
                values = torch.cat(self._flows(pool, list(torch.split(left, sizes))))
            except NoFlowError:
                if k == 1:
                    raise
                last = True  # too little is left for one path: the order that it had is kept
            here = left.nonzero().reshape(-1)
            order = here[values[here].argsort(stable=True)]
            stay = 0 if last else max(1, round(total * LEFT ** (k / self._iterations)))
            gone = order[: max(0, len(order) - stay)]
            ranks[gone] = (torch.arange(1, len(gone) + 1, dtype=torch.float64) + done) / total
            left[gone] = False
            done += len(gone)
            if last:
                break
            if k == 2:  # the first loads kernels
                self._guard(time.perf_counter() - started)
        return {t.name: x for t, x in zip(pool, torch.split(ranks, sizes), strict=True)}

    def _guard(self, seconds: float) -> None:
        estimate = seconds * self._iterations
        if estimate > self.setting.max_seconds:
            raise ConfigError(
                f"{self._iterations} iterations would take about {estimate:.0f} s, more than "
                f"max_seconds={self.setting.max_seconds:g}. Ask for fewer iterations"
            )

    def _flows(self, pool: Sequence[Target], alive: Sequence[Tensor]) -> list[Tensor]:
        """The flow through each unit of each target when the others are removed."""
        setting, keep = self.setting, dict[str, Tensor]()
        first = _first_names(setting)
        for target, flags in zip(pool, alive, strict=True):
            if bool(flags.all()):
                continue
            for name, factors in self._factors(target, flags):
                own = first[id(setting.params[name])]
                keep[own] = keep[own] * factors if own in keep else factors
        found, _ = flows(setting, self.power, keep)
        out = []
        for target in pool:
            if isinstance(target, WeightTarget):
                own = first[id(setting.params[target.name])]
                out.append(found[own].abs().reshape(-1).cpu())
                continue
            line = torch.zeros(target.n_units, dtype=torch.float64)
            for member in members_of(target, self.request.members, setting.params):
                own = first[id(setting.params[member.tensor])]
                into_units(found[own].abs(), member, line)
            out.append(line)
        return out

    def _factors(self, target: Target, flags: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(parameter, ones and zeros) for the units that are left."""
        params = self.setting.params
        if isinstance(target, WeightTarget):
            yield target.name, flags.double().reshape(target.shape).to(params[target.name].device)
            return
        for member in members_of(target, self.request.members, params):
            weight = params[member.tensor]
            line = torch.ones(weight.shape[member.dim], dtype=torch.float64)
            line[torch.from_numpy(member.index)] = flags[torch.from_numpy(member.unit)].double()
            shape = [-1 if d == member.dim else 1 for d in range(weight.dim())]
            yield member.tensor, line.reshape(shape).to(weight.device)


class Paths(Flow):
    """The same with squares: the path norm."""

    power = 2


def _flags(target: Target, alive: Tensor) -> Tensor:
    flags = torch.zeros(target.n_units, dtype=torch.bool)
    flags[alive] = True
    return flags


BENT = frozenset(
    "softmax _softmax log_softmax _log_softmax scaled_dot_product_attention multiheadattention "
    "tanh sigmoid gelu silu hardswish hardsigmoid elu selu mish softplus "
    "layer_norm native_layer_norm layernorm rms_norm rmsnorm group_norm groupnorm instance_norm "
    "rsqrt lstm gru rnn_tanh rnn lstm_cell gru_cell".split()
)
"""Operators, and classes of modules in small letters, that scale or bend what flows."""


def _bent(setting: Setting) -> list[str]:
    """What keeps the network from being positively homogeneous, as far as the graph tells."""
    labels = getattr(setting.graph.detail, "labels", None)
    if labels is not None:
        names = {record.op for record in labels.tape.records}
    else:
        names = {type(module).__name__.lower() for module in setting.model.modules()}
    return sorted(names & BENT)


register_statistic("flow", Flow)
register_statistic("flow_squared", Paths)
