"""Layers as products of inputs and weights: one matrix for each group of a convolution.

    y[g] = x[g] W[g]' + b[g]     x (groups, rows, in), W (groups, out, in)

A row is one sample at one position (pixel, time step; padding counts, too); the inputs of a
convolution are the patches that its kernel sees, borders included. What has such a product:
`nn.Linear`, the convolutions (also transposed), the `Conv1D` of transformers, the projections of
`nn.MultiheadAttention`, and inputs and states of recurrent layers of one level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

__all__ = ["Call", "Layer", "layers_of", "unread"]

MAX_ELEMENTS = 2**23
"""Of patches that are looked at together."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module in a run."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def given(self, position: int, name: str) -> Any:
        """An argument, however it was given; None if it was not."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)


@dataclass(frozen=True, eq=False)
class Layer:
    """One product of a module.

    Attributes:
        path: of the module.
        weight, bias: tensor names; a module may have no bias.
        groups: matrices.
        form: how the matrices lie in the weight: as they are, as the transpose, or as the kernel of
            a transposed convolution.
        part: first row of the weight that belongs to the product, and the row behind the last one;
            None for all.
        stage: products of one module with a higher stage read what those of a lower one made.
        loop: whether it reads what it made itself a step before.
        source: what holds the inputs of a call, samples or rows first.
        expand: the inputs of some of these samples: (groups, rows, in).
        made: (rows, out) of a call, where that can be seen; else it is computed.
    """

    path: str
    weight: str
    bias: str | None
    source: Callable[[Call], Tensor]
    expand: Callable[[Any, Tensor], Tensor]
    made: Callable[[Call], Tensor] | None = None
    groups: int = 1
    form: Literal["plain", "transposed", "kernel"] = "plain"
    part: tuple[int, int] | None = None
    stage: int = 0
    loop: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return self.weight if self.part is None else f"{self.weight}[{self.part[0]}:{self.part[1]}]"

    def rows(self, call: Call) -> Iterator[Tensor]:
        """(groups, rows, in) inputs of a call, so many at a time that they fit into the memory."""
        source = self.source(call).detach()
        if source.dtype in (torch.float16, torch.bfloat16):
            source = source.float()
        if not len(source):
            return
        size = self.expand(call.module, source[:1]).numel()
        for some in torch.split(source, max(1, MAX_ELEMENTS // max(1, size))):
            yield self.expand(call.module, some)

    def outputs(self, call: Call, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, out) of a call, without padding of any kind that the layer itself adds."""
        if self.made is not None:
            seen = self.made(call).detach()
            seen = seen.float() if seen.dtype in (torch.float16, torch.bfloat16) else seen
            return seen.clone()  # the next module may work in place
        return torch.cat([flat(product(x, weight, bias)) for x in self.rows(call)])

    def matrix(self, tensor: Tensor) -> Tensor:
        """(groups, out, in) of the weight, or of what has its shape."""
        if self.form == "transposed":
            return tensor.mT[None]
        if self.form == "kernel":  # (in, out / groups, *k)
            space = tuple(range(2, tensor.dim()))
            flipped = torch.unflatten(tensor.flip(space), 0, (self.groups, -1)).transpose(1, 2)
            return flipped.flatten(2)
        mine = tensor if self.part is None else tensor[slice(*self.part)]
        return mine.reshape(self.groups, -1, math.prod(tensor.shape[1:]))

    def line(self, tensor: Tensor) -> Tensor:
        """(groups, out) of the bias, or of what has its shape."""
        mine = tensor if self.part is None else tensor[slice(*self.part)]
        return mine.reshape(self.groups, -1)

    def place(self, tensor: Tensor, matrix: Tensor) -> None:
        """Write matrices into the weight, or into what has its shape."""
        if self.form == "transposed":
            tensor.copy_(matrix[0].mT)
        elif self.form == "kernel":
            k = tensor.shape[2:]
            n_in = tensor.shape[0] // self.groups
            kernel = torch.unflatten(matrix, 2, (n_in, *k)).transpose(1, 2).flatten(0, 1)
            tensor.copy_(kernel.flip(tuple(range(2, tensor.dim()))))
        else:
            mine = tensor if self.part is None else tensor[slice(*self.part)]
            mine.copy_(matrix.reshape(mine.shape))

    def place_line(self, tensor: Tensor, line: Tensor) -> None:
        """Write a line into the bias, or into what has its shape."""
        mine = tensor if self.part is None else tensor[slice(*self.part)]
        mine.copy_(line.reshape(mine.shape))

    @property
    def out_dim(self) -> int:
        """Dimension of the weight along which its outputs lie."""
        return 0 if self.form == "plain" else 1


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(groups, rows, out) from (groups, rows, in), (groups, out, in) and (groups, out)."""
    y = x @ weight.to(x.dtype).mT
    return y if bias is None else y + bias.to(x.dtype)[:, None]


def flat(y: Tensor) -> Tensor:
    """(groups, rows, out) -> (rows, groups * out)."""
    return y.transpose(0, 1).flatten(1)


def layers_of(model: nn.Module) -> list[Layer]:
    """Every layer whose inputs can be seen from outside, in the order of registration."""
    found: list[Layer] = []
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        if isinstance(module, nn.RNNBase):
            found += _recurrent(path, dot, module)
        elif isinstance(module, nn.MultiheadAttention):
            found += _attention(path, dot, module)
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            continue  # of nn.MultiheadAttention: used, but never called
        elif isinstance(module, nn.Linear) and "weight" in module._parameters:
            found.append(Layer(path, f"{dot}weight", _bias(dot, module), _features, _one, _last))
        elif isinstance(module, _ConvNd) and "weight" in module._parameters:
            up = isinstance(module, _ConvTransposeNd)
            found.append(
                Layer(
                    path,
                    f"{dot}weight",
                    _bias(dot, module),
                    _spread if up else _padded,
                    _patches,
                    _pixels,
                    module.groups,
                    "kernel" if up else "plain",
                )
            )
        elif type(module).__name__ == "Conv1D" and "weight" in module._parameters:
            # Of transformers: a linear layer with weight (in, out).
            bias = _bias(dot, module)
            found.append(
                Layer(path, f"{dot}weight", bias, _features, _one, _last, form="transposed")
            )
    return found


def unread(module: nn.Module) -> str:
    """Why the weights of a module are no layer."""
    if isinstance(module, nn.RNNBase):
        return "what is between its levels, and behind its projection, stays in the kernel"
    return f"the inputs that a {type(module).__name__} multiplies cannot be seen from outside"


def _bias(dot: str, module: nn.Module) -> str | None:
    return f"{dot}bias" if module._parameters.get("bias") is not None else None


# -- linear layers -----------------------------------------------------------------------------


def _features(call: Call) -> Tensor:
    """(rows, in)"""
    x: Tensor = call.args[0] if call.args else next(iter(call.kwargs.values()))
    return x.reshape(-1, x.shape[-1])


def _one(module: Any, x: Tensor) -> Tensor:
    return x[None]


def _last(call: Call) -> Tensor:
    out: Tensor = call.output
    return out.reshape(-1, out.shape[-1])


# -- convolutions ------------------------------------------------------------------------------


def _maps(call: Call) -> Tensor:
    """(n, in, *space)"""
    x: Tensor = call.given(0, "input")
    return x if x.dim() == len(call.module.kernel_size) + 2 else x[None]


def _padded(call: Call) -> Tensor:
    m = call.module
    mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
    return F.pad(_maps(call), m._reversed_padding_repeated_twice, mode=mode)


def _spread(call: Call) -> Tensor:
    """The input of a transposed convolution so that it is a plain one of stride 1."""
    m, x = call.module, _maps(call)
    space = len(m.kernel_size)
    wide = x.new_zeros(
        *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], m.stride, strict=True))
    )
    spots: Any = (..., *(slice(None, None, s) for s in m.stride))
    wide[spots] = x
    pads: list[int] = []
    for d in reversed(range(space)):
        reach = m.dilation[d] * (m.kernel_size[d] - 1)
        before = reach - m.padding[d]
        size = call.output.shape[call.output.dim() - space + d]  # the caller may have asked for one
        pads += [before, size + reach - before - wide.shape[2 + d]]
    return F.pad(wide, pads)


def _patches(m: Any, x: Tensor) -> Tensor:
    """(n, in, *space), padded -> (groups, n * positions, in / groups * k)"""
    space = len(m.kernel_size)
    for d in range(space):
        step = 1 if isinstance(m, _ConvTransposeNd) else m.stride[d]
        reach = m.dilation[d] * (m.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, reach, step)[..., :: m.dilation[d]]
    x = torch.unflatten(x, 1, (m.groups, -1))  # (n, groups, in / groups, *positions, *k)
    positions = range(3, 3 + space)
    kernel = range(3 + space, 3 + 2 * space)
    x = x.permute(1, 0, *positions, 2, *kernel)
    return x.flatten(2 + space).flatten(1, 1 + space)


def _pixels(call: Call) -> Tensor:
    """(n * positions, out)"""
    out: Tensor = call.output
    out = out if out.dim() == len(call.module.kernel_size) + 2 else out[None]
    return out.movedim(1, -1).flatten(0, -2)


# -- attention ---------------------------------------------------------------------------------


def _attention(path: str, dot: str, m: nn.MultiheadAttention) -> list[Layer]:
    e = m.embed_dim
    bias = f"{dot}in_proj_bias" if m.in_proj_bias is not None else None
    found = []
    for i, name in enumerate(("query", "key", "value")):

        def source(call: Call, i: int = i, name: str = name) -> Tensor:
            x: Tensor = call.given(i, name)
            return x.reshape(-1, x.shape[-1])

        if m._qkv_same_embed_dim:
            part = (i * e, (i + 1) * e)
            found.append(Layer(path, f"{dot}in_proj_weight", bias, source, _one, part=part))
        else:
            weight = f"{dot}{name[0]}_proj_weight"
            found.append(Layer(path, weight, None, source, _one))
    out_bias = f"{dot}out_proj.bias" if m.out_proj.bias is not None else None
    weight = f"{dot}out_proj.weight"
    found.append(Layer(path, weight, out_bias, _mixed, _one, _attended, stage=1))
    return found


def _mixed(call: Call) -> Tensor:
    """What the heads say: the output of the same module with a projection that changes nothing."""
    m = call.module
    plain = {"out_proj.weight": torch.eye(m.embed_dim).to(m.out_proj.weight)}
    if m.out_proj.bias is not None:
        plain["out_proj.bias"] = torch.zeros_like(m.out_proj.bias)
    out: Tensor = functional_call(m, plain, call.args, call.kwargs)[0]
    return out.reshape(-1, out.shape[-1])


def _attended(call: Call) -> Tensor:
    out: Tensor = call.output[0]
    return out.reshape(-1, out.shape[-1])


# -- recurrent layers --------------------------------------------------------------------------


def _recurrent(path: str, dot: str, m: nn.RNNBase) -> list[Layer]:
    if m.num_layers > 1 or m.proj_size:
        return []
    found = []
    for back, suffix in enumerate(["", "_reverse"][: 2 if m.bidirectional else 1]):
        for stage, (what, read) in enumerate((("ih", _sequence), ("hh", _states))):

            def source(call: Call, read: Any = read, back: int = back) -> Tensor:
                x: Tensor = read(call, back)
                return x.reshape(-1, x.shape[-1])

            bias = f"{dot}bias_{what}_l0{suffix}" if m.bias else None
            weight = f"{dot}weight_{what}_l0{suffix}"
            found.append(Layer(path, weight, bias, source, _one, stage=stage, loop=stage > 0))
    return found


def _sequence(call: Call, back: int) -> Tensor:
    x = call.given(0, "input")
    return x.data if isinstance(x, PackedSequence) else x


def _states(call: Call, back: int) -> Tensor:
    """The state that each step reads: that of the step before it, at first the given one or 0."""
    m, y = call.module, call.output[0]
    lengths = None
    if isinstance(y, PackedSequence):
        y, lengths = pad_packed_sequence(y)  # (time, n, directions * hidden)
    y = y[..., back * m.hidden_size : (back + 1) * m.hidden_size]
    if lengths is None and m.batch_first and y.dim() == 3:
        y = y.transpose(0, 1)
    given = call.given(1, "hx")
    given = given[0] if isinstance(given, tuple) else given  # LSTM: (h, c)
    first = torch.zeros_like(y[0]) if given is None else given[back]
    if lengths is None:
        return torch.cat([y[1:], first[None]] if back else [first[None], y[:-1]])
    steps, ends = torch.arange(len(y))[:, None], lengths[None]
    before = torch.cat([y[1:], y[:1]]) if back else torch.cat([y[-1:], y[:-1]])
    begins = (steps == (ends - 1 if back else 0)).to(y.device)
    before = torch.where(begins[..., None], first[None], before)
    return before[(steps < ends).to(y.device)]
