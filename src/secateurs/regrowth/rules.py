"""Rules that move masks: pure functions over tensors, all with one signature.

    rule(seen, how) -> {name: new mask}

`seen` is what there is of each tensor, `how` is `How`. Ties go to the entry that comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.errors import BudgetError
from secateurs.kth import keep_mask, kth_largest

__all__ = ["RULES", "How", "Rule", "Seen", "centre", "dns", "dpf", "rigl", "set_", "top"]

Masks = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Seen:
    """What a rule may look at of one tensor; all of its shape.

    Attributes:
        weight: with "dns" and "dpf" the dense weights, else zero where removed.
        mask: bool, True = keep.
        gradient: of the step, dense; None for a rule that needs none.
        centre: of both thresholds of "dns" with `spread`; else None.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor | None = None
    centre: float | None = None


@dataclass(frozen=True, eq=False)
class How:
    """What the options say at this update.

    Attributes:
        share: fraction of the kept entries to drop.
        margin: half the relative distance of the thresholds.
        whole: whether the number kept belongs to all tensors together.
        generator: of random growth.
    """

    share: float
    margin: float
    whole: bool
    generator: torch.Generator


def rigl(seen: Mapping[str, Seen], how: How) -> Masks:
    """Drop the smallest |w|, grow the largest |gradient|, as many in each tensor.

    floor(share x kept) entries are dropped. What was dropped just now may be grown at once (the
    paper grows among all that the drop leaves unconnected): it then stays as it was.
    """
    found = {}
    for name, s in seen.items():
        assert s.gradient is not None
        found[name] = _drop_and_grow(name, s, s.gradient.detach().abs(), how)
    return found


def set_(seen: Mapping[str, Seen], how: How) -> Masks:
    """Drop the smallest |w|, grow at random, as many in each tensor.

    The smallest positive and the largest negative weights of the paper are the smallest |w|.
    """
    return {
        name: _drop_and_grow(name, s, torch.rand(s.mask.shape, generator=how.generator), how)
        for name, s in seen.items()
    }


def dns(seen: Mapping[str, Seen], how: How) -> Masks:
    """Kept while |w| >= a, back from |w| >= b; with margin m and centre c

        a = c x (1 - m),  b = c x (1 + m)

    Without a centre, c is the one that leaves as many as before: the entries with the largest
    |w| / (1 - m if kept, 1 + m if removed) stay, which is the same rule.

    Raises:
        BudgetError: nothing of a tensor would stay.
    """
    found = {}
    for name, s in seen.items():
        size = _magnitude(s.weight)
        mask = s.mask.cpu()
        size = torch.where(mask, size / (1 - how.margin), size / (1 + how.margin))
        if s.centre is None:
            found[name] = top({name: size}, int(mask.sum()))[name]
            continue
        found[name] = size >= s.centre
        if not found[name].any():
            raise BudgetError(
                f"{name} {tuple(mask.shape)} would lose all its weights: none reaches "
                f"{s.centre:.3g}. Give a smaller spread"
            )
    return found


def dpf(seen: Mapping[str, Seen], how: How) -> Masks:
    """The largest dense |w| stay, as many as before: in each tensor, or in all together."""
    sizes = {name: _magnitude(s.weight) for name, s in seen.items()}
    counts = {name: int(s.mask.sum()) for name, s in seen.items()}
    if how.whole:
        return top(sizes, sum(counts.values()))
    return {name: top({name: size}, counts[name])[name] for name, size in sizes.items()}


@dataclass(frozen=True)
class Rule:
    """A rule and what it asks of the training.

    Attributes:
        move: the function.
        uses: fields of `Regrow` that only some rules use.
        dense: whether removed weights keep learning.
    """

    move: Callable[[Mapping[str, Seen], How], Masks]
    uses: frozenset[str]
    dense: bool = False


RULES: Mapping[str, Rule] = {
    "rigl": Rule(rigl, frozenset({"fraction", "curve"})),
    "set": Rule(set_, frozenset({"fraction", "curve"})),
    "dns": Rule(dns, frozenset({"margin", "spread"}), dense=True),
    "dpf": Rule(dpf, frozenset({"scope"}), dense=True),
}
"""Name -> rule."""


def top(scores: Mapping[str, Tensor], k: int) -> Masks:
    """Masks of the k largest of all scores; ties go to the first tensors and entries.

    Example:
        >>> top({"w": torch.tensor([2.0, 1.0, 2.0, 2.0])}, 2)["w"].tolist()
        [True, False, True, False]
    """
    if not k:
        return {name: torch.zeros(s.shape, dtype=torch.bool) for name, s in scores.items()}
    cut = kth_largest(scores, k)
    return {name: keep_mask(s, cut.threshold, cut.equal[name]) for name, s in scores.items()}


def centre(weight: Tensor, spread: float) -> float:
    """Mean + spread x standard deviation of |w| over what is not zero; at least 0.

    Example:
        >>> centre(torch.tensor([1.0, -3.0, 0.0]), spread=0.5)
        2.5
    """
    size = _magnitude(weight)
    size = size[size > 0]
    if not len(size):
        return 0.0
    return max(0.0, float(size.mean() + spread * size.std(correction=0)))


def _drop_and_grow(name: str, s: Seen, wanted: Tensor, how: How) -> Tensor:
    mask = s.mask.cpu()
    n_kept = int(mask.sum())
    n_moved = int(how.share * n_kept)
    size = _magnitude(s.weight).masked_fill(~mask, float("-inf"))
    stays = top({name: size}, n_kept - n_moved)[name]
    return stays | top({name: _comparable(wanted).masked_fill(stays, float("-inf"))}, n_moved)[name]


def _magnitude(weight: Tensor) -> Tensor:
    return _comparable(weight.detach().abs())


def _comparable(scores: Tensor) -> Tensor:
    """On the CPU, in a type that holds every smaller one exactly."""
    return scores.cpu() if scores.dtype == torch.float64 else scores.float().cpu()
