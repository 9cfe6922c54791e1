"""Networks that the engine must understand: name -> model, inputs, and the units it should find.

Each is pruned, shrunk in both forms and compared in `test_structures`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.types import Inputs
from tests.graph.nets import Net, image, rows, sequence

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One network; `form` is what "auto" should end in."""

    build: Callable[[], nn.Module]
    inputs: Inputs
    units: dict[str, int]
    form: str = "module"


CASES: dict[str, Case] = {}


def linear_case(
    name: str,
    between: Callable[[Any, Tensor], Tensor],
    units: dict[str, int] | None = None,
    form: str = "module",
    **parts: Any,
) -> None:
    """linear(6, 8) - `between` - linear(8, 4)."""

    def forward(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.c(between(net, net.a(x)))
        return out

    def build() -> nn.Module:
        made = {k: v() for k, v in parts.items()}
        return Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 4), **made)

    CASES[name] = Case(build, rows(), {"a:neuron": 8} if units is None else units, form)


def image_case(
    name: str,
    between: Callable[[Any, Tensor, Tensor], Tensor],
    units: dict[str, int],
    form: str = "module",
    out: int = 8,
    **parts: Any,
) -> None:
    """conv(3, 8) - `between(net, features, image)` - global pool - linear(out, 4)."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y: Tensor = net.h(between(net, net.a(x), x).mean((2, 3)))
        return y

    def build() -> nn.Module:
        made = {k: v() for k, v in parts.items()}
        first = nn.Conv2d(3, 8, 3, padding=1)
        return Net(forward, a=first, h=nn.Linear(out, 4), **made)

    CASES[name] = Case(build, image(), units, form)


def recurrent_case(
    name: str,
    kind: Callable[..., nn.RNNBase],
    read: Callable[[Any, Tensor], Tensor],
    units: dict[str, int] | None = None,
    form: str = "module",
    inputs: Inputs | None = None,
    parts: dict[str, Callable[[], Any]] | None = None,
    **options: Any,
) -> None:
    """A recurrent layer (4 -> 6), `read`, linear to 3."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y: Tensor = net.h(read(net, x))
        return y

    def build() -> nn.Module:
        layer = kind(4, 6, **{"batch_first": True, **options})
        made = {k: v() for k, v in (parts or {}).items()}
        return Net(forward, r=layer, h=nn.LazyLinear(3), **made)

    def ready() -> nn.Module:
        net = build()
        with torch.no_grad():
            net(sequence() if inputs is None else inputs)
        return net

    found = {"r:hidden": 6} if units is None else units
    CASES[name] = Case(ready, sequence() if inputs is None else inputs, found, form)


# -- elementwise: does zero stay zero? ------------------------------------------------------

for _name, _fn in {
    "relu": F.relu, "plus one": lambda x: x + 1, "sigmoid": torch.sigmoid, "exp": torch.exp,
    "times three": lambda x: x * 3, "softplus": F.softplus, "hardswish": F.hardswish,
    "where": lambda x: torch.where(x > 0, x, torch.ones_like(x)),
    "masked fill": lambda x: x.masked_fill(x < 0.1, -5.0), "clamp": lambda x: x.clamp(min=0.2),
    "square root": lambda x: x.abs() ** 0.5, "soft sign": lambda x: x / (1 + x.abs()),
    "greater or equal": lambda x: (x >= 0).float(), "to integer": lambda x: (3 * x).long().float(),
    "constant": lambda x: torch.maximum(x, torch.tensor(0.3)),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(), "squeeze dim": lambda x: x.squeeze(1),
}.items():  # fmt: skip
    linear_case(_name, lambda net, x, fn=_fn: fn(x))  # type: ignore[misc]


# -- moving data -------------------------------------------------------------------------


def _add_to_view(net: Any, x: Tensor) -> Tensor:
    y = net.b(torch.relu(x))
    x[:, :3] += y[:, :3]
    return x


def _write_ones(net: Any, x: Tensor) -> Tensor:
    x[:, 2:5] = 1.0
    return x


def _base_after_view(net: Any, x: Tensor) -> Tensor:
    view = x[:, :3]
    x.add_(1)
    return torch.cat([view, x[:, 3:]], 1)


def _relu_on_view(net: Any, x: Tensor) -> Tensor:
    x.view(-1, 2, 4).relu_()
    return x


_EIGHT: dict[str, Any] = {"b": lambda: nn.Linear(8, 8)}
linear_case(
    "in place on a slice", _add_to_view,
    {"a:neuron": 3, "a:neuron#2": 5, "b:neuron": 5}, "graph", **_EIGHT,
)  # fmt: skip
linear_case("constant into a slice", _write_ones, {"a:neuron": 5, "a:neuron#2": 3}, "graph")
linear_case("base changed after a view", _base_after_view,
            {"a:neuron": 3, "a:neuron#2": 5}, "graph")  # fmt: skip
