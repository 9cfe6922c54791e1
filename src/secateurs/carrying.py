"""Carry an optimizer over to the smaller model, so that training goes on where it was.

    Optimizer of the dense model, Plan -> Optimizer of the smaller model

Momentum and second moments are sliced like the weights that they belong to. Without them the first
steps after a cut are those of a cold start.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.errors import ConfigError
from secateurs.surgery.shrinking import slice_masks
from secateurs.surgery.slicing import sliced
from secateurs.types import Plan

__all__ = ["carry_optimizer"]

Opt = TypeVar("Opt", bound=Optimizer)
Plain = (bool, int, float, str, type(None))


def carry_optimizer(optimizer: Opt, model: nn.Module, small: nn.Module, plan: Plan) -> Opt:
    """An optimizer of the same class for the smaller model, with its state sliced by the plan.

    Groups with their options (learning rates, betas, ...) stay as they are. State of the shape of
    its parameter (momentum, moments) is sliced, and zero where a weight mask of the plan removes
    the entry; scalars (step counts) are copied. Parameters that the smaller model no longer has are
    dropped. `optimizer` itself is not changed, and its step hooks stay with it. To go on with a
    learning-rate scheduler, make one for the new optimizer and load the old one's `state_dict()`.

    Args:
        optimizer: of `model`'s parameters.
        model: the dense model from which `small` was made.
        small: the result of `shrink(model, plan, ...)`.
        plan: what was removed.

    Returns:
        A new optimizer over the parameters of `small`.

    Raises:
        ConfigError: the optimizer holds a parameter that is not the dense model's, keeps state that
            cannot be sliced, or `small` is not what `plan` makes of `model`; all are listed.

    Example:
        >>> import secateurs as sc
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(x).sum().backward()
        >>> adam.step()
        >>> scores = sc.score(net, criterion="l2_norm", graph=sc.trace(net, x))
        >>> plan = sc.select(scores, sc.allocate(scores, sc.Budget(units=0.5)))
        >>> small = sc.shrink(net, plan, x)
        >>> carried = carry_optimizer(adam, net, small, plan)
        >>> carried.state[small[0].weight]["exp_avg"].shape
        torch.Size([4, 4])
    """
    carrier = _Carrier(model, small, plan)
    groups = [carrier.group(number, group) for number, group in enumerate(optimizer.param_groups)]
    state = {
        carrier.new[id(p)]: carrier.state(p, optimizer.state[p])
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in carrier.new and p in optimizer.state
    }
    carrier.check_nothing_left_out()
    if not carrier.problems and not any(group["params"] for group in groups):
        carrier.problems.append("the smaller model has none of the optimizer's parameters")
    new = _same_class(optimizer, groups, state, carrier.problems)
    if carrier.problems:
        problems = "\n  ".join(carrier.problems)
        raise ConfigError(f"the optimizer cannot be carried over:\n  {problems}")
    return new


class _Carrier:
    """Where each parameter goes, and what is wrong on the way.

    Attributes:
        new: id of a dense parameter -> the parameter of the smaller model.
        problems: one sentence for each fault.
    """

    def __init__(self, model: nn.Module, small: nn.Module, plan: Plan) -> None:
        self.names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(p), []).append(name)
        self.small = dict(small.named_parameters(remove_duplicate=False))
        self.kept, self.masks = plan.kept, slice_masks(plan)
        self.new: dict[int, Tensor] = {}
        self.problems: list[str] = []

    def group(self, number: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """The same options over the parameters that remain."""
        names = group.get("param_names")
        stay = []
        for i, p in enumerate(group["params"]):
            if id(p) not in self.names:
                called = f" ({names[i]})" if names else ""
                self.problems.append(
                    f"parameter {i} of group {number}{called}, shape {tuple(p.shape)}, is not a "
                    "parameter of the dense model. Give the model that the optimizer trained"
                )
            elif self._place(p):
                stay.append(i)
        made = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
        made["params"] = [self.new[id(group["params"][i])] for i in stay]
        if names:
            made["param_names"] = [names[i] for i in stay]
        return made

    def _place(self, p: Tensor) -> bool:
        """Find the parameter of the smaller model; False if it vanished."""
        new = next((self.small[n] for n in self.names[id(p)] if n in self.small), None)
        if new is None:
            return False
        shape = tuple(p.shape)
        kept = self._of(p, self.kept)
        for dim, index in (kept or {}).items():
            shape = (*shape[:dim], len(index), *shape[dim + 1 :])
        if tuple(new.shape) != shape:
            self.problems.append(
                f"{self.names[id(p)][0]}: the plan makes {tuple(p.shape)} into {shape}, the "
                f"smaller model has {tuple(new.shape)}. Give model, small and plan of one shrink"
            )
            return False
        self.new[id(p)] = new
        return True

    def _of(self, p: Tensor, table: Mapping[str, Any]) -> Any:
        """What a table says about any name of a parameter."""
        return next((table[n] for n in self.names[id(p)] if n in table), None)

    def check_nothing_left_out(self) -> None:
        """Every parameter of the smaller model must be one of the dense model's."""
        known = {name for names in self.names.values() for name in names}
        if extra := sorted(set(self.small) - known):
            self.problems.append(
                f"the smaller model has parameters that the dense one has not: {', '.join(extra)}"
            )

    def state(self, p: Tensor, state: Mapping[Any, Any]) -> dict[Any, Any]:
        """State of one parameter for its smaller form."""
        new, kept, mask = self.new[id(p)], self._of(p, self.kept), self._of(p, self.masks)
        made = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == p.shape:
                cut = sliced(value.to_dense() if value.is_sparse else value, kept or {})
                if mask is not None:
                    cut.masked_fill_(~mask.to(cut.device), 0)
                made[key] = torch.empty_like(new, dtype=cut.dtype, requires_grad=False)
                made[key].copy_(cut)  # with the strides and on the device of the parameter
            elif isinstance(value, Tensor) and not value.dim():
                made[key] = value.clone()
            elif isinstance(value, Plain) or (kept is None and mask is None):
                made[key] = copy.deepcopy(value)  # of a parameter that is not cut: as it is
            else:
                what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"
                self.problems.append(
                    f"{self.names[id(p)][0]}: state {key!r} ({what}) does not have the shape of "
                    f"the parameter, {tuple(p.shape)}, so it cannot be cut along. Start a new "
                    "optimizer for the smaller model"
                )
        return made


def _same_class(
    optimizer: Opt, groups: list[dict[str, Any]], state: dict[Any, Any], problems: list[str]
) -> Opt:
    """An optimizer made of groups and state, as a copy of one is made."""
    new = type(optimizer).__new__(type(optimizer))
    held = defaultdict(dict, state)
    new.__setstate__(
        {"defaults": copy.deepcopy(optimizer.defaults), "state": held, "param_groups": groups}
    )
    for name, value in vars(optimizer).items():
        if name in vars(new) or callable(value):  # a scheduler wraps the method `step`
            continue
        if isinstance(value, Plain):
            setattr(new, name, value)
        else:
            problems.append(
                f"{type(optimizer).__name__} keeps {name!r} outside its state. Start a new "
                "optimizer for the smaller model"
            )
    return new
