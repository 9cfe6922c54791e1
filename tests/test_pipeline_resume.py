"""A pruning run that is interrupted anywhere and resumed ends bit for bit as one that was not."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.checkpoints import Checkpoints, tensor_mark
from secateurs.errors import ConfigError, FileFormatError
from secateurs.penalties import Penalty
from secateurs.pipeline import Stage, prune, prune_stages
from secateurs.pipeline.packing import pack, unpack
from secateurs.posttraining import FisherSearch, LayerwiseCut, layerwise
from secateurs.regrowth import Regrow
from secateurs.schedules import Schedule
from secateurs.tickets import AtInit, TicketSearch
from secateurs.types import Budget, Counts, Plan, Threshold
from tests.checkpoints.scenarios import SGD, X, accuracy, loader, net, report_marks

HALF = Budget(units=0.5)
ONE = replace(SGD, epochs=1)


class Stopped(BaseException):
    """In place of a crash."""


def run(
    stages: list[Stage], stop: int = 0, checkpoint: Checkpoints | None = None, **options: Any
) -> tuple[Any, int]:
    """Marks of the result (None when it was stopped), and how often the loss was called."""
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stopped
        return F.cross_entropy(outputs, targets)

    try:
        result = prune_stages(
            net(), loader(), loss, stages, evaluate=accuracy, checkpoint=checkpoint,
            **{"seed": 3, "example_inputs": X, **options},
        )  # fmt: skip
    except Stopped:
        return None, calls
    plan = {name: units.tolist() for name, units in result.plan.removed.items()}
    history = [repr(replace(done, seconds=0)) for done in result.history]
    weights = tensor_mark(result.model.state_dict()), tensor_mark(result.masked.state_dict())
    scores = tensor_mark(result.scores.values)
    return [*weights, scores, plan, history, report_marks(result.report)], calls


CASES: dict[str, list[Stage]] = {
    "rounds": [Stage(HALF, schedule=Schedule("linear", 3, rescore=False), finetune=SGD)],
    "no training": [Stage(HALF, schedule=Schedule("linear", 3))],
    "guard": [Stage(Budget(units=0.1), schedule=Schedule("linear", 4), finetune=ONE, max_drop=0.2)],
    "threshold": [
        Stage(
            threshold=Threshold("permutation", fdr=0.4), schedule=Schedule("linear", 2),
            finetune=ONE,
        )
    ],
    "reinit": [Stage(HALF, schedule=Schedule("linear", 2), finetune=ONE, control="reinit")],
    "to a size": [
        Stage(Budget(units=0.3, metric_drop=0.2), schedule=Schedule("cubic", 3), finetune=ONE)
    ],
    "auto": [Stage("auto", finetune=ONE, schedule=Schedule("exponential", 3))],
    "at init": [
        Stage(
            HALF, granularity="weight", at_init=AtInit("snip", batches_per_iteration=2),
            finetune=SGD, regrow=Regrow("set", every=3),
        )
    ],
    "at init, drawn anew": [
        Stage(HALF, granularity="weight", at_init=AtInit(reinitialise=True), finetune=SGD)
    ],
    "fisher masks": [
        Stage(HALF, fisher_masks=FisherSearch(importance="any_output"), finetune=SGD),
        Stage(Budget(units=0.4), schedule=Schedule("linear", 1)),
    ],
    "layerwise": [
        Stage(
            HALF, granularity="weight", layerwise=LayerwiseCut(), schedule=Schedule("linear", 2),
            finetune=SGD,
        ),
        Stage(Budget(units=0.4), schedule=Schedule("linear", 1)),
    ],
    "layerwise to a metric": [
        Stage(
            Budget(metric_drop=0.2), granularity="weight", layerwise=LayerwiseCut("wanda"),
            allocation="global", schedule=Schedule("exponential", 3), finetune=ONE,
        )
    ],
    "ticket": [
        Stage(
            HALF, granularity="weight", criterion="magnitude", finetune=SGD,
            ticket=TicketSearch(rounds=2, rewind=0.2),
        ),
        Stage(HALF, schedule=Schedule("linear", 1)),
    ],
    "prepared": [
        Stage(
            HALF, schedule=Schedule("linear", 2), finetune=ONE, prepare=SGD,
            penalty=Penalty("growing"),
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(case: str, tmp_path: Path) -> None:
    stages = CASES[case]
    expected, calls = run(stages)
    draw, seen = random.Random(case), 0
    for stop in draw.sample(range(calls // 3, calls), 5):
        folder = tmp_path / str(stop)
        assert run(stages, stop, Checkpoints(folder, every=1))[0] is None
        if not Checkpoints(folder).files:
            continue
        seen += 1
        found, _ = run(stages, 0, Checkpoints(folder, every=3), resume=True)
        assert found == expected, stop
    assert seen


def test_a_resumed_run_does_less(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, every=1)
    stages = CASES["rounds"]
    _, calls = run(stages)
    assert run(stages, calls - 3, kept)[0] is None
    assert run(stages, 0, kept, resume=True)[1] < calls / 2
    assert run(stages, 0, kept, resume=True)[1] < calls / 3  # what was done is only measured again


def test_masks_are_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they are found there is a checkpoint, however seldom these are asked for."""
    stages = [Stage(HALF, fisher_masks=FisherSearch(), finetune=SGD)]
    expected, calls = run(stages)
    kept = Checkpoints(tmp_path, every=1000)
    assert run(stages, calls - 14, kept)[0] is None  # within the training; the report takes 10
    assert len(kept.files) == 1
    monkeypatch.setattr("secateurs.pipeline.fisher.search_masks", None)
    assert run(stages, 0, kept, resume=True)[0] == expected
    with pytest.raises(TypeError):
        run(stages)


