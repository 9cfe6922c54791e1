"""Scales for the units that stay, so that each layer gives what the dense one gave.

    layer(x) = sum over units u of scale[u] * (what the layer makes of unit u) + bias

This is linear in the scales, so the best ones solve a linear least-squares problem with one unknown
for each kept unit (Kwon et al., 2022, arXiv:2204.09656). Layers are done in the order in which they
run: each sees the inputs that it will have, with all before it cut and tuned. The scales are
multiplied into the weights that read the units; no name or shape changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError
from secateurs.masks import named_tensors
from secateurs.posttraining.cut import Cut
from secateurs.posttraining.inputs import Moments, inputs_of, passes, quiet, watch_calls
from secateurs.posttraining.layers import Call, Layer, layers_of, unread
from secateurs.posttraining.lost import owner, shared
from secateurs.posttraining.measuring import Judge, checked_finite, relative, restoring
from secateurs.posttraining.won import Won
from secateurs.types import Batches, Evaluate, Graph, GroupTarget, LossFn, Member, Plan

__all__ = ["DAMPING", "check_damping", "tune_scales_"]

DAMPING = 0.01
"""How much scales are drawn to 1, unless it is said."""


def tune_scales_(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    batches: Batches,
    *,
    graph: Graph,
    damping: float = DAMPING,
    bound: float = 10.0,
    loss_fn: LossFn | None = None,
    evaluate: Evaluate | None = None,
    max_batches: int | None = None,
) -> tuple[Won, dict[str, Tensor]]:
    """Scale what reads the kept units, layer after layer, so that its output is the dense one's.

    Minimises |y - sum of scale[u] z_u|^2 + damping * m * |scale - 1|^2 over all positions of all
    samples, for each weight that reads units of a cut target: y is the output of the dense layer,
    z_u what the masked layer makes of unit u, and m the mean of |z_u|^2. A solution with a scale
    outside of [-bound, bound] is not taken: that layer stays as it is, and a note says so.

    Args:
        model: masked, of the dense shapes; changed IN PLACE, and put back if anything fails.
        dense: the model before the cut; not changed.
        plan: what was cut.
        batches: re-iterable of `(inputs, targets)`; targets are read for `loss_fn` only.
        graph: of the dense model: which units a weight reads.
        damping: at least 0; how much the scales are drawn to 1.
        bound: the largest size of a scale.
        loss_fn, evaluate: what else to measure before and after.
        max_batches: use at most that many batches.

    Returns:
        `Won`, whose "error" is the mean over the tuned layers of |y - y'| / |y|, if there are
        any; and {weight: (size,) factors along the dimension that reads}, 1 for what was not tuned.

    Raises:
        ConfigError: an option out of range; a plan, graph or models that do not fit each other.
        DataError, CaptureError: batches that do not fit the model.
    """
    check_damping(damping)
    if not bound > 0:
        raise ConfigError(f"bound must be above 0, got {bound!r}")
    cut = Cut(model, dense, plan)
    if cut.small:
        raise ConfigError("the model is smaller than the dense one; tune scales, then shrink")
    judge = Judge(dense, batches, loss_fn, evaluate, max_batches, plan.outputs)
    judge.start(model)
    jobs, notes = _jobs(model, dense, plan, graph)
    scales: dict[str, Tensor] = {}
    errors: list[tuple[float, float]] = []
    with restoring(model):
        with quiet(model, dense):
            mine = [x for job in jobs.values() for x in job.layers]
            found = passes(model, mine, batches, max_batches)
            seen = [layer.name for group in found.groups for layer in group]
            for weight in dict.fromkeys(x.weight for group in found.groups for x in group):
                job = jobs[weight]
                if any(layer.name not in seen for layer in job.layers):
                    continue  # a note says why
                n = found.calls[job.layers[0].path]
                sums = _sums(model, dense, job, [*inputs_of(batches, model, max_batches)], n)
                change, pair = _solved(sums, job, named_tensors(model)[weight], damping)
                largest = float((1 + change).abs().max())
                if not largest <= bound:
                    notes.append(f"{weight}: a scale of {largest:.3g} is beyond {bound:g}, left")
                    continue
                scales[weight] = job.fold_(named_tensors(model)[weight], 1 + change)
                errors.append(pair)
        known = None  # no layer was tuned, a note for each says why
        if errors:
            n = len(errors)
            known = (sum(pair[0] for pair in errors) / n, sum(pair[1] for pair in errors) / n)
        notes += found.notes
        won = judge.won(model, "kept units scaled", list(scales), notes, known)
    return won, scales


def check_damping(damping: float) -> None:
    """Raise unless it is a number of at least 0.

    Raises:
        ConfigError: it is not.
    """
    if (
        isinstance(damping, bool)
        or not isinstance(damping, (int, float))
        or not 0 <= damping < math.inf
    ):
        raise ConfigError(f"damping must be at least 0, got {damping!r}")


@dataclass(eq=False)
class _Job:
    """One weight and the units that it reads.

    Attributes:
        layers: its products: several for the fused projections of attention.
        dim: of the weight, along which the units lie.
        unit: (size,) int64 number of the kept unit of each position; -1 for no kept unit.
        n: kept units.
    """

    layers: list[Layer]
    dim: int
    unit: Tensor
    n: int = 0
    columns: list[Tensor] = field(default_factory=list)
    """For each of `layers` (groups, in) the unit of each input."""

    def add(self, member: Member, stays: Tensor) -> None:
        """Count the kept units of one more target among the unknowns."""
        number = torch.cumsum(stays, 0) - 1 + self.n
        number[~stays] = -1
        self.unit[torch.from_numpy(member.index.copy())] = number[
            torch.from_numpy(member.unit.copy())
        ]
        self.n += int(stays.sum())

    def find_columns(self, weight: Tensor) -> bool:
        """Find the unit of each input of each product; False if an input has several."""
        shape = [1] * weight.dim()
        shape[self.dim] = -1
        every = self.unit.view(shape).expand(weight.shape).contiguous()
        found = [layer.matrix(every) for layer in self.layers]
        self.columns = [m[:, 0] for m in found]
        return all(bool((m == m[:, :1]).all()) for m in found)

    def fold_(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Multiply (n,) scales into the weight; (size,) factors along its dimension."""
        line = torch.cat([scale, torch.ones(1, dtype=scale.dtype)])[self.unit]
        shape = [1] * weight.dim()
        shape[self.dim] = -1
        weight.mul_(line.to(weight).view(shape))
        return line


