"""The second derivative of the loss with respect to the outputs, as squares: H = sum_k s_k E[r r'].

    seen_outputs(outputs, ...) -> Outputs   the outputs, cut off from the model
    roots(outputs, ...) -> [(r, s)]         vectors shaped like the outputs, and signs

For every sample, E[s r r'] over random signs is the Hessian H_i of its loss, so that a product j' r
with a derivative j of the outputs gives j' H_i j when it is squared. The better r fits H_i, the
less the squares scatter; what H_i looks like is tried in this order, and proven by a product of the
true H with random signs:

    small     up to 64 outputs for each sample: H_i itself, its eigenvectors with random signs
    diagonal  squared error, binary cross-entropy: sqrt(h) with random signs
    softmax   cross-entropy of logits: sum_c +-sqrt(p_c) (e_c - p), at each position
    other     z and H z for random signs z, as (z + Hz)^2 - (z - Hz)^2: right on average, but noisy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateurs.errors import ScoringError
from secateurs.statistics.curvature import NO_SECOND, check_twice

__all__ = ["Outputs", "Root", "roots", "seen_outputs"]

Root = tuple[list[Tensor], float]
"""One tensor for each output, and the sign of its square."""
Signs = Callable[[int, int], Tensor]
"""(sample, how many) -> int8 of -1 and 1."""
SMALL = 64
EXACT = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative error within which two vectors of outputs are the same; of other dtypes 0.03."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the loss sees of the model.

    Attributes:
        inside: the outputs in which the loss curves, as they depend on the model.
        slopes: dL/doutput of each, which can be differentiated once more.
        cut: the same outputs, cut off from the model.
        linear: outputs in which the loss does not curve, and dL/doutput of each.
        n: samples.
        where: the batch, for messages.
    """

    inside: list[Tensor]
    slopes: list[Tensor]
    cut: list[Tensor]
    linear: list[tuple[Tensor, Tensor]]
    n: int
    where: str

    def slope(self, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient of the loss for some tensors inside of the model."""
        more = [x for x, _ in self.linear]
        slopes = [d.detach() for d in [*self.slopes, *(d for _, d in self.linear)]]
        return _pulled([*self.inside, *more], slopes, leaves)

    def pulled(self, r: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """J' r for some tensors inside of the model."""
        return _pulled(self.inside, r, leaves)

    def times(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """H v in the space of the outputs."""
        try:
            found = torch.autograd.grad(
                self.slopes, self.cut, direction, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise ScoringError(NO_SECOND.format(where=self.where, why=error)) from error
        if not all(h is None or torch.isfinite(h).all() for h in found):
            raise ScoringError(
                f"{self.where}: the second derivative of the loss at the outputs is not finite; "
                "check the data, and the loss where its gradient is undefined"
            )
        return [
            torch.zeros_like(c) if h is None else h for h, c in zip(found, self.cut, strict=True)
        ]


def _pulled(
    inside: Sequence[Tensor], r: Sequence[Tensor], leaves: Sequence[Tensor]
) -> list[Tensor | None]:
    found = torch.autograd.grad(inside, leaves, r, retain_graph=True, allow_unused=True)
    return list(found)


def seen_outputs(outputs: Any, loss_of: Callable[[Any], Tensor], n: int, where: str) -> Outputs:
    """What the loss sees of the model, and where it curves.

    Args:
        outputs: what the model returned.
        loss_of: outputs -> scalar loss, the mean over samples.
        n: samples.
        where: the batch, for messages.

    Raises:
        ScoringError: the loss is linear in the outputs, is not finite, or curves in an output
            without samples.
    """
    leaves, spec = pytree.tree_flatten(outputs)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    cut = {i: leaves[i].detach().requires_grad_() for i in places}
    loss = loss_of(pytree.tree_unflatten([cut.get(i, x) for i, x in enumerate(leaves)], spec))
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not torch.isfinite(loss.detach()):
        raise ScoringError(f"{where}: the loss is {loss}; check the data and the model")
    if not loss.requires_grad:
        raise ScoringError(f"{where}: the loss does not depend on the outputs of the model")
    every = torch.autograd.grad(
        loss.reshape(()), list(cut.values()), create_graph=True, allow_unused=True
    )
    held = [(i, d) for i, d in zip(places, every, strict=True) if d is not None]
    if not all(torch.isfinite(d).all() for _, d in held):
        raise ScoringError(
            f"{where}: the gradient of the loss at the outputs is not finite; check the data, and "
            "the loss where its gradient is undefined"
        )
    curved = [i for i, d in held if d.requires_grad]
    strange = [tuple(leaves[i].shape) for i in curved if leaves[i].shape[:1] != (n,)]
    if strange or not curved:
        what = (
            f"curves in outputs of shapes {strange}, which do not begin with the {n} samples"
            if strange
            else "is linear in the outputs of the model (is it computed inside of the model?)"
        )
        raise ScoringError(
            f"{where}: the loss {what}; let the model return its predictions and compute the "
            "loss in loss_fn, or use criterion 'taylor'"
        )
    known = dict(held)
    check_twice([known[i] for i in curved], where)
    return Outputs(
        [leaves[i] for i in curved],
        [known[i] for i in curved],
        [cut[i] for i in curved],
        [(leaves[i], d) for i, d in held if not d.requires_grad],
        n,
        where,
    )


def roots(outputs: Outputs, signs: Signs) -> list[Root]:
    """Vectors r with signs s such that the sum of E[s r r'] is H, for every sample.

    Args:
        outputs: from `seen_outputs`.
        signs: random signs for each sample.
    """
    sizes = [c[:1].numel() for c in outputs.cut]
    if sum(sizes) <= SMALL:
        return _small(outputs, signs, sizes)
    z = _random(outputs, signs, sizes)
    hz = outputs.times(z)
    ones = outputs.times([torch.ones_like(c) for c in outputs.cut])
    if all(_near(h * v, x) for h, v, x in zip(ones, z, hz, strict=True)):
        return _split([(h.abs().sqrt() * v, h) for h, v in zip(ones, z, strict=True)])
    if len(z) == 1 and (found := _softmax(outputs, z[0])) is not None:
        return [([found], 1.0)]
    return _polar(z, hz)


def _near(a: Tensor, b: Tensor) -> bool:
    tolerance = EXACT.get(b.dtype, 0.03)
    return bool((a - b).double().norm() <= tolerance * b.double().norm())


def _random(outputs: Outputs, signs: Signs, sizes: Sequence[int]) -> list[Tensor]:
    """Random signs shaped like the outputs."""
    rows = torch.stack([signs(i, sum(sizes)) for i in range(outputs.n)])
    parts = torch.split(rows, list(sizes), 1)
    return [p.reshape(c.shape).to(c) for p, c in zip(parts, outputs.cut, strict=True)]


def _split(values: Sequence[tuple[Tensor, Tensor]]) -> list[Root]:
    """Roots of a diagonal, those of its negative entries apart."""
    found: list[Root] = [([torch.where(h > 0, r, 0) for r, h in values], 1.0)]
    if any(bool((h < 0).any()) for _, h in values):
        found.append(([torch.where(h < 0, r, 0) for r, h in values], -1.0))
    return found


def _small(outputs: Outputs, signs: Signs, sizes: Sequence[int]) -> list[Root]:
    """H of every sample, entry by entry, and its eigenvectors."""
    n, size = outputs.n, sum(sizes)
    columns = []
    for k in range(size):
        row = torch.zeros(n, size)
        row[:, k] = 1
        parts = torch.split(row, list(sizes), 1)
        direction = [p.reshape(c.shape).to(c) for p, c in zip(parts, outputs.cut, strict=True)]
        columns.append(torch.cat([h.reshape(n, -1).double() for h in outputs.times(direction)], 1))
    hessian = torch.stack(columns, 2)  # (n, size, size)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    noise = values.abs().amax(1, keepdim=True) * EXACT.get(outputs.cut[0].dtype, 0.03) / 100
    values = torch.where(values.abs() > noise, values, 0)
    z = torch.stack([signs(i, size) for i in range(n)]).to(values)
    found: list[Root] = []
    for sign in (1.0, -1.0):
        part = (values * sign).clamp_min(0)
        if sign < 0 and not part.any():
            continue
        r = (vectors @ (part.sqrt() * z)[:, :, None])[:, :, 0]
        pieces = torch.split(r, list(sizes), 1)
        shaped = [p.reshape(c.shape).to(c) for p, c in zip(pieces, outputs.cut, strict=True)]
        found.append((shaped, sign))
    return found


def _softmax(outputs: Outputs, z: Tensor) -> Tensor | None:
    """The root for cross-entropy along one dimension, weighted by position; None if it is not."""
    logits = outputs.cut[0].detach()
    for dim in dict.fromkeys((logits.dim() - 1, 1)):
        p = logits.softmax(dim)
        shape = [1] * z.dim()
        shape[dim] = z.shape[dim]
        # of different sizes, so that no probe is constant, which is what softmax cannot see
        probe = z * torch.linspace(1, 2, z.shape[dim], dtype=z.dtype).to(z).reshape(shape)
        (seen,) = outputs.times([probe])
        plain = p * probe - p * (p * probe).sum(dim, keepdim=True)
        norm = plain.square().sum(dim, keepdim=True)
        weight = (plain * seen).sum(dim, keepdim=True) / norm.clamp_min(1e-30)
        sure = norm > 1e-8 * norm.max()  # elsewhere p is 0 or 1, and nothing is left to weigh
        if not sure.any():
            continue
        weight = torch.where(sure, weight, weight[sure].max())
        if _near(weight * plain, seen) and bool((weight >= -1e-6 * weight.abs().max()).all()):
            r = p.sqrt() * z
            return weight.clamp_min(0).sqrt() * (r - p * r.sum(dim, keepdim=True))
    return None


def _polar(z: Sequence[Tensor], hz: Sequence[Tensor]) -> list[Root]:
    """z' and H z as two squares, brought to one size first so that little is lost in between."""
    n = len(z[0])
    both = [torch.stack([x.reshape(n, -1).double().norm(dim=1) for x in y]) for y in (z, hz)]
    size, other = (b.norm(dim=0) for b in both)
    scale = (other / size).sqrt().clamp_min(1e-30)  # (n,)
    plus, minus = [], []
    for a, b in zip(z, hz, strict=True):
        s = scale.reshape(-1, *[1] * (a.dim() - 1))
        x, y = a * s, b / s
        plus.append(((x + y) / 2).to(a))
        minus.append(((x - y) / 2).to(a))
    return [(plus, 1.0), (minus, -1.0)]
