"""Single weights pruned layer by layer, from second moments of the layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, ScoringError, choose
from secateurs.filters import Patterns, Place, taken_out
from secateurs.masks import named_tensors
from secateurs.posttraining.choosing import (
    BLOCK,
    DAMPING,
    Cutter,
    Method,
    by_magnitude,
    check_layerwise,
    cutter_of,
    split,
)
from secateurs.posttraining.cut import Cut
from secateurs.posttraining.inputs import Moments, inputs_of, passes, quiet, watch_calls
from secateurs.posttraining.layers import Call, Layer, layers_of
from secateurs.posttraining.lost import shared
from secateurs.posttraining.measuring import Judge, checked_finite, relative, restoring
from secateurs.posttraining.won import Won
from secateurs.selection import RemovedTable
from secateurs.surgery.verification import copied
from secateurs.types import Batches, Evaluate, LossFn, Plan

__all__ = ["prune_layerwise", "prune_to_counts", "whole_weights"]


def prune_layerwise(
    model: nn.Module,
    batches: Batches,
    *,
    density: float | Mapping[str, float],
    method: Method = "sparsegpt",
    block: int = BLOCK,
    damping: float = DAMPING,
    previous: Plan | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    loss_fn: LossFn | None = None,
    evaluate: Evaluate | None = None,
    max_batches: int | None = None,
) -> tuple[Plan, Won]:
    """Prune single weights of every layer in place, without training; the plan and what it cost.

    In the order of execution each layer sees the inputs that the layers pruned before it leave, H =
    sum x x' over them. "sparsegpt": columns from left to right; in each block of columns the
    smallest w^2 / [H^-1]_jj go, where H^-1 is that of the columns not passed yet, and the columns
    to the right make up for the error. "wanda": the smallest |w| ||x_j|| of each output row;
    what stays is not changed. "magnitude": the smallest |w| of the layer.

    N:M patterns are not made here.

    Args:
        model: changed in place; on any exception it is as before.
        batches: re-iterable of `(inputs, targets)`; targets are not used.
        density: fraction in (0, 1] of the weights of each layer that may remain, of those that are
            left so far; or one for each weight name, the others stay whole. Counts are exact, and
            at least one weight of each layer stays.
        method: see above.
        block: columns of which "sparsegpt" chooses together; of that method only.
        damping: added to the diagonal of H, in units of its mean; of "sparsegpt" only.
        previous: what was removed earlier stays removed, and is part of the new plan.
        include, exclude: weights by name, glob, module or class, as in `Graph.only`.
        loss_fn, evaluate: if given, measured before and after.
        max_batches: use at most that many batches.

    Returns:
        A plan with the masks (for `hold_masks`), and what it cost: "error" is the mean over the
        layers of ||W' x - W x|| / ||W x||, 0 before; `notes` has it for each layer, beside that of
        cutting the same number of smallest weights.

    Raises:
        ConfigError: an option or name does not fit, or no layer was called.
        ScoringError: activations that are not finite.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 5.0]]))
        >>> x = torch.tensor([[4.0, 1.0], [0.0, 1.0]])
        >>> plan, won = prune_layerwise(net, [(x, None)], density=0.5, method="wanda")
        >>> net.weight.tolist(), plan.masks["weight"].tolist()
        ([[3.0, 0.0]], [[True, False]])

    References:
        Frantar and Alistarh, SparseGPT, 2023, arXiv:2301.00774. Sun et al., A Simple and Effective
        Pruning Approach for Large Language Models (Wanda), 2023, arXiv:2306.11695.
    """
    check_layerwise(method, block, damping)
    layers, notes = _chosen(model, density, include, exclude)
    masks = _masks(model, layers, previous)
    keep = {}
    for layer in layers:
        n_left = int(layer.matrix(masks[layer.weight]).sum())
        share = round(_density(density, layer.weight) * n_left)
        keep[layer.name] = min(n_left, max(1, share))  # a layer without weights says nothing
    why = {x.weight: f"{method}, density {_density(density, x.weight)}" for x in layers}
    task = _Task(layers, masks, keep, method, cutter_of(method, block, damping), previous, why)
    with restoring(model):
        return task.run(model, batches, loss_fn, evaluate, max_batches, notes)


def prune_to_counts(
    model: nn.Module,
    batches: Batches,
    counts: Mapping[str, int],
    *,
    method: Method = "sparsegpt",
    block: int = BLOCK,
    damping: float = DAMPING,
    previous: Plan | None = None,
    evaluate: Evaluate | None = None,
    why: str = "",
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Plan, Won]:
    """`prune_layerwise` to a number of weights for each tensor: all of them, or an error.

    The products of one tensor (query, key and value of an attention) share its count in proportion
    to what they have left, each with at least one if there are enough.

    Args:
        counts: weight name -> how many stay, of those that are left; others stay whole.
        why: for the reasons in the plan.
        progress: called with (layers done, layers).

    Other arguments as `prune_layerwise`.

    Raises:
        ConfigError: a weight is that of no layer, or its layer is not called.
        ScoringError: activations that are not finite.

    Example:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 5.0, 1.0]]))
        >>> plan, _ = prune_to_counts(net, [(torch.eye(3), None)], {"weight": 2}, method="wanda")
        >>> plan.masks["weight"].tolist()
        [[True, True, False]]
    """
    check_layerwise(method, block, damping)
    every = layers_of(model)
    for name in counts:
        choose(name, dict.fromkeys(x.weight for x in every), "weight of a layer")
    known = [x for x in every if x.weight in counts]
    masks = _masks(model, known, previous)
    keep: dict[str, int] = {}
    for name, count in counts.items():
        mine = [x for x in known if x.weight == name]
        left = [int(x.matrix(masks[name]).sum()) for x in mine]
        shares = split(count, left)
        keep |= {x.name: share for x, share in zip(mine, shares, strict=True)}
    reasons = dict.fromkeys(counts, f"{method}, {why}" if why else method)
    cutter = cutter_of(method, block, damping)
    task = _Task(known, masks, keep, method, cutter, previous, reasons, True, progress)
    with restoring(model):
        return task.run(model, batches, None, evaluate, None, [])


def whole_weights(model: nn.Module, batches: Batches) -> dict[str, str]:
    """Weights that `prune_layerwise` would leave whole -> why, by a run of the first batch.

    Example:
        >>> net = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
        >>> whole_weights(net, [(torch.tensor([0, 2]), None)])
        {'0.weight': 'no layer whose inputs can be seen'}
    """
    layers = layers_of(model)
    found = _unseen(model, layers)
    order = passes(model, [x for x in layers if x.weight not in found], batches, every=False)
    return found | {x.weight: order.left[x.name] for x in layers if x.name in order.left}


def _unseen(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Weights that belong to no layer, or to more than one -> why."""
    names = {x.weight for x in layers}
    found = {
        name: f"tied to {other}, which reads other inputs"
        for name, other in shared(model, layers).items()
    }
    params = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    return found | {n: "no layer whose inputs can be seen" for n in params if n not in names}