def _jobs(
    model: nn.Module, dense: nn.Module, plan: Plan, graph: Graph
) -> tuple[dict[str, _Job], list[str]]:
    """Weight -> what it reads of cut targets; and why others are left as they are."""
    layers: dict[str, list[Layer]] = {}
    for layer in layers_of(dense):
        layers.setdefault(layer.weight, []).append(layer)
    tied = shared(model, [x for several in layers.values() for x in several])
    params, jobs, notes = named_tensors(model), dict[str, _Job](), dict[str, str]()
    for target, member in _readers(plan, graph):
        name = member.tensor
        if name not in params:
            raise ConfigError(f"the graph does not belong to this model: it has no {name}")
        if name not in layers:
            if params[name].dim() > 1:
                notes[name] = f"{name}: {unread(owner(dense, name))}, left"
        elif "_hh_" in name and isinstance(owner(dense, name), nn.RNNBase):
            notes[name] = f"{name}: what it reads depends on its own scales, left"
        elif name in tied:
            notes[name] = f"{name}: {tied[name]} uses the same weights, left"
        else:
            size = params[name].shape[member.dim]
            empty = torch.full((size,), -1)
            job = jobs.setdefault(name, _Job(layers[name], member.dim, empty))
            if job.dim == member.dim:
                job.add(member, ~plan.gone(target))
            else:
                notes[name] = f"{name}: {target.name} lies along another dimension of it, left"
    for name in list(jobs):
        if not jobs[name].find_columns(params[name]) or not jobs[name].n:
            notes[name] = f"{name}: its inputs do not belong to one unit each, left"
            del jobs[name]
    return jobs, list(notes.values())


