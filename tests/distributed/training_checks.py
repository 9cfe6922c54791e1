"""Training by several processes, its checkpoints, and what one rank does for all."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from secateurs.checkpoints import Checkpoints
from secateurs.distributed import (
    assert_same,
    full_state,
    load_sharded,
    newest,
    on_first,
    plain,
    save_sharded,
)
from secateurs.errors import (
    ConfigError,
    FileFormatError,
    RankError,
)
from secateurs.finetuning import Finetune, finetune
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.surgery import load, save, shrink
from secateurs.testing.nets import case
from secateurs.types import Budget, Counts
from tests.distributed.cases import (
    adam,
    data_of,
    everywhere,
    joined,
    masks,
    net,
    raised,
    ranks,
    sharded,
    steps,
    train,
)
from tests.distributed.scores_checks import my_part

CONFIGS = [
    Finetune(steps=12, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, clip_norm=0.2,
             lr_schedule="cosine"),
    Finetune(epochs=6, optimizer="adamw", lr=0.01, weight_decay=0.1, accumulate=2),
    Finetune(epochs=4, full_batch=True, lr=0.01, restore_best=True, patience=3),
]  # fmt: skip


def check_training_equals_that_of_one_process(folder: Path) -> None:
    """The same global batches, with held masks; ranks with fewer batches, and with none."""
    rank, size = ranks()
    parts = data_of(size)

    def evaluate(model: nn.Module) -> float:
        return float(sum(mse_loss(model(x), y) for x, y in joined(parts)))

    for config in CONFIGS:
        metric = evaluate if config.restore_best else None
        one = net()
        alone = train(one, joined(parts), None, config, metric, masks())
        for make in (DistributedDataParallel, sharded):
            model = make(net())
            mine = train(model, parts[rank], "world", config, metric, masks())
            state = everywhere(model)
            for name, tensor in one.state_dict().items():
                assert torch.allclose(tensor, state[name], rtol=0, atol=1e-5), (config, make, name)
            for name, mask in masks().items():
                assert not state[name][~mask].any()
            losses = [(r.train_loss, r.lr) for r in mine.history]
            expected = [(r.train_loss, r.lr) for r in alone.history]
            assert torch.allclose(torch.tensor(losses), torch.tensor(expected), atol=1e-5)
            assert (mine.steps, mine.best_epoch) == (alone.steps, alone.best_epoch)
            assert_same([losses, mine.best_metric], "world", what="history")


def check_decisions_follow_rank_0(folder: Path) -> None:
    """Metrics that differ between ranks cannot part them."""
    rank, size = ranks()
    told = iter([3.0, 2.0, 5.0, 4.0] if rank == 0 else [1.0, 2.0, 3.0, 4.0])
    model = DistributedDataParallel(net())
    config = Finetune(epochs=6, patience=2, restore_best=True)
    result = train(model, data_of(size)[rank], "world", config, lambda m: next(told), {})
    assert (result.best_epoch, result.best_metric, len(result.history)) == (2, 2.0, 4)
    assert_same(everywhere(model), "world")


def check_what_differs_at_the_start_is_an_error(folder: Path) -> None:
    rank, size = ranks()
    held = masks()
    held["0.weight"][0, 0] = bool(rank)
    model = DistributedDataParallel(net())
    text = raised(RankError, lambda: train(model, data_of(size)[rank], "world", held=held))
    assert "masks must be the same on every rank: 0.weight" in text
    config = Finetune(epochs=1, lr=0.1 * (1 + rank))
    text = raised(RankError, lambda: train(model, data_of(size)[rank], "world", config, held={}))
    assert "settings" in text


def check_an_end_with_other_weights_is_an_error(folder: Path) -> None:
    """In its last step DDP leaves the gradients apart if one is missing, and says so to nobody."""
    rank, _ = ranks()

    class Odd(nn.Sequential):
        extra: nn.Parameter

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self[0](x)
            return out * self.extra if len(x) > 4 else out

    torch.manual_seed(0)
    model = Odd(nn.Linear(6, 2))
    model.extra = nn.Parameter(torch.ones(()))
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)), torch.zeros(4, 2)
    kept = Checkpoints(folder / "apart")
    for options in ({}, {"checkpoint": kept}):
        text = raised(
            RankError,
            lambda options=options: finetune(  # type: ignore[misc]
                DistributedDataParallel(copy.deepcopy(model)), [batch], nn.functional.mse_loss,
                Finetune(steps=1), group="world", **options,
            ),
        )  # fmt: skip
        assert "the trained weights must be the same on every rank: 0.weight differs" in text
        assert "find_unused_parameters=True" in text
    assert not kept.files  # to go on from one would hide it


def check_who_evaluates_alone_is_told_at_once(folder: Path) -> None:
    rank, _ = ranks()
    batch = torch.ones(4, 6), torch.zeros(4, 2)
    text = raised(
        RankError,
        lambda: finetune(
            DistributedDataParallel(nn.Linear(6, 2)), [batch], nn.functional.mse_loss, Finetune(),
            group="world", evaluate=None if rank else lambda _: 1.0,
        ),
    )  # fmt: skip
    assert "the settings of finetune must be the same on every rank: evaluate differs" in text


def check_a_checkpoint_is_loaded_by_another_number_of_ranks(folder: Path) -> None:
    """Two ranks save after 3 steps, four go on to 6 and save, one (in the test) goes on to 9."""
    _, size = ranks()
    for kind, make in (("ddp", DistributedDataParallel), ("fsdp", sharded)):
        model = make(net())
        optimizer = adam(model)
        held, start = masks(), 0
        if size == 4:
            text = raised(
                FileFormatError,
                lambda m=model, o=optimizer: load_sharded(folder / "none", m, o),  # type: ignore[misc]
            )
            assert "no complete checkpoint" in text
            # What DDP has written, FSDP2 reads, and the other way round.
            other = {"ddp": "fsdp", "fsdp": "ddp"}[kind]
            last = newest(folder.parent / "two" / other)
            assert last is not None
            assert last.name == "step-3"
            held, extra = load_sharded(last, model, optimizer)
            assert extra == {"steps": 3, "name": "né"}
            start = int(extra["steps"])
        steps(model, optimizer, held, range(start, start + 3))
        out = folder / kind / f"step-{start + 3}"
        save_sharded(
            out, model, optimizer, masks=held, extra={"steps": start + 3, "name": "né"}
        )  # fmt: skip
        assert not list(out.parent.glob("*.part"))
        text = raised(ConfigError, lambda p=out, m=model, o=optimizer: save_sharded(p, m, o))  # type: ignore[misc]
        assert "exists already" in text
        wrong = make(nn.Sequential(nn.Linear(6, 9)))
        text = raised(FileFormatError, lambda p=out, m=wrong: load_sharded(p, m, adam(m)))  # type: ignore[misc]
        assert "0.weight has shape (9, 6)" in text


def check_one_rank_saves_for_all(folder: Path) -> None:
    rank, _ = ranks()
    for make in (DistributedDataParallel, sharded):
        state = full_state(make(net()))
        assert bool(state) == (rank == 0)
        if rank == 0:
            assert all(t.equal(state[n]) for n, t in net().state_dict().items())

    def fail() -> None:
        raise FileFormatError("the disk is full")

    assert on_first("world", lambda: rank + 7) == (7 if rank == 0 else None)
    assert "the disk is full" in raised(FileFormatError, lambda: on_first("world", fail))


def check_every_rank_shrinks_alike_and_one_saves(folder: Path) -> None:
    """DDP: each rank by itself, to go on training. FSDP2: the full weights on rank 0."""
    c = case("mlp")
    x = c.batches[0][0]
    scores = score(c.model, my_part(c.batches), c.loss_fn, graph=c.graph, group="world")
    plan = select(scores, Counts(dict.fromkeys(scores.values, 3), Budget(units=0.5)))
    ddp = DistributedDataParallel(copy.deepcopy(c.model))
    small = shrink(plain(ddp), plan, x)
    assert_same(small.state_dict(), "world", what="the smaller model")
    model = sharded(copy.deepcopy(c.model))
    state = full_state(model)

    def work() -> None:
        dense = copy.deepcopy(c.model)
        dense.load_state_dict(state)
        save(shrink(dense, plan, x), plan, folder / "small")

    on_first("world", work)
    again = load(folder / "small", lambda: copy.deepcopy(c.model))
    assert again(x).equal(small(x))
