"""Trainings and pruning runs of several processes that are left anywhere, and go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from secateurs.checkpoints import Checkpoints, Together, tensor_mark
from secateurs.distributed import assert_same
from secateurs.errors import ConfigError, FileFormatError, RankError
from secateurs.finetuning import Finetune, finetune
from secateurs.masks import named_tensors
from secateurs.pipeline import prune
from secateurs.regrowth import Regrow, Regrowth
from secateurs.schedules import Schedule
from secateurs.types import Batches, Budget
from tests.distributed.cases import raised, ranks, sharded

PARTS = {2: [17, 9], 4: [17, 9, 4, 0]}
"""Samples of each rank: in batches of 5 some have fewer steps than others, and one none."""
MASK = {"0.weight": torch.arange(72).reshape(12, 6) % 3 > 0}
X = torch.randn(9, 6, generator=torch.Generator().manual_seed(9))


class Stopped(BaseException):
    """In place of a crash."""


def noisy() -> nn.Module:
    """A network with running statistics and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3),
                         nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 2))  # fmt: skip


def loader(rank: int, size: int, *, seed: int = 0) -> Batches:
    """The part of a rank, shuffled anew in each epoch by the random state of its process."""
    n = PARTS[size][rank]
    draw = torch.Generator().manual_seed(rank + seed)
    x, y = torch.randn(n, 6, generator=draw), torch.randn(n, 2, generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True) if n else []


def size_of_outputs(model: nn.Module) -> float:
    return float(model(X).square().mean())


def train(
    folder: Path | None, *, name: str = "plain", resume: bool = False, loss: Any = mse_loss,
    data: Batches | None = None, **others: Any,
) -> str:  # fmt: skip
    """What a training ends with, as a text."""
    rank, size = ranks()
    parts = [Regrowth(Regrow("rigl", every=2, until=1.0), 3)] if name == "rigl" else []
    config = {
        "plain": Finetune(epochs=3, lr=0.02, restore_best=True, lr_schedule="cosine"),
        "rigl": Finetune(steps=7, lr=0.02, accumulate=2),
    }[name]
    model = DistributedDataParallel(noisy())
    done = finetune(
        model, loader(rank, size) if data is None else data, loss, config, masks=MASK,
        parts=parts, seed=5, evaluate=size_of_outputs, group="world", resume=resume,
        checkpoint=None if folder is None else Checkpoints(folder, every=1), **others,
    )  # fmt: skip
    rows = [(row.train_loss, row.metric, row.lr) for row in done.history]
    return tensor_mark(named_tensors(model)) + str(rows) + tensor_mark(done.masks)


RUNS: Mapping[str, dict[str, Any]] = {
    "rounds": {"schedule": Schedule("cubic", steps=2), "prepare": Finetune(steps=3, lr=0.01),
               "finetune": Finetune(epochs=1, lr=0.02, restore_best=True)},
    "inside": {"granularity": "weight", "schedule": Schedule("linear", steps=2, every="2 steps"),
               "finetune": Finetune(epochs=2, lr=0.02)},
}  # fmt: skip


def cut(folder: Path | None, *, name: str = "rounds", resume: bool = False, loss: Any = mse_loss,
        every: int = 1) -> str:  # fmt: skip
    """What a pruning run ends with, as a text."""
    rank, size = ranks()
    torch.manual_seed(100 + rank)  # of no effect
    result = prune(
        noisy(), loader(rank, size), loss, example_inputs=X, budget=Budget(units=0.6), round_to=1,
        evaluate=size_of_outputs, maximize=False, seed=3, group="world", resume=resume,
        checkpoint=None if folder is None else Checkpoints(folder, every=every), **RUNS[name],
    )  # fmt: skip
    rows = [(row.loss, row.metric_masked, row.metric_healed) for row in result.report.steps]
    weights = tensor_mark(named_tensors(result.masked)) + tensor_mark(named_tensors(result.model))
    return weights + tensor_mark(result.masks) + str(rows)


WORK: Mapping[str, Callable[..., str]] = {"train": train, "cut": cut}


@contextmanager
def stopping(after: int) -> Iterator[list[int]]:
    """Stop all ranks after so many checkpoints."""
    usual, count = Together.save, [0]

    def save(self: Together, step: int, state: Any) -> object:
        done = usual(self, step, state)
        count[0] += 1
        if count[0] == after:
            raise Stopped
        return done

    Together.save = save  # type: ignore[method-assign]
    try:
        yield count
    finally:
        Together.save = usual  # type: ignore[method-assign]


