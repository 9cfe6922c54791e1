"""Single weights pruned layer by layer, from second moments of the layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, choose
from secateurs.filters import Patterns, Place, taken_out
from secateurs.masks import named_tensors
from secateurs.posttraining.cut import Cut
from secateurs.posttraining.inputs import Moments, inputs_of, passes, quiet, watch_calls
from secateurs.posttraining.layers import Call, Layer, layers_of
from secateurs.posttraining.lost import shared
from secateurs.posttraining.measuring import Judge, checked_finite, relative, restoring
from secateurs.posttraining.won import Won
from secateurs.selection import RemovedTable, order_of
from secateurs.surgery.verification import copied
from secateurs.types import Batches, Evaluate, LossFn, Plan

__all__ = ["prune_layerwise", "sparsegpt", "wanda_mask"]


def prune_layerwise(
    model: nn.Module,
    batches: Batches,
    *,
    density: float | Mapping[str, float],
    method: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt",
    block: int = 128,
    damping: float = 0.01,
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
        block: columns of which "sparsegpt" chooses together.
        damping: added to the diagonal of H, in units of its mean.
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
    choose(method, ["sparsegpt", "wanda", "magnitude"], "method of prune_layerwise")
    if block < 1 or not damping > 0:
        raise ConfigError(f"block must be at least 1 and damping above 0, got {block}, {damping}")
    layers, notes = _chosen(model, density, include, exclude)
    dense = copied(model)
    judge = Judge(dense, batches, loss_fn, evaluate, max_batches)
    with restoring(model):
        if previous is not None:
            Cut(model, dense, previous).apply_(model)
        judge.start(model)
        order = passes(model, layers, batches)
        notes += order.notes
        if not order.groups:
            raise ConfigError(
                "prune_layerwise found no layer that is called; prune before shrink, or use the "
                'module form of the smaller model (form="module")'
                + "".join(f"\n  {note}" for note in notes)
            )
        masks: dict[str, Tensor] = {}
        errors = []
        for group in order.groups:
            for layer, found in _collected(model, group, order.calls, batches, max_batches):
                share = _density(density, layer.weight)
                cutter = _cutter(method, block, damping)
                error, plain = _prune(model, layer, found, share, cutter, masks, previous)
                errors.append(error)
                told = f"error {error:.4f} (smallest weights: {plain:.4f})"
                notes.append(
                    f"{layer.name}: {told if found.n else 'no sample reaches it, cut by size only'}"
                )
        plan = _plan(masks, previous, f"{method}, density {density} of each layer")
        mean = sum(errors) / len(errors)
        won = judge.won(model, f"pruned by {method}", list(masks), notes, (0.0, mean))
        return plan, won


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
    for name, other in shared(model, found).items():
        if name not in out:
            out[name] = ""
            notes.append(f"{name}: tied to {other}, which reads other inputs; left whole")
    params = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    notes += [
        f"{n}: no layer whose inputs can be seen; left whole" for n in params if n not in names
    ]
    return [x for x in found if x.weight not in out and _density(density, x.weight) < 1], notes


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


Cutter = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(weight, gram, left, how many to keep) -> new weight and mask; all by groups, float64."""