def _readers(plan: Plan, graph: Graph) -> list[tuple[GroupTarget, Member]]:
    """What reads the units of each target that lost some."""
    unknown = sorted(name for name in plan.removed if name not in graph.targets)
    if unknown:
        raise ConfigError(f"the graph has no target {unknown[0]}; give the one of this plan")
    return [
        (target, member)
        for target in graph.targets.values()
        if isinstance(target, GroupTarget) and target.kind != "layer"
        if target.name in plan.removed and len(plan.removed[target.name])
        for member in target.members
        if member.role == "consumer" and member.learned
    ]


def _sums(
    model: nn.Module, dense: nn.Module, job: _Job, inputs: Sequence[object], calls: int
) -> list[Moments]:
    """Moments of the inputs of each product, and of what its output lacks."""
    path = job.layers[0].path
    sums: list[Moments] = []
    wanted: list[list[Tensor]] = []
    mine, theirs = named_tensors(model), named_tensors(dense)

    def look_dense(_: str, call: Call) -> None:
        wanted.append([_outputs(layer, call, theirs) for layer in job.layers])

    def look(_: str, call: Call) -> None:
        for i, (layer, target) in enumerate(zip(job.layers, wanted.pop(0), strict=True)):
            lacks = target - _outputs(layer, call, mine)  # (rows, out)
            low = 0
            for x in layer.rows(call):  # (groups, rows, in)
                if len(sums) == i:
                    sums.append(Moments(len(x), x.shape[2], lacks.shape[1] // len(x), bias=False))
                e, y = (
                    torch.unflatten(t[low : low + x.shape[1]], 1, (len(x), -1)).transpose(0, 1)
                    for t in (lacks, target)
                )
                sums[i].add(x)
                sums[i].compare(x, e, y)
                low += x.shape[1]

    for one in inputs:
        watch_calls(dense, one, {path: calls}, look_dense)
        watch_calls(model, one, {path: calls}, look)
    for moments in sums:
        checked_finite(moments.gram, path)
        checked_finite(moments.cross, path)
    return sums


def _outputs(layer: Layer, call: Call, tensors: Mapping[str, Tensor]) -> Tensor:
    weight = layer.matrix(tensors[layer.weight])
    bias = None if layer.bias is None else layer.line(tensors[layer.bias])
    return layer.outputs(call, weight, bias)


def _solved(
    sums: Sequence[Moments], job: _Job, weight: Tensor, damping: float
) -> tuple[Tensor, tuple[float, float]]:
    """(n,) what to add to scales of 1, and the relative error of the layer before and after."""
    gram = torch.zeros(job.n, job.n, dtype=torch.float64)
    cross = torch.zeros(job.n, dtype=torch.float64)
    for moments, layer, columns in zip(sums, job.layers, job.columns, strict=True):
        for g, matrix in enumerate(layer.matrix(weight).double().cpu()):  # (out, in)
            unit = torch.where(columns[g] < 0, job.n, columns[g])  # the last one is dropped
            products = (matrix.T @ matrix) * moments.gram[g]  # (in, in)
            gram += _into(unit, _into(unit, products, job.n).T, job.n)
            cross += _into(unit, (matrix * moments.cross[g]).sum(0), job.n)
    change = _least_squares(gram, cross, damping)
    missed = sum(m.error for m in sums)
    left = missed + float(change @ gram @ change - 2.0 * change @ cross)
    size = sum(m.size for m in sums)
    return change, (relative(missed, size), relative(max(0.0, left), size))


def _into(unit: Tensor, rows: Tensor, n: int) -> Tensor:
    """(n, ...) sums of the rows of each of n units; a row of unit n is dropped."""
    blank = torch.zeros(n + 1, *rows.shape[1:], dtype=rows.dtype)
    return blank.index_add_(0, unit, rows)[:-1]


def _least_squares(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """The damped solution; of several the shortest, so that silent units keep a scale of 1."""
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution: Tensor = torch.linalg.lstsq(damped, cross[:, None], driver="gelsd").solution[:, 0]
    return solution