linear_case("relu on a view", _relu_on_view, {"a:neuron": 4}, "graph")
linear_case(
    "over-long and negative bounds",
    lambda net, x: torch.cat([x[:, :100][:, -3:], x[:, -100:5]], 1),
    {"a:neuron": 5, "a:neuron#2": 3},
    "graph",
)
linear_case(
    "select pins its index",
    lambda net, x: torch.cat([x[:, 2:3], x[:, 3, None], x[:, :6]], 1),
    {"a:neuron": 4, "a:neuron#2": 2},
    "graph",
)
linear_case("empty pieces", lambda net, x: torch.cat([x[:, 8:], *torch.split(x, [0, 3, 5], 1)], 1),
            {"a:neuron": 3, "a:neuron#2": 5}, "graph")  # fmt: skip
linear_case(
    "regrouped twice",
    lambda net, x: (x.view(-1, 2, 4) * 1).reshape(-1, 4, 2).mul(2).flatten(1),
    {"a:neuron": 2},
    "graph",
)
linear_case(
    "unbind of heads", lambda net, x: torch.stack(x.view(-1, 2, 4).unbind(1), 1).flatten(1),
    {"a:neuron": 4}, "graph",
)  # fmt: skip
linear_case("size computed by the code", lambda net, x: x.view(x.size(0), x.numel() // x.size(0)))
linear_case("tied, transposed", lambda net, x: F.linear(F.relu(net.b(x)), net.b.weight.t()),
            {"a:neuron": 8, "b:neuron": 8}, **_EIGHT)  # fmt: skip
linear_case("weight plus one", lambda net, x: F.linear(x, net.b.weight + 1, net.b.bias),
            {"a:neuron": 8, "b:neuron": 8}, **_EIGHT)  # fmt: skip
linear_case("called twice", lambda net, x: net.b(F.relu(net.b(F.relu(x)))), **_EIGHT)

# -- images ------------------------------------------------------------------------------

_CONV: dict[str, Any] = {
    "b": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "bn": lambda: nn.BatchNorm2d(8),
    "c": lambda: nn.Conv2d(8, 8, 1),
}
_AC = {"a:channel": 8, "c:channel": 8}


def _gate(net: Any, x: Tensor) -> Tensor:
    squeezed = torch.sigmoid(net.f2(F.relu(net.f1(x.mean((2, 3))))))
    return x * squeezed[:, :, None, None]


def _shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


image_case("residual", lambda n, f, x: n.c(F.relu(n.bn(f)) + n.b(f)), _AC, **_CONV)
image_case(
    "joined with the image",
    lambda n, f, x: n.d(torch.cat([F.relu(f), x], 1)),
    {"a:channel": 8, "d:channel": 8},
    d=lambda: nn.Conv2d(11, 8, 1),
)
image_case(
    "residual over a pool",
    lambda n, f, x: F.avg_pool2d(f, 2) + n.s(F.max_pool2d(x, 2)),
    {"a:channel": 8},
    s=lambda: nn.Conv2d(3, 8, 1),
)
image_case(
    "squeeze and excite", lambda n, f, x: n.c(_gate(n, n.bn(f))),
    {"a:channel": 8, "f1:neuron": 4, "c:channel": 8},
    f1=lambda: nn.Linear(8, 4), f2=lambda: nn.Linear(4, 8), **_CONV,
)  # fmt: skip
image_case(
    "channel shuffle", lambda n, f, x: n.c(_shuffle(f)), {"a:channel": 4, "c:channel": 8}, **_CONV
)
image_case(
    "uneven chunks",
    lambda n, f, x: torch.cat([F.relu(f.chunk(3, 1)[0]), *f.chunk(3, 1)[1:]], 1),
    {"a:channel": 3, "a:channel#2": 3, "a:channel#3": 2},
)
image_case(
    "padded channels", lambda n, f, x: n.c(F.pad(f[:, :3], (0, 0, 0, 0, 2, 3))),
    {"a:channel": 3, "a:channel#2": 5, "c:channel": 8}, "graph", **_CONV,
)  # fmt: skip
image_case("padded with ones", lambda n, f, x: n.c(n.d(F.pad(f, (1, 1, 1, 1), value=1.0))), _AC,
           d=lambda: nn.Conv2d(8, 8, 3, groups=8), **_CONV)  # fmt: skip
image_case(
    "flattened map", lambda n, f, x: n.f(F.max_pool2d(f, 2).view(-1, 72))[:, :, None, None],
    {"a:channel": 8, "f:neuron": 5}, "graph", out=5, f=lambda: nn.Linear(72, 5),
)  # fmt: skip
image_case(
    "single channels", lambda n, f, x: n.d(n.s(f)), {"a:channel": 8, "d:channel": 8},
    s=lambda: nn.Conv2d(8, 1, 1), d=lambda: nn.Conv2d(1, 8, 1),
)  # fmt: skip
image_case("prelu", lambda n, f, x: n.c(n.p(f)), _AC, p=lambda: nn.PReLU(8), **_CONV)
image_case("softmax over positions", lambda n, f, x: n.c(F.softmax(f, -1)), _AC, **_CONV)
image_case("upsampled", lambda n, f, x: n.c(F.interpolate(f, scale_factor=2.0)), _AC, **_CONV)
image_case(
    "transposed convolution", lambda n, f, x: F.relu(n.t(f)), {"a:channel": 8, "t:channel": 8},
    t=lambda: nn.ConvTranspose2d(8, 8, 3, stride=2),
)  # fmt: skip
for _affine in (True, False):
    for _track in (True, False):
        image_case(
            f"batch norm affine={_affine} statistics={_track}",
            lambda n, f, x: n.c(F.relu(n.norm(torch.sigmoid(f)))),
            _AC,
            norm=lambda a=_affine, t=_track: nn.BatchNorm2d(8, affine=a, track_running_stats=t),
            **_CONV,
        )
image_case(
    "instance norm", lambda n, f, x: n.c(n.norm(f)), _AC, norm=lambda: nn.InstanceNorm2d(8), **_CONV
)
for _out, _groups, _units in (
    (8, 8, {"a:channel": 8}),  # depthwise
    (16, 8, {"a:channel": 8}),  # with a multiplier
    (8, 4, {"a:channel": 4}),  # whole groups
    (16, 2, {"a:channel": 4, "g:channel": 8}),  # the same index in both groups
    (2, 2, {"a:channel": 4}),  # one output per group cannot go
):
    image_case(
        f"{_groups} groups to {_out}",
        lambda n, f, x: torch.sigmoid(n.g(torch.sigmoid(f))),
        _units,
        out=_out,
        g=lambda o=_out, g=_groups: nn.Conv2d(8, o, 3, padding=1, groups=g),
    )

# -- sequences ---------------------------------------------------------------------------


def _last(net: Any, x: Tensor) -> Tensor:
    y: Tensor = net.r(x)[0][:, -1]
    return y


def _final(net: Any, x: Tensor) -> Tensor:
    state = net.r(x)[1]
    y: Tensor = state[0] if isinstance(state, tuple) else state
    return y


recurrent_case("lstm", nn.LSTM, _last)
recurrent_case(
    "lstm 3 layers both ways", nn.LSTM, _last, num_layers=3, bidirectional=True, dropout=0.2
)
recurrent_case("gru without bias", nn.GRU, _last, num_layers=2, bias=False)
recurrent_case("rnn, time first", nn.RNN, _last, batch_first=False, nonlinearity="relu")
recurrent_case(
    "final states joined", nn.LSTM, lambda n, x: _final(n, x).permute(1, 0, 2).flatten(1),
    bidirectional=True,
)  # fmt: skip
recurrent_case("both outputs", nn.GRU, lambda n, x: _last(n, x) + torch.sigmoid(_final(n, x)[0]))
recurrent_case("unbatched", nn.GRU, lambda n, x: n.r(x)[0][-1], inputs=sequence()[0])
recurrent_case(
    "state by size",
    nn.GRU,
    lambda n, x: n.r(x, torch.zeros(1, x.shape[0], 6))[0][:, -1],
    form="graph",
)
recurrent_case("learned state", nn.GRU,
               lambda n, x: n.r(x, (n.h0 * 2).expand(2, x.shape[0], 6).contiguous())[0][:, -1],
               form="graph", num_layers=2,
               parts={"h0": lambda: nn.Parameter(torch.randn(2, 1, 6))})  # fmt: skip
recurrent_case("encoded state", nn.GRU,
               lambda n, x: n.r(x, torch.sigmoid(n.e(x[:, 0]))[None])[0][:, -1], {"e:hidden": 6},
               parts={"e": lambda: nn.Linear(4, 6)})  # fmt: skip
CASES["embedding"] = Case(
    lambda: Net(
        lambda n, x: n.c(F.relu(n.e(x) + n.b(n.d(x)))).mean(1),
        e=nn.Embedding(10, 8), d=nn.Embedding(10, 6, padding_idx=0),
        b=nn.Linear(6, 8), c=nn.Linear(8, 3),
    ),
    torch.randint(0, 10, (3, 5), generator=torch.Generator().manual_seed(0)),
    {"e:embedding": 8, "d:embedding": 6},
)  # fmt: skip
CASES["mixer"] = Case(
    lambda: Net(
        lambda n, x: n.o(F.gelu(n.t(n.a(x).transpose(1, 2))).flatten(1)),
        a=nn.Linear(5, 8), t=nn.Linear(7, 6), o=nn.Linear(48, 3),
    ),
    torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)),
    {"a:neuron": 8},
)  # fmt: skip
CASES["two inputs"] = Case(
    lambda: Net(
        lambda n, x, y: (n.c(F.relu(n.a(x) + n.a(y))), [None, {"x": x}]),
        a=nn.Linear(6, 8), c=nn.Linear(8, 4),
    ),
    (rows(), rows() + 1),
    {"a:neuron": 8},
)  # fmt: skip
CASES["nested keywords"] = Case(
    lambda: Net(
        lambda n, x, y=None: n.c(F.relu(n.a(x["p"][0]) + n.a(x["q"]))),
        a=nn.Linear(6, 8), c=nn.Linear(8, 4),
    ),
    {"x": {"p": [rows()], "q": rows() + 1}, "y": None},
    {"a:neuron": 8},
)  # fmt: skip
