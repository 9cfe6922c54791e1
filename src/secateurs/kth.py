"""The k-th largest of very many scores: exact, in about one pass, and without joining them.

A random sample says between which bounds the answer lies. Then

    tally     one pass in chunks: how many scores lie above, and those few that lie between
    merge     tallies of parts of the scores (other tensors, other processes) add up
    settle    the answer, if it lies between the bounds; else the bounds move and a pass follows

so that the sample only decides how much work there is, never what comes out.

Scores may be of any floating type; `-inf` (removed earlier) is never counted, 0.0 and -0.0 are
equal, nan is an error. Besides the scores there are a chunk, the sample (one of 256) and what lies
between the bounds (under 1 % of the scores, unless there are few).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import ConfigError, ScoringError

__all__ = [
    "Cut",
    "Tally",
    "about_kth_largest",
    "count_left",
    "keep_mask",
    "kth_largest",
    "merge",
    "settle",
    "tally",
]

CHUNK = 1 << 17
"""Elements that are looked at together: they and what is computed of them stay in the cache."""
FOLD = 16
"""Neighbourhood in which elements between the bounds are looked for one by one."""
FEW = 1 << 16
"""Up to so many scores in all, the bounds are infinite: all are between them."""
SHARE = 256
"""One of so many scores is drawn, at most `MOST`."""
MOST = 1 << 20
WIDTH = 3.0
"""Half the distance of the bounds, in standard deviations of the rank in the sample."""

Tensors = Mapping[str, Tensor]
Sample = np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.float64]]


@dataclass(frozen=True)
class Cut:
    """Where the k best scores end.

    Attributes:
        threshold: the k-th largest score.
        above: name -> how many scores are larger.
        equal: name -> how many of those that equal the threshold stay: of the first names first,
            of one name those of smaller index.
    """

    threshold: float
    above: Mapping[str, int]
    equal: Mapping[str, int]

    @property
    def kept(self) -> dict[str, int]:
        """Name -> how many scores of it are among the k best."""
        return {name: above + self.equal[name] for name, above in self.above.items()}


@dataclass(frozen=True)
class Tally:
    """What one pass over some scores finds for two bounds, which may be equal.

    Attributes:
        low, high: the bounds.
        over: name -> how many scores are > low.
        reach: name -> how many scores are >= high.
        between: name -> the scores with low < score < high, in no particular order.
    """

    low: float
    high: float
    over: Mapping[str, int]
    reach: Mapping[str, int]
    between: Mapping[str, Tensor]


def kth_largest(tensors: Tensors, k: int) -> Cut:
    """The k-th largest of all scores, and how many of each tensor are among the k best.

    Exact. One pass, a second one where many scores equal the threshold or (about one draw of
    400) the sample misleads.

    Args:
        tensors: name -> scores of any shape and floating type. Read several times, so a mapping
            that makes its tensors on demand saves memory and costs time.
        k: from 1 to the number of scores above -inf.

    Raises:
        ConfigError: k is out of range, or the scores are not floating-point numbers.
        ScoringError: a score is nan.

    Example:
        >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([2.0, 2.0])}
        >>> cut = kth_largest(scores, 3)
        >>> cut.threshold, cut.kept
        (2.0, {'a': 2, 'b': 1})
    """
    n, dtype = _check(tensors, k)
    sample = _draw(tensors, n, dtype, min(MOST, n // SHARE) if n > FEW else 0, 0)
    share = k / max(1, n)
    width = WIDTH
    low, high = _bounds(sample, share, width)
    while True:
        found = tally(tensors, low, high, dtype)
        cut = settle(found, k)
        if cut is not None:
            return cut
        if low < high:  # at a bound, or beyond
            low = high = low if k > sum(found.over.values()) else high
            continue
        width *= 2
        lower, upper = _bounds(sample, share, width)
        if k <= sum(found.over.values()):
            high = upper if upper > low else math.inf
        else:
            low = lower if lower < high else -math.inf


def about_kth_largest(tensors: Tensors, k: int, *, sample: int, seed: int = 0) -> Cut:
    """About the k-th largest score, estimated from a sample; the counts of that cut are exact.

    The share f of scores that stay misses k / n with a standard error of at most

        sqrt(f (1 - f) / sample)

    (0.0003 for f = 0.1 and a million elements). Of scores that equal the threshold as many stay as
    are missing to k.

    Args:
        tensors, k: as in `kth_largest`.
        sample: elements to draw, with replacement, from each tensor in proportion to its size.
        seed: of the draw.

    Raises:
        ConfigError, ScoringError: as `kth_largest`, or `sample` is below 1.
    """
    n, dtype = _check(tensors, k)
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 1:
        raise ConfigError(f"sample must be a whole number of elements, at least 1, got {sample!r}")
    if k > n:
        raise ConfigError(f"k must be from 1 to {n}, the number of scores, got {k}")
    drawn = _draw(tensors, n, dtype, sample, seed)
    threshold = float(drawn[-min(len(drawn), max(1, round(k / n * len(drawn))))])
    found = tally(tensors, threshold, threshold, dtype)
    above = sum(found.over.values())
    both = found.over if threshold == -math.inf else found.reach  # what is gone never stays
    return _cut(found, threshold, found.over, both, max(k, above))


# -- one pass, and what follows from it ------------------------------------------------------------


def _draw(tensors: Tensors, total: int, dtype: torch.dtype, n: int, seed: int) -> Sample:
    """(about n,) scores at random positions, ascending; of each tensor in proportion to its size.

    Args:
        tensors: as in `kth_largest`.
        total: the number of their scores.
        dtype: of the result.
        n: how many.
        seed: of the positions.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.zeros(0, dtype=dtype)]
    for tensor in tensors.values() if n else ():
        flat = _flat(tensor)
        if len(flat):
            size = math.ceil(n * len(flat) / total)
            parts.append(flat[torch.randint(len(flat), (size,), generator=generator)].to(dtype))
    drawn: Sample = np.sort(torch.cat(parts).numpy())
    return drawn


