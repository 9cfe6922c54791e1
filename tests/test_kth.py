"""The k-th largest of many tensors, beside a sort of all of them joined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateurs import kth
from secateurs.errors import ConfigError, ScoringError
from secateurs.kth import (
    Cut,
    about_kth_largest,
    count_left,
    keep_mask,
    kth_largest,
    merge,
    settle,
    tally,
)

INF = math.inf
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FIGURES = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 5e-324, 1e-45, -1e-45, 6e-8, 1e30, -INF, INF)


def oracle(tensors: dict[str, Tensor], k: int) -> tuple[float, dict[str, int]]:
    """Threshold and counts by one stable sort of everything: ties by tensor, then by index."""
    joined = torch.cat([t.reshape(-1).double() for t in tensors.values()])
    owner = torch.cat([torch.full((t.numel(),), i) for i, t in enumerate(tensors.values())])
    values, order = torch.sort(joined, descending=True, stable=True)
    counts = torch.bincount(owner[order[:k]], minlength=len(tensors)).tolist()
    return float(values[k - 1]), dict(zip(tensors, counts, strict=True))


def left(tensors: dict[str, Tensor]) -> int:
    return sum(int((t > -INF).sum()) for t in tensors.values())


def check(tensors: dict[str, Tensor], k: int) -> Cut:
    cut = kth_largest(tensors, k)
    assert (cut.threshold, cut.kept) == oracle(tensors, k)
    assert sum(cut.kept.values()) == k
    return cut


@st.composite
def cases(make: st.DrawFn) -> dict[str, Tensor]:
    """A few tensors, some empty, of few or of many different figures, of one or of mixed types."""
    sizes = make(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    few = make(st.lists(st.sampled_from(FIGURES), min_size=1, max_size=4))
    seed = make(st.integers(0, 9999))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, size in enumerate(sizes):
        if make(st.booleans()):
            line = torch.randn(size, generator=generator, dtype=torch.float64)
        else:
            pick = torch.randint(len(few), (size,), generator=generator)
            line = torch.tensor(few, dtype=torch.float64)[pick]
        tensors[f"t{i}"] = line.to(make(st.sampled_from(TYPES)))
    return tensors


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a sample and chunks that every way through the code is taken by small tensors."""
    monkeypatch.setattr(kth, "CHUNK", 32)
    monkeypatch.setattr(kth, "FOLD", 4)
    monkeypatch.setattr(kth, "FEW", 0)
    monkeypatch.setattr(kth, "SHARE", 3)
    monkeypatch.setattr(kth, "WIDTH", 0.1)


@given(tensors=cases(), share=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_as_a_sort_of_everything(tensors: dict[str, Tensor], share: float) -> None:
    n = left(tensors)
    if n:
        check(tensors, min(n, 1 + int(share * n)))


def test_with_bounds_that_often_miss(tight: None) -> None:
    @given(tensors=cases(), share=st.floats(0, 1))
    @settings(max_examples=300, deadline=None)
    def run(tensors: dict[str, Tensor], share: float) -> None:
        n = left(tensors)
        if n:
            check(tensors, min(n, 1 + int(share * n)))

    run()


def test_every_rank_of_one_small_case(tight: None) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "a": torch.randint(-3, 4, (7, 9), generator=generator).float(),
        "b": torch.randn(50, generator=generator),
        "c": torch.full((20,), -INF),
        "d": torch.tensor([0.0, -0.0, INF, INF, -INF, 1e-45]),
    }
    for k in range(1, left(tensors) + 1):
        check(tensors, k)