def _chosen(
    model: nn.Module,
    density: float | Mapping[str, float],
    include: Patterns | None,
    exclude: Patterns | None,
) -> tuple[list[Layer], list[str]]:
    """Layers to prune, and notes on what is left."""
    found = layers_of(model)
    names = dict.fromkeys(x.weight for x in found)
    for value in density.values() if isinstance(density, Mapping) else [density]:
        if not 0 < value <= 1:
            hint = f" Did you mean {value / 100}?" if 1 < value <= 100 else ""
            raise ConfigError(f"density must be in (0, 1], got {value}.{hint}")
    for name in density if isinstance(density, Mapping) else ():
        choose(name, names, "weight of a layer")
    places = [Place(name, "weight", (name,)) for name in names]
    out = taken_out(places, {}, include, exclude, model)
    notes = [f"{name}: {why}" for name, why in out.items()]
    whole = _unseen(model, found)
    notes += [f"{name}: {why}; left whole" for name, why in whole.items() if name not in out]
    gone = {*out, *whole}
    return [x for x in found if x.weight not in gone and _density(density, x.weight) < 1], notes


def _density(density: float | Mapping[str, float], name: str) -> float:
    return density.get(name, 1.0) if isinstance(density, Mapping) else density


def _collected(
    model: nn.Module,
    group: Sequence[Layer],
    calls: Mapping[str, int],
    batches: Batches,
    max_batches: int | None,
) -> list[tuple[Layer, Moments]]:
    """Sums of x x' of layers that read the same inputs."""
    tensors = named_tensors(model)
    pairs = []
    for layer in group:
        groups, _, n_in = layer.matrix(tensors[layer.weight]).shape
        pairs.append((layer, Moments(groups, n_in, 0, bias=False)))

    def look(path: str, call: Call) -> None:
        for layer, found in pairs:
            if layer.path == path:
                for x in layer.rows(call):
                    found.add(x)

    with quiet(model):
        for inputs in inputs_of(batches, model, max_batches):
            watch_calls(model, inputs, {x.path: calls[x.path] for x in group}, look)
    for layer, found in pairs:
        checked_finite(found.gram, layer.name)
    return pairs


def _masks(model: nn.Module, layers: Sequence[Layer], previous: Plan | None) -> dict[str, Tensor]:
    """Weight of each layer -> bool of its shape: what is left so far."""
    tensors = named_tensors(model)
    old = {} if previous is None else previous.masks
    return {
        name: old[name].clone()
        if name in old
        else torch.ones(tensors[name].shape, dtype=torch.bool)
        for name in dict.fromkeys(x.weight for x in layers)
    }