def tally(tensors: Tensors, low: float, high: float, dtype: torch.dtype | None = None) -> Tally:
    """What lies above and between two bounds: one pass.

    Args:
        tensors: as in `kth_largest`.
        low, high: bounds, low <= high; both in the precision of the scores. Equal ones count the
            scores above and at one value.
        dtype: to compare in: float64 where any of all tensors, of all processes, is, else float32.
            Left out, that of these tensors.

    Raises:
        ScoringError: a score is nan.
    """
    if dtype is None:
        dtype = _work_type(tensors.values())
    over: dict[str, int] = {}
    reach: dict[str, int] = {}
    between: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        over[name], reach[name], between[name] = _pass(name, tensor, low, high, dtype)
    return Tally(low, high, over, reach, between)


def merge(tallies: Sequence[Tally]) -> Tally:
    """The tally of all parts: counts add up, what lies between is joined.

    Parts hold different tensors, or different elements of the same (then in the order of their
    elements, so that equal scores are told apart as in one process).

    Raises:
        ConfigError: there is none, or the bounds differ.

    Example:
        >>> left, right = {"a": torch.tensor([1.0, 5.0])}, {"a": torch.tensor([2.0, 3.0])}
        >>> whole = merge([tally(left, 1.0, 4.0), tally(right, 1.0, 4.0)])
        >>> whole.over, whole.reach, whole.between["a"].tolist()
        ({'a': 3}, {'a': 1}, [2.0, 3.0])
    """
    bounds = {(t.low, t.high) for t in tallies}
    if len(bounds) != 1:
        raise ConfigError(f"tallies to merge must have the same bounds, got {sorted(bounds)}")
    names = dict.fromkeys(name for t in tallies for name in t.over)
    return Tally(
        *bounds.pop(),
        over={n: sum(t.over.get(n, 0) for t in tallies) for n in names},
        reach={n: sum(t.reach.get(n, 0) for t in tallies) for n in names},
        between={n: torch.cat([t.between[n] for t in tallies if n in t.between]) for n in names},
    )


def settle(found: Tally, k: int) -> Cut | None:
    """The cut after the k best scores; None where it is not between the bounds of the tally.

    Raises:
        ConfigError: there are fewer than k scores.
    """
    over, reach = sum(found.over.values()), sum(found.reach.values())
    if found.low == -math.inf and k > over:
        raise ConfigError(f"k must be from 1 to {over}, the number of scores, got {k}")
    if found.low == found.high:
        return _cut(found, found.low, found.over, found.reach, k) if over < k <= reach else None
    if not reach < k <= over:
        return None
    inside = torch.cat([*found.between.values()]).numpy()
    place = len(inside) - (k - reach)
    threshold = float(np.partition(inside, place)[place])
    above = {n: found.reach[n] + int((x > threshold).sum()) for n, x in found.between.items()}
    both = {n: found.reach[n] + int((x >= threshold).sum()) for n, x in found.between.items()}
    return _cut(found, threshold, above, both, k)


