"""From elements to units: which members count, and how they are summed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.errors import ConfigError, DataError
from secateurs.types import Batch, GroupTarget, Member, Role, Target, WeightTarget

__all__ = [
    "Parameters",
    "into_units",
    "members_of",
    "noise",
    "one_sample",
    "removal_role",
    "some_samples",
]

Parameters = Mapping[str, nn.Parameter]
"""Name -> parameter, every name of a tied parameter included."""


def removal_role(target: GroupTarget) -> Role:
    """Whose learned members alone remove a unit.

    The outermost producers, if zero survives to the consumers; they may not do when the last
    producer in series is a buffer without anything learned beside it (the running mean of a batch
    norm without scale and shift). Then it is the consumers: they always do.
    """
    if target.removal == "consumers":
        return "consumer"
    outer = [m for m in target.members if m.role == "producer" and m.outermost]
    learned = {_module(m.tensor) for m in outer if m.learned}
    bare = {_module(m.tensor) for m in outer if not m.learned} - learned
    return "consumer" if bare or not learned else "producer"


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def members_of(target: GroupTarget, which: str, params: Parameters) -> list[Member]:
    """Learned members that a criterion sums over, each place of a tied parameter once.

    Args:
        target: the family of units.
        which: "producers", "consumers", "all" or "removal" (see `Criterion.members`).
        params: the parameters of the model.
    """
    if which == "removal":
        role = removal_role(target)
        chosen = [m for m in target.members if m.role == role]
        if role == "producer":
            chosen = [m for m in chosen if m.outermost]
    else:
        roles = {"producers": ["producer"], "consumers": ["consumer"]}
        wanted = roles.get(which, ["producer", "consumer"])
        chosen = [m for m in target.members if m.role in wanted]
    unique: dict[tuple[int, int, bytes, bytes], Member] = {}
    for m in chosen:
        if m.learned:
            key = (id(params[m.tensor]), m.dim, m.index.tobytes(), m.unit.tobytes())
            unique.setdefault(key, m)
    return list(unique.values())


def check_fits(model: nn.Module, targets: Iterable[Target]) -> Parameters:
    """The parameters of the model by name, checked against the targets.

    Raises:
        ConfigError: the graph was traced from another model.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for target in targets:
        for name, size in _demands(target):
            tensor = params.get(name, buffers.get(name))
            if tensor is None or not size(tuple(tensor.shape)):
                got = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise ConfigError(
                    f"the graph does not belong to this model: {name} of target {target.name} "
                    f"{got}. Trace this model again"
                )
    return params


def _demands(target: Target) -> list[tuple[str, Any]]:
    """(tensor name, test of its shape) for everything that a target touches."""
    if isinstance(target, WeightTarget):
        return [(target.name, lambda shape: shape == tuple(target.shape))]

    def fits(m: Member) -> Any:
        top = int(m.index.max(initial=-1))
        return lambda shape: m.dim < len(shape) and top < shape[m.dim]

    return [(m.tensor, fits(m)) for m in target.members]


def into_units(values: Tensor, member: Member, out: Tensor) -> Tensor:
    """Add element values of one member tensor to its units, in place, in float64.

    Args:
        values: (..., *shape), one value per element of the member tensor; samples may lead.
        member: where the units live.
        out: (..., n_units) float64 on the CPU.
    """
    lead = out.dim() - 1
    dim = lead + member.dim
    others = [d for d in range(lead, values.dim()) if d != dim]
    summed = values.sum(dim=others, dtype=torch.float64) if others else values.double()
    line = summed.cpu()  # (..., size)
    unit = torch.from_numpy(np.ascontiguousarray(member.unit))
    index = torch.from_numpy(np.ascontiguousarray(member.index))
    return out.index_add_(-1, unit, line[..., index])


def noise(target: Target, seed: str) -> Tensor:
    """(n_units,) uniform noise that depends on the seed and the target's name, on nothing else."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{target.name}".encode()))
    return torch.rand(target.n_units, generator=generator, dtype=torch.float64)


def one_sample(batch: Batch, i: int, n: int) -> Batch:
    """Sample `i` of a batch of `n`, as a batch of one; errors as `some_samples`."""
    return some_samples(batch, slice(i, i + 1), n)


def some_samples(batch: Batch, which: slice, n: int) -> Batch:
    """Some samples of a batch of `n`, as a batch.

    Tensors whose first dimension is `n` are cut, everything else is passed on.

    Raises:
        DataError: the targets hold no tensor of `n` samples, so that they cannot be cut.
    """

    def cut(leaf: Any) -> Any:
        inside = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n
        return leaf[which] if inside else leaf

    inputs, targets = batch
    leaves = [leaf for leaf in pytree.tree_leaves(targets) if leaf is not None]
    if n > 1 and leaves and all(cut(leaf) is leaf for leaf in leaves):
        raise DataError(
            f"scoring one sample at a time needs targets whose first dimension is the {n} samples "
            f"of the batch; got {type(targets).__name__}. Give tensors, or batches of one sample"
        )
    return pytree.tree_map(cut, inputs), pytree.tree_map(cut, targets)