@dataclass(frozen=True, eq=False)
class _Task:
    """What is to be done to a model.

    Attributes:
        layers: to be pruned, in any order.
        masks: weight name -> what is left, and in the end what stays.
        keep: layer name -> how many of its weights stay.
        method, cutter: who says which.
        previous: what was removed earlier.
        why: weight name -> end of the reason in the plan.
        all_: whether a layer that is not called is an error.
        progress: called with (layers done, layers).
    """

    layers: Sequence[Layer]
    masks: dict[str, Tensor]
    keep: Mapping[str, int]
    method: Method
    cutter: Cutter
    previous: Plan | None
    why: Mapping[str, str]
    all_: bool = False
    progress: Callable[[int, int], object] | None = None

    def run(
        self,
        model: nn.Module,
        batches: Batches,
        loss_fn: LossFn | None,
        evaluate: Evaluate | None,
        max_batches: int | None,
        notes: list[str],
    ) -> tuple[Plan, Won]:
        """Do it in place; as `prune_layerwise`."""
        dense = copied(model)
        judge = Judge(dense, batches, loss_fn, evaluate, max_batches)
        if self.previous is not None:
            Cut(model, dense, self.previous).apply_(model)
        judge.start(model)
        order = passes(model, self.layers, batches, max_batches)
        notes = [*notes, *order.notes]
        if self.all_ and order.left:
            raise ConfigError(
                "not every layer that is to be pruned can be: leave these out (exclude=), or look "
                "at the first batch" + "".join(f"\n  {note}" for note in order.notes)
            )
        if not order.groups:
            raise ConfigError(
                "prune_layerwise found no layer that is called; prune before shrink, or use the "
                'module form of the smaller model (form="module")'
                + "".join(f"\n  {note}" for note in notes)
            )
        errors: dict[str, float] = {}
        done: dict[str, Tensor] = {}
        for group in order.groups:
            for layer, found in _collected(model, group, order.calls, batches, max_batches):
                error, plain = self.prune(model, layer, found)
                errors[layer.name] = error
                done[layer.weight] = self.masks[layer.weight]
                notes.append(f"{layer.name}: {self.told(found, error, plain)}")
                if self.progress is not None:
                    self.progress(len(errors), len(self.layers))
        plan = _plan(done, self.previous, self.why)
        mean = sum(errors.values()) / len(errors)
        won = judge.won(model, f"pruned by {self.method}", list(done), notes, (0.0, mean))
        return plan, won

    def told(self, found: Moments, error: float, plain: float) -> str:
        """What a reader should know of a layer: what it cost, and on how little it stands."""
        if not found.n:
            return "no sample reaches it, cut by size only"
        if not found.gram.any():
            return "its inputs are zero, cut by size only"
        n_in = found.gram.shape[-1]
        few = self.method == "sparsegpt" and found.n < n_in
        return f"error {error:.4f} (smallest weights: {plain:.4f})" + (
            f" ({found.n} rows for {n_in} inputs: take more data)" if few else ""
        )

    @torch.no_grad()
    def prune(self, model: nn.Module, layer: Layer, found: Moments) -> tuple[float, float]:
        """Prune a layer in place and note its mask; its error, and that of the smallest weights."""
        tensor, full = named_tensors(model)[layer.weight], self.masks[layer.weight]
        weight = layer.matrix(tensor.detach()).double().cpu().clone()
        left, keep = layer.matrix(full), self.keep[layer.name]
        try:
            new, mask = self.cutter(weight, found.gram, left, keep)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ScoringError(
                f"{layer.name}: its inputs say the same several times, and damping is too small to "
                "solve for its weights: take a larger damping, as in the default, 0.01"
            ) from error
        plain, _ = by_magnitude(weight, found.gram, left, keep)
        assert int(mask.sum()) == keep
        layer.place(tensor, new.to(tensor))
        layer.place(full, mask)
        size = _energy(weight, found.gram)
        return (
            relative(_energy(new - weight, found.gram), size),
            relative(_energy(plain - weight, found.gram), size),
        )


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Sum over rows of |W x|^2."""
    return max(0.0, float((weight @ gram * weight).sum()))


def _plan(masks: Mapping[str, Tensor], previous: Plan | None, why: Mapping[str, str]) -> Plan:
    """A plan of these masks, what was removed earlier included."""
    removed = RemovedTable.after(previous)
    for name, mask in masks.items():
        removed.add(name, mask.reshape(-1), single=True)
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}

    def mask_before(name: str) -> Tensor:
        whole = torch.ones_like(masks[name])
        return whole if previous is None else previous.masks.get(name, whole)

    reasons = {
        name: f"{int(mask_before(name).sum() - mask.sum())} of {mask.numel()} weight units removed "
        f"layer by layer: {why[name]}"
        for name, mask in masks.items()
    }
    if previous is None:
        return Plan({}, masks, removed, shapes, ("weight",), reasons)
    return replace(
        previous,
        masks={**previous.masks, **masks},
        removed=removed,
        shapes={**previous.shapes, **shapes},
        granularity=tuple(sorted({*previous.granularity, "weight"})),
        reasons={**previous.reasons, **reasons},
    )