def count_left(name: str, tensor: Tensor) -> int:
    """How many scores are above -inf.

    Raises:
        ScoringError: a score is nan.
    """
    return _pass(name, tensor, -math.inf, -math.inf, _work_type([tensor]))[0]


def keep_mask(values: Tensor, threshold: float, equal: int) -> Tensor:
    """Bool of the shape of `values`: those above the threshold and the first `equal` at it.

    Example:
        >>> keep_mask(torch.tensor([2.0, 5.0, 2.0, 1.0]), 2.0, 1).tolist()
        [True, True, False, False]
    """
    mask = torch.empty(values.shape, dtype=torch.bool)
    parts = torch.split(mask.view(-1), CHUNK)
    for chunk, part in zip(torch.split(_flat(values), CHUNK), parts, strict=True):
        torch.gt(chunk, threshold, out=part)
        if equal:
            first = (chunk == threshold).nonzero().view(-1)[:equal]
            part[first] = True
            equal -= len(first)
    return mask


# -- the parts -------------------------------------------------------------------------------------


def _check(tensors: Tensors, k: int) -> tuple[int, torch.dtype]:
    """How many scores there are, and the type to compare them in."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k must be a whole number, at least 1, got {k!r}")
    n, empty = 0, []  # a mapping may make its tensors when they are read: read them once
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{name}: scores are floating-point numbers, got {tensor.dtype}")
        n += tensor.numel()
        empty.append(torch.zeros(0, dtype=tensor.dtype))
    return n, _work_type(empty)


def _work_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """float32, or float64 where a tensor is: both hold the smaller types exactly."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def _bounds(sample: Sample, share: float, width: float) -> tuple[float, float]:
    """Where the score that the given share exceeds lies, by a sample; infinite at its ends."""
    n = len(sample)
    rank = share * n
    margin = width * (1 + math.sqrt(max(0.0, rank * (1 - share))))
    below, above = n - 1 - math.floor(rank + margin), n - math.ceil(rank - margin)
    low = float(sample[below]) if below >= 0 else -math.inf
    high = float(sample[above]) if above < n else math.inf
    return low, high


def _cut(
    found: Tally, threshold: float, above: Mapping[str, int], both: Mapping[str, int], k: int
) -> Cut:
    """Share out what k leaves to the scores at the threshold: the first tensors take first."""
    missing = k - sum(above.values())
    equal = {}
    for name in found.over:
        equal[name] = min(missing, both[name] - above[name])
        missing -= equal[name]
    return Cut(threshold + 0.0, dict(above), equal)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """Chunks whose length is a multiple of `FOLD`, then what is left."""
    for chunk in torch.split(flat, CHUNK):
        whole = len(chunk) // FOLD * FOLD
        yield from (part for part in (chunk[:whole], chunk[whole:]) if len(part))


def _pass(
    name: str, tensor: Tensor, low: float, high: float, dtype: torch.dtype
) -> tuple[int, int, Tensor]:
    """How many scores are > low and >= high, and those between.

    Comparisons write numbers instead of bools, and sums count them: that is several times faster.
    Sums of `FOLD` elements, strided, say where to look for elements between the bounds.
    """
    over = reach = held = 0
    rough: list[Tensor] = []
    between = [torch.zeros(0, dtype=dtype)]
    marks = torch.empty(2 * min(CHUNK, max(FOLD, tensor.numel())), dtype=dtype)
    for piece in _pieces(_flat(tensor)):
        n = len(piece)
        fold = FOLD if n % FOLD == 0 else 1
        if math.isnan(float(piece.sum())) and bool(piece.isnan().any()):  # or inf - inf
            raise ScoringError(f"{name}: a score is not a number; score the target again")
        chunk = piece.to(dtype)
        torch.gt(chunk, low, out=marks[:n])
        torch.ge(chunk, high, out=marks[n : 2 * n])
        folded = marks[: 2 * n].view(2, fold, n // fold).sum(1)  # (2, n) -> (2, n / fold)
        counted = folded.sum(1).tolist()
        over += int(counted[0])
        reach += int(counted[1])
        if low < high and counted[0] != counted[1]:
            columns = (folded[0] != folded[1]).nonzero().view(-1)
            rough.append(chunk.view(fold, -1).index_select(1, columns).view(-1))
            held += rough[-1].numel()
            if held > CHUNK:
                between.append(_between(rough, low, high))
                rough, held = [], 0
    return over, reach, torch.cat([*between, _between(rough, low, high)])


def _between(rough: list[Tensor], low: float, high: float) -> Tensor:
    joined = torch.cat(rough) if rough else torch.zeros(0)
    return joined[(joined > low) & (joined < high)]
