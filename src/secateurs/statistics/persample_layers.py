"""How each kind of layer turns its inputs and output gradients into gradients of single samples.

One signature: `grads(module, name, x, g, n)` gives (n, *shape of the parameter) from the input
`x` and the output gradient `g` of one call. Both hold the samples one after the other in their
first dimension: sample i owns rows [i * t, (i + 1) * t). `squares` gives the sum over the samples
of the squared gradients without keeping one gradient per sample.

All of it works on float32 or float64 tensors and records nothing for autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Layer", "layer_of", "obstacle", "squares_of"]

Grads = Callable[[Any, str, Tensor, Tensor, int], Tensor]

BLOCK_BYTES = {"cpu": 2**20}
"""Largest scratch matrix: what stays in the cache of one core; launches count elsewhere."""
OTHER_BLOCK_BYTES = 2**26
EXPANDED = 4
"""Up to so many positions, (sum_t g_t a_t)^2 is cheaper multiplied out, as one product."""
SMALL_MAP = 64
"""Up to so many output positions, unfolding beats the convolution kernel for weight gradients."""


@dataclass(frozen=True)
class Layer:
    """The rules of one kind of layer.

    Attributes:
        grads: see the module docstring.
        squares: the same arguments, gives the shape of the parameter; None: sum up `grads`.
        rows: everything before the last dimension is positions, so that the samples may lie in
            any of these dimensions and several calls may be joined.
        blocked: why this module cannot be covered in its present state, or an empty text.
    """

    grads: Grads
    squares: Grads | None = None
    rows: bool = False
    blocked: Callable[[Any], str] = lambda _: ""


def layer_of(module: nn.Module) -> Layer | None:
    """The rules for a module, or None; a subclass counts while it keeps the forward."""
    for kind, layer in TABLE.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return layer
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # the linear layer of GPT-2
        return TRANSPOSED
    own = list(module.parameters(recurse=False))
    foreign = not type(module).__module__.startswith("torch.nn.")
    bare = next(module.children(), None) is None and next(module.buffers(), None) is None
    if foreign and bare and own and all(p.dim() == 1 for p in own):
        return SCALE
    return None


def obstacle(module: nn.Module, name: str) -> str:
    """Why no rule covers this parameter of a module, or an empty text."""
    kind, layer = type(module).__name__, layer_of(module)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"{kind} is recurrent: its steps cannot be seen from outside"
    if layer is None:
        return f"{kind} has no rule for gradients of single samples"
    if name not in ("weight", "bias") and layer is not SCALE:
        return f"{kind} does not read {name} in its own forward"
    return layer.blocked(module)


def squares_of(layer: Layer, module: nn.Module, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    """Sum over the samples of the squared gradients, shape of the parameter."""
    if layer.squares is not None and name == "weight":
        return layer.squares(module, name, x, g, n)
    return layer.grads(module, name, x, g, n).square().sum(0)


# --- products ------------------------------------------------------------------------------------


def product_squares(left: Tensor, right: Tensor) -> Tensor:
    """sum_i (left_i @ right_i)^2 of (n, out, t) and (n, t, in): (out, in)."""
    n, out, t = left.shape
    width = right.shape[2]
    if t <= EXPANDED:
        return _expanded(left, right)
    room = BLOCK_BYTES.get(left.device.type, OTHER_BLOCK_BYTES) // left.element_size()
    rows = max(1, min(out, room // max(width, 1)))
    total = left.new_zeros(out, width)
    scratch = left.new_empty(rows, width)
    for start in range(0, out, rows):
        part = total[start : start + rows]
        buffer = scratch[: part.shape[0]]
        for i in range(n):
            torch.mm(left[i, start : start + rows], right[i], out=buffer)
            part.addcmul_(buffer, buffer)
    return total


def _expanded(left: Tensor, right: Tensor) -> Tensor:
    """The same as sum_{i,s,t} (l_is l_it)(r_is r_it): one product of n t (t + 1) / 2 terms."""
    s, t = torch.triu_indices(left.shape[2], left.shape[2], device=left.device)
    twice = torch.where(s == t, 1, 2).to(left.dtype)
    a = (left[:, :, s] * left[:, :, t] * twice).transpose(0, 1).flatten(1)  # (out, n * pairs)
    b = (right[:, s] * right[:, t]).flatten(0, 1)  # (n * pairs, in)
    return (a @ b).clamp_min_(0)  # a sum of squares; cancellation may leave less than nothing


def _positions(x: Tensor, n: int) -> Tensor:
    """(n * t, ..., features) -> (n, positions, features)."""
    return x.reshape(n, -1, x.shape[-1])


def _channels(values: Tensor, n: int) -> Tensor:
    """Sums for each sample and channel: (n * t, channels, ...) -> (n, channels)."""
    sums = values.flatten(2).sum(2) if values.dim() > 2 else values
    return sums.reshape(n, -1, sums.shape[1]).sum(1)


# --- linear --------------------------------------------------------------------------------------


def _linear(module: nn.Linear, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    g = _positions(g, n)
    return g.sum(1) if name == "bias" else torch.bmm(g.transpose(1, 2), _positions(x, n))


def _linear_squares(module: nn.Linear, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    return product_squares(_positions(g, n).transpose(1, 2), _positions(x, n))


def _transposed(module: nn.Module, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    g = _positions(g, n)
    return g.sum(1) if name == "bias" else torch.bmm(_positions(x, n).transpose(1, 2), g)


def _transposed_squares(module: nn.Module, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    return product_squares(_positions(x, n).transpose(1, 2), _positions(g, n))


# --- convolution ---------------------------------------------------------------------------------


def _padded(module: Any, x: Tensor) -> tuple[Tensor, list[int]]:
    """The input and the symmetric zero padding that is left to do."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, module._reversed_padding_repeated_twice, mode=mode), [0] * (x.dim() - 2)
    return x, list(module.padding)


