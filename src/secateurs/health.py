"""When a layer's signal counts as healthy: the rule, the judgement, and its words.

    numbers of all layers ── flagged ──> the same with flag and reason ── verdict ──> sentences

**The rule.** The gradient enters at the last layer, so every layer is held against the last layer
that gets one: for the weights, the last layer of the same family (matrix: linear, convolution,
recurrent, embedding; vector: normalisation and other one-dimensional parameters); for the
activations, the last layer that ran. Norms are compared, not root mean squares, because layers that
pass the signal on well preserve its norm whatever their width and resolution.

- `dead`: all weights are zero, or the output, or the gradient is exactly zero everywhere, or
  the layer has no path to the loss.
- `exploding`: a value is not finite, or one of the two norms is above 1000 x its reference.
- `vanishing`: one of the two norms is below 1/1000 of its reference (or has become zero by
  underflow on the way).
- `ok`: none of these.

The activations are needed besides the weights: in a deep linear network of too small or too large
a gain, activations and gradients change in opposite directions and all weight gradients look alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

__all__ = ["Flag", "LayerHealth", "finite", "flagged", "usable", "verdict"]

Flag = Literal["ok", "vanishing", "exploding", "dead"]

VANISHING = 1e-3
EXPLODING = 1e3
UNDERFLOW = 1e-30  # a gradient this small in a later layer explains a zero in an earlier one

_NO_GRADIENT = "weight gradient zero everywhere"

_REMEDIES: dict[str, str] = {
    "exploding": "Lower the learning rate, clip gradients, use a smaller or orthogonal "
    "initialisation, or add normalisation.",
    "vanishing": "Use ReLU-like activations with He initialisation, normalisation layers or "
    "residual connections, and be careful with gradient scores there: they are small because of "
    "depth, not because the weights do not matter.",
    "dead": "If pruning did it, keep a minimum per layer or remove the layer; else look for "
    "units that never activate, weights of zero, or an output that the loss does not use.",
}


@dataclass(frozen=True)
class LayerHealth:
    """The signal in one layer. None: not defined (a module used without being called).

    Attributes:
        name: module path; "" is the model itself.
        type: class of the module.
        n_weights: elements of its weights (parameters without biases, if it has others).
        zero_fraction: share of them that are zero, in [0, 1].
        weight_norm: L2 norm of the weights.
        grad_norm: L2 norm of their gradient of the mean loss over all samples.
        grad_rms: the same per element: grad_norm / sqrt(n_weights).
        activation_rms: root mean square of the output, over elements and samples.
        activation_grad_rms: of the gradient of one sample's loss with respect to the output.
        activation_grad_norm: L2 norm of that gradient per sample (root mean square over samples).
        relative: the norm that decided, over its reference; of the weights if nothing is flagged.
        flag: "ok", "vanishing", "exploding" or "dead", by the rule of this module.
        reason: what the flag rests on; empty for "ok".
    """

    name: str
    type: str
    n_weights: int
    zero_fraction: float
    weight_norm: float
    grad_norm: float
    grad_rms: float
    activation_rms: float | None
    activation_grad_rms: float | None
    activation_grad_norm: float | None
    relative: float | None
    flag: Flag
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite becomes its name ("inf", "nan")."""
        return {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(self).items()
        }


def flagged(
    raw: Sequence[LayerHealth], owners: dict[str, list[nn.Parameter]]
) -> tuple[LayerHealth, ...]:
    """Judge every layer against the last one of its family, and the last one that ran."""
    family = {name: any(p.dim() > 1 for p in weights) for name, weights in owners.items()}
    last_weights = {family[x.name]: x for x in raw if usable(x.grad_norm)}
    arriving = [x for x in raw if usable(x.activation_grad_norm)]
    last_output = arriving[-1] if arriving else None
    layers = [_judge(x, last_weights.get(family[x.name]), last_output) for x in raw]
    smallest = math.inf
    for i in reversed(range(len(layers))):  # from the loss towards the input
        layer = layers[i]
        if layer.reason == _NO_GRADIENT and smallest < UNDERFLOW:
            layers[i] = replace(layer, flag="vanishing", reason="weight gradient underflows")
        elif usable(layer.grad_norm):
            smallest = min(smallest, layer.grad_norm)
    return tuple(layers)


def _judge(
    x: LayerHealth, last_weights: LayerHealth | None, last_output: LayerHealth | None
) -> LayerHealth:
    """One layer with its flag: the first rule that applies."""
    numbers = {
        "weights": x.weight_norm,
        "output": x.activation_rms,
        "weight gradient": x.grad_norm,
        "output gradient": x.activation_grad_norm,
    }
    for what, value in numbers.items():
        if value is not None and not math.isfinite(value):
            return replace(x, flag="exploding", reason=f"{what} not finite")
    if x.reason:
        return replace(x, flag="dead")
    if x.weight_norm == 0:
        return replace(x, flag="dead", reason="weights all zero")
    if x.activation_rms == 0:
        return replace(x, flag="dead", reason="output zero everywhere")
    if x.grad_norm == 0:
        return replace(x, flag="dead", reason=_NO_GRADIENT)
    ratios = []
    if last_weights is not None:
        ratios.append((x.grad_norm / last_weights.grad_norm, "weight gradient", last_weights))
    if last_output is not None and x.activation_grad_norm and last_output.activation_grad_norm:
        ratio = x.activation_grad_norm / last_output.activation_grad_norm
        ratios.append((ratio, "output gradient", last_output))
    for ratio, what, reference in ratios:
        flag: Flag = (
            "vanishing" if ratio < VANISHING else "exploding" if ratio > EXPLODING else "ok"
        )
        if flag != "ok":
            reason = f"{what} {ratio:.1e} times that of {reference.name or 'the model'!r}"
            return replace(x, flag=flag, relative=ratio, reason=reason)
    return replace(x, relative=ratios[0][0] if ratios else None)


def verdict(layers: Sequence[LayerHealth], loss: float) -> str:
    """What is wrong, where, and what helps."""
    sentences = []
    if not math.isfinite(loss):
        sentences.append(f"The loss is {loss}.")
    broken = [x for x in layers if x.activation_rms is not None and not finite(x.activation_rms)]
    if broken:
        sentences.append(f"The first output that is not finite is that of {_name(broken[0])}.")
    for flag in ("exploding", "vanishing", "dead"):
        hit = [x for x in layers if x.flag == flag]
        if hit:
            sentences.append(f"{_headline(flag, hit, len(layers))} {_REMEDIES[flag]}")
    if sentences:
        return " ".join(sentences)
    return f"All {len(layers)} layers carry a healthy signal."


def _headline(flag: str, hit: Sequence[LayerHealth], n: int) -> str:
    """How many layers, and the one to look at first."""
    if flag == "dead":  # upstream of a dead layer everything is without gradient
        return (
            f"{len(hit)} of {n} layers dead; start at {_name(hit[-1])}, the nearest to the output "
            f"({hit[-1].reason})."
        )
    known = [x for x in hit if x.relative is not None]
    if not known:
        return f"{len(hit)} of {n} layers not finite."
    pick = min if flag == "vanishing" else max
    worst = pick(known, key=lambda x: x.relative or 0.0)
    return f"{len(hit)} of {n} layers {flag}, worst {_name(worst)} ({worst.reason})."


def _name(layer: LayerHealth) -> str:
    return repr(layer.name) if layer.name else "the model itself"


def finite(x: float | None) -> bool:
    return x is not None and math.isfinite(x)


def usable(x: float | None) -> bool:
    """Whether a norm can be a reference: finite and not zero."""
    return x is not None and math.isfinite(x) and x > 0
