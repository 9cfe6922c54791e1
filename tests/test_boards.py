"""What a log for TensorBoard holds, read back by TensorBoard's own reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("tensorboard", reason="pip install 'secateurs[tensorboard]'")

from secateurs import allocate, score, select, trace
from secateurs.boards import BoardLog
from secateurs.errors import ConfigError, MissingDependencyError
from secateurs.finetuning import Finetune, FinetuneResult, finetune
from secateurs.types import Budget

BATCHES = [(torch.ones(2, 3), torch.tensor([0, 1])), (-torch.ones(2, 3), torch.tensor([1, 1]))]
MASKS = {"weight": torch.tensor([[True, True, False], [True, False, False]])}


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def train(log: BoardLog, model: nn.Module, epochs: int = 2) -> FinetuneResult:
    return finetune(
        model, BATCHES, F.cross_entropy, Finetune(epochs=epochs, lr=0.1), masks=MASKS,
        evaluate=lambda m: 0.75, parts=[log], progress=log.epoch,
    )  # fmt: skip


def test_curves_of_two_trainings_in_a_row(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with BoardLog(tmp_path / "board") as log:
        first = train(log, model)
        second = train(log, model, epochs=1)
    board = read(tmp_path / "board")

    def curve(name: str) -> list[tuple[int, float]]:
        return [(e.step, e.value) for e in board.Scalars(name)]

    losses = [row.train_loss for row in (*first.history, *second.history)]
    assert [step for step, _ in curve("train/loss")] == [2, 4, 6]
    assert [value for _, value in curve("train/loss")] == pytest.approx(losses)
    assert curve("validation/metric") == [(2, 0.75), (4, 0.75), (6, 0.75)]
    assert [step for step, _ in curve("train/gradient norm")] == [0, 1, 2, 3, 4, 5]
    assert all(lr == pytest.approx(0.1) for _, lr in curve("train/learning rate"))
    assert [value for _, value in curve("pruning/zeros")] == pytest.approx([3 / 8, 3 / 8])


def test_histograms_hold_the_kept_entries(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with BoardLog(tmp_path, every=3) as log:
        train(log, model, epochs=3)
    board = read(tmp_path)
    weights = board.Histograms("weights/weight")
    assert [h.step for h in weights] == [0, 3]
    assert all(h.histogram_value.num == 3 for h in weights)
    assert [h.histogram_value.num for h in board.Histograms("gradients/bias")] == [2, 2]


def test_units_left_after_a_cut(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = trace(net, torch.ones(1, 3))
    scores = score(net, graph=graph, criterion="l2_norm")
    plan = select(scores, allocate(scores, Budget(units=2)))
    with BoardLog(tmp_path) as log:
        log.cut(graph, plan)
    board = read(tmp_path)
    assert [e.value for e in board.Scalars("kept units/0:neuron")] == [2]
    assert [e.value for e in board.Scalars("kept share/0:neuron")] == [0.25]


def test_an_interrupted_log_goes_on_where_the_training_does(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with BoardLog(tmp_path) as log:
        train(log, model, epochs=1)
        kept = log.state()
        train(log, model, epochs=1)  # lost in the crash
    other = BoardLog(tmp_path)
    other.load(kept)
    with other:
        train(other, model, epochs=1)
    steps = [e.step for e in read(tmp_path).Scalars("train/loss")]
    assert steps == [2, 4]


def test_a_log_changes_nothing(tmp_path: Path) -> None:
    def weights(log: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        if log:
            with BoardLog(tmp_path, every=1) as board:
                train(board, model)
        else:
            finetune(model, BATCHES, F.cross_entropy, Finetune(epochs=2, lr=0.1), masks=MASKS)
        return model.weight.detach()

    assert torch.equal(weights(True), weights(False))


def test_bad_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="every must be a whole number"):
        BoardLog(tmp_path, every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        BoardLog(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"secateurs\[tensorboard\]"):
        BoardLog(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_masks_fit_under_every_name_of_a_parameter(tmp_path: Path, wrapped: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    masks = {"2.weight": torch.eye(3, dtype=torch.bool)}
    whole = nn.DataParallel(model) if wrapped else model  # names as under DDP
    with BoardLog(tmp_path) as log:
        finetune(whole, BATCHES, F.cross_entropy, Finetune(epochs=1), masks=masks, parts=[log])
    name = "module.0.weight" if wrapped else "0.weight"
    for what in ("weights", "gradients"):
        assert read(tmp_path).Histograms(f"{what}/{name}")[0].histogram_value.num == 3