def check_what_was_left_anywhere_ends_as_if_it_had_not_been(folder: Path) -> None:
    """After a checkpoint, and the next but one; bit for bit and the same on all ranks."""
    _, size = ranks()
    for what, name in (("train", "plain"), ("train", "rigl"), ("cut", "rounds"), ("cut", "inside")):
        if size > 2 and name != "plain":
            continue
        work = WORK[what]
        whole = work(None, name=name)
        assert_same(whole, "world", what="the end")
        with stopping(0) as count:
            assert work(folder / f"all-{what}-{name}", name=name) == whole
        assert count[0] > 6
        for after in (2, 5) if size == 2 else (2,):
            where = folder / f"{what}-{name}-{after}"
            for resume in (False, True):
                try:
                    with stopping(after if not resume else 2):
                        said = work(where, name=name, resume=resume)
                except Stopped:
                    continue
            if after + 2 < count[0]:
                said = work(where, name=name, resume=True)
            assert said == whole, (what, name, after)
            assert len(list(where.glob("*.safetensors"))) == 2


def check_a_checkpoint_is_for_as_many_processes_and_their_data(folder: Path) -> None:
    """That of two is refused by four; also where one rank has other data."""
    rank, size = ranks()
    where = folder.parent / "checkpoint-of-two"
    if size == 2:
        train(where)
        other = loader(rank, size, seed=7 * rank)  # rank 1 has changed its data
        said = raised(ConfigError, lambda: train(where, resume=True, data=other))
        assert "data.1.batches was '2 batches, the first" in said
        assert "data.0" not in said
        said = raised(ConfigError, lambda: train(where))
        assert "holds the checkpoints of a run that was not finished" in said
        assert rank == 0 or "failed on rank 0 of 2" in said
        config = rank == 0
        said = raised(RankError, lambda: train(where, resume=config))
        assert "the settings of finetune" in said
    else:
        said = raised(ConfigError, lambda: train(where, resume=True))
        assert "processes was 2 and is 4. Resume with 2" in said
        assert "save_sharded" in said
    model = sharded(noisy())
    said = raised(ConfigError, lambda: finetune(
        model, loader(rank, size), mse_loss, Finetune(epochs=1), group="world",
        checkpoint=Checkpoints(folder / "sharded")))  # fmt: skip
    assert "use save_sharded" in said
    apart = DistributedDataParallel(noisy(), broadcast_buffers=False)
    said = raised(ConfigError, lambda: finetune(
        apart, loader(rank, size), mse_loss, Finetune(epochs=1), group="world",
        checkpoint=Checkpoints(folder / "apart")))  # fmt: skip
    assert "broadcast_buffers=False" in said


def check_a_full_disk_ends_all_ranks(folder: Path) -> None:
    """Only rank 0 writes; the others are told."""
    rank, _ = ranks()
    where = folder / "full"
    usual = Checkpoints.save

    def save(self: Checkpoints, *given: Any) -> Path:
        assert rank == 0
        raise FileFormatError("the disk is full")

    Checkpoints.save = save  # type: ignore[method-assign,assignment]
    try:
        for work in WORK.values():
            said = raised(FileFormatError, lambda w=work: w(where))  # type: ignore[misc]
            assert "the disk is full" in said
    finally:
        Checkpoints.save = usual  # type: ignore[method-assign]


def check_ctrl_c_on_one_rank_stops_all_after_the_same_step(folder: Path) -> None:
    rank, _ = ranks()
    where, calls = folder / "ctrl-c", [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return mse_loss(outputs, targets)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(where, loss=loss)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("not stopped")
    finally:
        signal.signal(signal.SIGINT, usual)
    assert calls[0] == 3
    assert train(where, loss=loss, resume=True) == train(None)


# -- killed in earnest: see the tests --------------------------------------------------------------


def run_and_be_killed(folder: Path, *, what: str) -> None:
    """All ranks are killed in a training; the second time they go on to the end."""
    rank, _ = ranks()
    where, calls = folder / "checkpoints", [0]
    resume, last = where.exists(), {"train": 9, "cut": 16}[what]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if not resume and calls[0] == last + rank:  # one of them a little later
            os.kill(os.getpid(), signal.SIGKILL)
        return mse_loss(outputs, targets)

    said = WORK[what](where, resume=resume, loss=loss)
    assert calls[0] > 2
    assert said == WORK[what](None)