def _kernel_grad(module: Any, x: Tensor, g: Tensor, padding: list[int]) -> Tensor:
    """The weight gradient of one sample, by the kernel that autograd uses."""
    extra = [0] * len(padding)
    if module.transposed:
        extra = [
            size - ((start - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for size, start, stride, pad, dilation, kernel in zip(
                g.shape[2:],
                x.shape[2:],
                module.stride,
                padding,
                module.dilation,
                module.kernel_size,
                strict=True,
            )
        ]
    out: Tensor = torch.ops.aten.convolution_backward(
        g,
        x,
        module.weight.detach().to(g.dtype),
        None,
        module.stride,
        padding,
        module.dilation,
        module.transposed,
        extra,
        module.groups,
        [False, True, False],
    )[1]
    return out


def _conv(module: Any, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    if name == "bias":
        return _channels(g, n)
    x, padding = _padded(module, x)
    t = g.shape[0] // n
    parts = zip(torch.split(x, t), torch.split(g, t), strict=True)
    return torch.stack([_kernel_grad(module, a, b, padding) for a, b in parts])


def _conv_squares(module: Any, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    shape, t = module.weight.shape, g.shape[0] // n
    places = g[0, 0].numel()
    plain = module.groups == 1 and not module.transposed
    x, padding = _padded(module, x)
    if plain and all(k == 1 for k in module.kernel_size) and not any(padding):
        steps = tuple(slice(None, None, s) for s in module.stride)
        columns = x[(slice(None), slice(None), *steps)].flatten(2)  # (n * t, in, places)
    elif plain and x.dim() == 4 and t * places <= SMALL_MAP:
        columns = F.unfold(x, module.kernel_size, module.dilation, tuple(padding), module.stride)
    else:
        total = g.new_zeros(shape)
        for a, b in zip(torch.split(x, t), torch.split(g, t), strict=True):
            grad = _kernel_grad(module, a, b, padding)
            total.addcmul_(grad, grad)
        return total
    return product_squares(_joined(g.flatten(2), n), _joined(columns, n).transpose(1, 2)).reshape(
        shape
    )


def _joined(x: Tensor, n: int) -> Tensor:
    """(n * t, channels, places) -> (n, channels, t * places)."""
    return x.reshape(n, -1, *x.shape[1:]).transpose(1, 2).flatten(2) if x.shape[0] != n else x


# --- norms, scales -------------------------------------------------------------------------------


def _batch_norm(module: Any, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    if name == "bias":
        return _channels(g, n)
    k, c = x.shape[:2]
    flat = (1, k * c, *x.shape[2:])  # every sample has channels of its own: one fused pass
    out: Tensor = torch.ops.aten.native_batch_norm_backward(
        g.reshape(flat),
        x.reshape(flat),
        None,
        module.running_mean.to(g.dtype).repeat(k),
        module.running_var.to(g.dtype).repeat(k),
        None,
        None,
        False,
        module.eps,
        [False, True, False],
    )[1]
    return out.view(n, -1, c).sum(1)


def _batch_norm_blocked(module: Any) -> str:
    mixes = module.training or module.running_mean is None
    return f"{type(module).__name__} takes its statistics from the batch" if mixes else ""


def _row_norm(normalise: Callable[[Any, Tensor], Tensor]) -> Grads:
    def grads(module: Any, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
        values = g if name == "bias" else normalise(module, x) * g
        return values.reshape(n, -1, *module.normalized_shape).sum(1)

    return grads


def _channel_norm(normalise: Callable[[Any, Tensor], Tensor]) -> Grads:
    def grads(module: Any, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
        return _channels(g if name == "bias" else normalise(module, x) * g, n)

    return grads


def _instance(module: Any, x: Tensor) -> Tensor:
    if module.training or module.running_mean is None:
        return F.instance_norm(x, eps=module.eps)
    mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
    return F.instance_norm(x, mean, var, use_input_stats=False, eps=module.eps)


def _prelu(module: Any, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    values = x.clamp_max(0) * g
    if module.num_parameters == 1:
        return values.reshape(n, -1).sum(1, keepdim=True)
    return _channels(values, n)


def _scale(module: nn.Module, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    """A custom norm or scale: affine in each vector, along the last dimension or the channels."""

    def output(vector: Tensor) -> Tensor:
        twin = copy.copy(module)  # called beside the model: no hooks, nothing changed
        own = {k: p.detach().to(g.dtype) for k, p in module.named_parameters(recurse=False)}
        twin.__dict__["_parameters"] = own | {name: vector}
        out: Tensor = twin.forward(x)
        return out

    size = getattr(module, name).numel()
    ramp = torch.arange(1, size + 1, dtype=g.dtype, device=g.device) / size
    start = output(torch.zeros_like(ramp))
    slope, tilted = output(torch.ones_like(ramp)) - start, output(ramp) - start
    for dim in (g.dim() - 1, 1):
        if slope.shape == g.shape and g.shape[dim] == size:
            along = ramp.reshape([size if d == dim else 1 for d in range(g.dim())])
            gap = (tilted - slope * along).abs().max()
            if gap <= 1e-4 * slope.abs().max():
                return _positions((slope * g).movedim(dim, -1), n).sum(1)
    raise TypeError(f"{type(module).__name__} is not affine in {name}")


# --- embedding -----------------------------------------------------------------------------------


def _touched(module: Any, x: Tensor, g: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(sample, row of the table, gradient of that row) for each pair that occurs."""
    ids, grads = x.reshape(n, -1).long(), g.reshape(n, -1, g.shape[-1])
    sample = torch.arange(n, device=ids.device)[:, None]
    keys, where = torch.unique(sample * module.num_embeddings + ids, return_inverse=True)
    rows = grads.new_zeros(len(keys), grads.shape[-1])
    rows.index_add_(0, where.reshape(-1), grads.flatten(0, 1))
    index = keys % module.num_embeddings
    if module.padding_idx is not None:
        rows[index == module.padding_idx] = 0
    return keys // module.num_embeddings, index, rows


def _embedding(module: Any, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    sample, index, rows = _touched(module, x, g, n)
    out = g.new_zeros(n, *module.weight.shape)
    out[sample, index] = rows
    return out


def _embedding_squares(module: Any, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
    _, index, rows = _touched(module, x, g, n)
    return g.new_zeros(module.weight.shape).index_add_(0, index, rows.square_())


def _embedding_blocked(module: Any) -> str:
    if module.max_norm is not None:
        return "Embedding with max_norm changes its own weight"
    if module.scale_grad_by_freq:
        return "Embedding with scale_grad_by_freq counts over the batch"
    return ""


CONV = Layer(_conv, _conv_squares)
BATCH_NORM = Layer(_batch_norm, blocked=_batch_norm_blocked)
INSTANCE_NORM = Layer(_channel_norm(_instance))
LINEAR = Layer(_linear, _linear_squares, rows=True)
TRANSPOSED = Layer(_transposed, _transposed_squares, rows=True)
SCALE = Layer(_scale)

TABLE: dict[type[nn.Module], Layer] = {
    nn.Linear: LINEAR,
    nn.Conv1d: CONV,
    nn.Conv2d: CONV,
    nn.Conv3d: CONV,
    nn.ConvTranspose1d: CONV,
    nn.ConvTranspose2d: CONV,
    nn.ConvTranspose3d: CONV,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
    nn.InstanceNorm1d: INSTANCE_NORM,
    nn.InstanceNorm2d: INSTANCE_NORM,
    nn.InstanceNorm3d: INSTANCE_NORM,
    nn.LayerNorm: Layer(
        _row_norm(lambda m, x: F.layer_norm(x, m.normalized_shape, eps=m.eps)), rows=True
    ),
    nn.RMSNorm: Layer(
        _row_norm(lambda m, x: F.rms_norm(x, m.normalized_shape, eps=m.eps)), rows=True
    ),
    nn.GroupNorm: Layer(_channel_norm(lambda m, x: F.group_norm(x, m.num_groups, eps=m.eps))),
    nn.PReLU: Layer(_prelu),
    nn.Embedding: Layer(_embedding, _embedding_squares, rows=True),
}
