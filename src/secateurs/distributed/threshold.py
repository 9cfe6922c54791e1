"""One threshold for scores that no process holds together: histograms merge, scores stay.

A number is read as 16-bit digits, the first of which orders numbers coarsely. Each digit takes one
pass over the local scores and one sum of 65,536 counters over the ranks: two passes for float32,
four for float64, however many scores there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from secateurs.distributed.groups import Group, Ranks, order_of_first, ranks_of
from secateurs.errors import ConfigError, ScoringError
from secateurs.kth import Cut, keep_mask, tally

__all__ = ["global_threshold", "local_masks"]

PIECE = 1 << 20
DIGIT = 16
BINS = 1 << DIGIT


def global_threshold(local_scores: Mapping[str, Tensor], k: int, group: Group) -> Cut:
    """Where the k largest of the scores of all ranks end: exact, and without gathering them.

    Args:
        local_scores: name -> the scores that this rank holds, any shape, floating type; `-inf` is
            never counted. Ranks may hold different tensors, different parts of one, or none.
        k: from 1 to the number of scores of all ranks.
        group: the ranks.

    Returns:
        A `Cut` for this rank: `threshold` is the same on every rank; `above` and `equal` count the
        scores of *this* rank that stay. Of scores that equal the threshold those of the first names
        stay, of one name those of the lower rank, of one rank those of the smaller index: as in
        `kth_largest` of the parts joined in the order of the ranks.

    Raises:
        ConfigError: k is out of range, or differs between ranks.
        ScoringError: a score is nan.

    Example:
        >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([2.0, 2.0])}
        >>> cut = global_threshold(scores, 3, None)
        >>> cut.threshold, cut.kept
        (2.0, {'a': 2, 'b': 1})
    """
    ranks = ranks_of(group)
    with ranks.agreed("global_threshold"):
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"k must be a whole number, at least 1, got {k!r}")
        for name, scores in local_scores.items():
            _check(name, scores)
    told = ranks.gather((k, [*local_scores], any(_double(s) for s in local_scores.values())))
    if len({one[0] for one in told}) > 1:
        raise ConfigError(f"k must be the same on every rank, got {[one[0] for one in told]}")
    dtype = torch.float64 if any(one[2] for one in told) else torch.float32
    threshold = _kth(local_scores, k, dtype, ranks)
    found = tally(local_scores, threshold, threshold, dtype)
    names = order_of_first([one[1] for one in told])
    counted = ranks.gather({n: (found.over[n], found.reach[n]) for n in found.over})
    missing = k - sum(over for one in counted for over, _ in one.values())
    equal: dict[str, int] = {}
    for name in names:
        for rank, one in enumerate(counted):
            if name in one:
                over, reach = one[name]
                take = min(missing, reach - over)
                missing -= take
                if rank == ranks.rank:
                    equal[name] = take
    return Cut(threshold, dict(found.over), {name: equal[name] for name in found.over})


def local_masks(local_scores: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
    """Bool masks of what this rank holds, of the shapes of its scores: True = keep.

    Example:
        >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0])}
        >>> local_masks(scores, global_threshold(scores, 2, None))["a"].tolist()
        [True, False, True]
    """
    return {
        name: keep_mask(scores, cut.threshold, cut.equal[name])
        for name, scores in local_scores.items()
    }


def _double(scores: Tensor) -> bool:
    return scores.dtype == torch.float64


def _check(name: str, scores: Tensor) -> None:
    if not scores.is_floating_point():
        raise ConfigError(f"{name}: scores are floating-point numbers, got {scores.dtype}")
    for piece in torch.split(scores.detach().reshape(-1), PIECE):
        if bool(piece.isnan().any()):
            raise ScoringError(f"{name}: a score is not a number; score the target again")


def _kth(local_scores: Mapping[str, Tensor], k: int, dtype: torch.dtype, ranks: Ranks) -> float:
    """The k-th largest score, digit by digit."""
    n_digits = torch.finfo(dtype).bits // DIGIT
    prefix: int | None = None  # the digits that are known
    left = k
    for place in reversed(range(n_digits)):
        counts = torch.zeros(BINS, dtype=torch.int64)
        for keys in _keys(local_scores, dtype):
            digits = keys >> (DIGIT * place)
            if prefix is not None:
                digits = digits[digits >> DIGIT == prefix]
            # The first digit is signed, the others are not.
            first = BINS // 2 if prefix is None else -(prefix << DIGIT)
            counts += torch.bincount(digits + first, minlength=BINS)
        counts = ranks.sum(counts)
        total = int(counts.sum())
        if prefix is None and left > total:
            raise ConfigError(f"k must be from 1 to {total}, the number of scores, got {k}")
        from_above = counts.flip(0).cumsum(0)
        place_above = int(torch.searchsorted(from_above, left))
        left -= int(from_above[place_above - 1]) if place_above else 0
        digit = BINS - 1 - place_above
        prefix = digit - BINS // 2 if prefix is None else (prefix << DIGIT) + digit
    assert prefix is not None
    return _value(prefix, dtype)


def _keys(local_scores: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """(n,) int64 numbers on the CPU in the order of the scores; those of -inf are left out."""
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    for scores in local_scores.values():
        for piece in torch.split(scores.detach().reshape(-1), PIECE):
            line = piece.to(dtype).cpu() + 0.0  # -0.0 becomes 0.0
            bits = line[line > -math.inf].view(whole)
            yield torch.where(bits < 0, bits ^ torch.iinfo(whole).max, bits).long()


def _value(key: int, dtype: torch.dtype) -> float:
    """The number whose key that is."""
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    bits = torch.tensor([key], dtype=whole)
    bits = torch.where(bits < 0, bits ^ torch.iinfo(whole).max, bits)
    return float(bits.view(dtype)[0])
