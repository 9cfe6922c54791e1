"""Scores of several processes are those of one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from secateurs.criteria import CRITERIA, get_criterion
from secateurs.distributed import (
    Group,
    assert_same,
)
from secateurs.errors import (
    ConfigError,
    DataError,
    RankError,
    ScoringError,
)
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.statistics import check_fits, make_job
from secateurs.testing.nets import Case, case
from secateurs.types import Batch, Budget, Counts, Scores
from tests.distributed.cases import (
    raised,
    ranks,
    sharded,
    train,
)

SHORT = ["taylor", "fisher", "magnitude", "wanda", "entropy", "mutual_information", "grasp"]
WEIGHTS = ["taylor", "fisher", "magnitude", "wanda"]
REFUSED = {"gauss_newton", "movement", "gradient_window", "gradient_ema"}


def my_part(batches: Sequence[Batch]) -> list[Batch]:
    """Of three batches of 4, 4 and 2 samples: ragged, and of four ranks the second has none."""
    rank, size = ranks()
    two = [list(batches[:2]), list(batches[2:])]
    four = [list(batches[:1]), [], list(batches[1:2]), list(batches[2:])]
    return (two if size == 2 else four)[rank]


def same(one: Mapping[str, Scores], other: Mapping[str, Scores]) -> bool:
    return all(
        torch.allclose(s.values[t], other[c].values[t], rtol=1e-6, atol=1e-12)
        and s.n_samples == other[c].n_samples
        and s.notes == other[c].notes
        for c, s in one.items()
        for t in s.values
    )


def score_all(c: Case, model: nn.Module, batches: Sequence[Batch], group: Any) -> dict[str, Scores]:
    structure = score(
        model, batches, c.loss_fn, criterion=SHORT, graph=c.graph, group=group
    )  # fmt: skip
    weights = score(
        model, batches, c.loss_fn, criterion=WEIGHTS, graph=c.graph, granularity="weight",
        group=group,
    )  # fmt: skip
    return {**structure, **{f"{name} of weights": s for name, s in weights.items()}}


def check_scores_equal_those_of_one_process(folder: Path) -> None:
    """Plain, DDP and FSDP2, single and double precision, structure and weights."""
    for dtype in (torch.float32, torch.float64) if ranks()[1] == 2 else (torch.float32,):
        c = case("cnn", dtype)
        whole = score_all(c, c.model, c.batches, None)
        mine = my_part(c.batches)
        wrapped = [c.model, DistributedDataParallel(copy.deepcopy(c.model))]
        for model in [*wrapped, sharded(copy.deepcopy(c.model))]:
            before = {n: p.requires_grad for n, p in model.named_parameters()}
            found = score_all(c, model, mine, "world")
            assert same(whole, found)
            assert before == {n: p.requires_grad for n, p in model.named_parameters()}
            counts = Counts({n: max(1, len(v) // 2) for n, v in found["taylor"].values.items()},
                            Budget(units=0.5))  # fmt: skip
            plan, own = select(found["taylor"], counts), select(whole["taylor"], counts)
            assert_same(plan, "world", what="masks")
            assert all(plan.masks[n].equal(own.masks[n]) for n in own.masks)
    if mine:  # the part of one rank alone gives something else
        assert not same(whole, score_all(c, c.model, mine, None))


def check_every_criterion_merges_or_is_refused_by_name(folder: Path) -> None:
    """All of the registry, on a network that has a layer beside channels."""
    c = case("cnn")
    mine, scored = my_part(c.batches), set[str]()
    parts: list[tuple[list[Batch], Group]] = [(c.batches, None), (mine, "world")]
    for kind in ("structured", "weight", "layer"):
        names = [n for n in CRITERIA if n not in REFUSED and fits(c, n, kind)]
        scored |= set(names)
        one, found = (
            score(
                c.model, batches, c.loss_fn, criterion=names, graph=c.graph, granularity=kind,
                group=group,
            )
            for batches, group in parts
        )  # fmt: skip
        for name in names:
            assert same({name: one[name]}, {name: found[name]}), (name, kind)
    for name in REFUSED:
        text = raised(
            ConfigError,
            lambda n=name: score(  # type: ignore[misc]
                c.model, mine, c.loss_fn, criterion=n, graph=c.graph, group="world"
            ),
        )
        assert text.startswith(f"{name} cannot be scored by a group of processes: "), text
    assert scored | REFUSED == set(CRITERIA)


def fits(c: Case, name: str, kind: str) -> bool:
    """Whether a criterion is defined for units of a kind."""
    targets = c.graph.select(kind)
    try:
        make_job(get_criterion(name), targets, c.model, check_fits(c.model, targets), kind)
    except ConfigError:
        return False
    return True


def check_a_trace_is_made_from_the_shared_batch(folder: Path) -> None:
    c = case("mlp")
    mine = my_part(c.batches)
    found = score(c.model, mine, c.loss_fn, group="world")
    whole = score(c.model, c.batches, c.loss_fn)
    assert same({"": whole}, {"": found})


def check_what_is_refused(folder: Path) -> None:
    rank, _ = ranks()
    c = case("mlp")
    text = raised(
        ConfigError, lambda: score(c.model, c.batches, c.loss_fn, resume="x", group="world")
    )
    assert "resume=" in text
    parts = sharded(copy.deepcopy(c.model))
    text = raised(ConfigError, lambda: score(parts, c.batches, c.loss_fn, graph=c.graph))
    assert 'give group="world"' in text
    text = raised(DataError, lambda: score(c.model, [], c.loss_fn, graph=c.graph, group="world"))
    assert "empty on every rank" in text
    text = raised(ConfigError, lambda: train(c.model, c.batches, "world"))
    assert "DistributedDataParallel" in text
    ddp = DistributedDataParallel(copy.deepcopy(c.model))
    assert "group=" in raised(ConfigError, lambda: train(ddp, c.batches, None))
    text = raised(ConfigError, lambda: score(ddp, c.batches, c.loss_fn, graph=c.graph))
    assert "each would score its own part" in text
    maps = [{"name": "hrank", "samples": 3}]
    cnn = case("cnn")
    text = raised(
        ConfigError,
        lambda: score(cnn.model, cnn.batches, criterion=maps, graph=cnn.graph, group="world"),
    )
    assert "samples=" in text
    low = copy.deepcopy(c.model)
    fully_shard(low, mp_policy=_half())
    text = raised(
        ConfigError, lambda: score(low, c.batches, c.loss_fn, graph=c.graph, group="world")
    )
    assert "MixedPrecisionPolicy" in text
    with torch.no_grad():
        c.model.get_parameter("b.bias")[rank] += 1
    text = raised(
        RankError, lambda: score(c.model, c.batches, c.loss_fn, graph=c.graph, group="world")
    )
    assert "b.bias differs between rank 0 and" in text, text


def _half() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def check_an_error_on_one_rank_ends_all(folder: Path) -> None:
    rank, size = ranks()
    c = case("mlp")
    x, y = c.batches[0]
    bad = [(x, y), (x[:, :3], y)] if rank == 1 else list(c.batches)
    text = raised(Exception, lambda: score(c.model, bad, c.loss_fn, graph=c.graph, group="world"))
    assert "refuses the inputs" in text
    assert rank == 1 or f"failed on rank 1 of {size}" in text
    for wrong, kind in (((x * float("nan"), y), ScoringError), ((x,), DataError)):
        ddp = DistributedDataParallel(copy.deepcopy(c.model))
        before = {n: t.clone() for n, t in ddp.state_dict().items()}
        data: list[Any] = [(x, y), wrong] if rank == 1 else list(c.batches)
        text = raised(kind, lambda d=data, m=ddp: train(m, d, "world"))  # type: ignore[misc]
        assert rank == 1 or "rank 1" in text
        if kind is ScoringError:
            assert all(t.equal(before[n]) for n, t in ddp.state_dict().items())
