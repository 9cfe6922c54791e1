"""Weights that make up for what was cut: least squares against the dense layers, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from secateurs.errors import CaptureError, ConfigError, choose
from secateurs.masks import named_tensors
from secateurs.posttraining.cut import Cut
from secateurs.posttraining.inputs import Moments, inputs_of, passes, quiet, watch_calls
from secateurs.posttraining.layers import Call, Layer, layers_of, product
from secateurs.posttraining.lost import left_out, shared
from secateurs.posttraining.measuring import Judge, checked_finite, relative, restoring
from secateurs.posttraining.won import Won
from secateurs.types import Batches, Evaluate, LossFn, Plan

__all__ = ["reconstruct", "solve_rows"]


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan | Mapping[str, Tensor],
    batches: Batches,
    *,
    layers: Literal["cut", "all"] = "cut",
    ridge: float = 1e-4,
    loss_fn: LossFn | None = None,
    evaluate: Evaluate | None = None,
    max_batches: int | None = None,
) -> Won:
    """Solve the weights that stay again, so that layers make what the dense ones made.

        W' = argmin sum over rows |y - W' x|^2 + ridge d sum (W' - W)^2

    with y the output of the dense layer on the dense model's input, x the input that the layer has
    now, d the mean diagonal of sum x x' over what the layer still reads. The bias is solved, too,
    and removed weights are zero. Layers are solved in the order of their execution, each behind
    those that are solved already: later ones repair what earlier ones could not. On these batches
    no layer can become worse. Where a recurrent layer reads its own states, x is what is left of
    the dense model's states, since those of its own change with the weights. Rows are samples at
    all their positions, padding included; they should outnumber the inputs of a layer several
    times.

    Args:
        model: a copy of the dense one to be masked, or the smaller model (module form). Changed in
            place; on any exception it is as before.
        dense: the model before the cut; not changed.
        plan: what is removed, or masks by tensor name.
        batches: re-iterable of `(inputs, targets)`; targets are not used.
        layers: "cut", those that have lost inputs; "all", also those whose inputs are others.
        ridge: pulls towards the weights as they are; above 0.
        loss_fn, evaluate: if given, measured before and after.
        max_batches: use at most that many batches.

    Returns:
        What it won: "error" is the mean over the layers of ||y - W x|| / ||y||, before with earlier
        layers repaired; `notes` has it for each, and names what was left.

    Raises:
        ConfigError: the plan or an option does not fit, or there is no layer to solve.
        ScoringError: activations that are not finite.

    Example:
        >>> import copy
        >>> dense = nn.Linear(2, 1)
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])  # the second is twice the first
        >>> model = copy.deepcopy(dense)
        >>> won = reconstruct(
        ...     model, dense, {"weight": torch.tensor([[True, False]])}, [(x, None)], ridge=1e-9
        ... )
        >>> bool(torch.allclose(model(x), dense(x), atol=1e-4)), model.weight[0, 1].item()
        (True, 0.0)

    References:
        He, Zhang and Sun, Channel Pruning for Accelerating Very Deep Neural Networks, 2017,
        arXiv:1707.06168 (least squares on the inputs that are left, layer after layer).
    """
    choose(layers, ["cut", "all"], "layers of reconstruct")
    if not ridge > 0:
        raise ConfigError(f"ridge must be above 0, got {ridge}; 1e-4 is a usual value")
    outputs = plan.outputs if isinstance(plan, Plan) else ()
    judge = Judge(dense, batches, loss_fn, evaluate, max_batches, outputs)
    cut = Cut(model, dense, plan)
    with restoring(model):
        cut.apply_(model)
        judge.start(model)
        work = _Work(model, dense, cut, batches, max_batches)
        chosen, notes = work.chosen(everything=layers == "all")
        found = passes(model, chosen, batches, max_batches)
        notes += found.notes
        changed: list[str] = []
        errors: list[tuple[float, float]] = []
        for group in found.groups:
            for layer, sums in zip(group, work.collect(group, found.calls), strict=True):
                if not sums.n:
                    notes.append(f"{layer.name}: no sample reaches it, left")
                    continue
                changed += work.solve(layer, sums, ridge)
                errors.append((relative(sums.error, sums.size), work.left))
                told = f"{layer.name}: error {errors[-1][0]:.4f} -> {errors[-1][1]:.4f}"
                if sums.n < sums.gram.shape[-1]:
                    told += f" ({sums.n} rows for {sums.gram.shape[-1]} inputs: take more data)"
                notes.append(told)
        if not errors:
            raise ConfigError(
                "reconstruct found no layer to solve"
                + "".join(f"\n  {note}" for note in notes)
                + ("" if layers == "all" else '\n  layers="all" takes those that lost nothing')
            )
        mean = [sum(pair[i] for pair in errors) / len(errors) for i in (0, 1)]
        return judge.won(model, "layers solved again", changed, notes, (mean[0], mean[1]))


class _Work:
    """The two models, and what is done to one layer after the other.

    Attributes:
        left: ||y - W x|| / ||y|| of the layer that was solved last.
    """

    def __init__(
        self, model: nn.Module, dense: nn.Module, cut: Cut, batches: Batches, most: int | None
    ) -> None:
        self.model, self.dense, self.cut = model, dense, cut
        self.batches, self.most = batches, most
        self.mine, self.theirs = named_tensors(model), named_tensors(dense)
        self.origin = {x.name: x for x in layers_of(dense)}
        self.left = 0.0

    def chosen(self, *, everything: bool) -> tuple[list[Layer], list[str]]:
        """Layers to solve, and notes on those that are not."""
        notes = left_out(self.dense, self.cut)
        own = {x.name: x for x in layers_of(self.model)}
        tied = shared(self.model, list(own.values()))
        found = []
        for name, layer in self.origin.items():
            if not everything and not self.cut.touches(layer, self.theirs[layer.weight]):
                continue
            if name not in own or self.cut.small_groups(layer):
                notes.append(f"{name}: not found in the smaller model; repair before shrink")
            elif layer.weight in tied:
                notes.append(
                    f"{name}: tied to {tied[layer.weight]}, which reads other inputs; left"
                )
            else:
                found.append(own[name])
        return found, notes

    def matrices(self, layer: Layer, *, dense: bool) -> tuple[Tensor, Tensor | None]:
        """(groups, out, in) weights and (groups, out) biases as they are now."""
        tensors = self.theirs if dense else self.mine
        bias = None if layer.bias is None else layer.line(tensors[layer.bias].detach())
        return layer.matrix(tensors[layer.weight].detach()), bias

    def free(self, layer: Layer) -> Tensor:
        """(groups, out, in [+ 1]) bool: the weights, and the bias, that may be solved."""
        weight = self.theirs[layer.weight]
        free = layer.matrix(self.cut.own(layer.weight, self.cut.mask(layer.weight, weight)))
        if layer.bias is None:
            return free
        bias = self.theirs[layer.bias]
        line = layer.line(self.cut.own(layer.bias, self.cut.mask(layer.bias, bias)))
        return torch.cat([free, line[:, :, None]], 2)

    def collect(self, group: Sequence[Layer], calls: Mapping[str, int]) -> list[Moments]:
        """Sums over all batches, for layers that read the same inputs."""
        expected = {layer.path: calls[layer.path] for layer in group}
        moments = [self.empty(layer) for layer in group]
        wanted: dict[str, list[Tensor]] = {}

        def teach(path: str, call: Call) -> None:
            for layer, found in zip(group, moments, strict=True):
                if layer.path != path:
                    continue
                origin = self.origin[layer.name]
                y = self.cut.outputs(
                    origin, origin.outputs(call, *self.matrices(origin, dense=True))
                )
                if layer.loop:
                    rows = (self.cut.inputs(origin, x) for x in origin.rows(call))
                    self._learn(layer, found, rows, y)
                else:
                    wanted.setdefault(layer.name, []).append(y)

        def learn(path: str, call: Call) -> None:
            for layer, found in zip(group, moments, strict=True):
                if layer.path == path and not layer.loop:
                    if not wanted.get(layer.name):
                        raise CaptureError(f"{path}: called more often than in the dense model")
                    self._learn(layer, found, layer.rows(call), wanted[layer.name].pop(0))

        with quiet(self.model, self.dense):
            for inputs in inputs_of(self.batches, self.model, self.most):
                wanted.clear()
                watch_calls(self.dense, inputs, expected, teach)
                watch_calls(self.model, inputs, expected, learn)
        for layer, found in zip(group, moments, strict=True):
            checked_finite(found.gram, layer.name)
            checked_finite(found.cross, layer.name)
        return moments

    def empty(self, layer: Layer) -> Moments:
        """Sums over nothing yet."""
        groups, n_out, n_in = self.matrices(layer, dense=False)[0].shape
        return Moments(groups, n_in, n_out, bias=layer.bias is not None)

    def _learn(self, layer: Layer, found: Moments, rows: Iterable[Tensor], y: Tensor) -> None:
        """Take the inputs of one call; y (rows, out) is what the dense layer made."""
        weight, bias = self.matrices(layer, dense=False)
        live = self.free(layer).any(2)[:, None].to(y.device)  # what is removed whole counts nowhere
        at = 0
        for x in rows:
            target = y[at : at + x.shape[1]].to(x)
            at += x.shape[1]
            target = torch.unflatten(target, 1, (layer.groups, -1)).transpose(0, 1) * live
            e = target - product(x, weight, bias) * live
            found.add(x)
            found.compare(x, e, target)

    @torch.no_grad()
    def solve(self, layer: Layer, found: Moments, ridge: float) -> list[str]:
        """Write the new weights of one layer; names of the changed tensors."""
        free = self.free(layer).cpu()
        change = torch.stack(
            [
                solve_rows(*each, ridge, bias=layer.bias is not None)
                for each in zip(found.gram, found.cross, free, strict=True)
            ]
        )
        gain = 2 * (change * found.cross).sum() - (change @ found.gram * change).sum()
        self.left = relative(max(0.0, found.error - float(gain)), found.size)
        weight, bias = self.matrices(layer, dense=False)
        k = weight.shape[2]
        layer.place(self.mine[layer.weight], (weight.double().cpu() + change[:, :, :k]).to(weight))
        if layer.bias is None or bias is None:
            return [layer.weight]
        layer.place_line(self.mine[layer.bias], (bias.double().cpu() + change[:, :, k]).to(bias))
        return [layer.weight, layer.bias]


def solve_rows(gram: Tensor, cross: Tensor, free: Tensor, ridge: float, *, bias: bool) -> Tensor:
    """(out, in) float64 changes of weights that fit residuals best; 0 where they are not free.

    min over the free entries of each row of sum |e - change x|^2 + ridge d |change|^2, d the mean
    diagonal of the gram matrix over them; a bias, the last entry, is not held back.

    Args:
        gram: (in, in) float64, sum of x x'.
        cross: (out, in) float64, sum of e x'.
        free: (out, in) bool.
        ridge: above 0.
        bias: whether the last entry of x is always 1.

    Example:
        >>> g, c = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).double(), torch.tensor([[4.0, 6.0]])
        >>> solve_rows(g, c.double(), torch.tensor([[True, False]]), 1.0, bias=False)
        tensor([[1., 0.]], dtype=torch.float64)
    """
    change = torch.zeros_like(cross)
    weights = len(gram) - bias
    patterns, which = torch.unique(free, dim=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        columns, rows = pattern.nonzero().reshape(-1), (which == i).nonzero().reshape(-1)
        if not len(columns):
            continue
        mine = gram[columns][:, columns]
        held = (columns < weights).double()
        level = float((mine.diagonal() * held).sum() / held.sum().clamp(min=1))
        factor = torch.linalg.cholesky(mine + torch.diag(held * (ridge * level or 1.0)))
        answer = torch.cholesky_solve(cross[rows][:, columns].mT, factor).mT
        change[rows[:, None], columns] = answer
    return change
