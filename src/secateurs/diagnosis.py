"""Is the learning signal healthy in every layer, and what did pruning do to it?

    model, batches, loss ── diagnose ──> Diagnosis        two of them ── compare ──> changes

One pass with exact full-batch gradients, in **eval mode** (no dropout, fixed normalisation
statistics), so the numbers belong to the model and not to a random draw or to the partition into
batches. For each layer that owns parameters it takes the size of the activations, of the gradient
that arrives at them, and of the gradient of the weights. The rule that judges them is in `health`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.batches import (
    batch_size,
    call_model,
    in_mode,
    iterate,
    model_device,
    preserve,
    tensors,
)
from secateurs.errors import CaptureError, ConfigError, DataError, ScoringError
from secateurs.health import Flag, LayerHealth, finite, flagged, usable, verdict
from secateurs.types import Batch, Batches, LossFn

__all__ = ["Diagnosis", "Flag", "LayerChange", "LayerHealth", "compare", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """The signal in every layer, in execution order.

    Attributes:
        layers: one entry per module that owns parameters.
        samples: samples read.
        loss: mean loss over them.
        verdict: one or more sentences: what is wrong, where it starts, and what helps.
    """

    layers: tuple[LayerHealth, ...]
    samples: int
    loss: float
    verdict: str

    @property
    def flagged(self) -> tuple[LayerHealth, ...]:
        """The layers that are not ok."""
        return tuple(layer for layer in self.layers if layer.flag != "ok")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "samples": self.samples,
            "loss": self.loss if math.isfinite(self.loss) else str(self.loss),
            "verdict": self.verdict,
        }

    def table(self) -> list[dict[str, str]]:
        """Rows of short texts for printing, one per layer; the keys are the headings."""
        return [
            {
                "layer": layer.name or "(model)",
                "type": layer.type,
                "weights": str(layer.n_weights),
                "zeros": f"{layer.zero_fraction:.1%}",
                "activation rms": _short(layer.activation_rms),
                "activation grad rms": _short(layer.activation_grad_rms),
                "weight norm": _short(layer.weight_norm),
                "grad norm": _short(layer.grad_norm),
                "grad rms": _short(layer.grad_rms),
                "relative": _short(layer.relative),
                "flag": layer.flag,
                "reason": layer.reason,
            }
            for layer in self.layers
        ]


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after pruning.

    Attributes:
        name: module path.
        status: "kept", "removed" (only before) or "added" (only after).
        grad_ratio: gradient root mean square after / before; None if undefined.
        activation_grad_ratio: the same of the gradient at the output.
        activation_ratio: activation root mean square after / before.
        weights_ratio: number of non-zero weights after / before.
        flag_before: None if added.
        flag_after: None if removed.
    """

    name: str
    status: Literal["kept", "removed", "added"]
    grad_ratio: float | None = None
    activation_grad_ratio: float | None = None
    activation_ratio: float | None = None
    weights_ratio: float | None = None
    flag_before: Flag | None = None
    flag_after: Flag | None = None