def test_a_large_one_with_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds from the sample, one pass, and little between them."""
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).abs()
    x[1000:2000] = -INF
    tensors = {"a": x[:100_000].view(100, 1000), "b": x[100_000:]}
    tallies = []

    def watched(*args: object) -> kth.Tally:
        tallies.append(tally(*args))  # type: ignore[arg-type]
        return tallies[-1]

    monkeypatch.setattr(kth, "tally", watched)
    for k in (1, 2, 30_000, 150_000, 299_000):
        tallies.clear()
        check(tensors, k)
        assert len(tallies) == 1
        assert sum(len(v) for v in tallies[0].between.values()) < 0.15 * len(x)
    # Ties: one value is most of the scores, and then bounds are equal from the start.
    coarse = {"a": (x * 2).round()}
    for k in (1, 30_000, 150_000, 299_000):
        tallies.clear()
        check(coarse, k)
        assert len(tallies) <= 2
        assert all(len(t.between["a"]) == 0 for t in tallies if t.low == t.high)


def test_a_misleading_order_changes_nothing() -> None:
    """Sorted, and with a period: positions are random, and counts are exact whatever they are."""
    line = torch.arange(200_000, dtype=torch.float32)
    check({"a": line}, 77_777)
    check({"a": line.flip(0), "b": line % 256}, 123_456)


def test_zeros_are_equal_and_small_types_exact() -> None:
    cut = check({"a": torch.tensor([-0.0, 0.0]), "b": torch.tensor([0.0])}, 2)
    assert (cut.threshold, math.copysign(1, cut.threshold)) == (0.0, 1.0)
    assert (cut.above, cut.equal) == ({"a": 0, "b": 0}, {"a": 2, "b": 0})
    narrow = torch.tensor([1.0], dtype=torch.bfloat16)
    wide = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    assert check({"a": narrow, "b": wide}, 1).kept == {"a": 0, "b": 1}


def test_strided_and_scalar_tensors() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert check({"a": x.t(), "b": torch.tensor(5.5)}, 7).kept == {"a": 6, "b": 1}


def test_what_is_refused() -> None:
    tensors = {"good": torch.ones(3), "bad": torch.tensor([1.0, math.nan])}
    with pytest.raises(ScoringError, match="bad: a score is not a number"):
        kth_largest(tensors, 1)
    with pytest.raises(ScoringError, match="bad: a score is not a number"):
        count_left("bad", tensors["bad"])
    fine = {"a": torch.tensor([1.0, -INF, INF])}  # inf - inf in a sum is no nan among the scores
    assert count_left("a", fine["a"]) == 2
    with pytest.raises(ConfigError, match="k must be from 1 to 2, the number of scores, got 3"):
        kth_largest(fine, 3)
    for k in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="whole number, at least 1"):
            kth_largest(fine, k)  # type: ignore[arg-type]
    for empty in ({}, {"a": torch.zeros(0)}, {"a": torch.full((200_000,), -INF)}):
        with pytest.raises(ConfigError, match="k must be from 1 to 0"):
            kth_largest(empty, 1)
    with pytest.raises(ConfigError, match="a: scores are floating-point numbers, got"):
        kth_largest({"a": torch.arange(3)}, 1)


# -- parts that add up -----------------------------------------------------------------------------


def test_tallies_of_processes_add_up(tight: None) -> None:
    """Shards of the same tensors, in the order of their elements, are as good as the whole."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randint(0, 5, (60,), generator=generator).float()
    b = torch.randn(40, generator=generator)
    whole = {"a": a, "b": b}
    shards = [{"a": a[:11]}, {"a": a[11:], "b": b[:0]}, {"b": b}]
    for low, high in ((0.5, 2.5), (2.0, 2.0), (-INF, INF)):
        one = tally(whole, low, high)
        many = merge([tally(shard, low, high) for shard in shards])
        assert (many.over, many.reach) == (one.over, one.reach)
        assert {n: v.sort().values.tolist() for n, v in many.between.items()} == {
            n: v.sort().values.tolist() for n, v in one.between.items()
        }
        for k in range(1, 101):
            assert settle(many, k) == settle(one, k)
    with pytest.raises(ConfigError, match="must have the same bounds"):
        merge([tally(whole, 0.0, 1.0), tally(whole, 0.0, 2.0)])


def test_settle_answers_only_between_the_bounds() -> None:
    found = tally({"a": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])}, 1.0, 4.0)
    assert (found.over, found.reach) == ({"a": 4}, {"a": 2})
    assert settle(found, 2) is None
    assert [settle(found, k) for k in (3, 4)] == [
        Cut(3.0, {"a": 2}, {"a": 1}),
        Cut(2.0, {"a": 3}, {"a": 1}),
    ]
    assert settle(found, 5) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: {n: r + (n == "a") for n, r in t.reach.items()},
        lambda t: {n: r - (n == "b") for n, r in t.reach.items()},
    ],
)
def test_a_planted_off_by_one_is_caught(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[kth.Tally], dict[str, int]]
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(200, generator=generator) for n in "ab"}
    check(tensors, 100)

    def off(*args: object) -> kth.Tally:
        found = tally(*args)  # type: ignore[arg-type]
        return kth.Tally(found.low, found.high, found.over, wrong(found), found.between)

    monkeypatch.setattr(kth, "tally", off)
    with pytest.raises(AssertionError):
        check(tensors, 100)


