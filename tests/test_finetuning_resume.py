"""A training that is interrupted anywhere and resumed ends bit for bit as one that was not."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from secateurs.checkpoints import Checkpoints, random_state, tensor_mark
from secateurs.errors import ConfigError, FileFormatError
from secateurs.finetuning import Finetune, Part, Training, finetune
from secateurs.finetuning.resuming import Place, read_on
from secateurs.finetuning.state import load_optimizer_
from secateurs.types import Batches

X = torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
CONFIG = Finetune(epochs=3, lr=0.05)
MASK = torch.tensor([[True, False, True]]).repeat(6, 1)


class Stopped(BaseException):
    """In place of a crash."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))


def listed() -> Batches:
    return list(zip(torch.split(X, 5), torch.split(Y, 5), strict=True))


def shuffled() -> Batches:
    return DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)


def own_generator() -> Batches:
    g = torch.Generator().manual_seed(4)
    return DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=g)


def accuracy(model: nn.Module) -> float:
    return float((model(X).argmax(1) == Y).float().mean())


class Pull(Part):
    """A part with a memory: pulls the gradient by a running mean of the bias."""

    def start(self, training: Training) -> None:
        self.bias = training.model.get_parameter("3.bias")
        self.mean = torch.zeros(2)

    def gradients(self, steps: int) -> None:
        self.mean = 0.9 * self.mean + self.bias.detach()
        assert self.bias.grad is not None
        self.bias.grad += 0.1 * self.mean

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def masks_later(steps: int) -> Mapping[str, Tensor] | None:
    return {"0.weight": MASK} if steps == 4 else None


def run(
    stop: int | None = None,
    checkpoint: Checkpoints | None = None,
    *,
    batches: Any = listed,
    config: Finetune = CONFIG,
    optimizer: Any = None,
    resume: bool = False,
    **options: Any,
) -> tuple[str, Any] | None:
    """Weights and history of a training; None when it was stopped at a call of the loss."""
    model, calls = net(), 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stopped
        return F.cross_entropy(outputs, targets)

    if optimizer is not None:
        options["optimizer"] = optimizer(model)
    options.setdefault("seed", 7)
    try:
        done = finetune(
            model, batches(), loss, config, evaluate=accuracy, checkpoint=checkpoint,
            resume=resume, **options,
        )  # fmt: skip
    except Stopped:
        return None
    state = options["optimizer"].state_dict() if optimizer else None
    return tensor_mark(model.state_dict()), repr((replace(done, seconds=0), state))


def foreach(model: nn.Module) -> Optimizer:
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[3].parameters()}]  # type: ignore[index]
    return Adam(groups, lr=0.1, amsgrad=True, foreach=True)


CASES: dict[str, dict[str, Any]] = {
    "list": {},
    "shuffled": {"batches": shuffled},
    "generator": {"batches": own_generator},
    "adamw": {"config": replace(CONFIG, optimizer="adamw", weight_decay=0.1, clip_norm=0.5)},
    "momentum": {
        "config": replace(CONFIG, optimizer="sgd", momentum=0.9, lr_schedule="cosine", cycles=2),
        "batches": shuffled,
    },
    "best": {"config": replace(CONFIG, epochs=5, patience=2, restore_best=True, lr=0.5)},
    "accumulate": {"config": replace(CONFIG, accumulate=2), "batches": shuffled},
    "full-batch": {"config": replace(CONFIG, full_batch=True, epochs=6)},
    "steps": {"config": Finetune(steps=8, lr=0.05), "batches": shuffled},
    "masks": {"masks": {"0.weight": MASK}},
    "recut": {"recut": masks_later},
    "part": {"parts": "pull"},
    "groups": {"optimizer": foreach, "batches": shuffled},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(case: str, tmp_path: Path) -> None:
    options = dict(CASES[case])

    def made() -> dict[str, Any]:
        return {**options, "parts": [Pull()]} if "parts" in options else options

    expected = run(**made())
    seen = 0
    for stop in range(2, 17, 3):
        folder = tmp_path / str(stop)
        if run(stop, Checkpoints(folder, every=1), **made()) is not None:
            break
        if not Checkpoints(folder).files:
            continue
        seen += 1
        assert run(None, Checkpoints(folder, every=3), resume=True, **made()) == expected, stop
    assert seen >= (1 if case == "full-batch" else 2)


def test_checkpoints_change_nothing(tmp_path: Path) -> None:
    for batches in (shuffled, own_generator):
        kept = Checkpoints(tmp_path / batches.__name__, every=1)
        assert run(None, kept, batches=batches) == run(batches=batches)


def test_without_a_seed_the_random_state_of_the_caller_is_part_of_it(tmp_path: Path) -> None:
    ends = []
    for stop in (None, 8):
        kept = Checkpoints(tmp_path / str(stop), every=1)
        found = run(stop, kept, batches=shuffled, seed=None)
        if stop is not None:
            assert found is None
            torch.rand(3)  # whatever another process has drawn
            found = run(None, kept, batches=shuffled, seed=None, resume=True)
        ends.append((found, torch.rand(1).item()))
    assert ends[0] == ends[1]


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, every=1000)
    expected = run(None, kept)
    assert len(kept.files) == 1
    assert run(1, kept, resume=True) == expected  # the loss is never called


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"config": replace(CONFIG, lr=0.06)}, r"finetune.lr was 0.05 and is 0.06"),
        ({"seed": 8}, r"seed was 7 and is 8"),
        ({"masks": {"0.weight": MASK}}, r"masks was"),
        ({"batches": lambda: [(X, Y)]}, r"data.batches was '5 batches"),
        ({"batches": own_generator}, r"data.generators was 0 and is 1"),
        ({"parts": [Pull()]}, r"functions.2 was not given and is 'Pull'"),
    ],
)
def test_another_training_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    kept = Checkpoints(tmp_path, every=1)
    assert run(6, kept) is None
    with pytest.raises(ConfigError, match=text):
        run(None, kept, resume=True, **change)