def diagnose(
    model: nn.Module, batches: Batches, loss_fn: LossFn, *, max_batches: int | None = None
) -> Diagnosis:
    """Measure the signal in every layer and flag what is dead, vanishing or exploding.

    Runs in eval mode with gradients for all parameters, frozen ones too. Mode, `.grad`,
    `requires_grad`, hooks, buffers and random state are restored, also after an exception. A loss
    that is not finite is reported, not raised: finding its origin is the point.

    Args:
        batches: re-iterable of (inputs, targets); every batch weighs by its samples.
        loss_fn: (outputs, targets) -> scalar mean over the samples.
        max_batches: read at most so many, at least 1; None reads all.

    Raises:
        CaptureError: the model refuses the inputs or returns no tensor.
        ConfigError: the model has no parameters, or max_batches is below 1.
        DataError: the batches are empty or malformed, or the loss refuses the targets.
        ScoringError: the loss is not a scalar or has no gradient.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     for p in net.parameters():
        ...         _ = p.fill_(0.5)
        >>> d = diagnose(net, [(torch.ones(4, 2), torch.zeros(4, 1))], nn.functional.mse_loss)
        >>> [(layer.name, round(layer.grad_norm, 3), layer.flag) for layer in d.layers]
        [('0', 4.0, 'ok'), ('2', 8.485, 'ok')]
    """
    if max_batches is not None and max_batches < 1:
        raise ConfigError(f"max_batches must be at least 1 or None, got {max_batches}")
    owners = {name: weights for name, m in model.named_modules() if (weights := _weights(m))}
    if not owners:
        raise ConfigError(f"{type(model).__name__} has no parameters: nothing to diagnose")
    probe = _Probe()
    wanted = list({id(p): p for weights in owners.values() for p in weights}.values())
    with ExitStack() as stack:
        stack.enter_context(preserve(model))
        stack.enter_context(in_mode(model, training=False))
        stack.enter_context(_gradients_on(model))
        stack.enter_context(_recurrent_backward(model))
        stack.enter_context(probe.attached(model, set(owners)))
        sums, samples, loss = _accumulate(model, batches, loss_fn, wanted, max_batches)
    grads = {id(p): s for p, s in zip(wanted, sums, strict=True)}
    modules = dict(model.named_modules())
    raw = [
        _health(name, type(modules[name]).__name__, owners[name], grads, samples, probe)
        for name in _execution_order(list(owners), probe.first_call)
    ]
    layers = flagged(raw, owners)
    return Diagnosis(layers, samples, loss, verdict(layers, loss))


def compare(before: Diagnosis, after: Diagnosis) -> list[LayerChange]:
    """What pruning did to the signal: one row per layer of either diagnosis, by name.

    Use the same batches and loss for both. A layer that became dead or vanishing is seen in
    `flag_before` and `flag_after`.

    Example:
        >>> batch = (torch.ones(4, 2), torch.zeros(4, 1))
        >>> d = diagnose(nn.Linear(2, 1), [batch], nn.functional.mse_loss)
        >>> [(row.status, row.grad_ratio) for row in compare(d, d)]
        [('kept', 1.0)]
    """
    new = {layer.name: layer for layer in after.layers}
    old = {layer.name for layer in before.layers}
    rows = []
    for a in before.layers:
        b = new.get(a.name)
        if b is None:
            rows.append(LayerChange(a.name, "removed", flag_before=a.flag))
            continue
        rows.append(
            LayerChange(
                a.name,
                "kept",
                grad_ratio=_ratio(b.grad_rms, a.grad_rms),
                activation_grad_ratio=_ratio(b.activation_grad_rms, a.activation_grad_rms),
                activation_ratio=_ratio(b.activation_rms, a.activation_rms),
                weights_ratio=_ratio(_nonzeros(b), _nonzeros(a)),
                flag_before=a.flag,
                flag_after=b.flag,
            )
        )
    rows += [
        LayerChange(b.name, "added", flag_after=b.flag) for b in after.layers if b.name not in old
    ]
    return rows


# --- measuring -----------------------------------------------------------------------------------


