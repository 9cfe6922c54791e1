"""Tiny networks with graphs written by hand, exactly as the contracts in `types` describe them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.types import (
    Batch,
    CostDim,
    CostTerm,
    Graph,
    GroupTarget,
    IntArray,
    Kind,
    LossFn,
    Member,
    Role,
    Site,
    Target,
    WeightTarget,
)


@dataclass(frozen=True)
class Case:
    """A network, its graph, and data that fits."""

    model: nn.Module
    graph: Graph
    batches: list[Batch]
    loss_fn: LossFn


def arange(n: int) -> IntArray:
    return np.arange(n, dtype=np.int64)


def member(
    tensor: str,
    dim: int,
    unit: IntArray,
    role: Role = "producer",
    *,
    outermost: bool = True,
    learned: bool = True,
) -> Member:
    """Position i along `dim` belongs to `unit[i]`."""
    return Member(tensor, dim, arange(len(unit)), unit, role, outermost, learned)


def site(
    module: str,
    side: Literal["input", "output"],
    unit: IntArray,
    *,
    dim: int = 1,
    gate_exact: bool = True,
    call: int = 0,
) -> Site:
    """An output is a producer site, an input a consumer site."""
    role: Role = "producer" if side == "output" else "consumer"
    return Site(module, call, side, 0, dim, arange(len(unit)), unit, role, gate_exact)


def build(model: nn.Module, groups: Sequence[GroupTarget], uses: Mapping[str, float]) -> Graph:
    """Groups, then weights, shapes and costs, from the members of the groups."""
    shapes = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    params = dict(model.named_parameters())
    targets: dict[str, Target] = {g.name: g for g in groups}
    for name, p in params.items():
        if p.dim() > 1:
            targets[name] = WeightTarget(name, tuple(p.shape))
    costs = []
    for name, p in params.items():
        dims = []
        for d, size in enumerate(p.shape):
            owned = {
                g.name: np.bincount(m.unit, minlength=g.n_units).astype(np.int64)
                for g in groups
                for m in g.members
                if m.tensor == name and m.dim == d
            }
            dims.append(CostDim(size, owned))
        costs.append(CostTerm(name, tuple(dims), uses=uses.get(name, 0.0)))
    return Graph(
        targets, costs=tuple(costs), front_end="by hand", detail=SimpleNamespace(shapes=shapes)
    )


def linear(
    name: str, n: int, readers: Sequence[str], removal: Literal["producers", "consumers"]
) -> GroupTarget:
    """Neurons of one linear layer, read by others."""
    u = arange(n)
    return GroupTarget(
        f"{name}:neuron",
        "neuron",
        n,
        (
            member(f"{name}.weight", 0, u),
            member(f"{name}.bias", 0, u),
            *(member(f"{r}.weight", 1, u, "consumer") for r in readers),
        ),
        (site(name, "output", u), *(site(r, "input", u) for r in readers)),
        removal,
    )


def randomise(model: nn.Module, seed: int) -> None:
    """Random biases, norms and statistics too: zeros hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.6)
        for name, b in model.named_buffers():
            if b.is_floating_point():
                noise = torch.randn(b.shape, generator=g, dtype=torch.float64)
                b.copy_(noise.abs() + 0.5 if "var" in name else noise * 0.5)


def data(
    shape: tuple[int, ...], classes: int, sizes: Sequence[int], seed: int, dtype: torch.dtype
) -> list[Batch]:
    """Random inputs and labels in batches of the given sizes."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    x = torch.randn((n, *shape), generator=g, dtype=torch.float64).to(dtype)
    y = torch.randint(classes, (n,), generator=g)
    return list(zip(torch.split(x, list(sizes)), torch.split(y, list(sizes)), strict=True))


def _case(
    model: nn.Module,
    groups: Sequence[GroupTarget],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    uses: Mapping[str, float],
    seed: int,
) -> Case:
    model = model.to(dtype)
    randomise(model, seed)
    batches = data(shape, 3, (4, 4, 2), seed + 1, dtype)
    graph = replace(build(model, groups, uses), inputs=batches[0][0].to("meta"))
    return Case(model, graph, batches, nn.functional.cross_entropy)


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """4 -> tanh 6 -> relu 5 -> 3."""
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    )
    groups = [linear("0", 6, ["2"], "producers"), linear("2", 5, ["4"], "producers")]
    uses = {"0.weight": 1.0, "2.weight": 1.0, "4.weight": 1.0}
    return _case(net, groups, (4,), dtype, uses, seed)


def sigmoid_mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """4 -> sigmoid 6 -> 3: zero does not survive the sigmoid, so the consumers remove a unit."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3))
    groups = [linear("0", 6, ["2"], "consumers")]
    return _case(net, groups, (4,), dtype, {"0.weight": 1.0, "2.weight": 1.0}, seed)


