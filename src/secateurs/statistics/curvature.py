"""Second derivatives of the loss by products of the Hessian with a few directions.

    Curvature     w_u' H w_u of every unit u, estimated with random signs, and its slope w_u' g
    Slope         w_u' g, from the same run

A product is one backward pass through the backward pass; H itself is never formed. The loss of all
batches is a mean over samples, and so are its gradient and Hessian: sums over batches are exact.

With directions v = sum_u z_u w_u, w_u the weights of unit u and z_u an independent sign for each,
the expected value of z_u w_u' (H v) is w_u' H w_u: one product serves every unit of the model. For
single weights that is Hutchinson's estimate of the diagonal. The signs depend on the seed and the
target only, not on the batch, so that the estimate does not depend on how the data is cut.

Units whose gates can be hooked (see `gates`) need no weight gradients: the weights are linear in
their gates, so that the Hessian with respect to the gates holds the very same w_u' H w_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateurs.batches import checked_loss
from secateurs.errors import ScoringError
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    generator_for,
    register_statistic,
    requiring_grad,
)
from secateurs.statistics.gates import probe_gates
from secateurs.statistics.hooks import Key, key_of, site_values
from secateurs.statistics.removals import forward_mode
from secateurs.statistics.sums import View
from secateurs.statistics.units import into_units, members_of
from secateurs.types import Member, Site, Target, WeightTarget

__all__ = [
    "Curvature",
    "Slope",
    "check_twice",
    "differentiable_twice",
    "finite_product",
    "gradients_of",
    "product",
]

NO_SECOND = (
    "{where}: an operation of the model or the loss has no second derivative ({why}); use a "
    "first-order criterion such as 'taylor' or 'fisher'"
)


@contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Kernels that have a second derivative: no fused attention, no fused recurrent layers."""
    with ExitStack() as stack:
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(forward_mode())
        else:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def gradients_of(setting: Setting, run: Run, at: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the mean loss of a batch, which can be differentiated once more.

    Args:
        setting: model and loss.
        run: the batch.
        at: tensors that require a gradient.

    Returns:
        One gradient for each; None where the loss does not depend on it.

    Raises:
        ScoringError: the loss is not finite, or depends on no weight.
    """
    where = f"batch {run.number}"
    assert setting.loss_fn is not None
    loss = checked_loss(setting.model, run.batch, setting.loss_fn, where)
    return _gradients(loss, at, where)


def _gradients(loss: Tensor, at: Sequence[Tensor], where: str) -> list[Tensor | None]:
    if not loss.requires_grad:
        raise ScoringError(
            f"{where}: the loss does not depend on the weights through differentiable "
            "operations; remove torch.no_grad and detach from the model and the loss"
        )
    return list(torch.autograd.grad(loss, at, create_graph=True, allow_unused=True))


def product(
    grads: Sequence[Tensor | None],
    direction: Sequence[Tensor],
    wanted: Sequence[Tensor],
    *,
    where: str,
    keep: bool = False,
) -> list[Tensor]:
    """H v, for the tensors that are wanted.

    Args:
        grads: from `gradients_of`.
        direction: v, one tensor for each gradient.
        wanted: the tensors to which the product belongs.
        where: the batch, for messages.
        keep: whether another product follows.

    Raises:
        ScoringError: an operation has no second derivative.
    """
    pairs = [
        (g, v)
        for g, v in zip(grads, direction, strict=True)
        if g is not None and g.requires_grad  # a constant gradient has no second derivative
    ]
    if not pairs:
        return [torch.zeros_like(w) for w in wanted]
    check_twice([g for g, _ in pairs], where)
    try:
        found = torch.autograd.grad(
            [g for g, _ in pairs],
            wanted,
            [v for _, v in pairs],
            retain_graph=keep,
            allow_unused=True,
        )
    except RuntimeError as error:
        raise ScoringError(NO_SECOND.format(where=where, why=error)) from error
    return [torch.zeros_like(w) if h is None else h for h, w in zip(found, wanted, strict=True)]


def check_twice(grads: Sequence[Tensor], where: str) -> None:
    """Raise if a backward function on the way may be differentiated only once.

    Autograd itself counts what lies behind it as zero when it is asked for certain inputs.
    """
    seen: set[Any] = set()
    todo: list[Any] = [g.grad_fn for g in grads]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("::Error"):
            why = "a backward function is marked once_differentiable"
            raise ScoringError(NO_SECOND.format(where=where, why=why))
        todo += [following for following, _ in node.next_functions]


def finite_product(values: Tensor, name: object, where: str) -> Tensor:
    """A product with the Hessian, checked.

    Raises:
        ScoringError: it holds values that are not finite.
    """
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise ScoringError(
            f"{where}: a second derivative at {name} is not finite; check the data, and the loss "
            "where its gradient is undefined"
        )
    return values


# -- one number for each unit --------------------------------------------------------------------

Leaf = Any
"""What is differentiated: the name of a parameter, or the key of a site that holds a gate."""


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the units of a target are along one dimension of one leaf."""

    leaf: Leaf
    where: Member

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of the units along the dimension of the leaf, of a shape that broadcasts."""
        index, unit = torch.from_numpy(self.where.index), torch.from_numpy(self.where.unit)
        line = torch.zeros(like.shape[self.where.dim], dtype=values.dtype)
        line.index_add_(0, index, values[unit])
        shape = [1] * like.dim()
        shape[self.where.dim] = len(line)
        return line.reshape(shape).to(like)


class Curvature(Collector):
    """w_u' H w_u of every unit, and w_u' g: both from one run of the model.

    Options: `probes`, how many directions are averaged.
    """

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._probes = int(request.options["probes"])
        self._sites: list[Site] = []
        self._places: dict[str, list[_Place]] = {}
        self._gates: dict[Key, Tensor] = {}
        self._signs: dict[tuple[str, int], Tensor] = {}

    def begin(self, run: Run) -> None:
        """Find out which units can be gated; the others are differentiated at their weights."""
        setting, request = self.setting, self.request
        sites, _ = probe_gates(
            setting.model, run.batch, request.groups, request.members, setting.params
        )
        for target in request.groups:
            if target.name in sites:
                mine = sites[target.name]
                self._sites += mine
                self._places[target.name] = [_Place(key_of(s), _as_member(s)) for s in mine]
            else:
                members = members_of(target, request.members, setting.params)
                self._places[target.name] = [_Place(m.tensor, m) for m in members]

    def alone(self, run: Run) -> None:
        """First and second derivatives of one batch."""
        setting, where = self.setting, f"batch {run.number}"
        assert setting.loss_fn is not None
        held = {id(setting.params[n]): setting.params[n] for n in self._names()}
        self._gates = {}
        with ExitStack() as stack:
            stack.enter_context(requiring_grad(held.values()))
            stack.enter_context(differentiable_twice(setting.model))
            stack.enter_context(torch.enable_grad())
            torch.clear_autocast_cache()
            stack.enter_context(
                site_values(setting.model, self._sites, self._gate, self._gate_again)
            )
            loss = checked_loss(setting.model, run.batch, setting.loss_fn, where)
            leaves: list[Tensor] = [*self._gates.values(), *held.values()]
            grads = _gradients(loss, leaves, where)
            none = [
                torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
            ]
            self._fold(run, "slope", self._by_name(none))
            for k in range(self._probes):
                direction = self._direction(k, leaves)
                more = k + 1 < self._probes
                found = product(grads, direction, leaves, where=where, keep=more)
                self._fold(run, "curvature", self._by_name(found), k)
        self._gates = {}

    def unit(self, target: Target) -> Tensor:
        """(n_units,) estimates of w_u' H w_u, of the mean loss."""
        return self._mean(target, "curvature") / self._probes

    def slope(self, target: Target) -> Tensor:
        """(n_units,) w_u' g, of the mean loss."""
        return self._mean(target, "slope")

    def _mean(self, target: Target, what: str) -> Tensor:
        return self.sums[f"{target.name}/{what}"].reshape(-1).double().cpu() / self.n_samples

    def _names(self) -> list[str]:
        """Parameters that are differentiated themselves."""
        names = [t.name for t in self.request.targets if isinstance(t, WeightTarget)]
        names += [p.leaf for held in self._places.values() for p in held if isinstance(p.leaf, str)]
        return list(dict.fromkeys(names))

    def _by_name(self, values: Sequence[Tensor]) -> dict[Leaf, Tensor]:
        """Leaf -> its tensor; a tied parameter under each of its names."""
        params, gates = self.setting.params, list(self._gates)
        names = self._names()
        order = {i: n for n, i in enumerate(dict.fromkeys(id(params[n]) for n in names))}
        found: dict[Leaf, Tensor] = dict(zip(gates, values, strict=False))
        return found | {n: values[len(gates) + order[id(params[n])]] for n in names}

    def _gate(self, key: Key, value: Tensor) -> Tensor:
        shape = [1] * value.dim()
        shape[key[4]] = value.shape[key[4]]
        gate = torch.ones(shape, dtype=value.dtype, device=value.device, requires_grad=True)
        self._gates[key] = gate
        return value * gate

    def _gate_again(self, key: Key, value: Tensor) -> Tensor:
        return value * self._gates[key]

    def _sign(self, target: Target, k: int) -> Tensor:
        """(n_units,) int8 of -1 and 1, the same for every batch."""
        key = (target.name, k)
        if key not in self._signs:
            g = generator_for(self.setting, "curvature", target.name, k)
            bits = torch.randint(0, 2, (target.n_units,), generator=g, dtype=torch.int8)
            self._signs[key] = 2 * bits - 1
        return self._signs[key]

    def _scale(self, leaf: Leaf) -> Tensor | None:
        """What the units own of a leaf: the weights themselves; None for gates, which are one."""
        return self.setting.params[leaf].detach() if isinstance(leaf, str) else None

    def _direction(self, k: int, leaves: Sequence[Tensor]) -> list[Tensor]:
        """v = sum_u z_u w_u, one tensor for each leaf."""
        direction = [torch.zeros_like(leaf) for leaf in leaves]
        by_name = self._by_name(direction)
        for target in self.request.targets:
            z = self._sign(target, k)
            if isinstance(target, WeightTarget):
                weight = self.setting.params[target.name].detach()
                by_name[target.name].addcmul_(weight, z.to(weight).reshape(weight.shape))
                continue
            for place in self._places[target.name]:
                into, scale = by_name[place.leaf], self._scale(place.leaf)
                line = place.spread(z, into)
                into.add_(line if scale is None else line * scale)
        return direction

    @torch.no_grad()
    def _fold(self, run: Run, what: str, found: Mapping[Leaf, Tensor], k: int = -1) -> None:
        """Add w_u' x, times the sign of the unit in probe `k`, to the sums."""
        for target in self.request.targets:
            key = f"{target.name}/{what}"
            z = None if k < 0 else self._sign(target, k)
            if isinstance(target, WeightTarget):
                weight = self.setting.params[target.name].detach()
                x = finite_product(found[target.name], target.name, f"batch {run.number}")
                if z is not None:
                    x = x * z.to(x).reshape(x.shape)
                self.sums.add_product(key, weight, x, run.n)
                continue
            out = torch.zeros(target.n_units, dtype=torch.float64)
            for place in self._places[target.name]:
                x, scale = found[place.leaf], self._scale(place.leaf)
                finite_product(x, target.name, f"batch {run.number}")
                into_units(x if scale is None else x * scale, place.where, out)
            self.sums.add(key, out if z is None else out * z, run.n)


def _as_member(site: Site) -> Member:
    """A gate has the shape of its activation, with ones elsewhere."""
    return Member("", site.dim, site.index, site.unit, site.role)


class Slope(Collector):
    """w_u' g of every unit, which `Curvature` has met on its way."""

    depends: ClassVar[tuple[str, ...]] = ("curvature",)

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64."""
        curvature = self.others["curvature"]
        assert isinstance(curvature, Curvature)
        return curvature.slope(target)


register_statistic("curvature", Curvature)
register_statistic("slope", Slope)