@dataclass
class _Probe:
    """Sums taken by hooks during the passes; one instance per diagnosis."""

    first_call: dict[str, int] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    elements: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    grad_squares: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    grad_elements: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def attached(self, model: nn.Module, names: set[str]) -> Iterator[None]:
        """Hooks on every module (order of calls) and on the outputs of `names`."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                before = module.register_forward_pre_hook(self._called(name))
                stack.callback(before.remove)
                if name in names:
                    stack.callback(module.register_forward_hook(self._output(name)).remove)
            yield

    def _called(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.first_call.setdefault(name, len(self.first_call))

        return hook

    def _output(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = next((t for t in tensors(output) if t.is_floating_point()), None)
            if first is None:
                return
            self.squares[name] += _square_sum(first)
            self.elements[name] += first.numel()
            if first.requires_grad:
                first.register_hook(lambda grad: self._gradient(name, grad))  # type: ignore[no-untyped-call]

        return hook

    def _gradient(self, name: str, grad: Tensor) -> None:
        self.grad_squares[name] += _square_sum(grad)
        self.grad_elements[name] += grad.numel()


def _accumulate(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    wanted: Sequence[nn.Parameter],
    max_batches: int | None,
) -> tuple[list[Tensor | None], int, float]:
    """Gradients of the summed loss (None: no path to it), samples, mean loss."""
    sums: list[Tensor | None] = [None] * len(wanted)
    samples, total = 0, 0.0
    for i, batch in enumerate(iterate(batches, model_device(model), max_batches)):
        n = batch_size(batch[0])
        if n == 0:
            raise DataError(f"batch {i} has no samples (dimension 0 of its inputs has size 0)")
        with torch.inference_mode(False), torch.enable_grad():
            # A sum over samples: what the hooks see is then the gradient of each sample's loss.
            loss = _loss(model, batch, loss_fn, f"batch {i}") * n
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        for k, grad in enumerate(grads):
            if grad is not None:
                wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
                old = sums[k]
                sums[k] = wide if old is None else old + wide
        samples += n
        total += loss.item()
    return sums, samples, total / samples


def _loss(model: nn.Module, batch: Batch, loss_fn: LossFn, where: str) -> Tensor:
    """The loss of a batch: a scalar with a gradient, finite or not."""
    try:
        outputs = call_model(model, batch[0])
    except Exception as error:
        raise CaptureError(f"{where}: the model refuses the inputs: {error}") from error
    if not tensors(outputs):
        raise CaptureError(f"{where}: the model returns {type(outputs).__name__}, no tensor")
    try:
        loss = loss_fn(outputs, batch[1])
    except Exception as error:
        raise DataError(f"{where}: the loss refuses outputs and targets: {error}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ScoringError(f"{where}: loss_fn must return a scalar tensor that has a gradient")
    return loss.reshape(())


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The module's own floating parameters; biases only if there is nothing else."""
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    return [p for n, p in own.items() if "bias" not in n] or list(own.values())


@contextmanager
def _gradients_on(model: nn.Module) -> Iterator[None]:
    """Ask for the gradient of every floating parameter; restore what was frozen."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _recurrent_backward(model: nn.Module) -> Iterator[None]:
    """cuDNN has no backward for recurrent layers in eval mode: use the plain kernels."""
    if any(isinstance(m, nn.RNNBase) for m in model.modules()):
        with torch.backends.cudnn.flags(enabled=False):
            yield
    else:
        yield


def _square_sum(x: Tensor) -> float:
    """Sum of squares in double precision, so that tiny gradients do not underflow."""
    x = x.detach()
    if x.device.type == "mps":  # no double precision there
        x = x.cpu()
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _execution_order(names: Sequence[str], first_call: dict[str, int]) -> list[str]:
    """By first call; a module that is never called stands with its nearest called parent."""

    def when(name: str) -> int:
        while name not in first_call and name:
            name = name.rpartition(".")[0]
        return first_call.get(name, 0)

    return sorted(names, key=when)  # stable: ties keep the order of registration


def _health(
    name: str,
    kind: str,
    weights: Sequence[nn.Parameter],
    grads: dict[int, Tensor | None],
    samples: int,
    probe: _Probe,
) -> LayerHealth:
    """The numbers of one layer, not yet judged."""
    n = sum(p.numel() for p in weights)
    sums = [grads[id(p)] for p in weights]
    grad_norm = math.sqrt(sum(_square_sum(g) for g in sums if g is not None)) / samples
    seen, felt = probe.elements.get(name, 0), probe.grad_elements.get(name, 0)
    arriving = probe.grad_squares.get(name, 0.0)
    return LayerHealth(
        name=name,
        type=kind,
        n_weights=n,
        zero_fraction=sum(int((p == 0).sum()) for p in weights) / n if n else 0.0,
        weight_norm=math.sqrt(sum(map(_square_sum, weights))),
        grad_norm=grad_norm,
        grad_rms=grad_norm / math.sqrt(n) if n else 0.0,
        activation_rms=math.sqrt(probe.squares[name] / seen) if seen else None,
        activation_grad_rms=math.sqrt(arriving / felt) if felt else None,
        activation_grad_norm=math.sqrt(arriving / samples) if felt else None,
        relative=None,
        flag="ok",
        reason="" if any(g is not None for g in sums) else "no path to the loss",
    )


def _nonzeros(layer: LayerHealth) -> float:
    return layer.n_weights * (1 - layer.zero_fraction)


def _ratio(after: float | None, before: float | None) -> float | None:
    """after / before; None where it says nothing."""
    return after / before if finite(after) and usable(before) else None  # type: ignore[operator]


def _short(x: float | None) -> str:
    return "-" if x is None else f"{x:.2e}"