@pytest.mark.parametrize("drop", [None, 1.0])  # of the metric: steps that may be undone
def test_layers_are_not_pruned_again(
    drop: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        Stage(
            replace(HALF, metric_drop=drop), granularity="weight", layerwise=LayerwiseCut(),
            finetune=SGD, schedule=Schedule("one_shot", 1),
        )
    ]  # fmt: skip
    expected, calls = run(stages)
    kept = Checkpoints(tmp_path, every=1000)
    assert run(stages, calls - 14, kept)[0] is None
    assert len(kept.files) == 1
    monkeypatch.setattr("secateurs.pipeline.layerwise.prune_to_counts", None)
    assert run(stages, 0, kept, resume=True)[0] == expected
    with pytest.raises(TypeError):
        run(stages)


@pytest.mark.parametrize("stop", [4, 5, 6])
def test_a_cut_that_was_interrupted_between_its_layers_is_made_anew(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, true, calls = CASES["layerwise"], layerwise._Task.prune, 0
    expected, _ = run(stages)

    def prune_layer(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop:  # three layers, so it is in the second step
            raise Stopped
        return true(self, *arguments)

    kept = Checkpoints(tmp_path, every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(layerwise._Task, "prune", prune_layer)
        assert run(stages, 0, kept)[0] is None
        calls = stop
        found, _ = run(stages, 0, kept, resume=True)
    assert found == expected
    assert calls == stop + 3


def test_prune_takes_checkpoints_too(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    given: dict[str, Any] = {"example_inputs": X, "budget": HALF, "checkpoint": kept}
    first = prune(net(), loader(), F.cross_entropy, **given)
    assert kept.files
    again = prune(net(), loader(), F.cross_entropy, resume=True, **given)
    assert tensor_mark(first.model.state_dict()) == tensor_mark(again.model.state_dict())


@pytest.mark.parametrize(
    ("stage", "options", "text"),
    [
        (Stage(Budget(units=0.4), schedule=Schedule("linear", 3)), {},
         r"stages.0.budget.units was 0.5 and is 0.4"),
        (CASES["no training"][0], {"seed": 4}, r"seed was 3 and is 4"),
        (CASES["no training"][0], {"exclude": "0"}, r"exclude was None and is '0'"),
        (CASES["no training"][0], {"calibration": [(X, (X[:, 0] > 0).long())]},
         r"calibration.batches was not given and is '1 batch"),
    ],
)  # fmt: skip
def test_another_run_is_refused(
    tmp_path: Path, stage: Stage, options: dict[str, Any], text: str
) -> None:
    kept = Checkpoints(tmp_path)
    run(CASES["no training"], 0, kept)
    with pytest.raises(ConfigError, match=text):
        run([stage], 0, kept, resume=True, **options)


def test_another_model_is_refused(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    given: dict[str, Any] = {"example_inputs": X, "budget": HALF, "checkpoint": kept}
    prune(net(), loader(), F.cross_entropy, **given)
    model = net()
    nn.init.zeros_(model.get_parameter("6.bias"))
    with pytest.raises(ConfigError, match="weights was"):
        prune(model, loader(), F.cross_entropy, resume=True, **given)
    with pytest.raises(ConfigError, match="resume=True"):
        prune(net(), loader(), F.cross_entropy, **given)


# --- the nouns of a run as plain values ----------------------------------------------------------


def test_nouns_come_back() -> None:
    detail = object()
    plan = Plan({"w": {0: torch.arange(2)}}, {"w": torch.ones(3, 2) > 0}, {}, {"w": (3, 2)},
                detail=detail)  # fmt: skip
    counts = Counts({"a": 1}, Budget(macs=0.5), notes=("n",))
    plain = pack({"plan": plan, "end": (counts, None)}, {"detail": detail})
    back = unpack(plain, {"detail": detail})
    assert back["plan"].detail is detail
    assert back["plan"].kept["w"][0] is plan.kept["w"][0]
    assert (back["plan"].shapes, back["end"][0].asked) == ({"w": (3, 2)}, Budget(macs=0.5))
    assert back["end"][0].notes == ("n",)


def test_an_unknown_noun_is_an_error() -> None:
    with pytest.raises(FileFormatError, match="'Verb'"):
        unpack({"~kind": "Verb"}, {})
    with pytest.raises(FileFormatError, match="'Counts'"):
        unpack({"~kind": "Counts", "tempo": 1}, {})