def conv(dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """Conv 2 -> 4, batch norm, relu in place, pool, flatten 4 x 2 x 2, linear 16 -> 3."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    u, flat = arange(4), np.repeat(arange(4), 4)
    group = GroupTarget(
        "0:channel",
        "channel",
        4,
        (
            member("0.weight", 0, u, outermost=False),
            member("0.bias", 0, u, outermost=False),
            member("1.weight", 0, u),
            member("1.bias", 0, u),
            member("1.running_mean", 0, u, learned=False),
            member("1.running_var", 0, u, learned=False),
            member("5.weight", 1, flat, "consumer"),
        ),
        (site("1", "output", u), site("5", "input", flat)),
    )
    return _case(net, [group], (2, 4, 4), dtype, {"0.weight": 16.0, "5.weight": 1.0}, seed)


def bare_norm(dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """As `conv`, but the norm has no scale and shift: nothing learned makes the unit's value."""
    case = conv(dtype, seed)
    assert isinstance(case.model, nn.Sequential)
    case.model[1] = nn.BatchNorm2d(4, affine=False).to(dtype)
    randomise(case.model, seed)
    (group,) = case.graph.groups()
    members = tuple(m for m in group.members if m.tensor not in ("1.weight", "1.bias"))
    bare = GroupTarget(group.name, group.kind, 4, members, group.sites)
    uses = {"0.weight": 16.0, "5.weight": 1.0}
    graph = replace(build(case.model, [bare], uses), inputs=case.graph.inputs)
    return Case(case.model, graph, case.batches, case.loss_fn)


class LastStep(nn.Module):
    """LSTM, then a linear layer on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.lstm(x)[0][:, -1])
        return out


def lstm(dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """LSTM of 5 hidden units: four gate rows each, and its own reader."""
    u, gates = arange(5), np.tile(arange(5), 4)
    rows = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    group = GroupTarget(
        "lstm:hidden",
        "hidden",
        5,
        (
            *(member(f"lstm.{r}", 0, gates) for r in rows),
            member("lstm.weight_hh_l0", 1, u, "consumer"),
            member("fc.weight", 1, u, "consumer"),
        ),
        (site("lstm", "output", u, dim=2, gate_exact=False), site("fc", "input", u)),
    )
    uses = {"lstm.weight_ih_l0": 4.0, "lstm.weight_hh_l0": 4.0, "fc.weight": 1.0}
    return _case(LastStep(), [group], (4, 3), dtype, uses, seed)


class Residual(nn.Module):
    """stem -> x + fc2(relu(fc1(x))) -> relu -> head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.fc1 = nn.Linear(6, 7)
        self.fc2 = nn.Linear(7, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        out: Tensor = self.head(torch.relu(x))
        return out


def residual(dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """A residual stream of 6 with two producers and two readers, and 7 inner neurons."""
    u = arange(6)
    stream = GroupTarget(
        "stem:neuron",
        "neuron",
        6,
        (
            member("stem.weight", 0, u),
            member("stem.bias", 0, u),
            member("fc2.weight", 0, u),
            member("fc2.bias", 0, u),
            member("fc1.weight", 1, u, "consumer"),
            member("head.weight", 1, u, "consumer"),
        ),
        (
            site("stem", "output", u),
            site("fc2", "output", u),
            site("fc1", "input", u),
            site("head", "input", u),
        ),
    )
    groups = [stream, linear("fc1", 7, ["fc2"], "producers")]
    uses = {f"{n}.weight": 1.0 for n in ("stem", "fc1", "fc2", "head")}
    return _case(Residual(), groups, (4,), dtype, uses, seed)


CASES: Mapping[str, Callable[..., Case]] = {
    "mlp": mlp,
    "sigmoid_mlp": sigmoid_mlp,
    "conv": conv,
    "bare_norm": bare_norm,
    "lstm": lstm,
    "residual": residual,
}


def units_graph(
    sizes: Mapping[str, int], weights: Mapping[str, Sequence[int]] | None = None
) -> Graph:
    """Targets without a network, for allocation: unit i of target t costs `weights[t][i]` params.

    One MAC for each parameter, and ten parameters that belong to no unit.
    """
    kind: Kind = "channel"
    targets: dict[str, Target] = {n: GroupTarget(n, kind, size, ()) for n, size in sizes.items()}
    costs = [CostTerm("rest", (CostDim(10),), uses=1.0)]
    for name, size in sizes.items():
        owned = np.array((weights or {}).get(name, [1] * size), dtype=np.int64)
        costs.append(
            CostTerm(f"{name}.weight", (CostDim(int(owned.sum()), {name: owned}),), uses=1.0)
        )
    return Graph(targets, costs=tuple(costs), detail=SimpleNamespace(shapes={}))