def test_checkpoints_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, every=1)
    assert run(6, kept) is None
    with pytest.raises(ConfigError, match="resume=True"):
        run(None, kept)


def test_a_part_that_cannot_be_saved_is_found_before_the_training(tmp_path: Path) -> None:
    class Odd(Part):
        def state(self) -> dict[str, Any]:
            return {"hook": object()}

    with pytest.raises(ConfigError, match=r"parts.0.hook: a object cannot be saved"):
        run(1, Checkpoints(tmp_path), parts=[Odd()])


def test_a_full_disk_ends_the_training_and_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(batches=shuffled)
    kept = Checkpoints(tmp_path, every=2)
    calls = 0

    def full(file: Any, piece: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls > 150:
            raise OSError(28, "No space left on device")
        file.write(piece)

    with monkeypatch.context() as small:
        small.setattr("secateurs.checkpoints.files.write", full)
        with pytest.raises(FileFormatError, match="No space left on device"):
            run(None, kept, batches=shuffled)
    assert kept.latest() is not None
    assert run(None, kept, batches=shuffled, resume=True) == expected


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    expected = run(batches=shuffled)
    usual = signal.getsignal(signal.SIGINT)
    kept = Checkpoints(tmp_path, every=1000)

    class Presses(Part):
        def gradients(self, steps: int) -> None:
            if steps == 6:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(None, kept, batches=shuffled, parts=[Presses()])
    assert signal.getsignal(signal.SIGINT) is usual
    found = kept.latest()
    assert found is not None
    assert found.step == 7
    marks = {**found.marks, "functions": found.marks["functions"][:-1]}
    state = {**found.state, "parts": []}
    kept.save(7, state, marks)  # the one who presses is no part of the training
    assert run(None, kept, batches=shuffled, resume=True) == expected


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    class Presses(Part):
        def gradients(self, steps: int) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    kept = Checkpoints(tmp_path, every=1000)
    with pytest.raises(KeyboardInterrupt):
        run(None, kept, parts=[Presses()])
    assert not kept.files


def test_fewer_batches_than_before_are_noticed(tmp_path: Path) -> None:
    """The marks see only the first batch."""

    class Shrinks:
        n = 5

        def __iter__(self) -> Any:
            yield from list(zip(torch.split(X, 5), torch.split(Y, 5), strict=True))[: self.n]

    kept, data = Checkpoints(tmp_path, every=1), Shrinks()
    assert run(5, kept, batches=lambda: data) is None
    data.n = 2
    with pytest.raises(ConfigError, match="4 batches of this epoch were done"):
        run(None, kept, batches=lambda: data, resume=True)


def test_state_in_another_precision_comes_back_as_it_was() -> None:
    """torch would round the state of a bfloat16 parameter to bfloat16."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    held = torch.tensor([0.1, 0.2, 0.3])
    state = optimizer.state_dict()
    state["state"] = {0: {"momentum_buffer": held}}
    load_optimizer_(optimizer, state)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], held)


@pytest.mark.parametrize(("n", "said"), [(1, "there are only 1"), (2, ""), (3, "there are more")])
def test_a_process_that_only_kept_step_had_read_all_its_batches(n: int, said: str) -> None:
    """Three steps of an epoch were done, for the last one it had no batch."""
    data = [(torch.ones(1, 3), torch.ones(1)) for _ in range(n)]
    place = Place(batches=3, spare=1, random=random_state(data))
    seen: list[Any] = []
    reader = read_on(data, torch.device("cpu"), place, keeps=True, passed=seen.append)
    if said:
        with pytest.raises(ConfigError, match=f"2 batches of this epoch were done, and {said}"):
            list(reader)
    else:
        assert list(reader) == []
        assert len(seen) == 2