def _cutter(method: str, block: int, damping: float) -> Cutter:
    def by_sparsegpt(w: Tensor, h: Tensor, left: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        return sparsegpt(w, h, left, keep, block=block, damping=damping)

    def by_wanda(w: Tensor, h: Tensor, left: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        mask = wanda_mask(w, h, left, keep)
        return w.masked_fill(~mask, 0), mask

    return {"sparsegpt": by_sparsegpt, "wanda": by_wanda, "magnitude": _by_magnitude}[method]


def _by_magnitude(w: Tensor, h: Tensor, left: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    mask = _best(w.abs().masked_fill(~left, -1), keep)
    return w.masked_fill(~mask, 0), mask


def _best(scores: Tensor, keep: int) -> Tensor:
    """Bool: the `keep` largest of all; of equal ones the first."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order_of(scores.reshape(-1))[:keep]] = True
    return mask.view(scores.shape)


@torch.no_grad()
def _prune(
    model: nn.Module,
    layer: Layer,
    found: Moments,
    density: float,
    cutter: Cutter,
    masks: dict[str, Tensor],
    previous: Plan | None,
) -> tuple[float, float]:
    """Prune one layer in place and note its mask; its error, and that of the smallest weights."""
    tensor = named_tensors(model)[layer.weight]
    full = masks.get(layer.weight)
    if full is None:
        old = None if previous is None else previous.masks.get(layer.weight)
        full = torch.ones(tensor.shape, dtype=torch.bool) if old is None else old.clone()
        masks[layer.weight] = full
    weight = layer.matrix(tensor.detach()).double().cpu().clone()
    left = layer.matrix(full)
    n_left = int(left.sum())
    keep = min(n_left, max(1, round(density * n_left)))  # a layer without weights says nothing
    new, mask = cutter(weight, found.gram, left, keep)
    plain, _ = _by_magnitude(weight, found.gram, left, keep)
    layer.place(tensor, new.to(tensor))
    layer.place(full, mask)
    size = _energy(weight, found.gram)
    return tuple(relative(_energy(w - weight, found.gram), size) for w in (new, plain))  # type: ignore[return-value]


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Sum over rows of |W x|^2."""
    return max(0.0, float((weight @ gram * weight).sum()))


def _plan(masks: Mapping[str, Tensor], previous: Plan | None, why: str) -> Plan:
    """A plan of these masks, what was removed earlier included."""
    removed = RemovedTable.after(previous)
    for name, mask in masks.items():
        removed.add(name, mask.reshape(-1), single=True)
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    reasons = {
        name: f"{int((~mask).sum())} of {mask.numel()} weight units removed layer by layer: {why}"
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


def wanda_mask(weight: Tensor, gram: Tensor, left: Tensor, keep: int) -> Tensor:
    """(groups, out, in) bool: in each row the largest |w| ||x_j||, `keep` in all.

    Every row keeps the same share of what it has left, rounded down; what the rounding leaves over
    goes to the rows whose next weight scores highest.

    Args:
        weight: (groups, out, in) float64.
        gram: (groups, in, in), sum of x x'.
        left: (groups, out, in) bool, what may be kept.
        keep: weights that stay, in all.

    Example:
        >>> w, eye = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]]), torch.eye(3)[None]
        >>> wanda_mask(w, eye, torch.ones(1, 2, 3, dtype=torch.bool), 3).int().tolist()
        [[[0, 1, 1], [1, 0, 0]]]
    """
    norm = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # (groups, in)
    scores = (weight.abs() * norm[:, None]).masked_fill(~left, -1).flatten(0, 1)  # (rows, in)
    n_left = left.flatten(0, 1).sum(1)
    share = n_left * keep // max(1, int(n_left.sum()))
    ordered = torch.sort(scores, dim=1, descending=True, stable=True)
    more = keep - int(share.sum())
    if more:
        at = share.clamp(max=scores.shape[1] - 1)[:, None]
        following = ordered.values.gather(1, at)[:, 0].masked_fill(share >= n_left, -2)
        share = share + _best(following, more)
    ranks = torch.arange(scores.shape[1])[None] < share[:, None]
    return torch.zeros_like(left.flatten(0, 1)).scatter_(1, ordered.indices, ranks).view(left.shape)


def sparsegpt(
    weight: Tensor, gram: Tensor, left: Tensor, keep: int, *, block: int, damping: float
) -> tuple[Tensor, Tensor]:
    """New weights and their mask: columns in order, errors fed to those on the right.

    Args:
        weight: (groups, out, in) float64.
        gram: (groups, in, in) float64, sum of x x'.
        left: (groups, out, in) bool, what may be kept; weights elsewhere are zero.
        keep: weights that stay, in all; each block keeps its share.
        block: columns of which masks are chosen together.
        damping: in units of the mean diagonal.

    Example:
        >>> h = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]).double()
        >>> w, whole = torch.tensor([[[1.0, 5.0]]]).double(), torch.ones(1, 1, 2, dtype=torch.bool)
        >>> new, mask = sparsegpt(w, h, whole, 1, block=2, damping=1e-12)
        >>> new.round().tolist(), mask.tolist()
        ([[[0.0, 6.0]]], [[[False, True]]])
    """
    n_in = weight.shape[2]
    level = gram.diagonal(dim1=1, dim2=2).mean(1)  # (groups,)
    level = torch.where(level > 0, level * damping, 1.0)
    damped = gram + torch.diag_embed(level[:, None].expand(-1, n_in))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(
        inverse, upper=True
    )  # row j: the inverse once j is the first left
    work, mask = weight.clone(), torch.zeros_like(left)
    total, seen, kept = int(left.sum()), 0, 0
    for low in range(0, n_in, block):
        high = min(low + block, n_in)
        scale = upper.diagonal(dim1=1, dim2=2)[:, None, low:high]
        mine = left[:, :, low:high]
        seen += int(mine.sum())
        share = (keep * seen + total // 2) // max(1, total) - kept
        kept += share
        score = (work[:, :, low:high] / scale).square().masked_fill(~mine, -1)
        mask[:, :, low:high] = _best(score, share)
        errors = torch.zeros_like(score)
        for j in range(low, high):
            lost = work[:, :, j].masked_fill(mask[:, :, j], 0) / upper[:, j, j, None]
            work[:, :, j:high] -= lost[:, :, None] * upper[:, j, None, j:high]
            errors[:, :, j - low] = lost
        work[:, :, high:] -= errors @ upper[:, low:high, high:]
    return work.masked_fill(~mask, 0), mask