# -- masks -----------------------------------------------------------------------------------------


@given(tensors=cases(), share=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_masks_as_by_a_stable_sort(tensors: dict[str, Tensor], share: float) -> None:
    values = tensors["t0"]
    n = left({"t0": values})
    if not n:
        return
    k = min(n, 1 + int(share * n))
    cut = kth_largest({"t0": values}, k)
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[torch.sort(values.double(), descending=True, stable=True).indices[:k]] = True
    assert torch.equal(keep_mask(values, cut.threshold, cut.equal["t0"]), expected)


def test_masks_across_chunks(tight: None) -> None:
    values = torch.ones(10, 10)
    mask = keep_mask(values, 1.0, 70)
    assert mask.shape == (10, 10)
    assert mask.view(-1).nonzero().view(-1).tolist() == list(range(70))
    assert not keep_mask(values, 1.0, 0).any()


# -- about -----------------------------------------------------------------------------------------


def test_a_sample_misses_by_its_standard_error() -> None:
    """The realised share spreads as the docstring says, and its counts are those of the cut."""
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    tensors = {"a": x[:30_000], "b": x[30_000:]}
    shares = []
    for seed in range(60):
        cut = about_kth_largest(tensors, 10_000, sample=2_500, seed=seed)
        assert cut.above == {n: int((t > cut.threshold).sum()) for n, t in tensors.items()}
        at = sum(int((t == cut.threshold).sum()) for t in tensors.values())
        above = sum(cut.above.values())
        assert sum(cut.equal.values()) == max(0, min(at, 10_000 - above))
        shares.append(sum(cut.kept.values()) / 100_000)
    error = math.sqrt(0.1 * 0.9 / 2_500)
    assert abs(np.mean(shares) - 0.1) < 3 * error / math.sqrt(60)
    assert 0.7 * error < np.std(shares) < 1.25 * error
    again = about_kth_largest(tensors, 10_000, sample=2_500, seed=59)
    assert sum(again.kept.values()) / 100_000 == shares[-1]


def test_a_sample_of_ties_does_not_overshoot() -> None:
    zeros = {"a": torch.cat([torch.zeros(900), torch.ones(100)])}
    assert about_kth_largest(zeros, 300, sample=500).kept == {"a": 300}
    gone = {"a": torch.cat([torch.full((900,), -INF), torch.ones(100)])}
    assert about_kth_largest(gone, 100, sample=20).kept["a"] <= 100
    assert about_kth_largest(gone, 900, sample=500).kept == {"a": 100}
    for sample in (0, True, 1.5):
        with pytest.raises(ConfigError, match="sample must be a whole number of elements"):
            about_kth_largest(zeros, 3, sample=sample)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k must be from 1 to 1000"):
        about_kth_largest(zeros, 1001, sample=10)


def test_a_draw_is_ascending_and_in_proportion() -> None:
    tensors = {"a": torch.zeros(75_000), "b": torch.ones(25_000), "c": torch.ones(0)}
    drawn = kth._draw(tensors, 100_000, torch.float64, 1000, 4)
    assert (len(drawn), drawn.sum(), str(drawn.dtype)) == (1000, 250, "float64")
    assert (np.diff(drawn) >= 0).all()


def test_tensors_that_are_made_when_read_are_read_three_times() -> None:
    """Once for their sizes, once for the sample, once for the pass."""
    read = []
    line = torch.rand(100_000, generator=torch.Generator().manual_seed(0))

    class Counting(dict[str, Tensor]):
        def items(self) -> Any:
            read.append("items")
            return super().items()

        def values(self) -> Any:
            read.append("values")
            return super().values()

    assert kth_largest(Counting(a=line), 5_000).kept == {"a": 5_000}
    assert read == ["items", "values", "items"]
