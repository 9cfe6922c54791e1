"""Hashes, and what is done without gathering the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from secateurs.distributed import (
    assert_same,
    global_threshold,
    load_sharded,
    local_masks,
    save_sharded,
)
from secateurs.errors import (
    BudgetError,
    ConfigError,
    DataError,
    RankError,
    ScoringError,
)
from secateurs.kth import keep_mask, kth_largest
from secateurs.scoring import score
from secateurs.sharding import score_shards, select_shards
from secateurs.types import Graph, WeightTarget
from tests.distributed.cases import (
    adam,
    data_of,
    everywhere,
    joined,
    net,
    raised,
    ranks,
    sharded,
    steps,
)


def check_assert_same_names_the_first_that_differs(folder: Path) -> None:
    rank, size = ranks()
    masks = {"a": torch.tensor([True]), "b": torch.tensor([rank == size - 1])}
    text = raised(RankError, lambda: assert_same(masks, "world", what="masks"))
    assert text.startswith("masks must be the same on every rank: b differs between"), text
    assert text.endswith(
        f"and rank {size - 1}. Give every rank the same weights, seeds and settings"
    )
    more = {"a": torch.ones(1)} if rank else {"a": torch.ones(1), "c": torch.ones(1)}
    assert "without it" in raised(RankError, lambda: assert_same(more, "world"))
    assert len(assert_same({"a": torch.ones(3), "n": [1, "x"]}, "world")) == 32


def check_one_threshold_without_gathering(folder: Path) -> None:
    """Against `kth_largest` of the parts joined in the order of the ranks; with many ties."""
    rank, size = ranks()
    draw = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        every = {
            "a": [torch.randn(5 + 9 * r, generator=draw).mul(3).round() / 3 for r in range(size)],
            "b": [torch.randn(7 * (r % 2), generator=draw) for r in range(size)],
            "c": [torch.randn(300, generator=draw).exp() * 1e-4 for r in range(size)],
        }
        every["a"][0][:3] = torch.tensor([-torch.inf, 0.0, -0.0])
        every = {n: [p.to(dtype) for p in parts] for n, parts in every.items()}
        joined = {n: torch.cat(parts) for n, parts in every.items()}
        total = sum(int((s > -torch.inf).sum()) for s in joined.values())
        mine = {n: parts[rank] for n, parts in every.items()}
        for k in [1, 2, 5, 17, 40, total // 2, total - 1, total]:
            cut, oracle = global_threshold(mine, k, "world"), kth_largest(joined, k)
            assert cut.threshold == oracle.threshold
            for name, mask in local_masks(mine, cut).items():
                full = keep_mask(joined[name], oracle.threshold, oracle.equal[name])
                mine_only = torch.split(full, [len(p) for p in every[name]])[rank]
                assert mask.equal(mine_only), (name, k)
        assert "from 1 to" in raised(
            ConfigError,
            lambda m=mine, n=total: global_threshold(m, n + 1, "world"),  # type: ignore[misc]
        )
    raised(ConfigError, lambda: global_threshold(mine, 1 + rank, "world"))
    nan = {"a": torch.tensor([float("nan") if rank == 1 else 1.0])}
    raised(ScoringError, lambda: global_threshold(nan, 1, "world"))


def check_shards_are_scored_and_masked_without_gathering(folder: Path) -> None:
    """As one process would, with ranks that have fewer batches, or none."""
    rank, size = ranks()
    parts, dense = data_of(size), net()
    graph = Graph({n: WeightTarget(n, tuple(p.shape)) for n, p in dense.named_parameters()
                   if p.dim() > 1})  # fmt: skip
    model = sharded(net())
    for name in ("magnitude", "gradient", "snip", "directional"):
        whole = score(
            dense, joined(parts), mse_loss, criterion=name, graph=graph, granularity="weight"
        ).values
        found = score_shards(model, parts[rank], mse_loss, criterion=name)
        for n, part in found.items():
            full = as_full(part, model.get_parameter(n))
            assert torch.allclose(full.reshape(-1), whole[n], rtol=1e-5, atol=1e-7), (name, n)
        assert all(p.grad is None for p in model.parameters())
    total = sum(len(s) for s in whole.values())
    chosen = select_shards(model, found, 0.25)
    oracle = kth_largest(whole, round(0.25 * total))
    expected = {n: keep_mask(s, oracle.threshold, oracle.equal[n]) for n, s in whole.items()}
    for n, held in chosen.items():
        assert held.full_tensor().reshape(-1).equal(expected[n])  # type: ignore[attr-defined]
    optimizer = adam(model)
    steps(model, optimizer, chosen, range(3))
    save_sharded(folder / "shards", model, optimizer, masks=chosen)
    again = sharded(net())
    stored, _ = load_sharded(folder / "shards", again, adam(again))
    state = everywhere(again)
    for n, mask in stored.items():
        assert mask.reshape(-1).equal(expected[n])
        assert not state[n][~mask].any()
    one = net()
    steps(one, adam(one), {n: m.view(dense.get_parameter(n).shape) for n, m in expected.items()},
          range(3))  # fmt: skip
    for n, tensor in one.state_dict().items():
        assert torch.allclose(state[n], tensor, rtol=0, atol=1e-5)
    assert "cannot be found from shards" in raised(
        ConfigError, lambda: score_shards(model, parts[rank], mse_loss, criterion="taylor")
    )
    raised(ConfigError, lambda: score_shards(dense, criterion="magnitude"))
    raised(BudgetError, lambda: select_shards(model, found, 1.5))
    empty = raised(DataError, lambda: score_shards(model, [], mse_loss))
    assert "empty on every rank" in empty


def as_full(part: Tensor, like: Any) -> Tensor:
    """What all ranks hold of a tensor that is sharded as a parameter."""
    held: Any = type(like.data).from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    full: Tensor = held.full_tensor()
    return full
